"""Regional compilation under `patch` and `Omni`: one graph a kind of block, no breaks, nothing compiled twice."""

import pytest
import tiny
import torch

import omni_kernels
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
    "combined": {
        "velocity": {"budget": 5},
        "blocks": {
            "cache_backend": "cache_dit",
            "cache_config": {"max_warmup_steps": 1, "residual_diff_threshold": 0.5},
        },
    },
}
#: the same caches run otherwise
VARIANTS = {
    "replay": ("tea_cache", CACHES["tea_cache"] | {"decision": "replay"}),
    "library": ("cache_dit", {"engine": "library", "max_warmup_steps": 2, "residual_diff_threshold": 0.5}),
}
OTHER = {"seed": 3, "prompt": "a dog that is no cat at all"}


class Counting:
    """The eager backend, and the graphs that it was given."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def latents(pipe, **arguments):
    return tiny.generate(pipe, output_type="latent", **arguments)


def off(now, expected):
    return ((now - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("fuse", [False, True], ids=["as it is", "fused"])
@pytest.mark.parametrize("cache", [*CACHES, *VARIANTS])
def test_no_break_and_nothing_compiled_again(qwen_pipe, cache, fuse):
    backend, config = VARIANTS.get(cache) or (cache, CACHES[cache])
    with omni_kernels.patched(qwen_pipe, backend, config, fuse=fuse) as handle:
        expected, other = latents(qwen_pipe), latents(qwen_pipe, **OTHER)
        report = handle.report
    compiler = Counting()
    with omni_kernels.patched(qwen_pipe, backend, config, fuse=fuse, compile={"backend": compiler}) as handle:
        assert len(handle.compiled) == len(qwen_pipe.transformer.transformer_blocks)
        assert off(latents(qwen_pipe), expected) < 1e-4
        warm = len(compiler.graphs)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert off(latents(qwen_pipe, **OTHER), other) < 1e-4
        assert 0 < warm == len(compiler.graphs)
        assert warm <= 3, "all blocks share a graph; another text length takes one more, and so does a mask or none"
        if backend is not None:
            assert handle.report.forwards_saved == report.forwards_saved > 0
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


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_every_pipelines_blocks_compile_whole(name):
    pipe, compiler = tiny.PIPELINES[name](), Counting()
    expected = latents(pipe)
    with omni_kernels.patched(pipe, compile={"backend": compiler}) as handle:
        assert {type(_at(pipe, path)).__name__ for path in handle.compiled} <= set(pipe.transformer._repeated_blocks)
        assert off(latents(pipe), expected) < 1e-4
        assert len(compiler.graphs) > 0
        warm = len(compiler.graphs)
        with torch.compiler.set_stance("fail_on_recompile"):
            latents(pipe, seed=1)
        assert len(compiler.graphs) == warm
    assert not torch._dynamo.utils.counters["graph_break"]


def _at(pipe, path):
    component, _, rest = path.partition(".")
    return getattr(pipe, component).get_submodule(rest)


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
