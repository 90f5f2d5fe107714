"""The encoder under pruning: nothing changes when everything stays, and what stays is what was chosen."""

import pytest
import torch

from headrace.vlm.pruning.auto import METHODS, prune, pruning_config
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.flowcut import FlowCutConfig
from headrace.vlm.pruning.placeholders import shrink
from headrace.vlm.pruning.policy import Patches
from headrace.vlm.pruning.towers import find_tower

ENCODER_METHODS = [name for name in METHODS if name != "fastv"]


@pytest.fixture(scope="module")
def encoders():
    import timm
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 8,
        "image_size": 48,
    }  # fmt: skip
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=32, depth=6, num_heads=4, num_classes=0
    )
    models = {
        "clip": CLIPVisionModel(CLIPVisionConfig(**shape)),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**shape)),
        "timm": vit,
    }
    with torch.no_grad():
        for model in models.values():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and ("q_proj" in name or "k_proj" in name or "qkv" in name):
                    weight.mul_(8)
    return {name: model.eval() for name, model in models.items()}


@torch.no_grad()
def tokens(model, pixels):
    """Patch tokens (B, N, D) of the last block."""
    if hasattr(model, "forward_features"):
        return model.forward_features(pixels)[:, 1:]
    states = model(pixels, output_hidden_states=True).hidden_states[-1]
    return states[:, 1:] if hasattr(model, "pre_layrnorm") or "CLIP" in type(model).__name__ else states


@pytest.mark.parametrize("name", ["clip", "siglip", "timm"])
def test_keeping_everything_changes_no_bit(encoders, name):
    model, pixels = encoders[name], torch.randn(2, 3, 48, 48)
    plain = tokens(model, pixels)
    for method in ENCODER_METHODS:
        with prune(model, pruning_config(method, Budget(tokens=36))) as cut:
            assert torch.equal(tokens(model, pixels), plain), method
        assert cut.report.kept == [list(range(36))] * 2
    assert torch.equal(tokens(model, pixels), plain)


@pytest.mark.parametrize("name", ["clip", "siglip", "timm"])
def test_every_method_keeps_its_budget_and_leaves_no_trace(encoders, name):
    model, pixels = encoders[name], torch.randn(2, 3, 48, 48)
    plain = tokens(model, pixels)
    for method in ENCODER_METHODS:
        config = pruning_config(method, Budget(tokens=9))
        if isinstance(config, FlowCutConfig):  # timm's fused blocks cannot mask rows of unequal length
            config = FlowCutConfig(**{**vars(config), "batch_rule": "max", "decoder": False})
        with prune(model, config) as cut:
            short = tokens(model, pixels)
        assert short.shape == (2, 9, 32) and torch.isfinite(short).all(), method
        for row in cut.report.kept:
            assert len(row) == 9 and row == sorted(set(row)) and max(row) < 36
        assert torch.equal(tokens(model, pixels), plain), method


def test_selection_only_methods_hand_on_the_rows_they_name(encoders):
    """With the cut after the last block, tokens are rows of the unpruned output."""
    model, pixels = encoders["clip"], torch.randn(2, 3, 48, 48)
    plain = tokens(model, pixels)
    for method in ("random", "grid", "cls-only"):
        with prune(model, pruning_config(method, Budget(tokens=7))) as cut:
            short = tokens(model, pixels)
        for row, kept, whole in zip(short, cut.report.kept, plain, strict=True):
            torch.testing.assert_close(row, whole[kept])


def test_rows_of_a_batch_are_cut_as_each_alone(encoders):
    model, pixels = encoders["clip"], torch.randn(3, 3, 48, 48)
    config = FlowCutConfig(budget=Budget(tokens=8))
    with prune(model, config) as cut:
        together = tokens(model, pixels)
    for row in range(3):
        with prune(model, config) as own:
            alone = tokens(model, pixels[row : row + 1])
        assert cut.report.kept[row] == own.report.kept[0]
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_eager_and_sdpa_cut_alike(encoders):
    model, pixels = encoders["clip"], torch.randn(3, 3, 48, 48)
    kept = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with prune(model, FlowCutConfig(budget=Budget(tokens=8))) as cut:
            tokens(model, pixels)
        assert model.config._attn_implementation == name
        kept.append(cut.report.kept)
    model.set_attn_implementation("sdpa")
    assert kept[0] == kept[1]


@torch.no_grad()
def test_scoring_costs_two_rows_per_block(encoders):
    """Counted in floating-point operations: one row of q.k and one of v.v per block, and no projection twice."""
    from torch.utils.flop_counter import FlopCounterMode

    model, pixels = encoders["clip"], torch.randn(1, 3, 48, 48)

    def operations():
        with FlopCounterMode(display=False) as counter:
            model(pixels)
        return counter.get_total_flops()

    plain = operations()
    with prune(model, FlowCutConfig(budget=Budget(tokens=9), schedule="last")):
        scored = operations()
    blocks, tokens, width = 6, 37, 32
    assert scored - plain == blocks * 2 * (2 * tokens * width)
    with prune(model, FlowCutConfig(budget=Budget(tokens=9), schedule="uniform")):
        assert operations() < plain


def test_two_models_do_not_meet_and_one_is_not_pruned_twice(encoders):
    clip, siglip, pixels = encoders["clip"], encoders["siglip"], torch.randn(1, 3, 48, 48)
    plain = tokens(siglip, pixels)
    config = FlowCutConfig(budget=Budget(tokens=8))
    with prune(clip, config):
        assert torch.equal(tokens(siglip, pixels), plain)
        with pytest.raises(ValueError, match="being pruned already"), prune(clip, config):
            pass
    assert tokens(clip, pixels).shape[1] == 36


def test_exit_restores_after_an_error(encoders):
    model, pixels = encoders["clip"], torch.randn(1, 3, 48, 48)
    plain = tokens(model, pixels)
    with pytest.raises(RuntimeError, match="stop"), prune(model, FlowCutConfig(budget=Budget(tokens=8))):
        raise RuntimeError("stop")
    assert torch.equal(tokens(model, pixels), plain) and model.config._attn_implementation == "sdpa"


def test_what_cannot_be_scored_is_named(encoders):
    import timm

    with pytest.raises(ValueError, match="no attention to score"):
        find_tower(timm.create_model("test_efficientnet", num_classes=0))
    with (
        pytest.raises(ValueError, match="relay='cls' needs"),
        prune(encoders["siglip"], FlowCutConfig(budget=Budget(tokens=8), relay="cls")),
    ):
        tokens(encoders["siglip"], torch.randn(1, 3, 48, 48))
    with (
        pytest.raises(ValueError, match=r"0\.\.5"),
        prune(encoders["clip"], FlowCutConfig(budget=Budget(tokens=8), last_layer=6)),
    ):
        pass
    with pytest.raises(ValueError, match="did you mean 'flowcut'"):
        pruning_config("flowcutt", Budget(tokens=3))


@torch.no_grad()
def test_llava_generates_from_a_shortened_prompt(tiny_vlm, picture):
    """The plain use: stock model, stock generate, fewer placeholders."""
    model, processor = tiny_vlm("llava")
    inputs = processor(text=["USER: <image>\nWhat? ASSISTANT:"], images=[picture()], return_tensors="pt")
    whole = model(**inputs).logits
    with prune(model, FlowCutConfig(budget=Budget(tokens=36))):
        assert torch.equal(model(**inputs).logits, whole)
    placeholder = model.config.image_token_id
    ids, mask = shrink(inputs["input_ids"], inputs["attention_mask"], placeholder=placeholder, keep=5)
    with prune(model, FlowCutConfig(budget=Budget(tokens=5))):
        out = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], max_new_tokens=4, do_sample=False
        )
        with pytest.raises(ValueError, match="do not match"):
            model(**inputs)
    assert out.shape[1] > ids.shape[1]
    assert torch.equal(model(**inputs).logits, whole)


def test_shrinking_placeholders():
    ids = torch.tensor([[0, 5, 9, 9, 9, 6, 9, 9, 9, 7], [4, 9, 9, 9, 8, 9, 9, 9, 3, 0]])
    mask = (ids != 0).long()
    short, short_mask = shrink(ids, mask, placeholder=9, keep=2)
    assert short.tolist() == [[0, 5, 9, 9, 6, 9, 9, 7], [4, 9, 9, 8, 9, 9, 3, 0]]
    assert torch.equal(short_mask, (short != 0).long())
    text = torch.tensor([[1, 2, 3]])
    assert torch.equal(shrink(text, text, placeholder=9, keep=2)[0], text)
    with pytest.raises(ValueError, match="fewer than 4"):
        shrink(ids, mask, placeholder=9, keep=4)
    with pytest.raises(ValueError, match="one by one"):
        shrink(torch.tensor([[9, 9, 9], [1, 2, 3]]), torch.ones(2, 3), placeholder=9, keep=1)


def test_scores_of_a_units_patches_are_added_when_as_many_patches_are_left_as_there_were_units():
    unit = torch.tensor([[0, 0, 2, 2]])  # 4 units of 2 patches, of which two stay
    patches = Patches(torch.arange(4)[None], unit, units=4, prefix=0, has_cls=False, valid=None)
    assert patches.per_unit(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0, 2]])).tolist() == [[3.0, 7.0]]
