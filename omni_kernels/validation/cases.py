"""Cases that are checked and timed: each op as a model uses it, and the form used by other projects in eager torch.

A `Case` is one use of one op. It makes inputs, runs the op, runs the eager form, and converts both results to the same
values. These are compared with fp64 before anything is timed. If the eager form needs other state (TaylorSeer's
derivatives, where ours has snapshots), that state is prepared outside of the timing.

Both bandwidths are computed from the bytes that the op itself has to move (`bytes_moved`). Additional traffic of the
eager form therefore shows as lower bandwidth.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from omni_kernels.device import has_fp64
from omni_kernels.ops import OPS
from omni_kernels.validation.shapes import Shape

Inputs = dict[str, Any]
Values = tuple[torch.Tensor, ...]

#: The allowed relative error ‖value − fp64‖ / ‖fp64‖. bf16 has 8 bits, and eager torch rounds after each operation.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of one op.

    Attributes:
        name: the op's name, and the variant if there are several.
        op: key of `omni_kernels.ops.OPS`.
        inputs: (shape, device) → tensors by name.
        ours: inputs → the arguments of the op.
        places: positions or names of the arguments that the op writes to.
        fits: whether inputs of a shape are possible.
    """

    name: str
    op: str
    inputs: Callable[[Shape, torch.device], Inputs]
    ours: Callable[[Inputs], tuple[tuple[Any, ...], dict[str, Any]]]
    places: tuple[int | str, ...] = ()
    fits: Callable[[Shape], bool] = lambda shape: True

    def bytes_moved(self, inputs: Inputs) -> int:
        """The bytes that the op has to move, by its own count."""
        args, kwargs = self.ours(inputs)
        return OPS[self.op].bytes_moved(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Case(Use):
    """A use that other projects have in eager torch.

    Attributes:
        eager: the other projects' form, called with the inputs.
        values: converts the op's result to the values that `eager` returns.
        written: for an op without a result, the names of the inputs that it writes to. They serve as its result.
        rounding: allowed beyond `TOLERANCE`, where values may be rounded to either of two steps.
    """

    eager: Callable[[Inputs], Values]
    values: Callable[[Any], Values]
    written: tuple[str, ...] = ()
    rounding: float = 0.0

    def run(self, inputs: Inputs) -> Any:
        """The op's result or, if it returns nothing, what it wrote."""
        args, kwargs = self.ours(inputs)
        result = OPS[self.op].function(*args, **kwargs)
        return tuple(inputs[name] for name in self.written) if self.written else result


def hidden_states(shape: Shape, device: torch.device, count: int) -> list[torch.Tensor]:
    """`count` random tensors, each near the one before, like the states of successive steps."""
    first = torch.randn(shape.size, device=device)
    return [(first + 0.1 * j * torch.randn_like(first)).to(shape.dtype) for j in range(count)]


def _ratio(difference: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The relative L1 distance as in TeaCache, cache-dit and diffusers' first-block cache."""
    return difference.abs().mean() / before.abs().mean()


def _ratio_of_sums(sums: torch.Tensor) -> torch.Tensor:
    numerator, denominator = sums.sum(0)
    return numerator / denominator


def _relative_l1() -> Case:
    return Case(
        name="relative_l1",
        op="relative_l1",
        inputs=lambda shape, device: dict(zip("xy", hidden_states(shape, device, 2), strict=True)),
        ours=lambda i: ((i["x"], i["y"]), {}),
        eager=lambda i: (_ratio(i["x"] - i["y"], i["y"]),),
        values=lambda sums: (_ratio_of_sums(sums),),
    )


def _residual_relative_l1() -> Case:
    def inputs(shape: Shape, device: torch.device) -> Inputs:
        h_in, added, r_prev = hidden_states(shape, device, 3)
        return {"h_out": h_in + added, "h_in": h_in, "r_prev": r_prev}

    def eager(i: Inputs) -> Values:
        residual = i["h_out"] - i["h_in"]
        return residual, _ratio(i["r_prev"] - residual, i["r_prev"])

    return Case(
        name="residual_relative_l1",
        op="residual_relative_l1",
        inputs=inputs,
        ours=lambda i: ((i["h_out"], i["h_in"], i["r_prev"]), {}),
        eager=eager,
        values=lambda out: (out[0], _ratio_of_sums(out[1])),
    )


def _modulated_relative_l1(norm: str) -> Case:
    def inputs(shape: Shape, device: torch.device) -> Inputs:
        h, m_prev = hidden_states(shape, device, 2)
        vectors = torch.randn(3, shape.B, shape.D, device=device).mul_(0.2).to(shape.dtype)
        made = {"h": h, "m_prev": m_prev, "scale": vectors[0]}
        return made | ({"shift": vectors[1]} if norm == "layer" else {"weight": 1 + vectors[2, 0]})

    def eager(i: Inputs) -> Values:
        D = i["h"].shape[-1]
        if norm == "layer":
            m = F.layer_norm(i["h"], (D,), eps=1e-6) * (1 + i["scale"].unsqueeze(1)) + i["shift"].unsqueeze(1)
        else:
            m = F.rms_norm(i["h"], (D,), i["weight"], eps=1e-6) * (1 + i["scale"].unsqueeze(1))
        return m, _ratio(m - i["m_prev"], i["m_prev"])

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (i["h"], i["scale"], i.get("shift"), i["m_prev"]), {"norm": norm, "weight": i.get("weight")}

    return Case(
        name=f"modulated_relative_l1 {norm}",
        op="modulated_relative_l1",
        inputs=inputs,
        ours=ours,
        eager=eager,
        values=lambda out: (out[0], _ratio_of_sums(out[1])),
    )


def _linear_forecast(order: int) -> Case:
    """Residual reuse (order 0) or TaylorSeer. Computed steps are two apart; the forecast is two after the last one."""
    gap, k = 2.0, 2.0

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        base, *history = hidden_states(shape, device, order + 2)
        ladder, level = [history[0]], history
        while len(level) > 1:
            level = [(a - b) / gap for a, b in itertools.pairwise(level)]
            ladder.append(level[0])
        return {"base": base, "history": history, "ladder": ladder}

    def weights() -> list[float]:
        return {0: [1.0], 1: [1 + k / gap, -k / gap]}[order]

    def eager(i: Inputs) -> Values:
        if order == 0:
            return (i["history"][0] + i["base"],)
        output = 0
        for degree, derivative in enumerate(i["ladder"]):
            output = output + derivative * k**degree
        return (output + i["base"],)

    return Case(
        name="linear_forecast " + ("reuse" if order == 0 else f"order {order}"),
        op="linear_forecast",
        inputs=inputs,
        ours=lambda i: ((i["base"], i["history"], weights()), {}),
        eager=eager,
        values=lambda out: (out,),
    )


def modulation(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Shift, scale and gate as in blocks: chunks of one projection."""
    return list(torch.randn(shape.B, 6 * shape.D, device=device).mul_(0.2).to(shape.dtype).chunk(6, 1)[:3])


def _weight(shape: Shape, device: torch.device, D: int | None = None) -> torch.Tensor:
    return (1 + 0.2 * torch.randn(D or shape.D, device=device)).to(shape.dtype)


def _ada_layer_norm(norm: str) -> Case:
    """As in Qwen-Image and FLUX ("layer"), or in Z-Image ("rms")."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        shift, scale, _ = modulation(shape, device)
        made = {"x": hidden_states(shape, device, 1)[0], "scale": scale}
        return made | ({"shift": shift} if norm == "layer" else {"weight": _weight(shape, device)})

    def eager(i: Inputs) -> Values:
        D, scale = i["x"].shape[-1], i["scale"].unsqueeze(1)
        if norm == "layer":
            return (F.layer_norm(i["x"], (D,), eps=1e-6) * (1 + scale) + i["shift"].unsqueeze(1),)
        return (F.rms_norm(i["x"], (D,), i["weight"], eps=1e-6) * (1 + scale),)

    return Case(
        name=f"ada_layer_norm {norm}",
        op="ada_layer_norm",
        inputs=inputs,
        ours=lambda i: ((i["x"], i["scale"], i.get("shift")), {"norm": norm, "weight": i.get("weight")}),
        eager=eager,
        values=lambda out: (out,),
    )


def _gate_residual_norm(norm: str) -> Case:
    """As in Qwen-Image and FLUX ("layer"), or in Z-Image ("rms")."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        shift, scale, gate = modulation(shape, device)
        residual, x = hidden_states(shape, device, 2)
        made = {"residual": residual, "x": x, "gate": gate, "scale": scale}
        if norm == "layer":
            return made | {"shift": shift}
        return made | {"x_weight": _weight(shape, device), "weight": _weight(shape, device)}

    def eager(i: Inputs) -> Values:
        D, gate, scale = i["x"].shape[-1], i["gate"].unsqueeze(1), i["scale"].unsqueeze(1)
        if norm == "layer":
            h = i["residual"] + gate * i["x"]
            return h, F.layer_norm(h, (D,), eps=1e-6) * (1 + scale) + i["shift"].unsqueeze(1)
        h = i["residual"] + gate.tanh() * F.rms_norm(i["x"], (D,), i["x_weight"], eps=1e-6)
        return h, F.rms_norm(h, (D,), i["weight"], eps=1e-6) * (1 + scale)

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        more = {name: i.get(name) for name in ("x_weight", "weight")}
        args = (i["residual"], i["x"], i["gate"], i["scale"], i.get("shift"))
        return args, {"norm": norm, "gate_tanh": norm == "rms"} | more

    return Case(
        name=f"gate_residual_norm {norm}",
        op="gate_residual_norm",
        inputs=inputs,
        ours=ours,
        eager=eager,
        values=lambda out: out,
    )


def _rms_norm() -> Case:
    """Norm of heads, as for q and k in attention. A head has 128 channels, else 64 or all, whichever divides first."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        D = next(n for n in (128, 64, shape.D) if shape.D % n == 0)
        return {"x": hidden_states(shape, device, 1)[0].unflatten(-1, (-1, D)), "weight": _weight(shape, device, D)}

    return Case(
        name="rms_norm heads",
        op="rms_norm",
        inputs=inputs,
        ours=lambda i: ((i["x"], i["weight"]), {}),
        eager=lambda i: (F.rms_norm(i["x"], i["weight"].shape, i["weight"], eps=1e-6),),
        values=lambda out: (out,),
    )


HEAD = 128


def _has_heads(shape: Shape) -> bool:
    """Whether the channels can be split into heads with an even number of channels each."""
    return shape.D % 8 == 0


def qk_norm_rope(across_heads: bool, names: str = "qkv") -> Case:
    """Write the image's q, k and v into a sequence that already has the text's, one text token per 32 of the image.

    Per head with the complex rotation of Qwen-Image and Z-Image, or across heads with the real rotation of Wan. If v is
    not in `names`, it is already in place.
    """

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        B, S, D = shape.size
        head = HEAD if D % HEAD == 0 else D // 4
        text = -(-S // 32)
        angle = torch.rand(S, head // 2, device=device)
        made = {"packed": torch.randn(B, S, 3 * D, device=device).to(shape.dtype)}
        for name in names:
            made[name] = torch.randn(B, text + S, D // head, head, device=device).to(shape.dtype)
            made[f"text {name}"] = made[name][:, :text].clone()
            if name != "v":
                made[f"{name} weight"] = (1 + 0.2 * torch.randn(D if across_heads else head, device=device)).to(
                    shape.dtype
                )
        return made | {"freqs": torch.stack((angle.cos(), angle.sin()), -1)}

    def thirds(i: Inputs) -> list[torch.Tensor]:
        return [t.unflatten(-1, i["q"].shape[2:]) for t in i["packed"].chunk(3, -1)][: len(names)]

    def rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        if not across_heads:
            numbers = torch.view_as_complex(x.to(freqs.dtype).unflatten(-1, (-1, 2)))
            return torch.view_as_real(numbers * torch.view_as_complex(freqs).unsqueeze(1)).flatten(3).to(x.dtype)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = freqs.unsqueeze(1).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = a * cos - b * sin
        out[..., 1::2] = a * sin + b * cos
        return out

    def eager(i: Inputs) -> Values:
        q, k, *v = thirds(i)
        image = []
        for x, weight in ((q, i["q weight"]), (k, i["k weight"])):
            normed = F.rms_norm(x.flatten(2) if across_heads else x, weight.shape, weight, eps=1e-6)
            image.append(rotate(normed.view(x.shape), i["freqs"]))
        return tuple(torch.cat((i[f"text {name}"], x), 1) for name, x in zip(names, image + v, strict=True))

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        outputs = [i[name][:, i[f"text {name}"].shape[1] :] for name in names]
        weights = {f"{name}_weight": i[f"{name} weight"] for name in "qk"}
        left_out = (None,) * (3 - len(names))
        args = *thirds(i), *left_out, *outputs, *left_out
        return args, {**weights, "freqs": i["freqs"], "across_heads": across_heads}

    return Case(
        name="qk_norm_rope" + (" across heads" if across_heads else "") + ("" if "v" in names else " without v"),
        op="qk_norm_rope",
        inputs=inputs,
        ours=ours,
        eager=eager,
        values=lambda out: out,
        written=tuple(names),
        places=tuple(3 + place for place in range(len(names))),
        fits=_has_heads,
    )


def _gelu() -> Case:
    return Case(
        name="gelu",
        op="gelu",
        inputs=lambda shape, device: {"x": hidden_states(shape, device, 1)[0]},
        ours=lambda i: ((i["x"],), {}),
        eager=lambda i: (F.gelu(i["x"], approximate="tanh"),),
        values=lambda out: (out,),
    )


def _swiglu() -> Case:
    """SwiGLU of the halves of one projection."""
    return Case(
        name="swiglu",
        op="swiglu",
        inputs=lambda shape, device: {"packed": torch.cat(hidden_states(shape, device, 2), -1)},
        ours=lambda i: (i["packed"].chunk(2, -1), {}),
        eager=lambda i: (F.silu(i["packed"].chunk(2, -1)[0]) * i["packed"].chunk(2, -1)[1],),
        values=lambda out: (out,),
    )


def _quantize(dtype: torch.dtype) -> Case:
    """Of a linear layer's input, as torchao does it: the largest magnitude, the quotient, the rounding."""
    limit = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]

    def eager(i: Inputs) -> Values:
        scale = i["x"].abs().amax(-1, keepdim=True) / limit
        y = i["x"] / scale
        return (y.round() * scale,) if dtype == torch.int8 else (y.to(dtype).to(scale.dtype) * scale,)

    return Case(
        name=f"quantize {str(dtype)[6:]}",
        op="quantize",
        inputs=lambda shape, device: {"x": hidden_states(shape, device, 1)[0]},
        ours=lambda i: ((i["x"], dtype), {}),
        eager=eager,
        values=lambda out: (out[0].float() * out[1].unsqueeze(-1),),
    )


def _in_int8(case: Case) -> Case:
    """A case whose last result is quantised in the same pass, where eager torch needs more of them."""

    def ours(i: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = case.ours(i)
        return args, kwargs | {"quantize": torch.int8}

    def eager(i: Inputs) -> Values:
        *others, y = case.eager(i)
        scale = y.abs().amax(-1, keepdim=True) / 127.0
        return *others, (y / scale).round() * scale

    return dataclasses.replace(
        case,
        name=f"{case.name} int8",
        ours=ours,
        eager=eager,
        values=lambda out: (*out[:-2], out[-2].float() * out[-1].unsqueeze(-1)),
        rounding=2e-3,
    )


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _relative_l1(),
        _residual_relative_l1(),
        _modulated_relative_l1("layer"),
        _modulated_relative_l1("rms"),
        _linear_forecast(0),
        _linear_forecast(1),
        qk_norm_rope(across_heads=False),
        qk_norm_rope(across_heads=True),
        qk_norm_rope(across_heads=False, names="qk"),
        qk_norm_rope(across_heads=True, names="qk"),
        _gelu(),
        _swiglu(),
        _quantize(torch.int8),
        _quantize(torch.float8_e4m3fn),
        _ada_layer_norm("layer"),
        _ada_layer_norm("rms"),
        _gate_residual_norm("layer"),
        _gate_residual_norm("rms"),
        _rms_norm(),
        _in_int8(_ada_layer_norm("layer")),
        _in_int8(_gate_residual_norm("layer")),
        _in_int8(_gelu()),
        _in_int8(_swiglu()),
    )
}


#: name → (case → function of its inputs). Results of "ours" still have to go through `Case.values`.
PROVIDERS: dict[str, Callable[[Case], Callable[[Inputs], Any]]] = {
    "ours": lambda case: case.run,
    "eager": lambda case: case.eager,
}


def wrong(case: Case, provider: str, output: Any, inputs: Inputs, dtype: torch.dtype) -> str | None:
    """What is wrong with a provider's output, compared with the eager form in fp64; None if it is correct."""
    values = case.values(output) if provider == "ours" else output
    doubled = {name: _double(value) for name, value in inputs.items()}
    for index, (value, truth) in enumerate(zip(values, case.eager(doubled), strict=True)):
        error = float((_double(value) - truth).norm() / truth.norm())
        allowed = TOLERANCE[dtype] + case.rounding
        if not error <= allowed:  # NaN is wrong as well
            return f"{provider} is off by {error:.1e} in output {index}; allowed is {allowed:.0e}"
    return None


def _double(value: Any) -> Any:
    """The value in fp64, on its own device if that supports fp64, else on the CPU."""
    if isinstance(value, list):
        return [_double(t) for t in value]
    return (value if has_fp64(value.device) else value.cpu()).double()
