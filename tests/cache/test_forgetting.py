"""What was kept amid a request, and no longer fits, is forgotten: forecasts are made from what came after."""

import tiny
import torch
from test_requests import NOISE, text
from test_velocity_cache import outputs_of

import omni_kernels

STEPS = 16


def test_guided_outputs_are_forgotten_where_guidance_ends(z_pipe):
    """Z-Image guides in one batch, and stops at cfg_truncation: a line through both kinds of output leads nowhere."""
    batches, seen = [], outputs_of(z_pipe)
    z_pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    config = {"schedule": [0, 1, STEPS - 1], "forecaster_order": 1, "corrector_order": 0}
    with omni_kernels.patched(z_pipe, "velocity_cache", config) as handle:
        tiny.generate(z_pipe, cfg_truncation=0.3, num_inference_steps=STEPS, output_type="latent")
        (branch,) = handle.report.branches.values()
    assert batches == [2, 2, 1, 1]
    first, second, ends, last = branch.computed
    assert (first, second, last) == (0, 1, STEPS - 1)
    assert branch.decisions[ends].reason == "another batch"
    assert ends < STEPS - 3
    outputs = [output for _, output in seen]
    assert not torch.equal(outputs[2], outputs[1]), "two outputs make a line"
    assert all(torch.equal(output, outputs[ends]) for output in outputs[ends:-1]), "one output makes none"


@torch.no_grad()
def test_text_of_another_size_of_picture_is_forgotten(qwen_pipe):
    """The text's snapshots fit still, but what blocks add to it beside other pictures says nothing of this one."""
    config = {
        "max_warmup_steps": 0,
        "residual_diff_threshold": 1,
        "Bn_compute_blocks": 1,
        "enable_taylorseer": True,
        "taylorseer_order": 1,
    }
    wide = torch.cat((NOISE, NOISE.flip(1)), 1)

    def last_of(pictures):
        handle = omni_kernels.patch(qwen_pipe, "cache_dit", config)
        with handle.sampling():
            qwen_pipe.scheduler.set_timesteps(len(pictures), mu=0.5)
            for step, picture in enumerate(pictures):
                (output,) = qwen_pipe.transformer(
                    hidden_states=picture,
                    encoder_hidden_states=text(5),
                    timestep=torch.tensor([0.5]),
                    img_shapes=[[(1, 4, picture.shape[1] // 4)]],
                    return_dict=False,
                )
                qwen_pipe.scheduler.step(picture, qwen_pipe.scheduler.timesteps[step], picture)
        omni_kernels.unpatch(qwen_pipe)
        return output, [decision.computed for decision in handle.report.branches["0"].decisions]

    expected, computed = last_of([wide, wide])
    assert computed == [True, False]
    output, computed = last_of([NOISE, wide, wide])
    assert computed == [True, True, False]
    assert torch.equal(output, expected)
