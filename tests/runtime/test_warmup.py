"""What a warm-up runs: every variant of every op that later requests of its kind run, and nothing that stays."""

import itertools
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pairs import in_turn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import omni_kernels
from omni_kernels.compilations import Compilations
from omni_kernels.patching import Warmup
from omni_runtime import Omni

BACKENDS: dict[str | None, dict[str, Any]] = {
    None: {},
    "tea_cache": {"rel_l1_thresh": 0.3, "coefficients": [0, 0, 0, 1, 0], "forecaster": "newton"},
    "cache_dit": {"max_warmup_steps": 4, "residual_diff_threshold": 0.3, "enable_taylorseer": True},
    "first_block_cache": {"threshold": 0.3},
    "mag_cache": {"threshold": 0.3, "mag_ratios": [1.0] * 20},
    "sea_cache": {"threshold": 0.3},
    "easy_cache": {"thresh": 0.3, "ret_steps": 4},
    "velocity_cache": {"schedule": [*range(0, 20, 3), 19], "forecaster_order": 2},
}


class Variants(TorchDispatchMode):
    """Our ops with all that a kernel's variant hangs on: tensors' dtypes, shapes and strides, and all but numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "omni_kernels":
            name, given = func.__name__, args
            if "_into" in name:  # the same kernel, into memory that is there
                name, given = name.replace("_into", ""), args[:-1]
            self.seen.add(f"{name} {tree_map(_kind, (given, kwargs or {}))}")
        return func(*args, **kwargs or {})


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()}"
    return "float" if isinstance(value, float) else repr(value)


def latents(pipe: Any, steps: int = 20, **arguments: Any) -> Any:
    return tiny.generate(pipe, output_type="latent", num_inference_steps=steps, **arguments)


@pytest.mark.parametrize(
    ("backend", "pipeline"), in_turn(BACKENDS, itertools.product(["qwen_image", "z_image"], ["fused", "not fused"]))
)
def test_it_runs_all_that_a_request_runs_and_leaves_nothing(backend: str | None, pipeline: tuple[str, str]) -> None:
    pipe, fuse = tiny.PIPELINES[pipeline[0]](), pipeline[1] == "fused"
    pipe.set_progress_bar_config(disable=True)
    guided = tiny.default_arguments(pipe)
    with omni_kernels.patched(pipe, backend, BACKENDS[backend], fuse=fuse) as handle:
        expected = latents(pipe)
        report, state = handle.report, torch.get_rng_state()
        with Variants() as warmed, torch.no_grad():
            omni_kernels.warmup(pipe, prompt="a cat", height=64, width=64, output_type="latent", **guided)
        assert torch.equal(torch.get_rng_state(), state)
        assert repr(handle.report) == repr(report)
        with Variants() as real:
            assert torch.equal(latents(pipe), expected)
        assert real.seen <= warmed.seen
        if backend is not None:
            assert real.seen
            assert handle.report.forwards_saved > 0


@pytest.mark.parametrize("backend", ["tea_cache", "easy_cache"])
def test_nothing_is_learnt_from_it(qwen_pipe: Any, backend: str) -> None:
    """Neither before nor between requests: what a rehearsal skips would be no schedule."""
    config = {key: value for key, value in BACKENDS[backend].items() if key != "forecaster"} | {"decision": "replay"}

    def run(*warmed: int) -> list[Any]:
        made = []
        with omni_kernels.patched(qwen_pipe, backend, config) as handle:
            for request in range(2):
                if request in warmed:
                    omni_kernels.warmup(qwen_pipe, height=64, width=64, negative_prompt=" ")
                made.append((latents(qwen_pipe, seed=request), handle.report.drift, handle.report.forwards))
        return made

    qwen_pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for (plain, *told), (warmed, *also) in zip(run(), run(0, 1), strict=True):
            assert torch.equal(plain, warmed)
            assert told == also


def test_nobody_is_told_of_it() -> None:
    """Neither who follows the steps, nor the user, that ten steps are not the fifty that were calibrated."""
    with Omni("emoji-qwen-image", device="cpu", cache_backend="tea_cache") as omni, warnings.catch_warnings():
        warnings.simplefilter("error")
        omni.pipe.set_progress_bar_config(disable=True)
        handle = omni_kernels.patching.handle_of(omni.pipe)
        steps: list[Any] = []
        handle.on_step = steps.append
        omni.warmup("a cat", steps=3)
        assert steps == []
        assert handle.report is None
        handle.on_step = None
        omni.generate("a cat", seed=0, num_inference_steps=50, on_step=steps.append)
        assert len(steps) == 50


def test_one_that_breaks_leaves_the_cache_as_it_was(qwen_pipe: Any) -> None:
    qwen_pipe.set_progress_bar_config(disable=True)
    with omni_kernels.patched(qwen_pipe, "tea_cache", BACKENDS["tea_cache"]):
        expected = latents(qwen_pipe)
        hook = qwen_pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            omni_kernels.warmup(qwen_pipe, height=64, width=64)
        hook.remove()
        assert torch.equal(latents(qwen_pipe), expected)


def test_compiled_blocks_are_compiled_by_then(qwen_pipe: Any) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    qwen_pipe.set_progress_bar_config(disable=True)
    torch._dynamo.reset()
    options = {"backend": backend, "fullgraph": True}
    with omni_kernels.patched(qwen_pipe, "cache_dit", BACKENDS["cache_dit"], compile=options), torch.no_grad():
        omni_kernels.warmup(qwen_pipe, height=64, width=64, negative_prompt=" ", output_type="latent")
        before = len(compiled)
        latents(qwen_pipe)
    torch._dynamo.reset()
    assert len(compiled) == before > 0


def test_omni_warms_up_with_the_models_own_size() -> None:
    with Omni("emoji-qwen-image", device="cpu", cache_backend="velocity_cache") as omni:
        (expected,) = omni.generate("a cat", seed=0, num_inference_steps=10)
    with Omni("emoji-qwen-image", device="cpu", cache_backend="velocity_cache") as omni:
        omni.pipe.set_progress_bar_config(disable=True)
        made = omni.warmup(steps=4)
        assert made.seconds > 0
        (again,) = omni.generate("a cat", seed=0, num_inference_steps=10)
    assert expected.images[0].tobytes() == again.images[0].tobytes()


def test_too_few_steps_are_refused(qwen_pipe: Any) -> None:
    omni_kernels.warmup(qwen_pipe, steps=2)
    with pytest.raises(ValueError, match="steps=1: a warm-up needs at least two steps"):
        omni_kernels.warmup(qwen_pipe, steps=1)


def test_what_triton_compiles_is_told(tmp_path: Path) -> None:
    """In a process without the interpreter, for a GPU that is not there."""
    program = """
        import importlib
        import torch
        from omni_kernels.compilations import following
        from omni_kernels.validation import aot
        op = importlib.import_module("omni_kernels.ops.rms_norm")
        x = torch.empty(3, 128, dtype=torch.bfloat16)
        for times in (1, 2):
            with following() as told:
                aot.launches("sm_90", lambda: op.launch(x))
            print(told.found, [(name, len(each), min(each) > 0.01) for name, each in told.seconds.items()])
            op.rms_norm_kernel.device_caches.clear()
    """
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["0 [('rms_norm_kernel', 1, True)]", "1 []"]


def test_it_prints_as_lines() -> None:
    assert str(Warmup(2.5, Compilations({"gelu_kernel": [0.25, 0.5]}, 3))).splitlines() == [
        "warmed up in 2.5 s",
        "2 variants of 1 kernels compiled in 0.8 s, 3 on disk",
        "gelu_kernel: 2, 0.50 s at most",
    ]
