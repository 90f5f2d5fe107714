"""Every family under pruning, from pictures to answers."""

import pytest
import torch

from headrace.vlm.huggingface import HuggingFaceVLM
from headrace.vlm.pruning.auto import METHODS, pruning_config
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.flowcut import FlowCutConfig
from headrace.vlm.pruning.reading import tokens_kept

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "smolvlm", "internvl", "video_llava")
QUESTIONS = ["How many nodes?", "Is A linked to B"]


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(tiny_vlm, picture, family):
    model, processor = tiny_vlm(family)
    vlm = HuggingFaceVLM(model, processor)
    plain = vlm.prompts(picture(), QUESTIONS)
    for method in ("flowcut", "visionzip"):
        vlm.pruning = pruning_config(method, Budget(share=1.0))
        for one, other in zip(plain, vlm.prompts(picture(), QUESTIONS), strict=True):
            assert torch.equal(one.embeds, other.embeds) and torch.equal(one.positions, other.positions), method
    vlm.pruning = pruning_config("flowcut-decoder", Budget(share=1.0))
    pruned = vlm.answer(picture(), QUESTIONS, max_new_tokens=3)
    vlm.pruning = None
    assert vlm.answer(picture(), QUESTIONS, max_new_tokens=3) == pruned


@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_are_met_and_kept_tokens_are_at_their_places(tiny_vlm, picture, family):
    """Random selection drops rows and does nothing else, so what is left must equal rows of the whole prompt."""
    vlm = HuggingFaceVLM(*tiny_vlm(family))
    (whole,) = vlm.prompts(picture(), QUESTIONS[:1])
    before = vlm.record.visual_before
    vlm.pruning = pruning_config("random", Budget(tokens=4))
    (short,) = vlm.prompts(picture(), QUESTIONS[:1])
    crops = len(vlm.record.kept)
    assert all(len(row) == 4 for row in vlm.record.kept) and vlm.record.visual_before == before
    assert vlm.record.pictures == crops
    after = int(short.visual.sum())
    assert after == vlm.record.visual_after <= 4 * crops and after < before
    if family != "llava_next":  # where padding cuts bands off the grid
        assert after == 4 * crops
    rows = whole.embeds[whole.visual]
    for row in short.embeds[short.visual]:
        assert float((rows - row).abs().amax(1).min()) < 1e-4
    assert torch.equal(short.ids[~short.visual], whole.ids[~whole.visual])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_random_draws_anew_for_every_picture(tiny_vlm, picture, family):
    """Pictures of one shape; encoded in one call or in calls of their own."""
    vlm = HuggingFaceVLM(*tiny_vlm(family), pruning=pruning_config("random", Budget(tokens=6)))
    kept = []
    for pictures in ([picture(0)], [picture(1)], [picture(2)], [picture(1), picture(2)]):
        vlm.prompts(pictures, QUESTIONS[:1])
        kept += vlm.record.kept
    assert len({tuple(row) for row in kept[:3]}) == 3 and kept[3:] == kept[1:3]


def lengths_after_block_two(vlm, pictures):
    lengths = []
    block = vlm.model.model.language_model.layers[2]
    with block.register_forward_hook(lambda _, __, out: lengths.append(out.shape[1])):
        vlm.answer(pictures, QUESTIONS[:1], max_new_tokens=1)
    return lengths


def test_fastv_keeps_its_budget_per_picture(tiny_vlm, picture):
    vlm = HuggingFaceVLM(*tiny_vlm("llava"), pruning=pruning_config("fastv", Budget(tokens=6)))
    pictures = [picture(), picture(seed=1)]
    (prompt,) = vlm.prompts(pictures, QUESTIONS[:1])
    assert lengths_after_block_two(vlm, pictures) == [len(prompt.ids) - 72 + 12]
    assert tokens_kept(vlm.pruning, vlm.record) == 12


@pytest.mark.parametrize("family, budget, want", [("llava", Budget(tokens=6), 12), ("llava_next", Budget(tokens=6), 3),
                                                  ("llava_next", Budget(share=0.25), 18)])  # fmt: skip
def test_the_encoder_of_a_model_with_crops_keeps_half_the_decoders_budget(tiny_vlm, picture, family, budget, want):
    vlm = HuggingFaceVLM(*tiny_vlm(family), pruning=pruning_config("flowcut-decoder", budget))
    vlm.prompts(picture(), QUESTIONS[:1])
    assert {len(row) for row in vlm.record.kept} == {want}
    kept = tokens_kept(vlm.pruning, vlm.record)
    assert kept == budget.of(vlm.record.visual_before) <= vlm.record.visual_after


def test_a_picture_may_keep_as_many_patches_as_it_had_units(tiny_vlm, picture):
    """16 units of 4 patches, cut down to 13, 10, 8, 6, 4 and 2: with 4 units there are 16 patches."""
    config = FlowCutConfig(budget=Budget(tokens=2), schedule="uniform", every=1)
    vlm = HuggingFaceVLM(*tiny_vlm("qwen2_vl"), pruning=config)
    vlm.prompts(picture(height=64, width=64), QUESTIONS[:1])
    assert vlm.record.units == [16] and len(vlm.record.kept[0]) == 2


def test_the_record_knows_the_grid_of_a_picture(tiny_vlm, picture):
    vlm = HuggingFaceVLM(*tiny_vlm("qwen2_vl"), pruning=pruning_config("random", Budget(tokens=2)))
    vlm.prompts([picture(height=32, width=288), picture(height=64, width=64)], QUESTIONS[:1])
    (columns, rows), square = vlm.record.grids
    assert columns * rows == vlm.record.units[0] and columns > 2 * rows and square == (4, 4)
    vlm = HuggingFaceVLM(*tiny_vlm("llava"), pruning=pruning_config("random", Budget(tokens=2)))
    vlm.prompts(picture(), QUESTIONS[:1])
    assert vlm.record.grids == [(6, 6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_answers(tiny_vlm, picture, family):
    vlm = HuggingFaceVLM(*tiny_vlm(family))
    for method in METHODS if family == "llava" else ("flowcut-decoder", "visionzip", "prumerge"):
        vlm.pruning = pruning_config(method, Budget(share=0.25))
        answers = vlm.answer([picture()], QUESTIONS, max_new_tokens=3)
        assert len(answers) == 2 and vlm.record.visual_before > 0
        if method != "fastv":
            assert vlm.record.visual_after < vlm.record.visual_before


def test_kept_groups_carry_their_own_rotary_positions(tiny_vlm, picture):
    """Qwen2-VL: a kept token has the position of its place in the picture, unlike in the released code."""
    vlm = HuggingFaceVLM(*tiny_vlm("qwen2_vl"))
    (whole,) = vlm.prompts(picture(), QUESTIONS[:1])
    vlm.pruning = FlowCutConfig(budget=Budget(tokens=3))
    (short,) = vlm.prompts(picture(), QUESTIONS[:1])
    want = whole.positions[:, whole.visual][:, vlm.record.kept[0]]
    assert torch.equal(short.positions[:, short.visual], want)
    assert torch.equal(short.positions[:, -1], whole.positions[:, -1])


def test_window_order_is_undone_in_the_record(tiny_vlm, picture):
    """Qwen2.5-VL sorts its units by window; the record counts them in raster order all the same."""
    vlm = HuggingFaceVLM(*tiny_vlm("qwen2_5_vl"))
    (whole,) = vlm.prompts(picture(), QUESTIONS[:1])
    vlm.pruning = pruning_config("grid", Budget(tokens=5))
    (short,) = vlm.prompts(picture(), QUESTIONS[:1])
    want = whole.positions[:, whole.visual][:, vlm.record.kept[0]]
    assert torch.equal(short.positions[:, short.visual], want)


def test_the_decoder_cut_halves_once_more(tiny_vlm, picture):
    model, processor = tiny_vlm("llava")
    vlm = HuggingFaceVLM(model, processor, pruning=FlowCutConfig(budget=Budget(tokens=6), decoder=True))
    lengths = lengths_after_block_two(vlm, picture())
    (prompt,) = vlm.prompts(picture(), QUESTIONS[:1])
    assert vlm.record.visual_after == 12 and lengths == [len(prompt.ids) - 6]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "video_llava"])
def test_video_frames_are_cut_one_by_one(tiny_vlm, picture, family):
    vlm = HuggingFaceVLM(*tiny_vlm(family), pruning=pruning_config("flowcut", Budget(tokens=2)))
    frames = [picture(seed=s) for s in range(8 if family == "video_llava" else 4)]
    assert len(vlm.answer(frames, QUESTIONS, max_new_tokens=2, video=True)) == 2
    assert len(vlm.record.kept) == (8 if family == "video_llava" else 2)
    assert all(len(row) == 2 for row in vlm.record.kept)
