"""The ops in torch's dispatcher: under torch.compile, on fake tensors, on devices that are not there."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from omni_kernels import ops, registration
from omni_kernels.ops import OPS
from omni_kernels.ops._quantized import MX

# Those that return what they compute; qk_norm_rope, which writes it where it is told to, has the same tests of its own.
NAMES = [
    "ada_layer_norm",
    "gate_residual_norm",
    "gelu",
    "linear_forecast",
    "modulated_relative_l1",
    "quantize",
    "relative_l1",
    "residual_relative_l1",
    "rms_norm",
    "scaled_mm",
    "swiglu",
]


def tensors(count, *shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


def arguments(name, dtype=torch.float32, device="cpu"):
    h = tensors(3, 2, 5, 24, dtype=dtype, device=device)
    rows = tensors(2, 2, 24, device=device)
    return {
        "gelu": (h[0],),
        "swiglu": (h[0], h[1]),
        "relative_l1": (h[0], h[1]),
        "residual_relative_l1": (h[0], h[1], h[2]),
        "modulated_relative_l1": (h[0], rows[0], rows[1], h[1]),
        "linear_forecast": (h[0], [h[1], h[2]], [0.5, -1.5]),
        "ada_layer_norm": (h[0], rows[0], rows[1]),
        "gate_residual_norm": (h[0], h[1], rows[0], rows[0], rows[1]),
        "rms_norm": (h[0], tensors(1, 24, device=device)[0]),
        "quantize": (h[0], torch.int8),
        "scaled_mm": (
            torch.ones(2, 5, 24, dtype=torch.int8, device=device),
            *tensors(1, 2, 5, device=device),
            torch.ones(3, 24, dtype=torch.int8, device=device),
            *tensors(1, 3, device=device),
        ),
    }[name]


def equal(a, b):
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(torch.equal(x, y) for x, y in pairs)


INDEX = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 0, 0, 0]])
# Of h alone: no index, a tanh, no norm of x, and none after.
ALONE = (None, True, None, 1e-6, None, None, None, 1e-6, None, False)
GROUPS = (
    torch.ones(2, 5, 256, dtype=torch.int8),
    torch.ones(2, 5, 2),
    torch.ones(128, 256, dtype=torch.int8),
    torch.ones(128),
)
NOT_IN_8_BITS, IN_8_BITS, BESIDE = (None, False), (torch.int8, False), (torch.float8_e4m3fn, True)
OVERLOADS = {
    "quantize": [
        ("default", arguments("quantize")),
        ("default", (*arguments("quantize")[:1], torch.float8_e4m3fn)),
        ("default", (torch.ones(2, 5, 64), MX)),
    ],
    "scaled_mm": [
        ("default", (*arguments("scaled_mm"), None, torch.bfloat16, False, None)),
        ("default", (*GROUPS, torch.ones(128), torch.float32, True, torch.float8_e4m3fn)),
    ],
    "scaled_mm_into": [
        ("default", (*arguments("scaled_mm"), torch.ones(3), torch.float16, True, None, torch.zeros(2, 5, 3).half())),
    ],
    "relative_l1": [("default", arguments("relative_l1"))],
    "residual_relative_l1": [
        ("default", arguments("residual_relative_l1")),
        ("default", (*arguments("residual_relative_l1", torch.bfloat16)[:2], None)),
    ],
    "modulated_relative_l1": [
        ("default", (*arguments("modulated_relative_l1"), "layer", None, 1e-6)),
        ("default", (*arguments("modulated_relative_l1")[:2], None, None, "rms", torch.ones(24), 1e-6)),
    ],
    "linear_forecast": [
        ("default", arguments("linear_forecast", torch.float16)),
        ("default", (torch.ones(2, 3), [], [])),
        ("tensor", (None, tensors(2, 3, 4), torch.tensor([0.5, 2.0]))),
    ],
    "ada_layer_norm": [
        ("default", (*arguments("ada_layer_norm"), None, "layer", None, None, 1e-6, *NOT_IN_8_BITS)),
        (
            "default",
            (*arguments("ada_layer_norm", torch.bfloat16)[:2], None, INDEX, "rms", *tensors(2, 24), 1e-6, *BESIDE),
        ),
    ],
    "gate_residual_norm": [
        ("default", (*arguments("gate_residual_norm"), None, False, None, 1e-6, "layer", None, None, 1e-6, *IN_8_BITS)),
        (
            "default",
            (
                *arguments("gate_residual_norm")[:2],
                *tensors(3, 4, 24),
                INDEX,
                True,
                *tensors(1, 24),
                1e-5,
                "rms",
                *tensors(2, 24),
                1e-6,
                *NOT_IN_8_BITS,
            ),
        ),
        ("default", (*arguments("gate_residual_norm", torch.bfloat16)[:3], None, None, *ALONE)),
    ],
    "rms_norm": [
        ("default", (*arguments("rms_norm"), 1e-6, *NOT_IN_8_BITS)),
        ("default", (tensors(1, 2, 3, 4, 8, dtype=torch.float16)[0].transpose(1, 2), None, 1e-6, *BESIDE)),
    ],
    "linear_forecast_into": [
        ("default", (*arguments("linear_forecast"), torch.empty(2, 5, 24))),
        ("tensor", (None, tensors(2, 3, 4), torch.tensor([0.5, 2.0]), torch.empty(3, 4, dtype=torch.bfloat16))),
    ],
    "gelu": [("default", (*arguments("gelu"), *how)) for how in (NOT_IN_8_BITS, IN_8_BITS)],
    "gelu_into": [("default", (*arguments("gelu"), *NOT_IN_8_BITS, torch.zeros(2, 5, 30)[..., 6:]))],
    "swiglu": [("default", (*arguments("swiglu", torch.bfloat16), *how)) for how in (NOT_IN_8_BITS, BESIDE)],
    "swiglu_into": [("default", (*arguments("swiglu"), *NOT_IN_8_BITS, torch.zeros(2, 5, 30)[..., 6:]))],
}


@pytest.mark.parametrize(
    ("name", "overload", "inputs"), [(name, *case) for name, cases in OVERLOADS.items() for case in cases]
)
def test_opcheck(name, overload, inputs):
    opcheck(getattr(getattr(torch.ops.omni_kernels, name), overload), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_takes_the_function_whole(name):
    torch._dynamo.reset()
    # The default backend once; the others differ in what they generate around an op, and there is nothing here.
    backend = "inductor" if name == "residual_relative_l1" else "aot_eager"
    function, inputs = OPS[name].function, arguments(name)
    assert equal(torch.compile(function, fullgraph=True, backend=backend)(*inputs), function(*inputs))


def test_torch_compile_takes_new_weights_and_an_output():
    torch._dynamo.reset()

    def step(base, history, weights, out):
        ops.linear_forecast(base, history, weights, out=out)
        return out + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    base, *history = tensors(3, 2, 5, 24)
    for weights in ([1.0, 0.0], [0.5, -1.5], [0.25, 3.0]):
        expected = ops.linear_forecast(base, history, weights)
        out = torch.empty_like(base)
        assert torch.equal(compiled(base, history, weights, out), expected + 1)
        assert torch.equal(out, expected)
    oldest = history[1].clone()
    assert torch.equal(compiled(base, [history[0], oldest], [0.25, 3.0], oldest), expected + 1)
    assert torch.equal(oldest, expected)


def test_torch_compile_takes_an_index_and_no_norm():
    torch._dynamo.reset()

    def block(x, added, modulation, index):
        scale, shift, gate = modulation.chunk(3, 1)
        y = ops.ada_layer_norm(x, scale, shift, index=index)
        h, nothing = ops.gate_residual_norm(y, added, gate, index=index, gate_tanh=True, norm=None)
        return h, nothing is None

    x, added = tensors(2, 2, 5, 24)
    (modulation,) = tensors(1, 4, 72)
    got, without = torch.compile(block, fullgraph=True, backend="aot_eager")(x, added, modulation, INDEX)
    assert without
    assert torch.equal(got, block(x, added, modulation, INDEX)[0])


@pytest.mark.parametrize("name", NAMES)
def test_fakes_have_the_shapes_dtypes_and_strides_of_the_results(name):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = OPS[name].function(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments(name)))
    real = OPS[name].function(*arguments(name))
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (fake, real)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", NAMES)
def test_plain_torch_stays_on_the_device(name):
    """On a device that is not there, every operator sees its tensors there; reading one to the host would raise."""
    with FakeTensorMode():
        result = OPS[name].reference(*arguments(name, torch.bfloat16, device="xpu"))
        if name == "linear_forecast":
            base, history, weights = arguments(name, device="xpu")
            weights = torch.empty(2, device="xpu")
            assert OPS[name].reference(base, history, weights).device.type == "xpu"
    assert all(t.device.type == "xpu" for t in (result if isinstance(result, tuple) else (result,)))


VARIANTS = ["linear_forecast.tensor", "linear_forecast_into.tensor"]


@pytest.mark.parametrize(
    "name",
    sorted({*OPS, *(f"{name}_into" for name in ("gelu", "linear_forecast", "swiglu")), *VARIANTS}),
)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "PrivateUse1", "CompositeExplicitAutograd", "Autograd"])
def test_every_device_has_an_implementation(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"omni_kernels::{name}", key)


WITH_GRADIENT = [
    *((name, {}) for name in NAMES),
    ("gelu", {"out": torch.empty(2, 5, 24)}),
    ("swiglu", {"out": torch.empty(2, 5, 24)}),
    ("linear_forecast", {"out": torch.empty(2, 5, 24)}),
    ("linear_forecast", {"weights": torch.ones(2)}),
    ("linear_forecast", {"weights": torch.ones(2), "out": torch.empty(2, 5, 24)}),
    ("gate_residual_norm", {"scale": None, "shift": None, "norm": None}),
]


def by_name(name, options):
    given = inspect.signature(OPS[name].function).bind(*arguments(name)).arguments
    return given | options


def launched_on_the_cpu():
    """The dispatcher runs the launchers, in Triton's interpreter, as it does where there is a GPU."""
    library = torch.library.Library("omni_kernels", "IMPL")
    for name, op in OPS.items():
        for base in (name, f"{name}_into"):
            packet = getattr(torch.ops.omni_kernels, base, None)
            for overload in packet.overloads() if packet else ():
                found = getattr(packet, overload)
                adapted = registration._adapted(str(found._schema))
                name_of = base if overload == "default" else f"{base}.{overload}"
                library.impl(name_of, adapted(op.launcher), "CPU", allow_override=True)
    return library


@pytest.mark.parametrize("launched", [False, True], ids=["plain torch", "Triton"])
@pytest.mark.parametrize(("name", "options"), WITH_GRADIENT)
def test_a_gradient_is_refused_by_the_name_of_who_wants_it(name, options, launched, request):
    if launched:
        library = launched_on_the_cpu()
        request.addfinalizer(library._destroy)
    given = by_name(name, options)
    OPS[name].function(**given)  # nothing wants one
    for argument, value in given.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            wanting = given | {argument: value.clone().requires_grad_()}
        elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
            wanting = given | {argument: [*value[:-1], value[-1].clone().requires_grad_()]}
        else:
            continue
        with pytest.raises(RuntimeError, match=rf"{name}: {argument} requires a gradient.*no_grad.*unpatch\(pipe\)"):
            OPS[name].function(**wanting)
        with torch.no_grad():
            OPS[name].function(**wanting)


def test_places_that_want_a_gradient_are_refused():
    q, k, v, *places = tensors(6, 1, 3, 2, 8)
    with pytest.raises(RuntimeError, match="qk_norm_rope: v requires a gradient"):
        ops.qk_norm_rope(q, k, v.requires_grad_(), *places)
    places[1] = places[1].requires_grad_()
    with pytest.raises(RuntimeError, match="qk_norm_rope: k_out requires a gradient"):
        ops.qk_norm_rope(q, k, v.detach(), *places)


def test_who_calls_the_dispatchers_op_is_refused_too():
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="gelu: x requires a gradient"):
        torch.ops.omni_kernels.gelu(x, None, False)
    with pytest.raises(RuntimeError, match="gelu: out requires a gradient"):
        torch.ops.omni_kernels.gelu_into(x.detach(), None, False, x)


def test_a_compiled_function_refuses_a_gradient():
    torch._dynamo.reset()
    compiled = torch.compile(ops.gelu, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="gelu: x requires a gradient"):
        compiled(torch.ones(2, 3, requires_grad=True))


def test_an_implementation_must_take_the_ops_arguments():
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return _op(x)

    def reference(y):
        return y * 2

    with pytest.raises(TypeError, match="reference takes y; it must take x, as the op does"):
        _op = registration.define(doubled, reference, reference)


def test_what_is_written_to_counts_as_changed():
    """Whoever saved it for a gradient of its own is told."""
    x, out = torch.ones(2, 3), torch.zeros(2, 3)
    before = out._version
    ops.gelu(x, out=out)
    assert out._version > before


def test_table_and_exports_agree():
    assert ops.__all__ == sorted(["OPS", *OPS, "trusted"])
    assert sorted(OPS) == sorted([*NAMES, "qk_norm_rope"])
    assert all(getattr(ops, name) is op.function for name, op in OPS.items())
    assert registration.NAMESPACE == "omni_kernels"


@pytest.mark.parametrize("name", NAMES)
def test_trusted_ops_are_plain_where_nobody_watches_and_the_public_ones_elsewhere(name):
    t = torch.zeros(1, 2)
    assert getattr(ops.trusted(t), name) is OPS[name].function  # autograd watches
    with torch.no_grad():
        assert getattr(ops.trusted(t), name) is OPS[name].reference
        assert getattr(ops.trusted(t.to("meta")), name) is OPS[name].function


@pytest.mark.parametrize(
    ("name", "elements", "rest"),
    [
        ("relative_l1", 2, 16),
        ("residual_relative_l1", 4, 16),
        ("modulated_relative_l1", 3, 2 * 2 * 24 * 4 + 16),
        ("linear_forecast", 4, 8),
        ("ada_layer_norm", 2, 2 * 2 * 24 * 4),
        ("gate_residual_norm", 4, 3 * 2 * 24 * 4),
        ("rms_norm", 2, 24 * 4),
        ("gelu", 2, 0),
        ("swiglu", 3, 0),
    ],
)
def test_bytes_moved_counts_every_tensor_once(name, elements, rest):
    inputs = arguments(name, torch.bfloat16, device="meta")
    assert OPS[name].bytes_moved(*inputs) == elements * 2 * 5 * 24 * 2 + rest


def test_bytes_moved_counts_what_is_given():
    x = torch.empty(2, 5, 24, device="meta")
    size = x.numel() * 4
    assert OPS["residual_relative_l1"].bytes_moved(x, x, None) == 3 * size + 16
    row = torch.empty(2, 24, device="meta")
    weight = row[0]
    options = {"norm": "rms", "weight": weight}
    assert OPS["modulated_relative_l1"].bytes_moved(x, row, None, None, **options) == 2 * size + 3 * 96 + 16
    index, two = torch.empty(2, 5, device="meta", dtype=torch.int32), torch.empty(4, 24, device="meta")
    assert OPS["ada_layer_norm"].bytes_moved(x, None, weight=weight, bias=weight) == 2 * size + 2 * 96
    assert OPS["ada_layer_norm"].bytes_moved(x, two, two, index=index) == 2 * size + 8 * 96 + 40
    assert OPS["gate_residual_norm"].bytes_moved(x, x, x_weight=weight, norm=None) == 3 * size + 96
    assert OPS["gate_residual_norm"].bytes_moved(x, x, two, index=index, bias=weight) == 4 * size + 5 * 96 + 40
    half = torch.empty(2, 5, 24, device="meta", dtype=torch.float16)
    assert OPS["linear_forecast"].bytes_moved(None, [x], [1.0], out=half) == size + size // 2 + 4


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_probes_no_device_and_loads_no_models():
    code = """
import sys, torch
import omni_kernels.ops
from triton.runtime.driver import driver
print(torch.cuda.is_initialized(), "active" in vars(driver) or bool(getattr(driver, "_active", None)))
print([name for name in ("diffusers", "transformers", "omni_runtime") if name in sys.modules])
"""
    assert run(code).splitlines() == ["False False", "[]"]


def test_the_ops_work_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from omni_kernels.ops import OPS, relative_l1
print(relative_l1(torch.ones(1, 3), torch.zeros(1, 3)).tolist())
try:
    OPS["relative_l1"].launcher(torch.ones(1, 3), torch.zeros(1, 3))
except RuntimeError as error:
    print(error)
"""
    assert run(code).splitlines() == [
        "[[3.0, 0.0]]",
        "Triton is not installed; the plain-torch implementation runs without it",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_past_the_dispatcher_or_through_it_the_bits_are_the_same(name, dtype):
    through = OPS[name].function(*arguments(name, dtype))  # autograd might be watching
    with torch.no_grad():
        past = OPS[name].function(*arguments(name, dtype))
    assert equal(through, past)


@pytest.mark.parametrize(
    "name", ["residual_relative_l1", "linear_forecast", "ada_layer_norm", "gate_residual_norm", "rms_norm"]
)
def test_whoever_watches_operators_sees_the_op_without_gradients_too(name):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    inputs = arguments(name)
    with torch.no_grad(), Watch():
        OPS[name].function(*inputs)
    assert [func.namespace for func in seen] == [registration.NAMESPACE]


@pytest.mark.parametrize("name", [*NAMES, "qk_norm_rope"])
def test_each_kind_of_device_has_its_implementation_directly(name):
    op = OPS[name]
    assert getattr(registration.DIRECT["cpu"], name) is op.reference
    assert getattr(registration.DIRECT["cuda"], name) is op.launcher
    assert callable(getattr(registration.DIRECT["npu"], name))


class OnAGpu(torch.Tensor):
    """Says that it is on a GPU, and is nothing but a tensor to whoever asks for its class."""

    is_cpu, is_cuda = False, True


def test_kernels_are_launched_directly_unless_somebody_watches(monkeypatch):
    """Of a GPU that is not there: what would be called, by what the tensor says of itself."""
    monkeypatch.setattr(registration, "_Tensor", OnAGpu)
    x = torch.ones(2, 3).as_subclass(OnAGpu)
    assert registration.direct(x) is None  # autograd
    with torch.no_grad():
        assert registration.direct(x).gelu is OPS["gelu"].launcher
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            assert registration.direct(x) is None
        seen = []
        torch.func.vmap(lambda row: seen.append(registration.direct(x)) or row)(torch.ones(2, 3))
        torch.jit.trace(lambda row: seen.append(registration.direct(x)) or row, torch.ones(2), check_trace=False)
        assert seen == [None, None]
        assert registration.direct(torch.ones(2, device="meta")) is None  # another class, here


def test_a_profile_names_the_ops():
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.gelu(torch.ones(2, 3))
    assert "omni_kernels::gelu" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("shape", [(1, 1 << 14), (1, (1 << 14) + 16), (3, 1 << 13), (1, 1 << 20)])
def test_sums_of_small_and_large_inputs_agree_on_the_cpu(shape):
    out, entered, before = tensors(3, *shape)
    _, sums = ops.residual_relative_l1(out, entered, before)
    residual = out.double() - entered.double()
    expected = torch.stack(((before.double() - residual).abs().sum(1), before.double().abs().sum(1)), 1)
    torch.testing.assert_close(sums.double(), expected, rtol=2e-6, atol=0)
