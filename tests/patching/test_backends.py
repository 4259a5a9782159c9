"""Backends of others: found by their entry points, each standing alone, and none in the way of our own."""

import sys

import pytest

import omni_kernels
from omni_kernels.patching import backends
from omni_runtime.cache.methods import METHODS

SOUND = """
class Installed:
    report = 'halved'
    on_step = None
    closed = False
    def close(self):
        self.closed = True
class Half:
    name, summary, keys = 'half_cache', 'halves', ()
    def check(self, config, transformer=None):
        return {'factor': 2, **(config or {})}
    def install(self, pipe, config, patch):
        patch.set_method(pipe.scheduler, 'step', lambda *args: config['factor'])
        self.installed = Installed()
        return self.installed
HALF = Half()
"""


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Puts a distribution on sys.path that registers a backend, with the code of its module."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def registered(distribution, entry, code=""):
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[omni_kernels.cache_backends]\n{entry}\n")
        modules.append(f"{distribution}_backend")
        (tmp_path / f"{distribution}_backend.py").write_text(code)

    yield registered
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def half_cache(register):
    register("half_cache", "half_cache = half_cache_backend:HALF", SOUND)


def test_a_backend_is_found_by_its_entry_point(half_cache, qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, "half_cache", {"factor": 4})
    assert handle.report == "halved"
    assert handle.cache_config == {"factor": 4}
    assert qwen_pipe.scheduler.step() == 4
    installed = backends.get("half_cache").installed
    handle.undo()
    assert installed.closed
    assert "step" not in vars(qwen_pipe.scheduler)
    assert list(backends.available()) == [*METHODS, "half_cache"]
    assert backends.refused() == {}


def test_a_backend_of_others_is_suggested(half_cache, qwen_pipe):
    with pytest.raises(ValueError, match="did you mean 'half_cache'"):
        omni_kernels.patch(qwen_pipe, "hafl_cache")


BROKEN = {
    "raises ImportError": ("raise ImportError('no such library')", "cannot be loaded: ImportError: no such library"),
    "raises RuntimeError": ("raise RuntimeError('boom')", "cannot be loaded: RuntimeError: boom"),
    "ends the process": ("import sys; sys.exit(3)", "cannot be loaded: SystemExit: 3"),
    "no syntax": ("def", "cannot be loaded: SyntaxError"),
    "no such attribute": ("x = 1", "cannot be loaded: AttributeError: .*BAD"),
    "an object of nothing": ("BAD = object()", "is not usable: it lacks name, summary, keys, check, install"),
    "keys in a dict": (
        "class X:\n name = summary = 'bad'\n keys = {}\n check = install = print\nBAD = X()",
        "is not usable: it lacks a tuple of keys",
    ),
    "keys of nothing": (
        "class X:\n name = summary = 'bad'\n keys = (1,)\n check = install = print\nBAD = X()",
        "is not usable: it lacks name of a key, default of a key",
    ),
    "an attribute that raises": (
        "class X:\n @property\n def name(self): raise RuntimeError('lazy')\nBAD = X()",
        "cannot be loaded: RuntimeError: lazy",
    ),
}


@pytest.mark.parametrize(("code", "why"), BROKEN.values(), ids=BROKEN)
def test_a_backend_that_cannot_be_loaded_is_told_of_and_breaks_no_other(register, half_cache, qwen_pipe, code, why):
    register("bad", "bad_cache = bad_backend:BAD", code)
    assert list(backends.available()) == [*METHODS, "half_cache"]
    told = rf"^cache backend 'bad_cache' of bad 1\.0 \(bad_backend:BAD\) {why}"
    with pytest.raises(ValueError, match=told):
        omni_kernels.patch(qwen_pipe, "bad_cache")
    with pytest.raises(ValueError, match=told):
        raise ValueError(backends.refused()["bad_cache"])
    for name in ("first_block_cache", "half_cache"):
        omni_kernels.patch(qwen_pipe, name).undo()
    with pytest.raises(ValueError, match="unknown cache backend 'tea_cach': did you mean 'tea_cache'"):
        backends.get("tea_cach")


def test_a_module_that_is_not_there_is_named(register):
    register("bad", "bad_cache = no_such_module:BAD")
    with pytest.raises(ValueError, match=r"cannot be loaded: ModuleNotFoundError: .*no_such_module") as raised:
        backends.get("bad_cache")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_a_built_in_name_cannot_be_taken(register, half_cache):
    register("bad", "tea_cache = half_cache_backend:HALF")
    assert backends.get("tea_cache") is METHODS["tea_cache"]
    assert backends.available()["tea_cache"] is METHODS["tea_cache"]
    assert backends.refused() == {
        "tea_cache": "cache backend 'tea_cache' of bad 1.0 (half_cache_backend:HALF) is not used: the built-in method "
        "has that name"
    }
    with pytest.raises(ValueError, match="did you mean 'tea_cache'") as raised:
        backends.get("tea_cach")
    assert str(raised.value).partition("Known")[2].count("tea_cache") == 1


def test_of_two_backends_of_one_name_neither_is_taken_and_the_rest_stay(register, half_cache, qwen_pipe):
    register("other", "half_cache = other_backend:HALF", SOUND)
    register("third", "third_cache = third_backend:HALF", SOUND)
    told = (
        r"two cache backends are called 'half_cache': "
        r"(half_cache 1\.0 \(half_cache_backend:HALF\) and other 1\.0 \(other_backend:HALF\)"
        r"|other 1\.0 \(other_backend:HALF\) and half_cache 1\.0 \(half_cache_backend:HALF\))"
    )
    with pytest.raises(ValueError, match=told):
        omni_kernels.patch(qwen_pipe, "half_cache")
    assert list(backends.available()) == [*METHODS, "third_cache"]
    assert list(backends.refused()) == ["half_cache"]


def test_what_a_former_version_registered_is_left_alone(register):
    register("omni_kernels", "tea_cache = omni_runtime.cache.backends:TEA_CACHE\nold = omni_runtime.cache.backends:OLD")
    assert list(backends.available()) == list(METHODS)
    assert backends.refused() == {}


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), "a" * 10**6, list(range(10**5)), {"a": "b" * 10**6}],
    ids=["large", "far below 0", "text", "list", "dict"],
)
def test_a_value_is_shown_in_a_few_lines(value):
    assert len(backends.shown(value)) < 300


def test_a_small_value_is_shown_as_it_is():
    for value in (1, 10**30, -0.5, "text", [1, 2.0, None], {"a": (1,)}, True):
        assert backends.shown(value) == repr(value)
    deep = []
    for _ in range(3000):
        deep = [deep]
    assert backends.shown(deep).startswith("[[[")


def test_a_backend_whose_check_gives_nothing_is_named(register, qwen_pipe):
    register("none", "none_cache = none_backend:HALF", SOUND.replace("{'factor': 2, **(config or {})}", "None"))
    with pytest.raises(TypeError, match=r"its check returned None, not a configuration"):
        omni_kernels.patch(qwen_pipe, "none_cache")
    assert omni_kernels.patching.handle_of(qwen_pipe) is None


def test_a_backend_that_cannot_be_installed_is_named_and_leaves_nothing(register, qwen_pipe):
    code = "class X:\n name = summary = 'bad'\n keys = ()\n def check(self, *given): return {}\n"
    code += " def install(self, pipe, config, patch):\n  patch.set_attribute(pipe, 'mark', 1)\n"
    code += "  return {}['lost']\nBAD = X()"
    register("bad", "bad_cache = bad_backend:BAD", code)
    before = dict(vars(qwen_pipe))
    with pytest.raises(
        RuntimeError, match=r"cache backend 'bad' could not be installed: it raised KeyError: 'lost'"
    ) as raised:
        omni_kernels.patch(qwen_pipe, "bad_cache")
    assert isinstance(raised.value.__cause__, KeyError)
    assert vars(qwen_pipe) == before
