"""Rotary tables: those of Qwen-Image-Layered are kept for the last sizes only."""

import copy
import weakref

import pytest
import torch

import omni_kernels
from benchmarks.models.tiny import build
from omni_kernels.patching import tables

SIZES = tables.MOST + 10


@pytest.fixture
def layered():
    return build("QwenImageLayeredPipeline")


@pytest.mark.parametrize("method", ["_compute_video_freqs", "_compute_condition_freqs"])
@pytest.mark.parametrize("backend", [None, "velocity_cache"])
def test_tables_of_the_last_sizes_are_kept(layered, method, backend):
    rope = layered.pipe.transformer.pos_embed
    plain = getattr(rope, method)
    with omni_kernels.patched(layered.pipe, backend):
        bounded = getattr(rope, method)
        seen = []
        for width in range(1, SIZES + 1):
            table = bounded(1, 2, width)
            assert torch.equal(table, plain.__wrapped__(rope, 1, 2, width))
            seen.append(weakref.ref(table))
        assert bounded(1, 2, SIZES) is table
        del table
        assert [one() is not None for one in seen] == [False] * 10 + [True] * tables.MOST
    assert getattr(rope, method) == plain


def test_pictures_are_the_same(layered):
    expected = layered.generate()
    with omni_kernels.patched(layered.pipe, fuse=False):
        assert torch.equal(layered.generate(), expected)


def test_two_pipelines_with_one_transformer_can_be_patched_and_undone_in_any_order(layered):
    other = copy.copy(layered.pipe)
    first, second = (omni_kernels.patch(pipe, fuse=False) for pipe in (layered.pipe, other))
    first.undo()
    second.undo()
    assert "_compute_video_freqs" not in vars(layered.pipe.transformer.pos_embed)
