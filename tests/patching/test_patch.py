"""`patch` itself: what it takes, and whose handle a pipeline has."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch

import omni_kernels
from omni_kernels.patching import handle_of

CACHE = ("velocity_cache", {"budget": 4})


@pytest.mark.parametrize("fuse", ["no", 1, 0, [True]])
@pytest.mark.parametrize("given", [(), CACHE], ids=["alone", "cached"])
def test_fuse_is_true_false_or_none(qwen_pipe, given, fuse):
    with pytest.raises(TypeError, match="fuse must be True, False or None, not"):
        omni_kernels.patch(qwen_pipe, *given, fuse=fuse)
    assert handle_of(qwen_pipe) is None


@pytest.mark.parametrize("backend", [None, "none"])
@pytest.mark.parametrize("config", [5, 0, "x", "", [1]])
def test_a_configuration_that_is_none_is_named(qwen_pipe, backend, config):
    with pytest.raises(TypeError, match="cache_config must be a dict or None"):
        omni_kernels.patch(qwen_pipe, backend, config)


@pytest.mark.parametrize("option", ["graphs", "reuse"])
def test_what_is_no_option_is_pythons_own_error(qwen_pipe, option):
    for call in (omni_kernels.patch, omni_kernels.patched):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            call(qwen_pipe, **{option: True})


def blocks_of(pipe):
    return [dict(vars(block)) for block in pipe.transformer.transformer_blocks]


@pytest.mark.parametrize("given", [(), CACHE], ids=["fused", "cached"])
def test_a_shallow_copy_has_no_handle_and_leaves_the_original_alone(qwen_pipe, given):
    handle = omni_kernels.patch(qwen_pipe, *given)
    expected, patched = tiny.generate(qwen_pipe, output_type="latent"), blocks_of(qwen_pipe)
    copied = copy.copy(qwen_pipe)
    assert handle_of(copied) is None
    omni_kernels.unpatch(copied)
    assert handle.active
    assert handle_of(qwen_pipe) is handle
    assert omni_kernels.patch(qwen_pipe, *given) is handle
    assert blocks_of(qwen_pipe) == patched
    assert (tiny.generate(qwen_pipe, output_type="latent") == expected).all()


def test_a_shallow_copy_that_shares_compiled_blocks_is_refused(qwen_pipe):
    handle = omni_kernels.patch(qwen_pipe, compile={"backend": "eager"})
    copied = copy.copy(qwen_pipe)
    with pytest.raises(omni_kernels.PatchConflictError):
        omni_kernels.patch(copied, compile={"backend": "eager"})
    assert handle.active
    assert handle_of(copied) is None


def test_a_shallow_copy_with_a_transformer_of_its_own_is_patched_by_itself(qwen_pipe):
    expected = tiny.generate(qwen_pipe, output_type="latent")
    handle = omni_kernels.patch(qwen_pipe)
    copied = copy.copy(qwen_pipe)
    copied.transformer = copy.deepcopy(qwen_pipe.transformer)
    plain = blocks_of(copied)
    own = omni_kernels.patch(copied)
    assert own is not handle
    assert handle_of(copied) is own
    assert len(own.fused.replaced) == len(plain)
    omni_kernels.unpatch(copied)
    assert blocks_of(copied) == plain
    assert (handle.active, own.active) == (True, False)
    assert (tiny.generate(copied, output_type="latent") == expected).all()
    omni_kernels.unpatch(qwen_pipe)
    assert (tiny.generate(qwen_pipe, output_type="latent") == expected).all()


@pytest.mark.parametrize(
    "given", [object(), 3, SimpleNamespace(scheduler=object())], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"compile": "regional"}], ids=str)
def test_what_is_no_pipeline_is_refused_by_name(given, options):
    with pytest.raises(ValueError, match=f"{type(given).__name__} is no pipeline: none of its parts is a torch.nn"):
        omni_kernels.patch(given, **options)


class ModulePipeline(torch.nn.Module):
    """A pipeline that is a module itself, as vLLM-Omni's are, with the parts of one of diffusers."""

    def __init__(self, pipe):
        super().__init__()
        self.transformer, self.scheduler, self._pipe = pipe.transformer, pipe.scheduler, [pipe]

    def forward(self, **arguments):
        return tiny.generate(self._pipe[0], **arguments)


def test_a_pipeline_that_is_a_module_is_fused_and_cached_by_its_forward(qwen_pipe):
    pipe = ModulePipeline(qwen_pipe)
    with omni_kernels.patched(pipe, *CACHE, fuse=True) as handle:
        assert len(handle.fused.replaced) == len(qwen_pipe.transformer.transformer_blocks)
        pipe.forward(num_inference_steps=6)
        assert len(handle.report.skipped) == 2
        pipe(num_inference_steps=8)
        assert len(handle.report.skipped) == 4
    assert "forward" not in vars(pipe)
