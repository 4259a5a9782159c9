"""First-block cache (ParaAttention, and diffusers' `FirstBlockCacheConfig`): skip all blocks but the first.

What block 0 adds to the hidden states is compared with what it added in the last computed step. While the distance
Σ|x − y| / Σ|y| is below `threshold`, all blocks after it are skipped, and what they added in the last computed step is
added again. This is DBCache (`cache_dit`) with Fn = 1 and no limits.

site: blocks [1, N) · signal: residual of block 0 · gate: threshold · forecaster: reuse, or another
"""

from __future__ import annotations

from omni_runtime.cache import config as keys
from omni_runtime.cache.gates import Limits, ThresholdGate
from omni_runtime.cache.methods.method import Config, Method
from omni_runtime.cache.methods.shared_keys import (
    DECISION_KEYS,
    FORECASTER_KEYS,
    chosen_forecaster,
    drift_tolerance,
)
from omni_runtime.cache.models import ModelRow
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.signals import FirstBlocksResidual


def _parts(config: Config, row: ModelRow, blocks: int) -> Parts:
    return Parts(
        first=1,
        last=blocks,
        signal=FirstBlocksResidual(),
        gate=lambda request: ThresholdGate(Limits(), config["threshold"]),
        forecaster=chosen_forecaster(config),
        drift_tolerance=drift_tolerance(config),
    )


def _relations(config: Config, blocks: int | None, steps: int | None) -> None:
    if blocks is not None and blocks < 2:
        raise ValueError(f"first_block_cache needs at least 2 blocks; the transformer has {blocks}")


FIRST_BLOCK_CACHE = Method(
    name="first_block_cache",
    summary="First-block cache: skip all blocks but the first while its residual has changed little",
    keys=(
        keys.number("threshold", 0.05, "distance below which a step is skipped; ≤ 0 never skips, ≥ 1 always"),
        *DECISION_KEYS,
        *FORECASTER_KEYS,
    ),
    parts=_parts,
    relations=_relations,
)
