"""sea_cache against its definition written out in NumPy's float64, and the grids that it filters over."""

import itertools

import numpy as np
import pytest
import tiny
import torch

import omni_kernels
from omni_runtime.cache.methods import METHODS
from omni_runtime.cache.models import MODELS, ModelRow, row_of
from omni_runtime.cache.signals import wiener

STEPS = 12


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **{"num_inference_steps": STEPS} | arguments)


def written_out_filter(x: np.ndarray, sigma: float, power: float) -> np.ndarray:
    """The SEA filter of x, [F, H, W, D], with the whole gain of all axes."""
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    gain = np.ones(x.shape[:3])
    for axis, n in enumerate(x.shape[:3]):
        f = np.abs(np.fft.fftfreq(n))
        spectrum = 1 / (f**power + 1e-16)
        g = (1 - sigma) * spectrum / ((1 - sigma) ** 2 * spectrum + sigma**2 + 1e-16)
        gain = gain * g.reshape([n if a == axis else 1 for a in range(3)])
    gain /= gain.mean()
    return np.fft.ifftn(np.fft.fftn(x, axes=(0, 1, 2)) * gain[..., None], axes=(0, 1, 2)).real


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 5, 8), (1, 8, 5), (3, 4, 6), (2, 7, 1), (1, 1, 1)])
@pytest.mark.parametrize("sigma", [1.0, 0.97, 0.5, 0.02, 0.0])
@pytest.mark.parametrize("power", [2.0, 3.0])
def test_the_filter_is_the_written_out_one(grid, sigma, power):
    x = torch.randn(2, *grid, 6, generator=torch.Generator().manual_seed(0))
    found = wiener(x, sigma, power)
    assert found.dtype == torch.float32
    for sample in range(2):
        expected = torch.from_numpy(written_out_filter(x[sample].double().numpy(), sigma, power))
        # Near σ = 1 only the mean is left, times the number of tokens.
        torch.testing.assert_close(found[sample].double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_filter_works_in_float32_whatever_the_dtype():
    x = torch.randn(1, 1, 4, 4, 6).to(torch.bfloat16)
    assert torch.equal(wiener(x, 0.5, 3.0), wiener(x.float(), 0.5, 3.0))


def test_noise_is_taken_out_more_where_there_is_more_of_it():
    noise = torch.randn(1, 1, 16, 16, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.linspace(0, 1, 16)[:, None, None].expand(16, 16, 8)[None, None]
    signal = (wiener(smooth + noise, s, 3.0) - wiener(smooth, s, 3.0) for s in (0.9, 0.1))
    rough, fine = ((d - d.mean((1, 2, 3), keepdim=True)).norm() / d.norm() for d in signal)
    assert rough < fine


# The method


def written_out_decisions(modulated, grid, sigmas, threshold, power, most):
    """(computed, accumulated) of each step, from [S, D] modulated inputs."""
    found, then, accumulated, run = [], None, 0.0, 0
    for step, (x, sigma) in enumerate(zip(modulated, sigmas, strict=False)):
        now = written_out_filter(x[: np.prod(grid)].numpy().reshape(*grid, -1), sigma, power)
        forced = step in (0, len(modulated) - 1) or run >= most >= 0
        if forced:
            compute, told = True, None
        else:
            accumulated += np.abs(now - then).mean() / np.abs(then).mean()
            compute, told = accumulated >= threshold, accumulated
        found.append((compute, told))
        then = now
        accumulated, run = (0.0, 0) if compute else (accumulated, run + 1)
    return found


@pytest.mark.parametrize(
    "config",
    [{}, {"threshold": 0.1}, {"threshold": 0.12, "power_exp": 2.0}, {"threshold": 0.9, "max_consecutive_cached": -1}],
    ids=str,
)
def test_decisions_are_those_of_the_rule_written_out(config):
    pipe = tiny.qwen_image()
    modulated = []
    block = pipe.transformer.transformer_blocks[0]
    # The hidden states that enter block 0 are known even where it does not run: from img_in's output, and its temb.
    hidden, temb = [], []
    pipe.transformer.img_in.register_forward_hook(lambda _, a, output: hidden.append(output))
    pipe.transformer.time_text_embed.register_forward_hook(lambda _, a, output: temb.append(output))
    with omni_kernels.patched(pipe, "sea_cache", config) as handle:
        latents(pipe, height=96, negative_prompt=None)
        decisions = handle.report.branches["cond"].decisions
    for h, t in zip(hidden, temb, strict=True):
        with torch.no_grad():
            shift, scale, _ = block.img_mod(t).chunk(2, dim=-1)[0].chunk(3, dim=-1)
            modulated.append((block.img_norm1(h) * (1 + scale[:, None]) + shift[:, None])[0].double())
    keys = {"threshold": 0.25, "power_exp": 3.0, "max_consecutive_cached": 2} | config
    expected = written_out_decisions(modulated, (1, 6, 4), pipe.scheduler.sigmas.tolist(), *keys.values())
    assert [d.computed for d in decisions] == [computed for computed, _ in expected]
    assert {True, False} == {d.computed for d in decisions[1:-1]}
    for decision, (_, accumulated) in zip(decisions, expected, strict=True):
        assert decision.accumulated == (None if accumulated is None else pytest.approx(accumulated, rel=1e-3))


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "z_image", "flux"])
def test_every_pipelines_grid_is_that_of_its_latents(name, monkeypatch):
    """96×64 pixels are 12×8 latents, and 6×4 tokens."""
    pipe = tiny.PIPELINES[name]()
    grids = []
    monkeypatch.setattr(
        "omni_runtime.cache.signals.wiener", lambda x, *others: grids.append(x.shape[1:4]) or wiener(x, *others)
    )
    with omni_kernels.patched(pipe, "sea_cache", {"threshold": 0.4}) as handle:
        latents(pipe, height=96)
        assert handle.report.forwards_saved > 0
    assert set(grids) == {(1, 6, 4)}


def test_tokens_none_of_which_is_of_the_first_picture_have_no_grid():
    """VisualCloze numbers its pictures from 1."""
    ids = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="none of the transformer's img_ids begins with 0"):
        MODELS["FluxTransformer2DModel"].noise_grid({"img_ids": ids})


def test_rows_of_the_grid_are_rows_of_the_picture():
    """The tokens of a picture that changes along its height alone differ along the grid's first axis alone."""
    for name in ("qwen_image", "z_image", "flux"):
        pipe = tiny.PIPELINES[name]()
        packed = torch.arange(12.0)[None, None, :, None].expand(1, 16, 12, 8)
        if name == "z_image":
            tokens = packed[0].reshape(16, 6, 2, 4, 2).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)[None]
        else:
            tokens = type(pipe)._pack_latents(packed, 1, 16, 12, 8)
        grid = tokens.reshape(6, 4, -1)
        assert torch.equal(grid, grid[:, :1].expand_as(grid))
        assert not torch.equal(grid[0], grid[1])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("QwenImageTransformer2DModel", {"img_shapes": None}, "without img_shapes"),
        (
            "QwenImageTransformer2DModel",
            {"img_shapes": [[(1, 4, 4)] * 3], "additional_t_cond": torch.zeros(1)},
            "the noise lies in 2 layers",
        ),
        ("ZImageTransformer2DModel", {"x": [[torch.zeros(16, 1, 8, 8)]]}, "references among its latents"),
    ],
)
def test_a_call_whose_tokens_are_no_grid_is_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name].noise_grid(arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "grid"),
    [
        ("QwenImageTransformer2DModel", {"img_shapes": [[(1, 6, 4)]]}, (1, 6, 4)),
        ("QwenImageTransformer2DModel", {"img_shapes": [(1, 6, 4)]}, (1, 6, 4)),
        ("QwenImageTransformer2DModel", {"img_shapes": [[(1, 6, 4), (1, 2, 2)]]}, (1, 6, 4)),
        ("ZImageTransformer2DModel", {"x": [torch.zeros(16, 1, 12, 8)] * 2}, (1, 6, 4)),
        ("ZImageTransformer2DModel", {"x": [torch.zeros(16, 4, 12, 8)], "patch_size": 4, "f_patch_size": 2}, (2, 3, 2)),
        (
            "FluxTransformer2DModel",
            {"img_ids": torch.tensor([[0, h, w] for h in range(6) for w in range(4)] + [[1, 8, 9]])},
            (1, 6, 4),
        ),
    ],
)
def test_grids(name, arguments, grid):
    assert MODELS[name].noise_grid(arguments) == grid


def test_flux_reads_its_ids_only_where_nothing_tells_the_grid(monkeypatch):
    row = MODELS["FluxTransformer2DModel"]
    calls = []
    counting = ModelRow(**{**vars(row), "noise_grid": lambda a: calls.append(1) or row.noise_grid(a)})
    monkeypatch.setitem(MODELS, "FluxTransformer2DModel", counting)
    pipe = tiny.flux()
    with omni_kernels.patched(pipe, "sea_cache", {"threshold": 0.2}) as handle:
        latents(pipe)
        (branch,) = handle.report.branches.values()
    assert len(calls) == sum(d.distance is None for d in branch.decisions) < STEPS


def test_a_row_without_a_grid_is_refused_by_name(qwen_pipe, monkeypatch):
    row = MODELS["QwenImageTransformer2DModel"]
    for lacking in ("noise_grid", "modulation"):
        monkeypatch.setitem(MODELS, "QwenImageTransformer2DModel", ModelRow(**{**vars(row), lacking: None}))
        with pytest.raises(ValueError, match=f"sea_cache filters .* ModelRow gives no {lacking}"):
            omni_kernels.patch(qwen_pipe, "sea_cache")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_first_and_last_step_are_computed_in_any_number_of_steps(qwen_pipe, steps):
    with omni_kernels.patched(qwen_pipe, "sea_cache", {"threshold": 9.0}) as handle:
        latents(qwen_pipe, num_inference_steps=steps)
        branch = handle.report.branches["cond"]
    assert branch.computed == sorted({0, steps - 1})


@pytest.mark.parametrize("order", [0, 1, 2])
def test_residual_order_continues_polynomials_in_step_indices(order):
    method = METHODS["sea_cache"]
    config = method.check({"sea_residual_order": order})
    forecaster = method.parts(config, row_of("QwenImageTransformer2DModel"), 4).forecaster
    assert (forecaster.axis, forecaster.snapshots) == ("step", order + 1)
    positions = [7.0, 4.0, 2.0][: order + 1]
    weights = forecaster.weights(positions, 9.0)
    for power in range(order + 1):
        assert sum(w * x**power for w, x in zip(weights, positions, strict=True)) == pytest.approx(9.0**power)
    with pytest.raises(ValueError, match="residual_order contradicts forecaster='newton'"):
        method.check({"residual_order": order, "forecaster": "newton"})


def test_no_more_than_two_steps_are_skipped_in_a_row(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, "sea_cache", {"threshold": 9.0}) as handle:
        latents(qwen_pipe)
        branch = handle.report.branches["cond"]
    assert branch.computed == [0, 3, 6, 9, 11]
    assert max(b - a for a, b in itertools.pairwise(branch.computed)) == 3
