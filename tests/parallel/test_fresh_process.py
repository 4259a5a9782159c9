"""A request after one that died equals the same request in a process that has seen no other."""

import pytest
import tiny
import torch
from two_ranks import start

import omni_kernels

CONFIGS = {
    "tea_cache": {"rel_l1_thresh": 0.1, "coefficients": [0, 0, 0, 1, 0]},
    "mag_cache": {"threshold": 0.3, "forecaster": "foca"},
    "sea_cache": {"threshold": 0.4, "forecaster": "dmd"},
    "first_block_cache": {"threshold": 0.2},
    "cache_dit": {"residual_diff_threshold": 0.3, "max_warmup_steps": 2, "enable_taylorseer": True},
    "velocity_cache": {"speedup": 2.5},
    "easy_cache": {"thresh": 0.3, "ret_steps": 2, "forecaster": "newton"},
}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", num_inference_steps=6, **arguments)


def of_each_method():
    for backend, config in CONFIGS.items():
        pipe = tiny.qwen_image()
        with omni_kernels.patched(pipe, backend, config) as handle:
            yield pipe, handle


def in_a_fresh_process(_, path):
    torch.set_num_threads(1)
    torch.save([latents(pipe) for pipe, _ in of_each_method()], path)


def test_request_after_a_dead_one_equals_a_fresh_process(tmp_path):
    path = tmp_path / "latents.pt"
    start(in_a_fresh_process, (path,), processes=1)
    for (pipe, handle), expected in zip(of_each_method(), torch.load(path), strict=True):
        hook = raise_at_call_3(pipe.transformer.transformer_blocks[0])
        with pytest.raises(KeyboardInterrupt):
            latents(pipe, seed=7)
        hook.remove()
        assert torch.equal(latents(pipe), expected)
        assert handle.report.forwards_saved > 0


def raise_at_call_3(module):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    return module.register_forward_pre_hook(hook)
