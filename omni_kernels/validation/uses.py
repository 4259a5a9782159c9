"""Uses that are checked but not timed: other forms of the ops, such as with an index, with `out`, without a norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from omni_kernels.ops import quantize
from omni_kernels.ops._quantized import MX
from omni_kernels.ops.scaled_mm import GROUP
from omni_kernels.validation.cases import CASES, Case, Inputs, Use, hidden_states, modulation, qk_norm_rope
from omni_kernels.validation.shapes import Shape


def _index(shape: Shape, device: torch.device) -> torch.Tensor:
    """Which of two modulations each token takes: the second for the last half, as for a reference image's tokens."""
    return (torch.arange(shape.S, device=device) >= shape.S // 2).int().expand(shape.B, -1).contiguous()


def _two_rows(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Shift, scale and gate, two rows for each sample."""
    return list(torch.randn(2 * shape.B, 6 * shape.D, device=device).mul_(0.2).to(shape.dtype).chunk(6, 1)[:3])


def _first_residual() -> Use:
    """The residual of the first step, without an earlier one."""
    return Use(
        name="residual_relative_l1 first",
        op="residual_relative_l1",
        inputs=lambda shape, device: dict(zip(("h_out", "h_in"), hidden_states(shape, device, 2), strict=True)),
        ours=lambda i: ((i["h_out"], i["h_in"], None), {}),
    )


def _forecast_into() -> Use:
    """A forecast into a given tensor, with weights on the device."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        made = dict(zip(("base", "last", "before", "out"), hidden_states(shape, device, 4), strict=True))
        return made | {"weights": torch.tensor([1.5, -0.5], device=device)}

    return Use(
        name="linear_forecast into",
        op="linear_forecast",
        inputs=inputs,
        ours=lambda i: ((i["base"], [i["last"], i["before"]], i["weights"], i["out"]), {}),
        places=(3,),
    )


def _ada_layer_norm_index() -> Use:
    """As in Qwen-Image-Edit-2511."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        shift, scale, _ = _two_rows(shape, device)
        return {
            "x": hidden_states(shape, device, 1)[0],
            "scale": scale,
            "shift": shift,
            "index": _index(shape, device),
        }

    return Use(
        name="ada_layer_norm index",
        op="ada_layer_norm",
        inputs=inputs,
        ours=lambda i: ((i["x"], i["scale"], i["shift"]), {"index": i["index"]}),
    )


def _gate_residual_norm_index() -> Use:
    """As in Qwen-Image-Edit-2511."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        shift, scale, gate = _two_rows(shape, device)
        residual, x = hidden_states(shape, device, 2)
        return {
            "residual": residual,
            "x": x,
            "gate": gate,
            "scale": scale,
            "shift": shift,
            "index": _index(shape, device),
        }

    return Use(
        name="gate_residual_norm index",
        op="gate_residual_norm",
        inputs=inputs,
        ours=lambda i: (
            (i["residual"], i["x"], i["gate"], i["scale"], i["shift"]),
            {"index": i["index"]},
        ),
    )


def _gated_residual() -> Use:
    """The last one of a block, which no norm follows."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        residual, x = hidden_states(shape, device, 2)
        return {"residual": residual, "x": x, "gate": modulation(shape, device)[2]}

    return Use(
        name="gate_residual_norm h alone",
        op="gate_residual_norm",
        inputs=inputs,
        ours=lambda i: ((i["residual"], i["x"], i["gate"]), {"norm": None}),
    )


def _rotated_halves() -> Use:
    """Rotation with pairs from a head's two halves, without a norm."""
    case = qk_norm_rope(across_heads=False)

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = case.ours(i)
        return args, {"freqs": kwargs["freqs"], "layout": "half"}

    return Use(
        name="qk_norm_rope half",
        op="qk_norm_rope",
        inputs=case.inputs,
        ours=ours,
        places=case.places,
        fits=case.fits,
    )


def _rotated_by_tables(across_heads: bool, by_head: bool = False) -> Use:
    """Rotation by a cosine and a sine for each element, as in FLUX, or (across heads) in Wan; by head, as in LTX."""
    case = qk_norm_rope(across_heads)

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        made = case.inputs(shape, device)
        angles = made["freqs"]
        if by_head:
            B, _, H, _ = made["q"].shape
            angle = torch.rand(B, shape.S, H, angles.shape[1], device=device)
            angles = torch.stack((angle.cos(), angle.sin()), -1)
        cos, sin = (t.repeat_interleave(2, -1) for t in angles.unbind(-1))
        return made | {"cos": cos, "sin": sin}

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = case.ours(i)
        return args, kwargs | {"freqs": None, "cos": i["cos"], "sin": i["sin"]}

    return Use(
        name="qk_norm_rope cos and sin" + (" by head" if by_head else "") + (" across heads" if across_heads else ""),
        op="qk_norm_rope",
        inputs=inputs,
        ours=ours,
        places=case.places,
        fits=case.fits,
    )


def _gelu_behind() -> Use:
    """Output after other channels, as in FLUX's single-stream blocks."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        x, others = hidden_states(shape, device, 2)
        return {"x": x, "packed": torch.cat((others, others), -1)}

    return Use(
        name="gelu behind",
        op="gelu",
        inputs=inputs,
        ours=lambda i: ((i["x"],), {"out": i["packed"][..., i["x"].shape[-1] :]}),
        places=("out",),
    )


def _swiglu_behind() -> Use:
    """Halves of a packed projection, and output after other channels, as in FLUX.2's single-stream blocks."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        gate, up, others = hidden_states(shape, device, 3)
        return {"both": torch.cat((gate, up), -1), "packed": torch.cat((others, others), -1)}

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        gate, up = i["both"].chunk(2, -1)
        return (gate, up), {"out": i["packed"][..., gate.shape[-1] :]}

    return Use(name="swiglu behind", op="swiglu", inputs=inputs, ours=ours, places=("out",))


def _in_fp8(case: Case, beside: bool, mx: bool = False) -> Use:
    """A use whose last result is quantised in the same pass, with a scale for each token or in MXFP8."""

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = case.ours(i)
        return args, kwargs | {"quantize": MX if mx else torch.float8_e4m3fn, "beside": beside}

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        return case.inputs(replace(shape, D=max(32, shape.D // 32 * 32)) if mx else shape, device)

    name = f"{case.name} float8_e4m3fn" + (" mx" if mx else "") + (" beside" if beside else "")
    return Use(name=name, op=case.op, inputs=inputs, ours=ours)


def _scaled_mm(dtype: torch.dtype, form: str = "") -> Use:
    """The product of a linear layer with half as many channels, with a bias; with GELU in 8 bits, or by groups.

    The last two need whole groups, so they have at least two.
    """

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        least = 2 * GROUP if form else 2
        D = max(least, shape.D // least * least)
        x, weight = torch.randn(shape.B, shape.S, D, device=device), torch.randn(D // 2, D, device=device) / D**0.5
        made: Inputs = dict(zip(("weight", "weight scale"), quantize(weight, dtype), strict=True))
        made["bias"] = torch.randn(D // 2, device=device).to(shape.dtype)
        values = quantize(x.unflatten(-1, (-1, GROUP)) if form == "groups" else x, dtype)
        made["q"], made["scale"] = values[0].view(x.shape), values[1]
        return made

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        options: dict[str, Any] = {"dtype": i["bias"].dtype}
        if form == "gelu":
            options |= {"gelu": True, "quantize": dtype}
        return (i["q"], i["scale"], i["weight"], i["weight scale"], i["bias"]), options

    name = f"scaled_mm {str(dtype)[6:]}" + (f" {form}" if form else "")
    return Use(name=name, op="scaled_mm", inputs=inputs, ours=ours)


#: Everything that is checked: the cases, and the uses that are not timed.
USES: dict[str, Use] = CASES | {
    use.name: use
    for use in (
        _first_residual(),
        _forecast_into(),
        _rotated_halves(),
        _rotated_by_tables(across_heads=False),
        _rotated_by_tables(across_heads=True),
        _rotated_by_tables(across_heads=True, by_head=True),
        _gelu_behind(),
        _swiglu_behind(),
        _ada_layer_norm_index(),
        _gate_residual_norm_index(),
        _gated_residual(),
        _in_fp8(CASES["ada_layer_norm rms"], beside=False),
        _in_fp8(CASES["gate_residual_norm rms"], beside=True),
        _in_fp8(CASES["rms_norm heads"], beside=False),
        _in_fp8(CASES["gelu"], beside=True),
        _in_fp8(CASES["swiglu"], beside=False),
        _in_fp8(CASES["ada_layer_norm rms"], beside=False, mx=True),
        _in_fp8(CASES["gate_residual_norm rms"], beside=True, mx=True),
        _in_fp8(CASES["gelu"], beside=False, mx=True),
        *(_scaled_mm(dtype, form) for dtype in (torch.int8, torch.float8_e4m3fn) for form in ("", "gelu", "groups")),
    )
}
