"""Block contracts: what is found by watching a forward is what the rows say, and what works is the same picture."""

import dataclasses

import pytest
import tiny
import torch

import omni_kernels
from omni_runtime.cache.models import MODELS

METHODS = {
    "first_block_cache": {"threshold": 0.2},
    "cache_dit": {"residual_diff_threshold": 0.3, "Bn_compute_blocks": 1, "enable_taylorseer": True},
    "mag_cache": {"threshold": 0.3, "mag_ratios": [1.0, 1.02, 0.97]},
}


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": 6} | arguments)


def without_lists(monkeypatch, pipe):
    name = type(pipe.transformer).__name__
    if name in MODELS:
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], lists=()))


@pytest.mark.parametrize("backend", METHODS)
def test_what_is_found_decides_and_computes_as_what_is_written(any_pipe, backend, monkeypatch):
    with omni_kernels.patched(any_pipe, backend, METHODS[backend]) as handle:
        expected, written = latents(any_pipe), handle.report
    without_lists(monkeypatch, any_pipe)
    with omni_kernels.patched(any_pipe, backend, METHODS[backend]) as handle:
        for _ in range(2):
            assert torch.equal(latents(any_pipe), expected)
            found = handle.report
            assert {name: branch.decisions for name, branch in found.branches.items()} == {
                name: branch.decisions for name, branch in written.branches.items()
            }
            assert (found.blocks_run, found.blocks_total) == (written.blocks_run, written.blocks_total)
    assert written.forwards_saved > 0


def test_the_contract_is_the_row(any_pipe, monkeypatch):
    row = MODELS[type(any_pipe.transformer).__name__]
    without_lists(monkeypatch, any_pipe)
    with omni_kernels.patched(any_pipe, "first_block_cache") as handle:
        assert handle.blocks is None
        latents(any_pipe)
        found = handle.blocks
    assert [dataclasses.replace(one, depth="") for one in row.lists] == list(found.lists)
    assert found.stretches == (len(row.lists),)
    assert f"{row.lists[0].name}: {len(getattr(any_pipe.transformer, row.lists[0].name))} × " in str(found)
