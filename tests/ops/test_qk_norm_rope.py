import sys

import pytest
import torch
from diffusers.models.transformers import transformer_flux, transformer_qwenimage, transformer_wan, transformer_z_image
from op_inputs import DTYPES, far_apart
from torch.library import opcheck

from omni_kernels.ops import OPS, qk_norm_rope
from omni_kernels.validation import oracle
from omni_kernels.validation.tolerances import assert_near

module = sys.modules["omni_kernels.ops.qk_norm_rope"]  # the package has the function under this name

LAYOUTS = ["interleaved", "half"]
# B, S, H, Dh: sizes of one, sizes that divide by nothing, the heads of models.
SHAPES = [(1, 1, 1, 2), (2, 1, 3, 6), (2, 7, 3, 48), (1, 5, 5, 128), (3, 4, 2, 64), (1, 3, 1, 256)]
BEFORE, BEHIND = 3, 2

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def angles(implementation, *shape):
    """Cosines and sines [*shape, 2]."""
    angle = implementation.randn(*shape)
    return torch.stack((angle.cos(), angle.sin()), -1)


def tables(freqs, layout="interleaved"):
    """Cosines and sines [S, Dh] of freqs [S, Dh/2, 2], each twice."""
    repeat = {"interleaved": lambda t: t.repeat_interleave(2, -1), "half": lambda t: torch.cat((t, t), -1)}[layout]
    return {"cos": repeat(freqs[..., 0]), "sin": repeat(freqs[..., 1])}


def weights(implementation, n, dtype=torch.float32):
    return {"q_weight": implementation.randn(n, dtype=dtype), "k_weight": implementation.randn(n, dtype=dtype)}


def joint(q, dtypes):
    """Buffers of a longer sequence for q, k and v, full of 42."""
    B, S, H, D = q.shape
    return [torch.full((B, BEFORE + S + BEHIND, H, D), 42.0, dtype=dtype, device=q.device) for dtype in dtypes]


def place(buffers):
    return [t[:, BEFORE:-BEHIND] for t in buffers]


def check(implementation, q, k, v, dtypes=None, truth=None, **options):
    """Against freqs, or those that the tables in the options are of."""
    buffers = joint(q, dtypes or [q.dtype, k.dtype, v.dtype])
    assert implementation["qk_norm_rope"](q, k, v, *place(buffers), **options) is None
    q_out, k_out, v_out = place(buffers)
    shared = {name: options[name] for name in ("eps", "freqs", "layout", "across_heads") if name in options}
    shared |= {} if truth is None else {"freqs": truth}
    assert_near(q_out, *oracle.rotated(q, options.get("q_weight"), **shared))
    assert_near(k_out, *oracle.rotated(k, options.get("k_weight"), **shared))
    assert_near(v_out, v.double())
    for t in buffers:
        assert (t[:, :BEFORE] == 42).all()
        assert (t[:, -BEHIND:] == 42).all()


@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_outputs_are_those_of_fp64(implementation, shape, dtypes, layout):
    _, S, _, D = shape
    q, k, v = (implementation.randn(*shape, dtype=dtype) for dtype in dtypes)
    options = weights(implementation, D, dtypes[2]) | {"freqs": angles(implementation, S, D // 2), "layout": layout}
    check(implementation, q, k, v, **options)


@every_layout
@pytest.mark.parametrize("shape", [(2, 3, 5, 48), (1, 1, 1, 2), (1, 2, 3, 128)], ids=str)
def test_a_norm_over_all_heads(implementation, shape, layout):
    _, S, H, D = shape
    q, k, v = (implementation.randn(*shape, dtype=torch.float16) for _ in range(3))
    options = weights(implementation, H * D) | {"freqs": angles(implementation, S, D // 2), "eps": 0.5}
    check(implementation, q, k, v, layout=layout, across_heads=True, **options)


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("given", ["nothing", "freqs", "weights", "q_weight", "k_weight and freqs"])
def test_norm_and_rotation_may_be_missing(implementation, given, across_heads):
    q, k, v = (implementation.randn(2, 3, 3, 24) for _ in range(3))
    options = weights(implementation, 72 if across_heads else 24)
    options = {name: t for name, t in options.items() if given == "weights" or name in given}
    if "freqs" in given:
        options["freqs"] = angles(implementation, 3, 12)
    check(implementation, q, k, v, across_heads=across_heads, **options)


@pytest.mark.parametrize("form", ["[S]", "[1, S]", "[B, S]", "cut", "offset"])
@every_layout
def test_forms_of_freqs(implementation, form, layout):
    B, S, H, D = 2, 5, 3, 16
    q, k, v = (implementation.randn(B, S, H, D) for _ in range(3))
    freqs = {
        "[S]": lambda: angles(implementation, S, D // 2),
        "[1, S]": lambda: angles(implementation, 1, S, D // 2),
        "[B, S]": lambda: angles(implementation, B, S, D // 2),
        "cut": lambda: angles(implementation, B, S, D)[:, :, ::2],
        "offset": lambda: torch.cat((torch.ones(1).to(q), angles(implementation, S * D // 2).flatten()))[1:].view(
            S, D // 2, 2
        ),
    }[form]()
    check(implementation, q, k, v, freqs=freqs, layout=layout)


@every_layout
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("form", ["plain", "fp16 and bf16", "a stretch", "transposed", "one for all"])
def test_forms_of_cos_and_sin(implementation, form, across_heads, layout):
    B, S, H, D = 2, 5, 3, 24
    q, k, v = (implementation.randn(B, S, H, D) for _ in range(3))
    made = tables(angles(implementation, 1 if form == "one for all" else 2 * S, D // 2), layout)
    cos, sin = (t.expand(S, D) if form == "one for all" else t[:S] for t in made.values())
    if form == "fp16 and bf16":
        cos, sin = cos.half(), sin.bfloat16()
    elif form == "a stretch":
        cos, sin = (t[S - 2 : 2 * S - 2] for t in made.values())
    elif form == "transposed":
        cos, sin = (t.t().contiguous().t() for t in (cos, sin))
    first = slice(0, None, 2) if layout == "interleaved" else slice(None, D // 2)
    truth = torch.stack((cos[:, first].float(), sin[:, first].float()), -1)
    options = weights(implementation, H * D if across_heads else D) | {"cos": cos, "sin": sin}
    check(implementation, q, k, v, truth=truth, layout=layout, across_heads=across_heads, **options)


@every_layout
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("form", ["[1, S]", "[B, S]", "fp16 and bf16", "a stretch", "expanded", "apart", "transposed"])
def test_cos_and_sin_of_each_head(implementation, form, across_heads, layout):
    B, S, H, D = 2, 5, 3, 24
    q, k, v = (implementation.randn(B, S, H, D) for _ in range(3))
    heads = 1 if form == "expanded" else H
    made = tables(angles(implementation, 1 if form == "[1, S]" else B, 2 * S, heads, D // 2), layout)
    cos, sin = (t[:, :S] for t in made.values())
    if form == "fp16 and bf16":
        cos, sin = cos.half(), sin.bfloat16()
    elif form == "a stretch":
        cos, sin = (t[:, S - 2 : 2 * S - 2] for t in made.values())
    elif form == "expanded":
        cos, sin = (t.expand(B, S, H, D) for t in (cos, sin))
    elif form == "apart":
        sin = sin.contiguous()
    elif form == "transposed":
        cos, sin = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (cos, sin))
    first = slice(0, None, 2) if layout == "interleaved" else slice(None, D // 2)
    truth = torch.stack((cos[..., first].float(), sin[..., first].float()), -1)
    options = weights(implementation, H * D if across_heads else D) | {"cos": cos, "sin": sin}
    check(implementation, q, k, v, truth=truth, layout=layout, across_heads=across_heads, **options)


@every_layout
@pytest.mark.parametrize("view", ["packed", "heads first", "offset", "one for all", "every other head"])
def test_views_give_what_their_elements_give(implementation, view, layout):
    B, S, H, D = 2, 5, 3, 32
    views = {
        "packed": lambda: implementation.randn(B, S, 3 * H * D).unflatten(-1, (3, H, D)).unbind(2),
        "heads first": lambda: implementation.randn(3, B, H, S, D).transpose(2, 3).unbind(),
        "offset": lambda: implementation.randn(3 * B * S * H * D + 1)[1:].view(3, B, S, H, D).unbind(),
        "one for all": lambda: implementation.randn(3, 1, S, H, D).expand(3, B, S, H, D).unbind(),
        "every other head": lambda: implementation.randn(3, B, S, 2 * H, D)[..., ::2, :].unbind(),
    }[view]()
    freqs = angles(implementation, S, D // 2)
    check(implementation, *views, freqs=freqs, layout=layout)
    check(implementation, *views, freqs=freqs, layout=layout, **weights(implementation, D))


def test_outputs_may_lie_in_any_order(implementation):
    B, S, H, D = 2, 5, 3, 32
    q, k, v = (implementation.randn(B, S, H, D) for _ in range(3))
    options = weights(implementation, D) | {"freqs": angles(implementation, S, D // 2)}
    expected = [torch.empty_like(t) for t in (q, k, v)]
    implementation["qk_norm_rope"](q, k, v, *expected, **options)
    heads_first = [torch.empty(B, H, S, D).to(q).transpose(1, 2) for _ in range(3)]
    implementation["qk_norm_rope"](q, k, v, *heads_first, **options)
    assert all(torch.equal(a, b) for a, b in zip(heads_first, expected, strict=True))


def test_outputs_have_dtypes_of_their_own(implementation):
    q, k, v = (implementation.randn(1, 5, 3, 32) for _ in range(3))
    check(implementation, q, k, v, [torch.float16, torch.bfloat16, torch.float32], freqs=angles(implementation, 5, 16))


def test_two_streams_fill_one_sequence(implementation):
    B, H, D = 2, 3, 16
    text, image = ([implementation.randn(B, S, H, D) for _ in range(3)] for S in (4, 9))
    norms = [weights(implementation, D) for _ in range(2)]
    freqs = angles(implementation, 13, D // 2)
    buffers = [torch.full((B, 13, H, D), float("nan")).to(text[0]) for _ in range(3)]
    run = implementation["qk_norm_rope"]
    run(*text, *(t[:, :4] for t in buffers), freqs=freqs[:4], **norms[0])
    run(*image, *(t[:, 4:] for t in buffers), freqs=freqs[4:], **norms[1])
    for j, name in enumerate(("q_weight", "k_weight")):
        pairs = [
            oracle.rotated(part[j], norm[name], freqs=table)
            for part, norm, table in zip((text, image), norms, freqs.split((4, 9)), strict=True)
        ]
        assert_near(buffers[j], *(torch.cat(both, 1) for both in zip(*pairs, strict=True)))
    assert torch.equal(buffers[2], torch.cat((text[2], image[2]), 1))


@every_layout
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_values_may_be_left_out(implementation, across_heads, normed, layout):
    B, S, H, D = 2, 5, 3, 24
    q, k, v = (implementation.randn(B, S, H, D, dtype=torch.bfloat16) for _ in range(3))
    options = weights(implementation, H * D if across_heads else D) if normed else {}
    options |= {"freqs": angles(implementation, S, D // 2), "layout": layout, "across_heads": across_heads}
    with_v, without = joint(q, [q.dtype] * 3), joint(q, [q.dtype] * 2)
    implementation["qk_norm_rope"](q, k, v, *place(with_v), **options)
    assert implementation["qk_norm_rope"](q, k, None, *place(without), None, **options) is None
    assert all(torch.equal(a, b) for a, b in zip(with_v, without, strict=False))


@every_layout
def test_many_odd_rows(implementation, large_blocks, layout):
    B, S, H, D = 1, 53, 7, 128
    q, k, v = (implementation.randn(B, S, H, D, dtype=torch.bfloat16) for _ in range(3))
    options = weights(implementation, D, torch.bfloat16) | {"freqs": angles(implementation, S, D // 2)}
    check(implementation, q, k, v, layout=layout, **options)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)], ids=str)
@pytest.mark.parametrize("across_heads", [False, True])
def test_nothing_writes_nothing(implementation, shape, across_heads):
    q, k, v = (implementation.randn(*shape) for _ in range(3))
    n = shape[3] * (shape[2] if across_heads else 1)
    options = weights(implementation, n) | {"freqs": angles(implementation, shape[1], shape[3] // 2)}
    check(implementation, q, k, v, across_heads=across_heads, **options)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
@every_layout
@pytest.mark.parametrize("normed", [False, True])
def test_infinities_and_nan_are_carried(implementation, layout, normed):
    q, k, v = (implementation.randn(1, 4, 3, 16, dtype=torch.float16) for _ in range(3))
    q[0, 0, 0, 0], k[0, 1, 1, 15], v[0, 2, 2, 3] = float("inf"), float("nan"), float("-inf")
    options = weights(implementation, 16) if normed else {}
    check(implementation, q, k, v, layout=layout, freqs=angles(implementation, 4, 8), **options)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter computes with numpy
def test_no_eps(implementation):
    q, k, v = (implementation.randn(1, 4, 3, 24) for _ in range(3))
    check(implementation, q, k, v, eps=0.0, **weights(implementation, 24))


@pytest.mark.parametrize("across_heads", [False, True])
def test_samples_far_apart(triton_launch, across_heads):
    q, k, v = (triton_launch.randn(3, 2, 3, 16, dtype=torch.bfloat16) for _ in range(3))
    options = weights(triton_launch, 48 if across_heads else 16) | {"freqs": angles(triton_launch, 2, 8)}
    near, far = ([torch.empty_like(q) for _ in range(3)] for _ in range(2))
    far = [far_apart(t) for t in far]
    run = triton_launch["qk_norm_rope"]
    run(q, k, v, *near, across_heads=across_heads, **options)
    run(*map(far_apart, (q, k, v)), *far, across_heads=across_heads, **options)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_tokens_too_long_for_a_program(triton_launch):
    q, k, v = (triton_launch.randn(1, 2, 65, 128) for _ in range(3))
    check(triton_launch, q, k, v, across_heads=True, **weights(triton_launch, 65 * 128))


# Against the attention processors of diffusers, whose attention is replaced by one that keeps what it is given.


class Projected(torch.nn.Module):
    """As much of diffusers' attention as a processor asks for before it attends: projections are the input's thirds."""

    def __init__(self, norms, heads, head_dim):
        super().__init__()
        self.heads, self.head_dim, self.inner_dim = heads, head_dim, heads * head_dim
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, norms.get(name))
        for name, third in (
            ("to_q", 0),
            ("to_k", 1),
            ("to_v", 2),
            ("add_q_proj", 0),
            ("add_k_proj", 1),
            ("add_v_proj", 2),
        ):
            setattr(self, name, lambda x, third=third: x.chunk(3, -1)[third])
        self.added_kv_proj_dim, self.fused_projections, self.is_cross_attention = None, False, False


class AttendedError(Exception):
    pass


def attended(monkeypatch, module, processor, *args, **kwargs):
    """q, k and v [B, S, H, Dh] as the processor hands them to attention."""

    def keep(q, k, v, *args, **kwargs):
        raise AttendedError(q, k, v)

    monkeypatch.setattr(module, "dispatch_attention_fn", keep)
    with pytest.raises(AttendedError) as kept, torch.no_grad():
        processor(*args, **kwargs)
    return kept.value.args


def is_theirs(ours, theirs, exact):
    """Ours is theirs in fp32; in fp16 it is nearer to fp64, for it rounds once."""
    for a, b, (truth, _) in zip(ours, theirs, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        else:
            assert (a.double() - truth).norm() <= (b.double() - truth).norm()


def thirds(x, H):
    return x.unflatten(-1, (3, H, -1)).unbind(2)


def norm(cls, n, eps, dtype):
    made = cls(n, eps=eps)
    torch.nn.init.normal_(made.weight)
    return made.to(dtype)


every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture
def on_cpu(implementation):
    if implementation.device != "cpu":
        pytest.skip("diffusers is asked on the CPU")
    return implementation["qk_norm_rope"]


@every_precision
def test_what_qwen_images_processor_computes(on_cpu, monkeypatch, dtype):
    H, D, text, image = 2, 16, 3, 5
    norms = {
        n: norm(transformer_qwenimage.RMSNorm, D, 1e-6, dtype)
        for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    }
    x, y = torch.randn(2, image, 3 * H * D).to(dtype), torch.randn(2, text, 3 * H * D).to(dtype)
    table = torch.polar(torch.ones(text + image, D // 2), torch.randn(text + image, D // 2))
    theirs = attended(
        monkeypatch, transformer_qwenimage, transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0(),
        Projected(norms, H, D), x, y, image_rotary_emb=(table[text:], table[:text]),
    )  # fmt: skip
    ours = [torch.empty(2, text + image, H, D, dtype=dtype) for _ in range(3)]
    freqs = torch.view_as_real(table)
    streams = [(y, slice(None, text), "norm_added_"), (x, slice(text, None), "norm_")]
    exact = []
    for stream, tokens, prefix in streams:
        w = [norms[prefix + which].weight.detach() for which in "qk"]
        parts = thirds(stream, H)
        on_cpu(*parts, *(t[:, tokens] for t in ours), q_weight=w[0], k_weight=w[1], freqs=freqs[tokens])
        exact.append([oracle.rotated(t, weight, freqs=freqs[tokens])[0] for t, weight in zip(parts, w, strict=False)])
    is_theirs(ours[:2], theirs[:2], [(torch.cat(both, 1), None) for both in zip(*exact, strict=True)])
    assert torch.equal(ours[2], theirs[2])


@every_precision
def test_what_z_images_processor_computes(on_cpu, monkeypatch, dtype):
    B, S, H, D = 2, 5, 2, 16
    norms = {n: norm(transformer_z_image.RMSNorm, D, 1e-5, dtype) for n in ("norm_q", "norm_k")}
    x = torch.randn(B, S, 3 * H * D).to(dtype)
    table = torch.polar(torch.ones(B, S, D // 2), torch.randn(B, S, D // 2))
    processor = transformer_z_image.ZSingleStreamAttnProcessor()
    theirs = attended(monkeypatch, transformer_z_image, processor, Projected(norms, H, D), x, freqs_cis=table)
    one_stream(on_cpu, x, H, norms, theirs, freqs=torch.view_as_real(table), eps=1e-5)


def one_stream(run, x, H, norms, theirs, tables=None, **options):
    """With freqs among the options, or the tables of cosines and sines."""
    parts = thirds(x, H)
    ours = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in parts]
    w = [norms[name].weight.detach() for name in ("norm_q", "norm_k")]
    rotation = {} if tables is None else dict(zip(("cos", "sin"), tables, strict=True))
    run(*parts, *ours, q_weight=w[0], k_weight=w[1], **rotation, **options)
    if tables is not None:
        options["freqs"] = torch.stack([t[:, ::2] for t in tables], -1)
    exact = [oracle.rotated(t, weight, **options) for t, weight in zip(parts, w, strict=False)]
    is_theirs(ours[:2], theirs[:2], exact)
    assert torch.equal(ours[2], theirs[2])


@every_precision
def test_what_fluxs_processor_computes(on_cpu, monkeypatch, dtype):
    B, S, H, D = 2, 5, 2, 16
    norms = {n: norm(torch.nn.RMSNorm, D, 1e-6, dtype) for n in ("norm_q", "norm_k")}
    x = torch.randn(B, S, 3 * H * D).to(dtype)
    table = transformer_flux.FluxPosEmbed(10000, [4, 6, 6])(torch.randint(0, 9, (S, 3)))
    processor = transformer_flux.FluxAttnProcessor()
    theirs = attended(monkeypatch, transformer_flux, processor, Projected(norms, H, D), x, image_rotary_emb=table)
    one_stream(on_cpu, x, H, norms, theirs, tables=table)


@every_precision
def test_what_wans_processor_computes(on_cpu, monkeypatch, dtype):
    B, H, D = 2, 3, 24
    norms = {n: norm(torch.nn.RMSNorm, H * D, 1e-6, dtype) for n in ("norm_q", "norm_k")}
    table = transformer_wan.WanRotaryPosEmbed(D, (1, 2, 2), 32)(torch.empty(B, 4, 2, 4, 6))
    S = 2 * 2 * 3
    x = torch.randn(B, S, 3 * H * D).to(dtype)
    attention = Projected(norms, H, D)
    attention.add_k_proj = None
    processor = transformer_wan.WanAttnProcessor()
    theirs = attended(monkeypatch, transformer_wan, processor, attention, x, rotary_emb=table)
    one_stream(on_cpu, x, H, norms, theirs, tables=[t[0, :, 0] for t in table], across_heads=True)


# In torch's dispatcher.


def arguments(dtype=torch.float32, device="cpu", B=2, S=5, H=3, D=16):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, S, 3, H, D, device=device).to(dtype).unbind(2)
    buffers = torch.zeros(3, B, S + 4, H, D, dtype=dtype, device=device)
    freqs = torch.randn(S, D // 2, 2, device=device)
    outs = buffers.narrow(2, 2, S).unbind()
    return (q, k, v, *outs), {"q_weight": torch.ones(D, device=device), "freqs": freqs}


def test_opcheck():
    tensors, options = arguments()
    op = torch.ops.omni_kernels.qk_norm_rope.default
    opcheck(op, (*tensors, options["q_weight"], None, 1e-6, options["freqs"], "half", False, None, None))
    opcheck(op, (*arguments(torch.bfloat16)[0], None, None, 1e-6, None, "interleaved", True, None, None))
    opcheck(op, (*tensors, None, None, 1e-6, None, "half", False, *tables(options["freqs"], "half").values()))
    q, k, _, q_out, k_out, _ = tensors
    opcheck(op, (q, k, None, q_out, k_out, None, None, None, 1e-6, None, "half", False, None, None))


def test_torch_compile_takes_two_streams_into_one_sequence():
    torch._dynamo.reset()
    (q, k, v, *_), options = arguments()

    def block(q, k, v):
        buffers = [q.new_zeros(2, 10, 3, 16) for _ in range(3)]
        for start in (0, 5):
            q_out, k_out, v_out = (t[:, start : start + 5] for t in buffers)
            if start:
                qk_norm_rope(q, k, v, q_out, k_out, v_out, **options)
            else:
                qk_norm_rope(q, k, None, q_out, k_out, None, **options)
        return [t + 1 for t in buffers]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(q, k, v), block(q, k, v), strict=True))


def test_torch_compile_writes_into_given_buffers():
    torch._dynamo.reset()
    tensors, options = arguments()
    expected, _ = arguments()
    qk_norm_rope(*expected, **options)
    torch.compile(lambda *t: qk_norm_rope(*t, **options), fullgraph=True, backend="aot_eager")(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert tensors[3].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_past_the_dispatcher_or_through_it_the_bits_are_the_same(dtype):
    through, options = arguments(dtype)
    past, _ = arguments(dtype)
    qk_norm_rope(*through, **options)  # autograd might be watching
    with torch.no_grad():
        qk_norm_rope(*past, **options)
    assert all(torch.equal(a, b) for a, b in zip(through, past, strict=True))


@pytest.mark.parametrize("run", [OPS["qk_norm_rope"].reference, qk_norm_rope])
@every_layout
def test_nothing_is_read_to_the_host(run, layout):
    """Where there are no numbers, reading one or mixing devices would raise."""
    tensors, options = arguments(torch.bfloat16, device="meta")
    run(*tensors, layout=layout, **options)
    run(*tensors, layout=layout, **tables(options["freqs"]))
    assert all(t.is_meta for t in tensors)


def test_bytes_moved_counts_every_tensor_once():
    tensors, options = arguments(torch.bfloat16, device="meta")
    size = 2 * 5 * 3 * 16 * 2
    assert OPS["qk_norm_rope"].bytes_moved(*tensors) == 6 * size
    assert OPS["qk_norm_rope"].bytes_moved(*tensors, **options) == 6 * size + 16 * 4 + 5 * 16 * 4
    assert OPS["qk_norm_rope"].bytes_moved(*tensors, **tables(options["freqs"])) == 6 * size + 2 * 5 * 16 * 4
    q, k, _, q_out, k_out, _ = tensors
    assert OPS["qk_norm_rope"].bytes_moved(q, k, None, q_out, k_out, None) == 4 * size


# What is refused.


def refused(message, *tensors, **options):
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*tensors, **options)


def test_overlaps_are_refused_by_name():
    memory = torch.zeros(2, 12, 3, 16)
    (*packed, _, _, _), _ = arguments()
    q, k, v = (t.contiguous() for t in packed)
    outs = [torch.zeros_like(t) for t in packed]
    refused("q_out overlaps q in memory", q, k, v, q, *outs[1:])
    refused("v_out overlaps k in memory", q, k, v, *outs[:2], k)
    refused("k_out overlaps q_out in memory", q, k, v, outs[0], outs[0], outs[2])
    refused("q_out overlaps v in memory", q, k, memory[:, 4:9], memory[:, :5], *outs[1:])
    refused("k_out is expanded", q, k, v, outs[0], torch.zeros(2, 1, 3, 16).expand(2, 5, 3, 16), outs[2])
    assert not any(t.any() for t in outs)
    # One behind the other is no overlap.
    qk_norm_rope(q[:1], k[:1], v[:1], memory[:1, :5], memory[:1, 5:10], memory[1:, :5])
    assert torch.equal(memory[:1, :5], q[:1])


def test_refused_by_name():
    (q, k, v, *outs), _ = arguments()
    empty = torch.empty
    refused(r"q has shape \[2, 5, 48\]; it must be \[B, S, H, Dh\]", q.flatten(2), k, v, *outs)
    refused(r"q has shape \[2, 5, 3, 15\]; .* an even Dh up to 256", q[..., 1:], k, v, *outs)
    refused(
        r"k_out has shape \[2, 5, 2, 16\]; it must be \[2, 5, 3, 16\], as q's is",
        q,
        k,
        v,
        outs[0],
        empty(2, 5, 2, 16),
        outs[2],
    )
    refused("v has dtype int32", q, k, v.int(), *outs)
    refused("v and v_out must be given together", q, k, None, *outs)
    refused("v and v_out must be given together", q, k, v, *outs[:2], None)
    refused("v_out is on meta; it must be on cpu", q, k, v, *outs[:2], outs[2].to("meta"))
    refused("layout is 'other'; allowed are 'interleaved' and 'half'", q, k, v, *outs, layout="other")
    refused("k has strides .*; the last one must be 1", q, empty(2, 5, 3, 32)[..., ::2], v, *outs)
    refused("q_out has strides .*; the last one must be 1", q, k, v, empty(2, 5, 3, 32)[..., ::2], *outs[1:])
    refused(r"q_weight has shape \[48\]; it must be \[16\], as a head of q's is", q, k, v, *outs, q_weight=empty(48))
    refused(
        r"k_weight has shape \[16\]; it must be \[48\], as all heads of q's is",
        *(q, k, v, *outs), k_weight=empty(16), across_heads=True,
    )  # fmt: skip
    refused("k_weight has dtype int64", q, k, v, *outs, k_weight=torch.ones(16, dtype=torch.int64))
    refused(r"freqs has shape \[5, 16\]; allowed are .* S = 5, Dh/2 = 8", q, k, v, *outs, freqs=empty(5, 16))
    refused(r"freqs has shape \[3, 5, 8, 2\]; .* B = 2 or 1", q, k, v, *outs, freqs=empty(3, 5, 8, 2))
    refused("freqs has dtype bfloat16; it must be float32$", q, k, v, *outs, freqs=empty(5, 8, 2).bfloat16())
    refused("complex64; .* torch.view_as_real", q, k, v, *outs, freqs=empty(5, 8, dtype=torch.complex64))
    refused("freqs is on meta", q, k, v, *outs, freqs=empty(5, 8, 2, device="meta"))


def test_tables_that_do_not_fit_are_refused():
    tensors, options = arguments()
    made = tables(options["freqs"])
    cos, sin = made.values()
    refused("cos and sin must be given together, and without freqs", *tensors, cos=cos)
    refused("cos and sin must be given together, and without freqs", *tensors, **made, freqs=options["freqs"])
    refused(r"cos has shape \[5, 8\]; it must be \[S, Dh\] = \[5, 16\], or", *tensors, cos=cos[:, :8], sin=sin)
    by_head = cos[None, :, None].expand(3, 5, 3, 16)
    refused(r"cos has shape \[3, 5, 3, 16\]; .* B = 2 or 1, H = 3", *tensors, cos=by_head, sin=by_head)
    refused(r"sin has shape \[4, 16\]; it must be \[5, 16\]", *tensors, cos=cos, sin=sin[:4])
    refused("cos has dtype float64", *tensors, cos=cos.double(), sin=sin)
    refused("sin is on meta; it must be on cpu", *tensors, cos=cos, sin=sin.to("meta"))
    refused("cos is on meta; it must be on cpu", *tensors, cos=cos.to("meta"), sin=sin.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("layout", "across_heads"), [("interleaved", False), ("half", False), ("interleaved", True)])
def test_q_and_k_of_one_tensor_are_computed_together_and_have_the_bits_that_they_have_apart(
    layout, across_heads, weighted, dtype, monkeypatch
):
    torch.manual_seed(0)
    both = torch.randn(2, 2, 5, 3, 8).to(dtype)
    size = 24 if across_heads else 8
    weights = torch.randn(2, size) if weighted else (None, None)
    options = {"layout": layout, "across_heads": across_heads, "freqs": torch.randn(5, 4, 2)}
    options |= {"q_weight": weights[0], "k_weight": weights[1]}
    joint, apart = torch.zeros(2, 2, 7, 3, 8, dtype=dtype), torch.zeros(2, 2, 7, 3, 8, dtype=dtype)
    computed = []
    stacked = module._stacked
    monkeypatch.setattr(module, "_stacked", lambda a, b: computed.append(stacked(a, b)) or computed[-1])
    with torch.no_grad():
        q, k = both.unbind()
        q_out, k_out = (t[:, 2:] for t in joint.unbind())
        OPS["qk_norm_rope"].reference(q, k, None, q_out, k_out, None, **options)
        q_out, k_out = (t[:, 2:] for t in (apart[0].clone(), apart[1].clone()))
        OPS["qk_norm_rope"].reference(q.clone(), k.clone(), None, q_out, k_out, None, **options)
    assert [one is not None for one in computed] == [True, True, False, False]
    assert torch.equal(joint[0, :, 2:], q_out)
    assert torch.equal(joint[1, :, 2:], k_out)
    assert not joint[:, :, :2].any()


def test_q_and_k_that_lie_otherwise_are_computed_apart():
    """k before q, of other strides, of another dtype, of another tensor, or nobody's view."""
    both = torch.randn(2, 1, 5, 3, 8)
    q, k = both.unbind()
    others = [(k, q), (q, both[1].transpose(1, 2)), (q, k.view(torch.int32)), (q, k.clone()), (q.clone(), k.clone())]
    for a, b in others:
        assert module._stacked(a, b) is None
    assert torch.equal(module._stacked(q, k), both)
