import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.nn.pretrained import CONFIG_FILE, WEIGHTS_FILE
from headrace.tokenizers.auto import load_tokenizer
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.tokenizers.tokenflow_import import (
    export_official,
    from_official,
    load_official,
    official_variant,
    read_official,
    save_official,
)
from headrace.tokenizers.tokenflow_semantic import FAMILIES, SemanticTower, TowerConfig, resize_positions

ENTRIES = {"b": 549, "b_enhanced": 649, "b_256": 649, "l": 972, "xl": 848}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TokenFlow(TokenFlowConfig.tiny()).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def hollow(variant):
    with torch.device("meta"):
        return TokenFlow(getattr(TokenFlowConfig, variant)())


@pytest.mark.parametrize("variant", ENTRIES)
def test_published_sizes_have_the_published_keys(variant):
    model = hollow(variant)
    state = export_official(model)
    assert len(state) == ENTRIES[variant]
    again = from_official(state, model.config)
    own = model.state_dict()
    assert again.keys() == own.keys()
    assert all(again[key].shape == own[key].shape for key in own)
    assert official_variant(state) in (variant, "b_256")


@pytest.mark.parametrize("official_keys", ["tokenflow_clipb_enhanced"], indirect=True)
def test_all_649_keys_of_the_enhanced_checkpoint_fit(official_keys):
    listed = official_keys
    assert len(listed) == 649
    model = hollow("b_256")
    assert {name: tuple(value.shape) for name, value in export_official(model).items()} == listed
    state = {name: torch.empty(shape, device="meta") for name, shape in listed.items()}
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in from_official(state, model.config).items()} == own


def test_xl_tower_has_the_names_of_transformers_siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    with torch.device("meta"):
        theirs = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=384, patch_size=14))
    listed = {name.removeprefix("vision_model."): tuple(v.shape) for name, v in theirs.state_dict().items()}
    listed = {name: shape for name, shape in listed.items() if not name.endswith("position_ids")}
    exported = export_official(hollow("xl"))
    start = "encoder_vqkd.vision_model."
    tower = {name.removeprefix(start): tuple(v.shape) for name, v in exported.items() if name.startswith(start)}
    assert tower == listed


def test_siglip_tower_equals_transformers():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = replace(
        TokenFlowConfig.xl(),
        size=70,
        tower=TowerConfig(family="siglip", size=70, patch=14, width=48, depth=3, heads=4, hidden=100),
        semantic_decoder=replace(TokenFlowConfig.tiny().semantic_decoder, grid=5),
        pixel_encoder=TokenFlowConfig.tiny().pixel_encoder,
        pixel_decoder=TokenFlowConfig.tiny().pixel_decoder,
        quantizer=replace(TokenFlowConfig.tiny().quantizer, scales=(1, 2, 5)),
    )
    model = TokenFlow(config).eval()
    sizes = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4}
    theirs = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=70, patch_size=14)).eval()
    exported = export_official(model)
    tower = {k.removeprefix("encoder_vqkd."): v for k, v in exported.items() if k.startswith("encoder_vqkd.")}
    if not any(name.startswith("vision_model.") for name in theirs.state_dict()):
        tower = {name.removeprefix("vision_model."): value for name, value in tower.items()}
    theirs.load_state_dict(tower, strict=True)
    images = (torch.randint(0, 256, (1, 3, 70, 70)) / 127.5 - 1).float()
    with torch.no_grad():
        wanted = theirs(images, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(model.tower(images), wanted, rtol=1e-5, atol=1e-5)
        assert model.reconstruct(images).shape == (1, 3, 70, 70)
    bare = {name.replace(".vision_model", ""): value for name, value in exported.items()}
    again = from_official(bare, config)
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    unused = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert unused == {"blocks", "norm", "attn_pool"}


def test_vitamin_tower_normalises_as_clip_does():
    class Echo(nn.Module):
        def forward_features(self, x):
            return x

    tower = SemanticTower.__new__(SemanticTower)
    nn.Module.__init__(tower)
    tower.config, tower.facts, tower.model = TokenFlowConfig.l().tower, FAMILIES["vitamin"], Echo()
    seen = tower(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)).flatten()
    wanted = (torch.tensor([0, 0.5, 1]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(seen, wanted)


def test_positions_are_resized_by_the_reference_factor():
    table = torch.randn(1, 1 + 14 * 14, 3)
    resized = resize_positions(table, 16, prefix=1)
    assert resized.shape == (1, 1 + 16 * 16, 3)
    assert torch.equal(resized[:, :1], table[:, :1])
    grid = table[:, 1:].transpose(1, 2).reshape(1, 3, 14, 14)
    plain = nn.functional.interpolate(grid, size=(16, 16), mode="bicubic").flatten(2).transpose(1, 2)
    assert not torch.allclose(resized[:, 1:], plain, atol=1e-3)
    reference = nn.functional.interpolate(grid, scale_factor=(16.1 / 14,) * 2, mode="bicubic").flatten(2)
    torch.testing.assert_close(resized[:, 1:], reference.transpose(1, 2))
    assert resize_positions(table, 14, prefix=1) is table


def test_larger_pictures_use_interpolated_tables(model):
    config = replace(model.config, size=80, quantizer=replace(model.config.quantizer, scales=(1, 2, 3, 4, 5)))
    larger = TokenFlow(config).eval()
    larger.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 80, 80) * 2 - 1
    codes = larger.encode(images)
    assert codes.shape == (1, 55) and larger.tokens_per_image == 55
    assert larger.decode(codes).shape == (1, 3, 80, 80)


@pytest.mark.parametrize(
    ("choice", "shape"),
    [("last", (16, 24)), ("semantic", (16, 16)), ("all", (30, 24)), ("residual", (30, 24))],
)
def test_features_for_a_language_model(model, images, choice, shape):
    rows = model.features(images, choice=choice)
    assert rows.shape == (2, *shape)
    last = model.features(images)
    if choice == "semantic":
        assert torch.equal(rows, last[..., :16])
    if choice == "all":
        torch.testing.assert_close(rows[:, -16:], last)
    if choice == "residual":
        torch.testing.assert_close(rows[..., :16].norm(dim=-1), torch.ones(2, 30))


@pytest.mark.parametrize("choice", ["last", "semantic", "all", "residual"])
@pytest.mark.parametrize(
    ("codes", "message"),
    [(torch.zeros(1, 14, dtype=torch.int64), r"\(B, 30\)"), (torch.full((1, 30), -1), r"0\.\.255")],
)
def test_features_need_the_codes_of_all_scales(model, codes, message, choice):
    with pytest.raises(ValueError, match=message):
        model.features_of(codes, choice=choice)


def test_an_unknown_choice_of_features_is_named(model, images):
    with pytest.raises(ValueError, match="'first'"):
        model.features(images, choice="first")


@pytest.mark.parametrize("variant", ["tiny", "mini"])
def test_a_model_in_half_precision_encodes_and_decodes(images, variant):
    torch.manual_seed(0)
    half = TokenFlow(getattr(TokenFlowConfig, variant)()).eval().bfloat16()
    with torch.no_grad():
        codes = half.encode(images.bfloat16())
        assert half.decode(codes).dtype == torch.bfloat16
        made, meaning = half.decode_features(half.quantizer.accumulate(codes))
    assert made.isfinite().all() and meaning.isfinite().all() and meaning.dtype == torch.bfloat16


def test_pixel_loss_gives_the_semantic_branch_nothing(model, images):
    model.zero_grad()
    model.decode_pixels(model.quantize(images).features).square().mean().backward()
    groups = {"tower": 0.0, "encode_task": 0.0, "quantizer": 0.0, "pixel_encoder": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name.split(".")[0] in groups:
            groups[name.split(".")[0]] += float(parameter.grad.abs().sum())
    model.zero_grad()
    assert groups.pop("pixel_encoder") > 0
    assert set(groups.values()) == {0.0}


def test_saved_model_gives_the_same_codes(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.encode(images), model.encode(images))
    (tmp_path / WEIGHTS_FILE).write_bytes((tmp_path / WEIGHTS_FILE).read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        load_tokenizer(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_a_name_alone_warns_about_random_weights():
    with pytest.warns(UserWarning, match="random"):
        assert load_tokenizer("tokenflow:tiny").tokens_per_image == 30


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 7, dtype=torch.int64), r"\[1, 5, 14, 30\]"),
        (torch.full((1, 30), 256), r"0\.\.255"),
        (torch.full((1, 30), -1), r"0\.\.255"),
        (torch.zeros(1, 30), "integers"),
    ],
)
def test_bad_codes_are_named(model, codes, message):
    with pytest.raises(ValueError, match=message):
        model.decode(codes)


def test_bad_pictures_are_named(model):
    for bad in (torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 63, 64), torch.full((1, 3, 64, 64), 255.0)):
        with pytest.raises(ValueError, match="64, 64"):
            model.encode(bad)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_an_exported_file_is_loaded_with_the_same_numbers(model, images, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(TokenFlowConfig, "b_256", TokenFlowConfig.tiny)
    save_official(model, tmp_path / f"release{ending}")
    again = load_official(tmp_path / f"release{ending}")
    codes = model.encode(images)
    assert again.config == model.config and torch.equal(again.encode(images), codes)
    with torch.no_grad():
        assert torch.equal(again.decode(codes), model.decode(codes))
        assert torch.equal(again.features(images), model.features(images))


@pytest.mark.parametrize(("width", "found", "asked"), [(128, "b", "b_256"), (256, "b_256", "b")])
def test_plain_and_enhanced_b_are_told_apart(tmp_path, width, found, asked):
    names = {"encoder_vqkd.class_embedding": torch.zeros(768), "decoder.norm_out.weight": torch.zeros(width)}
    torch.save({"model": names}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=f"the variant '{found}', not of '{asked}'"):
        load_official(tmp_path / "b.pt", variant=asked)


def test_official_files_of_another_variant_are_named(model, tmp_path):
    state = {name: torch.zeros(1) for name in ("encoder_vqkd.post_layernorm.weight", "quant_conv.weight")}
    torch.save({"model": state}, tmp_path / "xl.pt")
    with pytest.raises(ValueError, match="'xl', not of 'b_256'"):
        load_official(tmp_path / "xl.pt", variant="b_256")
    save_official(model, tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="do not fit TokenFlow"):
        load_official(tmp_path / "tiny.safetensors")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "xl.pt").read_bytes()[:300])
    with pytest.raises(ValueError, match="cut off"):
        load_official(tmp_path / "cut.pt")
    torch.save({"model": {"a.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no TokenFlow checkpoint"):
        load_official(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_official(tmp_path / "none.pt")


def test_a_model_that_the_release_has_no_names_for_is_not_exported():
    with pytest.raises(ValueError, match="'efficientnet'"):
        export_official(hollow("mini"))


def test_an_official_file_that_is_not_whole_names_what_is_missing(model):
    whole = export_official(model)
    for lost in ("encoder_vqkd.class_embedding", "encoder_vqkd.positional_embedding"):
        state = {name: value for name, value in whole.items() if name != lost}
        with pytest.raises(ValueError, match=r"not whole: its clip tower lacks"):
            from_official(state, model.config)
    with pytest.raises(ValueError, match=r"'stem\.weight' is no weight of this tower"):
        from_official(whole | {"encoder_vqkd.stem.weight": torch.zeros(1)}, model.config)
    with pytest.raises(ValueError, match=r"not whole.*decoder\.norm_out"):
        official_variant({name: value for name, value in whole.items() if not name.startswith("decoder.")})


class Trap:
    """Leaves a file behind when a full unpickler makes it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_trainer_arguments_are_not(tmp_path):
    weights = {"quant_conv.weight": torch.ones(2)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-4), "steps": 7}, tmp_path / "trainer.pt")
    assert torch.equal(read_official(tmp_path / "trainer.pt")["quant_conv.weight"], torch.ones(2))
    torch.save({"model": weights, "ema": {"quant_conv.weight": torch.zeros(2)}}, tmp_path / "averaged.pt")
    assert torch.equal(read_official(tmp_path / "averaged.pt")["quant_conv.weight"], torch.zeros(2))
    torch.save({"model": weights, "args": Trap(tmp_path / "ran")}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt asks to run code"):
        read_official(tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="last scale is 5"):
        replace(TokenFlowConfig.tiny(), quantizer=replace(TokenFlowConfig.tiny().quantizer, scales=(1, 5)))
    with pytest.raises(ValueError, match="384 px only"):
        replace(TokenFlowConfig.xl(), size=378)
