import pytest
import torch
from op_inputs import DTYPES

from omni_kernels.ops import OPS
from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS, channels, offset
from omni_kernels.validation.tolerances import assert_near

SHAPES = [(1, 1, 1), (1, 7, 1), (1, 1, 7), (3, 5, 17), (2, 33, 129), (2, 3, 3072)]
NORM = ("norm", "weight", "bias", "eps")
GATE = ("gate_tanh", "x_weight", "x_eps")


def check(implementation, residual, x, gate=None, scale=None, shift=None, index=None, **options):
    h, y = implementation["gate_residual_norm"](residual, x, gate, scale, shift, index=index, **options)
    assert h.dtype == residual.dtype
    assert h.is_contiguous()
    gated = {name: options[name] for name in GATE if name in options}
    assert_near(h, *oracle.gated_residual(residual, x, gate, index, **gated))
    if options.get("norm", "layer") is None:
        assert y is None
        return
    assert y.dtype == residual.dtype
    assert y.is_contiguous()
    # y is of h as it was rounded.
    normed = {name: options[name] for name in NORM if name in options}
    assert_near(y, *oracle.modulated(h, scale, shift, index=index, **normed))


def inputs(implementation, shape, dtypes=DTYPES[0], rows=None):
    """residual, x, gate, scale, shift."""
    B, _, D = shape
    hidden = [implementation.randn(*shape, dtype=dtype) for dtype in dtypes[:2]]
    return *hidden, *(implementation.randn(rows or B, D, dtype=dtypes[2]) for _ in range(3))


@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_h_and_y_are_those_of_fp64(implementation, norm, shape, dtypes):
    given = inputs(implementation, shape, dtypes)
    check(implementation, *(given if norm else given[:3]), norm=norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_large_odd_sample(implementation, large_blocks, norm):
    check(implementation, *inputs(implementation, (1, 389, 781), DTYPES[2]), norm=norm)


@pytest.mark.parametrize("D", [3840, 5120, 8192])
def test_a_row_to_a_program(implementation, D):
    weight = implementation.randn(D)
    given = inputs(implementation, (1, 2, D), DTYPES[3])
    check(implementation, *given, gate_tanh=True, x_weight=weight, norm="rms", weight=weight)


@pytest.mark.parametrize("form", ["[B, D]", "[B, 1, D]", "[1, D]", "[1, 1, D]", "[B, S, D]", "[1, S, D]"])
def test_forms_of_gate_scale_and_shift(implementation, form):
    B, S, D = 3, 10, 48
    residual, x, row, *_ = inputs(implementation, (B, S, D))
    shape = [{"B": B, "S": S, "D": D, "1": 1}[size] for size in form[1:-1].split(", ")]
    gate, scale, shift = (implementation.randn(*shape) for _ in range(3))
    check(implementation, residual, x, gate, scale, shift)
    check(implementation, residual, x, gate, scale, row)  # one may be per token and the others not


@pytest.mark.parametrize("without", ["gate", "scale", "shift", "gate and scale", "gate and scale and shift"])
def test_gate_scale_and_shift_may_be_missing(implementation, without):
    residual, x, *modulations = inputs(implementation, (2, 33, 129), DTYPES[3])
    named = zip(("gate", "scale", "shift"), modulations, strict=True)
    check(implementation, residual, x, *(None if name in without else t for name, t in named))


@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=str)
@pytest.mark.parametrize("with_gate", [True, False], ids=["gate", "no gate"])
def test_x_may_be_normed_before_the_gate(implementation, dtypes, with_gate):
    residual, x, gate, scale, _ = inputs(implementation, (2, 33, 129), dtypes)
    weight, x_weight = (implementation.randn(129, dtype=dtypes[2]) for _ in range(2))
    gate = gate if with_gate else None
    options = {"gate_tanh": True, "x_weight": x_weight, "x_eps": 0.5, "norm": "rms", "weight": weight, "eps": 0.25}
    check(implementation, residual, x, gate, scale, **options)
    check(implementation, residual, x, gate, norm=None, x_weight=x_weight)


def test_tanh_of_small_and_large_gates(implementation):
    magnitudes = torch.cat((torch.logspace(-30, 2, 500), torch.linspace(0.2, 0.3, 101), torch.tensor([0.25, 0.0])))
    gate = torch.cat((magnitudes, -magnitudes, torch.tensor([float("inf"), float("-inf"), float("nan")])))
    gate = gate.to(implementation.device)[None]
    ones = torch.ones_like(gate)[None]
    h, _ = implementation["gate_residual_norm"](torch.zeros_like(ones), ones, gate, gate_tanh=True, norm=None)
    assert_near(h, torch.tanh(gate.double())[None])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_weight_and_bias_of_the_norm(implementation, norm):
    residual, x, gate, *_ = inputs(implementation, (2, 5, 129), DTYPES[4])
    weight, bias = (implementation.randn(129, dtype=torch.float16) for _ in range(2))
    check(implementation, residual, x, gate, norm=norm, weight=weight, bias=bias, eps=0.5)
    check(implementation, residual, x, norm=norm, bias=bias)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
def test_an_index_selects_a_tokens_row(implementation, dtype):
    index = (torch.arange(18).reshape(2, 9) % 3 == 0).to(implementation.device, dtype)
    residual, x, gate, scale, shift = inputs(implementation, (2, 9, 129), rows=4)
    check(implementation, residual, x, gate, scale, shift, index)
    check(implementation, residual, x, gate, index=index, norm=None)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_y_is_what_the_next_norm_makes_of_the_stored_h(implementation, norm, dtypes):
    residual, x, gate, scale, shift = inputs(implementation, (2, 9, 129), dtypes)
    h, y = implementation["gate_residual_norm"](residual, x, gate, scale, shift, norm=norm)
    assert torch.equal(y, implementation["ada_layer_norm"](h, scale, shift, norm=norm))
    alone, nothing = implementation["gate_residual_norm"](residual, x, gate, norm=None)
    assert nothing is None
    assert torch.equal(alone, h)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_gives_nothing(implementation, shape):
    residual, *more = inputs(implementation, shape)
    h, y = implementation["gate_residual_norm"](residual, *more)
    assert h.shape == y.shape == residual.shape


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, view):
    residual, x, *_ = inputs(implementation, (3, 34, 48), DTYPES[2])
    gate, scale, shift = (implementation.randn(3, 34, 48) for _ in range(3))
    check(implementation, view(residual), x, gate, scale, shift)
    check(implementation, residual, view(x), view(gate), view(scale), view(shift))


@pytest.mark.parametrize("view", [channels, offset], ids=lambda view: view.__name__)
def test_chunks_of_the_modulation_give_what_their_elements_give(implementation, view):
    residual, x, *modulations = inputs(implementation, (2, 5, 48), DTYPES[2])
    x_weight, weight = (view(implementation.randn(1, 48))[0] for _ in range(2))
    check(implementation, residual, x, *(view(t) for t in modulations), x_weight=x_weight, weight=weight)


@pytest.mark.parametrize("rows", [2, 4], ids=["[B, D]", "[2B, D]"])
def test_chunks_of_one_projection_are_not_copied(triton_launch, no_copies, rows):
    residual, x, *_ = (channels(t) for t in inputs(triton_launch, (2, 5, 48), DTYPES[2]))
    shift, scale, gate, *_ = triton_launch.randn(rows, 6 * 48).chunk(6, 1)
    index = torch.arange(10).reshape(5, 2).T.to(triton_launch.device) % 3 if rows == 4 else None
    check(triton_launch, residual, x, gate, scale, shift, index)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_infinities_and_nan_are_carried_in_their_token(implementation, norm, dtypes):
    residual, x, gate, scale, shift = inputs(implementation, (6, 9, 100), dtypes)
    residual[0, 0, 0], residual[1, 8, 99], x[1, 0, 3] = float("inf"), float("nan"), float("-inf")
    gate[2, 3], scale[3, 3], shift[4, 99] = float("nan"), float("nan"), float("-inf")
    check(implementation, residual, x, gate, scale, shift, norm=norm)
    residual[1], x[5, 2, 7] = 0.0, float("inf")
    options = {"gate_tanh": True, "x_weight": implementation.randn(100)}
    check(implementation, residual, x, gate, scale, shift, norm=norm, **options)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
def test_no_eps(implementation):
    x = torch.zeros(1, 2, 100, device=implementation.device)
    x[0, 0, 0], x[0, 1] = 1.0, 1e-30  # the mean square of the second token is 0 in fp32
    residual, row = torch.zeros_like(x), torch.ones(100, device=implementation.device)
    h, y = implementation["gate_residual_norm"](residual, x, x_weight=row, x_eps=0.0, norm="rms", eps=0.0)
    expected = torch.zeros(100)
    expected[0] = 10.0
    assert_near(h[0, 0], expected)
    assert_near(y[0, 0], expected)
    assert h[0, 1].isinf().all()
    assert y[0, 1].isnan().all()  # ∞ / ∞


def test_rows_too_long_for_a_program(triton_launch):
    long = 8193
    given = inputs(triton_launch, (1, 2, long))
    check(triton_launch, *given)
    assert OPS["gate_residual_norm"].bytes_moved(*given) == 4 * long * (4 * 2 + 3)
    assert OPS["gate_residual_norm"].bytes_moved(*given[:3], norm=None) == 4 * long * (3 * 2 + 1)
