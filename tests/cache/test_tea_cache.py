"""TeaCache's decisions against its rule written out here, from modulated inputs that hooks on the model recorded."""

import dataclasses
import itertools

import pytest
import tiny
import torch

import omni_kernels
from omni_runtime.cache.models import MODELS

IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)


def qwen_modulated(block, arguments):
    shift, scale, _ = block.img_mod(arguments["temb"]).chunk(2, dim=-1)[0].chunk(3, dim=-1)
    return block.img_norm1(arguments["hidden_states"]) * (1 + scale[:, None]) + shift[:, None]


def z_image_modulated(block, arguments):
    scale = block.adaLN_modulation(arguments["adaln_input"]).chunk(4, dim=1)[0]
    return block.attention_norm1(arguments["x"]) * (1 + scale[:, None])


def flux_modulated(block, arguments):
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


MODULATED = {"qwen_image": qwen_modulated, "z_image": z_image_modulated, "flux": flux_modulated}


def rule(modulated: list[torch.Tensor], threshold: float, coefficients) -> list[bool]:
    """Whether each step is computed, from the modulated inputs of all steps of one branch of batch 1."""
    computed, accumulated = [True], 0.0
    for before, now in itertools.pairwise(modulated):
        r = float((now.double() - before.double()).abs().mean() / (before.double().abs().mean() + 1e-8))
        accumulated += abs(sum(c * r**k for c, k in zip(coefficients, (4, 3, 2, 1, 0), strict=True)))
        computed.append(accumulated >= threshold)
        if computed[-1]:
            accumulated = 0.0
    return computed


@pytest.mark.parametrize("coefficients", [IDENTITY, None], ids=["identity", "the model's own"])
@pytest.mark.parametrize("threshold", [0.12, 0.3, 0.8])
@pytest.mark.parametrize("name", sorted(MODULATED))
def test_decisions_are_those_of_the_rule(name, threshold, coefficients, monkeypatch):
    pipe = tiny.PIPELINES[name]()
    seen: list[torch.Tensor] = []
    row = MODELS[type(pipe.transformer).__name__]

    def spy(block, arguments):
        seen.append(MODULATED[name](block, arguments))
        return row.modulation(block, arguments)

    monkeypatch.setitem(MODELS, type(pipe.transformer).__name__, dataclasses.replace(row, modulation=spy))
    guidance = {"guidance_scale": 0.0} if name == "z_image" else {}
    if name == "qwen_image":
        guidance = {"negative_prompt": None}
    config = {"rel_l1_thresh": threshold, "coefficients": coefficients}
    with omni_kernels.patched(pipe, "tea_cache", config) as handle:
        tiny.generate(pipe, num_inference_steps=16, **guidance)
        (branch,) = handle.report.branches.values()
    assert len(seen) == 16
    expected = rule(seen, threshold, coefficients or row.tea_coefficients)
    assert [d.computed for d in branch.decisions] == expected


def test_the_rule_is_tested_where_it_both_computes_and_skips():
    pipe = tiny.qwen_image()
    with omni_kernels.patched(pipe, "tea_cache", {"rel_l1_thresh": 0.12, "coefficients": IDENTITY}) as handle:
        tiny.generate(pipe, num_inference_steps=16)
        for branch in handle.report.branches.values():
            assert len(branch.computed) >= 3
            assert len(branch.skipped) >= 3


def test_branches_decide_for_themselves():
    pipe = tiny.qwen_image()
    with omni_kernels.patched(pipe, "tea_cache", {"rel_l1_thresh": 0.3, "coefficients": IDENTITY}) as handle:
        tiny.generate(pipe, num_inference_steps=16, negative_prompt="a dog on a very long red sofa")
        report = handle.report
    assert set(report.branches) == {"cond", "uncond"}
    for branch in report.branches.values():
        assert [d.step for d in branch.decisions] == list(range(16))


def test_a_skipped_step_adds_the_last_residual_to_its_own_input(monkeypatch):
    """With everything but the first step skipped, the output is norm_out(img_in(x) + residual of step 0)."""
    pipe = tiny.qwen_image()
    transformer = pipe.transformer
    outputs, inputs = [], []
    transformer.img_in.register_forward_hook(lambda m, a, out: inputs.append(out.clone()))
    transformer.norm_out.register_forward_pre_hook(lambda m, a: outputs.append(a[0].clone()))
    with omni_kernels.patched(pipe, "tea_cache", {"rel_l1_thresh": 1e9}) as handle:
        tiny.generate(pipe, num_inference_steps=5, negative_prompt=None)
        (branch,) = handle.report.branches.values()
    assert branch.computed == [0]
    residual = outputs[0] - inputs[0]
    for entered, left in zip(inputs[1:], outputs[1:], strict=True):
        torch.testing.assert_close(left, entered + residual, rtol=1e-6, atol=1e-6)
