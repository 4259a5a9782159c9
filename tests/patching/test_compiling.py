"""Regional compilation under `patch` and `Omni`: one graph a kind of block, no breaks, nothing compiled twice."""

import inspect
import warnings

import pytest
import tiny
import torch
from pairs import in_turn
from torch._inductor import cudagraph_trees

import omni_kernels
from omni_kernels.patching import calls, compiled, structure
from omni_runtime import Omni

CACHES = {
    None: {},
    "tea_cache": {"rel_l1_thresh": 0.3, "coefficients": [0, 0, 0, 1, 0]},
    "first_block_cache": {"threshold": 0.4},
    "cache_dit": {"max_warmup_steps": 2, "Bn_compute_blocks": 1, "residual_diff_threshold": 0.5},
    "mag_cache": {"threshold": 0.4, "retention_ratio": 0.0, "mag_ratios": [1.0, 1.1]},
    "sea_cache": {"threshold": 0.6},
    "easy_cache": {"thresh": 0.6, "ret_steps": 0},
    "velocity_cache": {"budget": 3},
}
#: the same caches run otherwise
VARIANTS = {
    "replay": ("tea_cache", CACHES["tea_cache"] | {"decision": "replay"}),
    "library": ("cache_dit", {"engine": "library", "max_warmup_steps": 2, "residual_diff_threshold": 0.5}),
}
OTHER = {"seed": 3, "prompt": "a dog that is no cat at all"}


class Counting:
    """The eager backend, the graphs that it was given, and how often they ran."""

    def __init__(self):
        self.graphs, self.ran = [], 0

    def __call__(self, graph, inputs):
        self.graphs.append(graph)

        def run(*inputs):
            self.ran += 1
            return graph.forward(*inputs)

        return run


class WrittenOver:
    """Stands for CUDA graphs on the CPU: what its graphs return is gone as soon as another generation of them runs.

    Which calls are of one generation is torch's own rule: those between two marks, and without any each by itself.
    """

    def __init__(self):
        self.graphs, self.generation, self.generations, self.returned = [], None, 0, []

    def __call__(self, graph, inputs, mode=None):
        assert mode == "reduce-overhead"
        self.graphs.append(graph)

        def run(*inputs):
            now = cudagraph_trees.CUDAGraphTreeManager.get_curr_generation()
            if now != self.generation:
                self.generation, self.generations = now, self.generations + 1
                for tensor in self.returned:
                    tensor.data.fill_(float("nan"))  # as a graph writes: no version counter sees it
                self.returned.clear()
            made = [one.clone() if isinstance(one, torch.Tensor) else one for one in graph.forward(*inputs)]
            self.returned += [one for one in made if isinstance(one, torch.Tensor)]
            return made

        return run


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(cudagraph_trees.MarkStepBox, "mark_step_counter", 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    structure._own.clear()  # as in a new process: no graph may depend on what was seen before
    yield
    torch._dynamo.reset()


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **arguments)


def off(now, expected):
    return ((now - expected).norm() / expected.norm()).item()


def reduced(backend):
    return {"backend": backend, "mode": "reduce-overhead"}


@pytest.mark.parametrize("kind", [WrittenOver, pytest.param(Counting, marks=pytest.mark.long)])
@pytest.mark.parametrize(("cache", "fuse"), in_turn([*CACHES, *VARIANTS], [False, True]))
def test_no_break_and_nothing_compiled_again(qwen_pipe, cache, fuse, kind):
    """Nor does a cache hold what lies in a graph's memory from one forward to the next, nor does a block."""
    backend, config = VARIANTS.get(cache) or (cache, CACHES[cache])
    with omni_kernels.patched(qwen_pipe, backend, config, fuse=fuse) as handle:
        expected, other = latents(qwen_pipe), latents(qwen_pipe, **OTHER)
        report = handle.report
    compiler = kind()
    how = reduced(compiler) if kind is WrittenOver else {"backend": compiler}
    with omni_kernels.patched(qwen_pipe, backend, config, fuse=fuse, compile=how) as handle:
        assert len(handle.compiled) == len(qwen_pipe.transformer.transformer_blocks)
        assert off(latents(qwen_pipe), expected) < 1e-4
        warm = len(compiler.graphs)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert off(latents(qwen_pipe, **OTHER), other) < 1e-4
        assert 0 < warm == len(compiler.graphs)
        # The library's first forward also runs without it. The model names arguments that the library passes by place.
        assert warm <= 2 + (cache == "library"), "all blocks share a graph, another text length takes one more"
        if backend is not None:
            assert handle.report.forwards_saved == report.forwards_saved > 0
    assert kind is Counting or compiler.generations > 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["z_image", "flux"])
def test_other_models_under_a_cache_are_compiled_once(name):
    pipe, compiler, config = tiny.PIPELINES[name](), Counting(), CACHES["first_block_cache"]
    with omni_kernels.patched(pipe, "first_block_cache", config, fuse=True) as handle:
        expected, other = latents(pipe), latents(pipe, **OTHER)
        report = handle.report
    how = {"fuse": True, "compile": {"backend": compiler}}
    with omni_kernels.patched(pipe, "first_block_cache", config, **how) as handle:
        assert off(latents(pipe), expected) < 1e-4
        warm = len(compiler.graphs)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert off(latents(pipe, **OTHER), other) < 1e-4
        assert 0 < warm == len(compiler.graphs)
        assert handle.report.forwards_saved == report.forwards_saved > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_third_size_is_compiled_no_more():
    """The first is compiled for its own shapes, the second for all; after that, any is at hand."""
    pipe, compiler = tiny.qwen_image(layers=1), Counting()
    how = {"negative_prompt": None, "num_inference_steps": 2}
    sizes = [(64, 64), (96, 64), (64, 128)]
    expected = [latents(pipe, height=h, width=w, **how) for h, w in sizes]
    with omni_kernels.patched(pipe, compile={"backend": compiler}):
        for number, ((h, w), wanted) in enumerate(zip(sizes, expected, strict=True)):
            with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
                assert off(latents(pipe, height=h, width=w, **how), wanted) < 1e-4
    assert len(compiler.graphs) == 2
    assert not torch._dynamo.utils.counters["graph_break"]


PROMPTS = ["a b c d e", "q", "z z"]
SHORT = {"num_inference_steps": 2}
#: requests, and the graphs that they take
MIXES = {
    # text lengths static and not, with a mask (batches) and without; a batch of one is always a graph of its own
    "batches": (
        [SHORT | {"prompt": PROMPTS[:n], "negative_prompt": ["q"] * n} for n in (1, 2, 3)]
        + [SHORT | {"prompt": PROMPTS[1:], "negative_prompt": ["q"] * 2}],
        6,
    ),
    "sizes, texts, a batch": (
        [
            SHORT | {"prompt": "x " * n, "negative_prompt": "q", "height": side, "width": side}
            for side in (64, 96, 128)
            for n in (1, 5, 20)
        ]
        + [SHORT | {"prompt": PROMPTS[:2], "negative_prompt": ["q"] * 2}],
        5,
    ),
}


@pytest.mark.parametrize(
    ("mix", "fuse", "limit"),
    [("batches", True, 8), ("sizes, texts, a batch", False, 3)],
    ids=["batches, within Dynamo's limit", "sizes, texts, a batch, beyond it"],
)
def test_a_mix_of_requests_is_compiled_once(mix, fuse, limit):
    requests, graphs = MIXES[mix]
    pipe, compiler = tiny.qwen_image(layers=2), Counting()
    expected = [latents(pipe, **request) for request in requests]
    with torch._dynamo.config.patch(recompile_limit=limit), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with omni_kernels.patched(pipe, fuse=fuse, compile={"backend": compiler}) as handle:
            for stance in ("default", "fail_on_recompile"):
                with torch.compiler.set_stance(stance):
                    for request, wanted in zip(requests, expected, strict=True):
                        assert off(latents(pipe, **request), wanted) < 1e-5
            assert str(handle.compiled) == "2 blocks compiled"
        assert torch._dynamo.config.recompile_limit == limit
    assert len(compiler.graphs) == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_graphs_of_other_models_do_not_count(monkeypatch):
    """One size each, and no graph beyond Dynamo's limit but the last model's own."""
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    how, compiler, pipes = SHORT | {"negative_prompt": None}, Counting(), []
    for heads in (2, 3, 4):
        pipes.append(tiny.qwen_image(layers=2, num_attention_heads=heads))
        expected = latents(pipes[-1], **how)
        with torch._dynamo.config.patch(recompile_limit=1):
            handle = omni_kernels.patch(pipes[-1], compile={"backend": compiler})
            assert off(latents(pipes[-1], **how), expected) < 1e-5
            assert not handle.compiled.refused
    assert len(compiler.graphs) == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for pipe in pipes:
            latents(pipe, **how)


def _own_limit(limit):
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("torch.compile takes no recompile_limit before 2.12 or so")
    return {"recompile_limit": limit}


@pytest.mark.parametrize("whose", ["Dynamo's", "the caller's"])
def test_what_gets_no_graph_runs_uncompiled(monkeypatch, whose):
    pipe, compiler = tiny.qwen_image(layers=2), Counting()
    options = {"backend": compiler} | (_own_limit(1) if whose == "the caller's" else {})
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 0 if whose == "Dynamo's" else 64)
    how = SHORT | {"negative_prompt": None}
    sizes = [{"height": h, "width": w} | how for h, w in ((64, 64), (96, 64), (64, 128))]
    expected = [latents(pipe, **size) for size in sizes]
    before = [dict(vars(block)) for block in pipe.transformer.transformer_blocks]
    with torch._dynamo.config.patch(recompile_limit=1 if whose == "Dynamo's" else 8):
        handle = omni_kernels.patch(pipe, compile=options)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", RuntimeWarning)
            for size, wanted in zip(sizes * 2, expected * 2, strict=True):
                assert off(latents(pipe, **size), wanted) < 1e-5
    (warning,) = (each for each in told if each.category is RuntimeWarning)
    (reason,) = handle.compiled.refused.values()
    assert str(warning.message) == f"QwenImageTransformerBlock runs uncompiled where it has no graph yet: {reason}"
    assert str(handle.compiled).splitlines() == [
        "2 blocks compiled",
        f"QwenImageTransformerBlock: uncompiled where there is no graph yet: {reason}",
    ]
    assert (len(compiler.graphs), compiler.ran) == (1, 8), "two blocks, of two steps, twice"
    handle.undo()
    assert [dict(vars(block)) for block in pipe.transformer.transformer_blocks] == before


def test_a_break_in_a_graph_is_an_error(qwen_pipe):
    qwen_pipe.transformer.transformer_blocks[0].attn.register_forward_hook(lambda *of_it: torch._dynamo.graph_break())
    with omni_kernels.patched(qwen_pipe, fuse=False, compile={"backend": "eager"}) as handle:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            latents(qwen_pipe)
        assert not handle.compiled.refused


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_every_pipelines_blocks_compile_whole(name):
    """And a forward of the transformer is one generation of CUDA graphs."""
    pipe, graphs, forwards = tiny.PIPELINES[name](), WrittenOver(), []
    expected = latents(pipe, num_inference_steps=3)
    hook = pipe.transformer.register_forward_pre_hook(lambda *of_it: forwards.append(1))
    with omni_kernels.patched(pipe, compile=reduced(graphs)) as handle:
        assert {type(_at(pipe, path)).__name__ for path in handle.compiled} <= set(pipe.transformer._repeated_blocks)
        assert off(latents(pipe, num_inference_steps=3), expected) < 1e-4
        assert graphs.generations == len(forwards) > 1
        warm = len(graphs.graphs)
        assert warm > 0
        with torch.compiler.set_stance("fail_on_recompile"):
            latents(pipe, seed=1, num_inference_steps=3)
        assert len(graphs.graphs) == warm
    hook.remove()
    assert not torch._dynamo.utils.counters["graph_break"]


def _at(pipe, path):
    component, _, rest = path.partition(".")
    return getattr(pipe, component).get_submodule(rest)


@pytest.mark.parametrize(
    "build",
    [tiny.qwen_image, *(pytest.param(build, marks=pytest.mark.long) for build in (tiny.wan, tiny.flux, tiny.z_image))],
)
def test_compiled_code_computes_the_same_at_other_lengths_and_sizes(build):
    """By Inductor itself, whose code for symbolic lengths is other code than that for the first one."""
    pipe = build(layers=1)
    requests = [{}, {"prompt": "a dog that is not a cat at all"}, {"height": 96}]
    with omni_kernels.patched(pipe, fuse=True):
        expected = [latents(pipe, num_inference_steps=2, **request) for request in requests]
    with omni_kernels.patched(pipe, fuse=True, compile="regional") as handle:
        for request, exact in zip(requests, expected, strict=True):
            torch.testing.assert_close(latents(pipe, num_inference_steps=2, **request), exact, rtol=1e-5, atol=1e-5)
        assert len(handle.compiled) == len(handle.fused.replaced) > 0


def test_undone_exactly(qwen_pipe):
    before = [dict(vars(block)) for block in qwen_pipe.transformer.transformer_blocks]
    handle = omni_kernels.patch(qwen_pipe, "first_block_cache", {"threshold": 0.4}, compile="regional")
    assert handle.compile == {"fullgraph": True}
    assert all(block._compiled_call_impl is not None for block in qwen_pipe.transformer.transformer_blocks)
    omni_kernels.unpatch(qwen_pipe)
    assert [dict(vars(block)) for block in qwen_pipe.transformer.transformer_blocks] == before


def test_what_is_compiled_already_is_left_as_it_is(qwen_pipe):
    compiler = Counting()
    qwen_pipe.transformer.transformer_blocks[0].compile(backend=compiler)
    theirs = qwen_pipe.transformer.transformer_blocks[0]._compiled_call_impl
    with omni_kernels.patched(qwen_pipe, compile={"backend": Counting()}) as handle:
        names = [f"transformer.transformer_blocks.{i}" for i in range(len(qwen_pipe.transformer.transformer_blocks))]
        assert handle.compiled == names[1:]
        assert qwen_pipe.transformer.transformer_blocks[0]._compiled_call_impl is theirs
    assert qwen_pipe.transformer.transformer_blocks[0]._compiled_call_impl is theirs


def test_whole_compile_is_a_conflict_and_leaves_nothing(qwen_pipe):
    qwen_pipe.transformer.compile(backend="eager")
    before = [dict(vars(block)) for block in qwen_pipe.transformer.transformer_blocks]
    with pytest.raises(omni_kernels.PatchConflictError, match="transformer is compiled as a whole"):
        omni_kernels.patch(qwen_pipe, compile="regional")
    assert [dict(vars(block)) for block in qwen_pipe.transformer.transformer_blocks] == before


@pytest.mark.parametrize(
    ("compile", "error", "message"),
    [
        ("whole", ValueError, "compile='whole': \"regional\""),
        (True, TypeError, 'compile must be "regional"'),
    ],
)
def test_wrong_choice_is_named_early(qwen_pipe, compile, error, message):
    for call in (
        lambda: omni_kernels.patch(qwen_pipe, compile=compile),
        lambda: Omni("emoji-qwen-image", compile=compile),
    ):
        with pytest.raises(error, match=message):
            call()


def test_patched_otherwise_is_a_conflict_and_the_same_again_is_not(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, compile="regional")
    assert omni_kernels.patch(qwen_pipe, compile="regional") is handle
    with pytest.raises(omni_kernels.PatchConflictError, match=r"compile=\{'fullgraph': True\}"):
        omni_kernels.patch(qwen_pipe)


def test_omni_fuses_and_compiles_and_says_so(qwen_pipe):
    arguments = {"prompt": "a cat", "seed": 0, "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "pt"}
    with Omni(qwen_pipe) as omni:
        (plain,) = omni.generate(**arguments)
    assert (plain.settings["fused_blocks"], plain.settings["compiled_blocks"]) == (0, 0)
    with Omni(qwen_pipe, fuse=True, compile={"backend": "eager"}) as omni:
        (made,) = omni.generate(**arguments)
    blocks = len(qwen_pipe.transformer.transformer_blocks)
    assert (made.settings["fused_blocks"], made.settings["compiled_blocks"]) == (blocks, blocks)
    assert off(made.images[0], plain.images[0]) < 1e-4


def test_omni_takes_a_patched_pipeline_as_it_is(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, compile={"backend": "eager"}) as handle:
        with Omni(qwen_pipe) as omni:
            assert omni._handle is handle
        assert handle.active


def test_what_a_block_returns_is_gone_in_the_next_forward(qwen_pipe):
    """That is what whoever keeps it has to know, and what the stand-in for graphs shows."""
    kept, block = [], qwen_pipe.transformer.transformer_blocks[0]
    with omni_kernels.patched(qwen_pipe, compile=reduced(WrittenOver())):
        call = block._compiled_call_impl

        def keeping(*args, **kwargs):
            kept.append(call(*args, **kwargs))
            return kept[-1]

        block._compiled_call_impl = keeping
        latents(qwen_pipe, negative_prompt=None, num_inference_steps=3)
        block._compiled_call_impl = call
    assert [bool(hidden.isnan().all()) for _, hidden in kept] == [True, True, False]


def test_cuda_graphs_are_undone_exactly(qwen_pipe):
    transformer = qwen_pipe.transformer
    theirs = transformer.register_forward_pre_hook(lambda module, args: None)
    before, hooks = dict(vars(transformer)), dict(transformer._forward_pre_hooks)
    blocks = [dict(vars(block)) for block in transformer.transformer_blocks]
    with omni_kernels.patched(qwen_pipe, compile=reduced(WrittenOver())):
        assert len(transformer._forward_pre_hooks) == 2
    assert dict(vars(transformer)) == before
    assert transformer._forward_pre_hooks == hooks
    assert [dict(vars(block)) for block in transformer.transformer_blocks] == blocks
    theirs.remove()


@pytest.mark.parametrize(
    ("options", "makes"),
    [
        ("regional", False),
        ({"mode": "default"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"options": {"max_autotune": True}}, False),
        ({"backend": "cudagraphs"}, True),
    ],
)
def test_torch_is_told_of_forwards_where_it_makes_cuda_graphs_alone(qwen_pipe, options, makes):
    """The marks count for all that is compiled in the process, so that there are none without need."""
    assert calls.makes_cuda_graphs(calls.options_of(options)) is makes
    with omni_kernels.patched(qwen_pipe, compile=options):
        assert bool(qwen_pipe.transformer._forward_pre_hooks) is makes
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert calls.makes_cuda_graphs(calls.options_of("regional"))


OWN = {
    "fused projections": ["flux", "wan"],
    "a gradient": ["qwen_image", "flux", "wan"],
}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, names in OWN.items() for name in names])
def test_a_block_that_leaves_its_fused_forward_to_its_own_compiles_whole(what, name):
    pipe, compiler, given = getattr(tiny, name)(), Counting(), {}
    transformer = pipe.transformer
    if what == "fused projections":
        transformer.fuse_qkv_projections()
    hook = transformer.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    expected = latents(pipe, num_inference_steps=2)
    hook.remove()
    given = {key: value.detach().clone() if torch.is_tensor(value) else value for key, value in given.items()}

    def gradient():
        transformer.zero_grad()
        transformer(**given)[0].float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])

    plain = gradient() if what == "a gradient" else expected
    with omni_kernels.patched(pipe, fuse=True, compile={"backend": compiler}):
        assert off(gradient() if what == "a gradient" else latents(pipe, num_inference_steps=2), plain) < 1e-5
    assert compiler.ran
    assert not torch._dynamo.utils.counters["graph_break"]
