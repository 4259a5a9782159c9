"""The table of methods. Each is one choice of site, signal, gate and forecaster, and the keys that set them.

To add a method, write a file with its `Method`, and add that to `METHODS`.
"""

from omni_runtime.cache.methods.auto import AUTO
from omni_runtime.cache.methods.cache_dit import CACHE_DIT
from omni_runtime.cache.methods.easy_cache import EASY_CACHE
from omni_runtime.cache.methods.first_block_cache import FIRST_BLOCK_CACHE
from omni_runtime.cache.methods.mag_cache import MAG_CACHE
from omni_runtime.cache.methods.method import Method
from omni_runtime.cache.methods.sea_cache import SEA_CACHE
from omni_runtime.cache.methods.tea_cache import TEA_CACHE
from omni_runtime.cache.methods.velocity_cache import VELOCITY_CACHE

__all__ = [
    "AUTO",
    "CACHE_DIT",
    "EASY_CACHE",
    "FIRST_BLOCK_CACHE",
    "MAG_CACHE",
    "METHODS",
    "SEA_CACHE",
    "TEA_CACHE",
    "VELOCITY_CACHE",
    "Method",
]

#: name → method, the one to try first at the top
METHODS: dict[str, Method] = {
    method.name: method
    for method in (AUTO, VELOCITY_CACHE, TEA_CACHE, CACHE_DIT, FIRST_BLOCK_CACHE, MAG_CACHE, SEA_CACHE, EASY_CACHE)
}
