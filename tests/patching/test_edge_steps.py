"""`edge_steps` of `quantize=`: which steps have the layers' own weights, with caches, guidance and several requests."""

import copy
import threading
import warnings

import diffusers
import pytest
import torch
from fused import off
from models import MODELS, latents

import omni_kernels
from omni_kernels.patching import PatchConflictError, handle_of
from omni_kernels.patching.quantised import options_of
from omni_kernels.patching.quantized_linear import QuantizedLinear
from omni_runtime import Omni

PLAIN = {"dtype": "int8", "min_width": 0}
HOW = PLAIN | {"edge_steps": (2, 1)}
PATH = "transformer_blocks.0.attn.to_q"


class Watched:
    """Which layer each forward of the transformer has, by the step of its scheduler: (step, "own" or "8 bits")."""

    def __init__(self, pipe, path=PATH):
        self.seen, self._pipe, self._path = [], pipe, path
        parent, _, self._name = path.rpartition(".")
        self._parent = pipe.transformer.get_submodule(parent)
        first = pipe.transformer.get_submodule(path.split("attn")[0].rstrip("."))
        first.register_forward_pre_hook(self)

    def __call__(self, *_):
        kind = "8 bits" if isinstance(getattr(self._parent, self._name), QuantizedLinear) else "own"
        self.seen.append((self._pipe.scheduler.step_index or 0, kind))

    def steps(self, kind):
        """The steps with this kind of layer; each forward once, in order."""
        seen, self.seen[:] = list(self.seen), []
        return [step for step, one in seen if one == kind], len(seen)


@pytest.mark.parametrize("guided", [True, False])
def test_the_first_and_last_steps_have_the_own_weights(qwen_pipe, guided):
    watched = Watched(qwen_pipe)
    arguments = {"num_inference_steps": 6} | ({} if guided else {"true_cfg_scale": 1.0})
    with omni_kernels.patched(qwen_pipe, quantize=HOW, fuse=False):
        for _ in range(2):  # the second request begins anew
            latents(qwen_pipe, **arguments)
            times = 2 if guided else 1
            assert watched.steps("own") == ([one for one in (0, 1, 5) for _ in range(times)], 6 * times)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fuse", [False, True])
def test_requests_of_few_steps_run_in_own_weights(name, fuse):
    model = MODELS[name]
    pipe = model.build(**model.options)
    with omni_kernels.patched(pipe, fuse=fuse):
        plain = latents(pipe, num_inference_steps=3)
    with omni_kernels.patched(pipe, quantize=HOW, fuse=fuse):
        assert torch.equal(latents(pipe, num_inference_steps=3), plain)
        assert not torch.equal(latents(pipe, num_inference_steps=4)[..., :1], plain[..., :1])
    with omni_kernels.patched(pipe, quantize=PLAIN, fuse=fuse):
        assert not torch.equal(latents(pipe, num_inference_steps=3), plain)


def test_all_layers_are_switched_and_a_step_between_is_in_8_bits(qwen_pipe):
    given = {}
    pre = qwen_pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    handle = omni_kernels.patch(qwen_pipe, quantize=HOW, fuse=False)
    latents(qwen_pipe, num_inference_steps=4)
    pre.remove()
    scheduler = qwen_pipe.scheduler
    got = {}
    with torch.no_grad():
        for step in range(5):  # at 4, the request is over
            scheduler._step_index = step
            got[step] = qwen_pipe.transformer(**given)[0]
        handle.undo()
        own = qwen_pipe.transformer(**given)[0]
        with omni_kernels.patched(qwen_pipe, quantize=PLAIN, fuse=False):
            bits = qwen_pipe.transformer(**given)[0]
    for step, expected in enumerate([own, own, bits, own, bits]):
        assert torch.equal(got[step], expected)
    assert not torch.equal(own, bits)


def test_another_thread_has_its_own_layers(qwen_pipe):
    """It shares the transformer: its forward, of a step in 8 bits, waits for the one of an edge."""
    pipe, given, got = qwen_pipe, {}, []
    pre = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    omni_kernels.patch(pipe, quantize=HOW, fuse=False)
    latents(pipe, num_inference_steps=6)
    pre.remove()

    def call():
        with torch.no_grad():
            got.append(pipe.transformer(**given)[0])

    def meanwhile(*_):
        hook.remove()
        pipe.scheduler._step_index = 3
        other.start()
        other.join(0.2)

    other = threading.Thread(target=call)
    pipe.scheduler._step_index = 3
    call()
    pipe.scheduler._step_index = 0
    hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(meanwhile)
    call()
    other.join()
    bits, edge, meanwhile_bits = got
    # torch gives a new thread more threads of its own, which sum in another order.
    assert off(meanwhile_bits, bits) < 1e-5
    assert off(edge, bits) > 1e-3


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("velocity_cache", {"schedule": [0, 3, 4, 6]}),
        ("velocity_cache", {"schedule": [0, 1, 4, 7]}),
        ("first_block_cache", {"threshold": 0.5}),
        ("tea_cache", {"rel_l1_thresh": 0.2}),
        ("cache_dit", {"residual_diff_threshold": 0.5}),
        ("cache_dit", {"engine": "library", "max_warmup_steps": 2, "residual_diff_threshold": 0.5}),
    ],
)
def test_under_a_cache_the_step_is_the_requests(qwen_pipe, backend, config):
    """Also where the steps before were skipped, and the transformer was not called."""
    watched = Watched(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, backend, config, quantize=PLAIN | {"edge_steps": (2, 2)}) as handle:
        results = []
        for _ in range(2):
            results.append(latents(qwen_pipe, num_inference_steps=8))
            ran = {step for step, _ in watched.seen}
            computed = {one.step for one in handle.report.branches["cond"].decisions if one.computed}
            assert handle.report.skipped
            assert {0} < computed <= ran
            assert {step for step, kind in watched.seen if kind == "own"} == ran & {0, 1, 6, 7}
            assert {step for step, kind in watched.seen if kind == "8 bits"} == ran - {0, 1, 6, 7} != set()
            watched.seen.clear()
        assert torch.equal(*results)


@pytest.mark.parametrize("begin", ["scheduler", "announced"])
def test_steps_that_a_pipeline_leaves_out_do_not_count(qwen_pipe, begin):
    watched, pipe = Watched(qwen_pipe), qwen_pipe
    given = {}
    pre = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    latents(pipe, num_inference_steps=1)
    pre.remove()
    watched.seen.clear()
    omni_kernels.patch(pipe, quantize=HOW)
    pipe.scheduler.set_timesteps(10, mu=1.0)
    pipe._num_timesteps = 6 if begin == "announced" else None
    if begin == "scheduler":
        pipe.scheduler.set_begin_index(4)
    sample, timesteps = given["hidden_states"], pipe.scheduler.timesteps
    with torch.no_grad():
        for t in timesteps[4:]:
            pipe.transformer(**given)
            pipe.scheduler.step(torch.zeros_like(sample), t, sample)
    assert watched.steps("own") == ([0, 5, 9], 6)  # a scheduler that has not begun has no index


def test_a_failed_forward_and_undo_leave_the_own_layers(qwen_pipe):
    pipe, before = qwen_pipe, [*map(id, qwen_pipe.transformer.modules())]
    handle = omni_kernels.patch(pipe, quantize=HOW, fuse=False)
    layer = pipe.transformer.get_submodule(PATH)
    hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latents(pipe)
    hook.remove()
    assert pipe.transformer.get_submodule(PATH) is layer
    handle.undo()
    assert [*map(id, pipe.transformer.modules())] == before
    assert "forward" not in vars(pipe.transformer)


def test_own_weights_follow_conversions(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, quantize=HOW):
        keys = qwen_pipe.transformer.state_dict().keys()
        assert not [key for key in keys if "own" in key]
        qwen_pipe.to(torch.bfloat16)
        assert latents(qwen_pipe, num_inference_steps=5).isfinite().all()
    assert {one.dtype for one in qwen_pipe.transformer.parameters()} == {torch.bfloat16}


def test_what_stays_on_the_device_is_told(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, quantize=HOW) as handle:
        layers = [qwen_pipe.transformer.get_submodule(path[12:]) for path in handle.quantised.replaced]
        assert handle.quantised.freed == -sum(one.weight.numel() + 4 * one.out_features for one in layers)
        assert str(handle.quantised).endswith("MB more on the device")


def test_omni_takes_it_and_an_engine_refuses_it(qwen_pipe):
    watched = Watched(qwen_pipe)
    with Omni(qwen_pipe, cache_backend=None, quantize=HOW) as omni:
        omni.generate("a cat", num_inference_steps=5, height=32, width=32, true_cfg_scale=1.0)
        assert watched.steps("own") == ([0, 1, 4], 5)
        assert handle_of(qwen_pipe).quantize.given()["edge_steps"] == (2, 1)
        with pytest.raises(ValueError, match="share forwards at different steps: leave out edge_steps"):
            omni.engine()


@pytest.mark.parametrize("fuse", [False, True])
def test_compiled_blocks_switch_without_a_new_graph(qwen_pipe, fuse):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile = {"backend": backend}
    watched = Watched(qwen_pipe)
    with omni_kernels.patched(qwen_pipe, quantize=HOW, fuse=fuse):
        expected = latents(qwen_pipe, num_inference_steps=6)
    with omni_kernels.patched(qwen_pipe, quantize=HOW, fuse=fuse, compile=compile):
        watched.seen.clear()
        got = latents(qwen_pipe, num_inference_steps=6)
        count = len(graphs)
        assert torch.equal(latents(qwen_pipe, num_inference_steps=6), got)
        assert len(graphs) == count > 0
    assert off(got, expected) < 0.02


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((2,), r"edge_steps must be two numbers of steps from 0 on, not \(2,\)"),
        (2, "edge_steps must be two numbers of steps from 0 on, not 2"),
        ((2, -1), "edge_steps must be two numbers"),
        ((True, 1), "edge_steps must be two numbers"),
        ("22", "edge_steps must be two numbers"),
    ],
)
def test_wrong_numbers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        options_of(PLAIN | {"edge_steps": given})


def test_own_weights_must_stay():
    for keep in ("reload", "none"):
        with pytest.raises(ValueError, match=f"edge_steps needs the layers' own weights, which keep='{keep}' drops"):
            options_of(HOW | {"keep": keep})
    assert options_of(PLAIN | {"edge_steps": [0, 0], "keep": "none"}).edge_steps == (0, 0)


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (diffusers.DDIMScheduler, "its DDIMScheduler has no step_index"),
        (diffusers.HeunDiscreteScheduler, "its HeunDiscreteScheduler calls the model 2 times a step"),
    ],
)
def test_a_step_that_cannot_be_known_is_refused_by_name(qwen_pipe, scheduler, why):
    plain, known = [*map(id, qwen_pipe.transformer.modules())], qwen_pipe.scheduler
    qwen_pipe.scheduler = scheduler()
    message = f"edge_steps of this QwenImagePipeline cannot be known, because {why}"
    with pytest.raises(ValueError, match=message):
        omni_kernels.patch(qwen_pipe, quantize=HOW)
    assert [*map(id, qwen_pipe.transformer.modules())] == plain
    qwen_pipe.scheduler = known
    with omni_kernels.patched(qwen_pipe, quantize=HOW):
        qwen_pipe.scheduler = scheduler()  # given later, it is refused at the first call
        with pytest.raises(ValueError, match=message):
            qwen_pipe.transformer(None)


def test_a_transformer_compiled_as_a_whole_is_refused_by_name(qwen_pipe):
    qwen_pipe.transformer.compile(backend="eager")
    with pytest.raises(PatchConflictError, match="transformer is compiled as a whole"):
        omni_kernels.patch(qwen_pipe, quantize=HOW)


def test_a_pipeline_that_steps_a_copy_of_its_scheduler_is_told(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, quantize=HOW), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        qwen_pipe.scheduler.step = lambda output, t, sample, **_: (sample,)
        watched = Watched(qwen_pipe)
        latents(qwen_pipe, num_inference_steps=20, true_cfg_scale=1.0)
        assert len(watched.steps("own")[0]) == 16
    assert (
        sum("so it steps another one, perhaps a copy: quantize's edge_steps" in str(one.message) for one in told) == 1
    )


def test_requests_of_one_step_are_no_copy(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, quantize=HOW), warnings.catch_warnings(record=True) as told:
        for _ in range(9):
            latents(qwen_pipe, num_inference_steps=1)
    assert not [one for one in told if "edge_steps" in str(one.message)]


def test_a_copy_of_a_pipeline_is_in_8_bits(qwen_pipe):
    with omni_kernels.patched(qwen_pipe, quantize=HOW):
        again = copy.deepcopy(qwen_pipe)
        watched = Watched(again)
        latents(again, num_inference_steps=4)
        assert watched.steps("own")[0] == []


def test_own_weights_on_another_device_are_an_error(qwen_pipe):
    """As under offloading of single layers, which moves the layers that it finds."""
    handle = omni_kernels.patch(qwen_pipe, quantize=HOW)
    path = handle.quantised.replaced[0].partition(".")[2]
    (own,) = qwen_pipe.transformer.get_submodule(path).own
    own.to("meta")
    with pytest.raises(RuntimeError, match=r"edge_steps does not work with offloading of single layers: .* on meta"):
        latents(qwen_pipe)
