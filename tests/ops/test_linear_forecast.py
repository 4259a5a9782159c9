import pytest
import torch
from op_inputs import DTYPES, EMPTY, SHAPES

from omni_kernels.validation import oracle
from omni_kernels.validation.layouts import VIEWS
from omni_kernels.validation.tolerances import assert_near

WEIGHTS = [0.5, -1.75, 3.0, 0.1, -0.3, 2.5, 1.0, -0.7]


def check(implementation, base, history, weights, dtype=None, out=None):
    expected, terms = oracle.linear_forecast(base, history, weights)
    result = implementation["linear_forecast"](base, history, weights, out=out)
    assert result.dtype == (dtype or (base if base is not None else history[0]).dtype)
    if out is None:
        assert result.is_contiguous()
    else:
        assert result is out
    assert_near(result, expected, terms)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forecast_is_that_of_fp64(implementation, shape, dtypes):
    base, *history = (implementation.randn(*shape, dtype=dtype) for dtype in dtypes)
    check(implementation, base, history, WEIGHTS[:2])


def test_every_row_of_an_odd_matrix_is_a_sample(implementation, large_blocks):
    base, *history = (implementation.randn(183, 781, dtype=torch.bfloat16) for _ in range(3))
    check(implementation, base, history, WEIGHTS[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", range(9))
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
def test_any_number_of_snapshots(implementation, K, with_base, dtype):
    if K == 0 and not with_base:
        return
    base, *history = (implementation.randn(2, 33, 65, dtype=dtype) for _ in range(K + 1))
    check(implementation, base if with_base else None, history, WEIGHTS[:K])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_sum_of_a_base_alone_is_a_copy(implementation, dtype):
    base = implementation.randn(2, 3, 5, dtype=dtype)
    copy = implementation["linear_forecast"](base, [], [])
    assert torch.equal(copy, base)
    assert copy.data_ptr() != base.data_ptr()


def test_history_and_weights_may_be_tuples(implementation):
    history = tuple(implementation.randn(2, 5) for _ in range(2))
    check(implementation, None, history, (1, -2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
def test_weights_in_a_tensor_give_the_same_bits(implementation, with_base, dtype):
    base, *history = (implementation.randn(2, 33, 65, dtype=dtype) for _ in range(4))
    base = base if with_base else None
    forecast = implementation["linear_forecast"]
    weights = torch.tensor(WEIGHTS[:3], device=implementation.device)
    assert torch.equal(forecast(base, history, weights), forecast(base, history, weights.tolist()))
    out = torch.empty_like(history[0])
    assert forecast(base, history, weights, out=out) is out
    assert torch.equal(out, forecast(base, history, weights))


@pytest.mark.parametrize("dtypes", DTYPES[1:4], ids=str)
def test_large_odd_sample(implementation, large_blocks, dtypes):
    base, *history = (implementation.randn(1, 1823, 781, dtype=dtype) for dtype in dtypes)
    check(implementation, base, history, WEIGHTS[:2])


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_gives_nothing(implementation, shape):
    base, *history = (implementation.randn(*shape) for _ in range(3))
    assert implementation["linear_forecast"](base, history, [1.0, 2.0]).shape == shape


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_views_give_what_their_elements_give(implementation, view):
    plain = [implementation.randn(3, 34, 48, dtype=torch.bfloat16) for _ in range(3)]
    for viewed in range(3):
        base, *history = (view(t) if j == viewed else t for j, t in enumerate(plain))
        check(implementation, base, history, WEIGHTS[:2])
    base, *history = (view(t) for t in plain)
    check(implementation, base, history, WEIGHTS[:2])
    check(implementation, None, history, WEIGHTS[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", range(3))
def test_out_may_be_any_of_the_inputs(implementation, place, dtype):
    tensors = [implementation.randn(2, 33, 65, dtype=dtype) for _ in range(3)]
    base, *history = tensors
    fresh = implementation["linear_forecast"](base, history, WEIGHTS[:2])
    others = [t.clone() for j, t in enumerate(tensors) if j != place]
    assert implementation["linear_forecast"](base, history, WEIGHTS[:2], out=tensors[place]) is tensors[place]
    assert torch.equal(tensors[place], fresh)
    assert all(torch.equal(a, b) for a, b in zip(others, [t for j, t in enumerate(tensors) if j != place], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_may_overlap_an_input_in_part(implementation, dtype):
    memory = implementation.randn(5001, dtype=dtype)
    other = implementation.randn(1, 5000, dtype=dtype)
    expected, terms = oracle.linear_forecast(None, [other, memory[None, :5000].clone()], WEIGHTS[:2])
    out = memory[None, 1:]
    implementation["linear_forecast"](None, [other, memory[None, :5000]], WEIGHTS[:2], out=out)
    assert_near(out, expected, terms)
    before = memory[:5000].clone()
    implementation["linear_forecast"](memory[None, :5000], [], [], out=out)
    assert torch.equal(out[0], before)


@pytest.mark.parametrize("start", [0, 1, 4999, 5001, 9999], ids="from {}".format)
@pytest.mark.parametrize("place", ["base", "first", "last"])
def test_out_may_begin_or_end_within_any_input(implementation, place, start):
    """What lies at 5000, 5001, ..., 9999 is read before it is overwritten: one in common, or half, or all but one."""
    memory = torch.arange(15000.0, device=implementation.device)
    inside, ones = memory[None, 5000:10000], torch.ones(1, 5000, device=implementation.device)
    base, history, weights = {
        "base": (inside, [ones, ones], [1.0, 2.0]),
        "first": (None, [inside, ones], [1.0, 3.0]),
        "last": (ones, [ones, inside], [2.0, 1.0]),
    }[place]
    out = memory[None, start : start + 5000] if start else memory[None, 1:10001:2]
    assert implementation["linear_forecast"](base, history, weights, out=out) is out
    assert torch.equal(out.cpu(), torch.arange(5003.0, 10003.0)[None])


def test_out_may_be_an_input_in_another_order(implementation):
    square = torch.arange(9.0, device=implementation.device).view(1, 3, 3)
    ones = torch.ones(1, 3, 3, device=implementation.device)
    implementation["linear_forecast"](square, [ones], [1.0], out=square.transpose(1, 2))
    assert square.tolist() == [[[1, 4, 7], [2, 5, 8], [3, 6, 9]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["aligned", "offset by one", "first tokens", "transposed"])
def test_out_is_written_and_nothing_around_it(implementation, place, dtype):
    history = [implementation.randn(2, 33, 65) for _ in range(2)]
    memory = torch.full((3 * 40 * 65,), 42.0, dtype=dtype, device=implementation.device)
    out = {
        "aligned": lambda: memory[64 : 64 + 2 * 33 * 65].view(2, 33, 65),
        "offset by one": lambda: memory[1 : 1 + 2 * 33 * 65].view(2, 33, 65),
        "first tokens": lambda: memory.view(3, 40, 65)[:2, :33],
        "transposed": lambda: memory.view(3, 65, 40)[:2, :, :33].transpose(1, 2),
    }[place]()
    check(implementation, None, history, WEIGHTS[:2], dtype=dtype, out=out)
    out.fill_(42.0)
    assert (memory == 42).all()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_infinities_and_nan_are_carried(implementation, dtypes):
    base, *history = (implementation.randn(3, 9, 100, dtype=dtype) for dtype in dtypes)
    base[0, 0, 0], history[0][1, 8, 99], history[1][2, 3, 4] = float("inf"), float("-inf"), float("nan")
    check(implementation, base, history, [0.0, 1.0])
    check(implementation, base, history, [1.0, -2.0])
