"""Following the calls of one pipeline: from the beginning to the end of each, and nobody else's."""

import contextlib
import copy
import inspect
import pickle

import diffusers
import pytest
import tiny
import torch

from omni_kernels.patching import Patch, PatchConflictError
from omni_kernels.patching.running import around_calls


class Plain(diffusers.DiffusionPipeline):
    """A pipeline that says whether a gradient is on."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, number=1, fail=False):
        if fail:
            raise KeyError(number)
        return number, torch.is_grad_enabled()


@pytest.fixture
def pipe():
    return Plain(diffusers.FlowMatchEulerDiscreteScheduler())


@pytest.fixture
def followed(pipe):
    """The pipeline's patch, and what has been opened and closed."""
    patch, seen = Patch(), []

    @contextlib.contextmanager
    def opened():
        seen.append("open")
        try:
            yield
        finally:
            seen.append("closed")

    around_calls(pipe, opened, patch)
    return patch, seen


def test_something_is_open_during_a_call_however_it_is_left(pipe, followed):
    _, seen = followed
    assert pipe(3) == (3, False)
    with pytest.raises(KeyError):
        pipe(fail=True)
    assert seen == ["open", "closed"] * 2


def test_sampling_with_a_gradient_is_followed_too(pipe, followed):
    """Reward tuning calls what `torch.no_grad` wraps."""
    assert type(pipe).__call__.__wrapped__(pipe, 3) == (3, True)
    assert followed[1] == ["open", "closed"]


def test_it_looks_like_its_class(pipe, followed):
    assert isinstance(pipe, Plain)
    assert (type(pipe).__name__, type(pipe).__module__) == ("Plain", __name__)
    assert inspect.signature(type(pipe).__call__) == inspect.signature(Plain.__call__)


@pytest.mark.parametrize(
    "make",
    [
        copy.copy,
        copy.deepcopy,
        lambda pipe: pickle.loads(pickle.dumps(pipe)),
        lambda pipe: type(pipe)(**pipe.components),
        lambda pipe: type(pipe).from_pipe(pipe),
    ],
    ids=["copy", "deepcopy", "pickle", "made again", "from_pipe"],
)
def test_others_that_are_made_from_it_are_plain(pipe, followed, make):
    other = make(pipe)
    assert type(other) is Plain
    assert other(3) == (3, False)
    assert type(other.scheduler) is type(pipe.scheduler)
    assert followed[1] == []


def test_undone_it_is_of_its_class_again(pipe, followed):
    patch, seen = followed
    patch.undo()
    assert type(pipe) is Plain
    assert pipe(3) == (3, False)
    assert seen == []


def test_it_is_followed_once(pipe, followed):
    with pytest.raises(PatchConflictError, match="this Plain is cached already"):
        around_calls(pipe, contextlib.nullcontext, Patch())


def test_the_callers_lists_are_not_written_into():
    """As Z-Image's pipeline does, which puts the chat's template around each prompt."""
    pipe, prompts = tiny.z_image(layers=1), ["a cat", "a dog"]
    with torch.no_grad():
        around_calls(pipe, contextlib.nullcontext, Patch())
        pipe(prompts, num_inference_steps=1, height=32, width=32, output_type="latent")
        pipe(prompt=prompts, num_inference_steps=1, height=32, width=32, output_type="latent")
    assert prompts == ["a cat", "a dog"]


def test_undone_in_the_middle_of_a_call_it_closes_what_is_open(pipe):
    patch, seen = Patch(), []

    @contextlib.contextmanager
    def opened():
        patch.undo()
        yield
        seen.append("closed")

    around_calls(pipe, opened, patch)
    assert pipe(3) == (3, False)
    assert seen == ["closed"]
    assert type(pipe) is Plain
