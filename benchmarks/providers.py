"""What is compared: each op as ours, as the other projects write it in eager torch, and that under torch.compile.

A `Case` is one use of one op. It makes inputs, runs the op, runs the eager form, and brings both to the same values,
which are compared with the same in fp64 before anything is timed. An eager form that carries other state (TaylorSeer's
ladder of derivatives where ours has snapshots) gets that state ready-made.

All providers are charged the bytes that the op itself has to move (`bytes_moved`): what a provider moves on top of
that shows as lost bandwidth.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.shapes import Shape
from omni_kernels.ops import OPS

Inputs = dict[str, Any]
Values = tuple[torch.Tensor, ...]

#: ‖value − fp64‖ / ‖fp64‖ that a provider may be off. bf16 has 8 bits; eager rounds after each operation.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One use of one op.

    Attributes:
        name: the op's name, and the variant where there are several.
        op: key of `omni_kernels.ops.OPS`.
        inputs: (shape, device) → the inputs of both forms.
        ours: inputs → the arguments of the op.
        eager: the form that other projects run, on the inputs.
        values: what the op returned → what `eager` returns.
    """

    name: str
    op: str
    inputs: Callable[[Shape, torch.device], Inputs]
    ours: Callable[[Inputs], tuple[tuple[Any, ...], dict[str, Any]]]
    eager: Callable[[Inputs], Values]
    values: Callable[[Any], Values]

    def bytes_moved(self, inputs: Inputs) -> int:
        """The op's own count."""
        args, kwargs = self.ours(inputs)
        return OPS[self.op].bytes_moved(*args, **kwargs)


def _hidden(shape: Shape, device: torch.device, count: int) -> list[torch.Tensor]:
    # Each is near the one before, as the states of successive steps are; none holds a value twice.
    first = torch.randn(shape.size, device=device)
    return [(first + 0.1 * j * torch.randn_like(first)).to(shape.dtype) for j in range(count)]


def _ratio(difference: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The relative L1 distance as TeaCache, cache-dit and diffusers' first-block cache write it."""
    return difference.abs().mean() / before.abs().mean()


def _ratio_of_sums(sums: torch.Tensor) -> torch.Tensor:
    numerator, denominator = sums.sum(0)
    return numerator / denominator


def _relative_l1() -> Case:
    return Case(
        name="relative_l1",
        op="relative_l1",
        inputs=lambda shape, device: dict(zip("xy", _hidden(shape, device, 2), strict=True)),
        ours=lambda i: ((i["x"], i["y"]), {}),
        eager=lambda i: (_ratio(i["x"] - i["y"], i["y"]),),
        values=lambda sums: (_ratio_of_sums(sums),),
    )


def _residual_relative_l1() -> Case:
    def inputs(shape: Shape, device: torch.device) -> Inputs:
        h_in, added, r_prev = _hidden(shape, device, 3)
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
        h, m_prev = _hidden(shape, device, 2)
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
    """Residual reuse (order 0) or TaylorSeer, two steps after the last of computed steps that lie two apart."""
    gap, k = 2.0, 2.0

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        base, *history = _hidden(shape, device, order + 2)
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


def _modulation(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Shift, scale and gate as blocks have them, chunks of one projection."""
    return list(torch.randn(shape.B, 6 * shape.D, device=device).mul_(0.2).to(shape.dtype).chunk(6, 1)[:3])


def _weight(shape: Shape, device: torch.device, D: int | None = None) -> torch.Tensor:
    return (1 + 0.2 * torch.randn(D or shape.D, device=device)).to(shape.dtype)


def _ada_layer_norm(norm: str) -> Case:
    """As Qwen-Image and FLUX write it, or Z-Image."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        shift, scale, _ = _modulation(shape, device)
        made = {"x": _hidden(shape, device, 1)[0], "scale": scale}
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
    """As Qwen-Image and FLUX write it, or Z-Image."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        shift, scale, gate = _modulation(shape, device)
        residual, x = _hidden(shape, device, 2)
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
    """Of heads, as attention norms q and k: 128 channels, or 64 where those do not divide."""

    def inputs(shape: Shape, device: torch.device) -> Inputs:
        D = 128 if shape.D % 128 == 0 else 64
        return {"x": _hidden(shape, device, 1)[0].unflatten(-1, (-1, D)), "weight": _weight(shape, device, D)}

    return Case(
        name="rms_norm heads",
        op="rms_norm",
        inputs=inputs,
        ours=lambda i: ((i["x"], i["weight"]), {}),
        eager=lambda i: (F.rms_norm(i["x"], i["weight"].shape, i["weight"], eps=1e-6),),
        values=lambda out: (out,),
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
        _ada_layer_norm("layer"),
        _ada_layer_norm("rms"),
        _gate_residual_norm("layer"),
        _gate_residual_norm("rms"),
        _rms_norm(),
    )
}


def _ours(case: Case) -> Callable[[Inputs], Any]:
    function = OPS[case.op].function

    def run(inputs: Inputs) -> Any:
        args, kwargs = case.ours(inputs)
        return function(*args, **kwargs)

    return run


def _compiled(case: Case) -> Callable[[Inputs], Any]:
    torch._dynamo.reset()  # there is a limit on recompilations of one function, which all shapes would share
    return torch.compile(case.eager, dynamic=False)


#: name → (case → what runs on its inputs). What ours returned still has to go through `Case.values`.
PROVIDERS: dict[str, Callable[[Case], Callable[[Inputs], Any]]] = {
    "ours": _ours,
    "eager": lambda case: case.eager,
    "torch.compile": _compiled,
}


def unavailable(provider: str, shape: Shape, device: torch.device) -> str | None:
    """Why `provider` is not run here; None where it is."""
    if provider != "torch.compile" or device.type != "cpu":
        return None
    if not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler on the CPU; there is none on the PATH"
    if shape.name != "qwen-image-1024":
        return "on the CPU torch.compile is measured at Qwen-Image's shape only: each compilation takes seconds"
    return None


def wrong(case: Case, provider: str, output: Any, inputs: Inputs, dtype: torch.dtype) -> str | None:
    """What is wrong with a provider's output, against the eager form in fp64; None where nothing is."""
    values = case.values(output) if provider == "ours" else output
    doubled = {name: _double(value) for name, value in inputs.items()}
    for index, (value, truth) in enumerate(zip(values, case.eager(doubled), strict=True)):
        error = float((value.double() - truth).norm() / truth.norm())
        if not error <= TOLERANCE[dtype]:  # NaN is wrong as well
            return f"{provider} is off by {error:.1e} in output {index}; allowed is {TOLERANCE[dtype]:.0e}"
    return None


def _double(value: Any) -> Any:
    return [t.double() for t in value] if isinstance(value, list) else value.double()
