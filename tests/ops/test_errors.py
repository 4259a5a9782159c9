"""What the ops refuse: by the name of the argument, with what is allowed."""

import pytest
import torch

from omni_kernels.ops import (
    ada_layer_norm,
    gate_residual_norm,
    gelu,
    linear_forecast,
    modulated_relative_l1,
    relative_l1,
    residual_relative_l1,
    rms_norm,
    swiglu,
)

h, other_shape, integers = torch.ones(2, 5, 24), torch.ones(2, 4, 24), torch.ones(2, 5, 24, dtype=torch.int32)
double, meta, row, scalar = h.double(), torch.empty(2, 5, 24, device="meta"), torch.ones(2, 24), torch.ones(())
index, two = torch.zeros(2, 5, dtype=torch.int64), torch.ones(4, 24)

CASES = [
    (lambda: relative_l1(h, other_shape), r"relative_l1: y has shape \[2, 4, 24\]; it must be \[2, 5, 24\], as x's is"),
    (lambda: relative_l1(integers, h), "relative_l1: x has dtype int32; allowed are float32, float16 and bfloat16"),
    (lambda: relative_l1(h, double), "relative_l1: y has dtype float64; allowed are float32, float16 and bfloat16"),
    (lambda: relative_l1(h, meta), "relative_l1: y is on meta; it must be on cpu, as x is"),
    (lambda: relative_l1(scalar, scalar), "relative_l1: x has no dimensions; the first one must be the batch"),
    (lambda: residual_relative_l1(h, h, other_shape), r"r_prev has shape \[2, 4, 24\]; it must be \[2, 5, 24\]"),
    (lambda: residual_relative_l1(h, integers, None), "h_in has dtype int32; allowed are"),
    (lambda: residual_relative_l1(h, h, meta), "r_prev is on meta; it must be on cpu, as h_out is"),
    (lambda: residual_relative_l1(scalar, scalar, None), "h_out has no dimensions"),
    (lambda: modulated_relative_l1(row, row, None, None), r"h has shape \[2, 24\]; it must be \[B, S, D\]"),
    (lambda: modulated_relative_l1(integers, row, None, None), "h has dtype int32"),
    (lambda: modulated_relative_l1(h, row, None, other_shape), r"m_prev has shape \[2, 4, 24\]"),
    (lambda: modulated_relative_l1(h, row, None, None, norm="group"), "norm is 'group'; allowed are 'layer' and 'rms'"),
    (lambda: modulated_relative_l1(h, torch.ones(24), None, None), r"scale has shape \[24\]; allowed are \[B, D\], "),
    (lambda: modulated_relative_l1(h, torch.ones(3, 24), None, None), r"scale has shape \[3, 24\]; .* B = 2 or 1"),
    (lambda: modulated_relative_l1(h, row, other_shape, None), r"shift has shape \[2, 4, 24\]; .* S = 5, D = 24"),
    (lambda: modulated_relative_l1(h, torch.ones(2, 1, 1), None, None), r"scale has shape \[2, 1, 1\]"),
    (lambda: modulated_relative_l1(h, row.int(), None, None), "scale has dtype int32"),
    (lambda: modulated_relative_l1(h, row, row.to("meta"), None), "shift is on meta; it must be on cpu, as h is"),
    (lambda: modulated_relative_l1(h, row, None, None, weight=torch.ones(23)), r"weight has shape \[23\]; .* \[24\]"),
    (lambda: modulated_relative_l1(h, row, None, None, weight=torch.ones(24).int()), "weight has dtype int32"),
    (lambda: modulated_relative_l1(h, row, None, None, weight=torch.ones(24, device="meta")), "weight is on meta"),
    (lambda: linear_forecast(None, [], []), "base is None and history is empty; one of them must be given"),
    (lambda: linear_forecast(h, [h], [1.0, 2.0]), "weights has 2 numbers; it must have 1, one per snapshot"),
    (lambda: linear_forecast(h, [h], []), "weights has 0 numbers; it must have 1, one per snapshot"),
    (lambda: linear_forecast(h, [h], torch.ones(2)), r"weights has shape \[2\]; it must be \[1\], one per snapshot"),
    (lambda: linear_forecast(h, [h], torch.ones(1, device="meta")), "weights is on meta; it must be on cpu"),
    (lambda: gelu(integers), "gelu: x has dtype int32"),
    (lambda: gelu(scalar), "gelu: x has no dimensions"),
    (lambda: gelu(h, out=other_shape), r"gelu: out has shape \[2, 4, 24\]"),
    (lambda: gelu(h, out=integers), "gelu: out has dtype int32"),
    (lambda: swiglu(h, other_shape), r"swiglu: up has shape \[2, 4, 24\]; it must be \[2, 5, 24\], as gate's is"),
    (lambda: swiglu(h, meta), "swiglu: up is on meta; it must be on cpu, as gate is"),
    (lambda: swiglu(h, h, out=other_shape), r"swiglu: out has shape \[2, 4, 24\]"),
    (lambda: linear_forecast(h, [h], torch.ones(1).int()), "weights has dtype int32"),
    (lambda: linear_forecast(h, [h] * 17, [1.0] * 17), "history has 17 tensors; allowed are 0 to 16"),
    (lambda: linear_forecast(h, [h, other_shape], [1.0, 1.0]), r"history\[1\] has shape \[2, 4, 24\]"),
    (lambda: linear_forecast(None, [h, integers], [1.0, 1.0]), r"history\[1\] has dtype int32"),
    (lambda: linear_forecast(h, [meta], [1.0]), r"history\[0\] is on meta; it must be on cpu, as base is"),
    (lambda: linear_forecast(h, [h], [1.0], out=other_shape), r"out has shape \[2, 4, 24\]"),
    (lambda: linear_forecast(h, [h], [1.0], out=integers), "out has dtype int32"),
    (lambda: linear_forecast(integers, [], []), "base has dtype int32"),
    (lambda: linear_forecast(scalar, [], []), "base has no dimensions"),
    (lambda: ada_layer_norm(row, row), r"ada_layer_norm: x has shape \[2, 24\]; it must be \[B, S, D\]"),
    (lambda: ada_layer_norm(double, row), "ada_layer_norm: x has dtype float64; allowed are"),
    (lambda: ada_layer_norm(h, row, norm="group"), "ada_layer_norm: norm is 'group'; allowed are 'layer' and 'rms'"),
    (lambda: ada_layer_norm(h, row, norm=None), "norm is None; allowed are 'layer' and 'rms'"),
    (lambda: ada_layer_norm(h, torch.ones(3, 24)), r"scale has shape \[3, 24\]; allowed .* B = 2 or 1, S = 5, D = 24"),
    (lambda: ada_layer_norm(h, row, row.int()), "shift has dtype int32"),
    (lambda: ada_layer_norm(h, row.to("meta")), "scale is on meta; it must be on cpu, as x is"),
    (lambda: ada_layer_norm(h, row, index=index), r"scale has .* with an index it must be \[2B, D\] = \[4, 24\]"),
    (lambda: ada_layer_norm(h, None, h, index=index), r"shift has shape \[2, 5, 24\]; with an index it must be \[2B"),
    (lambda: ada_layer_norm(h, two), r"scale has shape \[4, 24\]; allowed are"),
    (lambda: ada_layer_norm(h, two, index=index[0]), r"index has shape \[5\]; it must be \[B, S\] = \[2, 5\]"),
    (lambda: ada_layer_norm(h, two, index=index.float()), "index has dtype float32; it must be bool or an integer"),
    (lambda: ada_layer_norm(h, two, index=index.to("meta")), "index is on meta; it must be on cpu, as x is"),
    (lambda: ada_layer_norm(h, row, weight=torch.ones(23)), r"weight has shape \[23\]; it must be \[24\], as one row"),
    (lambda: ada_layer_norm(h, row, bias=row), r"bias has shape \[2, 24\]; it must be \[24\], as one row of x's is"),
    (lambda: gate_residual_norm(row, row), r"gate_residual_norm: residual has shape \[2, 24\]; it must be \[B, S, D\]"),
    (
        lambda: gate_residual_norm(h, other_shape),
        r"x has shape \[2, 4, 24\]; it must be \[2, 5, 24\], as residual's is",
    ),
    (lambda: gate_residual_norm(h, meta), "x is on meta; it must be on cpu, as residual is"),
    (lambda: gate_residual_norm(h, h, torch.ones(24)), r"gate has shape \[24\]; allowed are \[B, D\], "),
    (lambda: gate_residual_norm(h, h, two, two, row, index=index), r"shift has shape \[2, 24\]; with an index"),
    (lambda: gate_residual_norm(h, h, norm="group"), "norm is 'group'; allowed are 'layer', 'rms' and None"),
    (lambda: gate_residual_norm(h, h, scale=row, norm=None), "scale is given, and norm is None"),
    (lambda: gate_residual_norm(h, h, bias=row[0], norm=None), "bias is given, and norm is None"),
    (lambda: gate_residual_norm(h, h, x_weight=row), r"x_weight has shape \[2, 24\]; it must be \[24\]"),
    (lambda: rms_norm(scalar), "rms_norm: x has no dimensions; it is normalised over the last one"),
    (lambda: rms_norm(integers), "rms_norm: x has dtype int32; allowed are float32, float16 and bfloat16"),
    (lambda: rms_norm(h, row), r"weight has shape \[2, 24\]; it must be \[24\], as one row of x's is"),
    (lambda: rms_norm(h, row[0].int()), "rms_norm: weight has dtype int32"),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message for _, message in CASES])
def test_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
