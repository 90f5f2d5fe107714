from dataclasses import replace

import pytest
import torch

from headrace.contracts import ActionSpec
from headrace.nn.image_tokens import ImageTokensConfig
from headrace.robot.carry_over import carry_over, require_same_conditions
from headrace.robot.frame_codes import FrameCodesConfig
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_config import BackboneConfig
from headrace.robot.vipra_pretraining import PretrainingInput, VipraPretraining, VipraPretrainingConfig
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.vlm.visual_encoder import VisualEncoderConfig

SPEC = ActionSpec(names=("x", "y", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=20.0)


def make(**changes) -> VipraPretraining:
    torch.manual_seed(0)
    return VipraPretraining(replace(VipraPretrainingConfig.tiny(), **changes)).eval()


def batch_for(model: VipraPretraining, batch: int = 2) -> PretrainingInput:
    generator, config = torch.Generator().manual_seed(0), model.config
    words = ["push the cube", "pull it"][:batch]
    return PretrainingInput(
        torch.randint(0, 256, (batch, 1, len(config.history), 64, 64, 3), generator=generator, dtype=torch.uint8),
        torch.zeros(batch, 0, dtype=torch.int64),
        torch.randint(config.frame_codes, (batch, config.frame_tokens), generator=generator),
        torch.randint(config.latent_codes, (batch, config.record.latent_steps * 2), generator=generator),
        model.encode_text(words),
    )


@pytest.fixture(scope="module")
def model() -> VipraPretraining:
    return make()


def test_the_total_is_the_layout_s_weights_times_the_means(model):
    with torch.no_grad():
        terms = model.loss(batch_for(model))
    wanted = 0.48 * terms["visual"] + 0.48 * terms["latent"] + 0.02 * terms["spelling"]
    torch.testing.assert_close(terms["total"], wanted)


def test_batched_rows_stand_where_the_layout_builds_them(model):
    batch, layout = batch_for(model, 1), model.layout
    contents = {"instruction": batch.text, "future": batch.future, "latents": batch.latents}
    embedded = model.embed(layout, contents | model.frame_contents(batch.images))
    sample = {"instruction": batch.text[0], "frame_0": model.image_tokens.tokens}
    sequence = layout.build(sample | {"future": batch.future[0], "latents": batch.latents[0]})
    assert torch.equal(embedded.kinds, sequence.modality)
    assert embedded.spans == sequence.spans
    discrete = embedded.ids[0] >= 0
    assert torch.equal(embedded.ids[0][discrete], sequence.ids[discrete])
    for name, weight in layout.loss_weights.items():
        scored = embedded.scored & (embedded.kinds == layout.index(name))
        assert torch.equal(scored, (sequence.loss_weight > 0) & (sequence.modality == layout.index(name)))
        torch.testing.assert_close(sequence.loss_weight[scored].sum(), torch.tensor(weight))


def test_latent_actions_see_the_future_frame_and_not_the_other_way_round(model):
    batch = batch_for(model)
    other_latents = batch._replace(latents=(batch.latents + 1) % 4)
    other_future = batch._replace(future=(batch.future + 1) % 20)
    with torch.no_grad():
        base, moved, shown = (model.loss(b) for b in (batch, other_latents, other_future))
    torch.testing.assert_close(base["visual"], moved["visual"])
    assert not torch.allclose(base["latent"], shown["latent"])


def test_padding_of_the_instruction_changes_nothing(model):
    batch = batch_for(model)
    padded = batch._replace(text=torch.nn.functional.pad(batch.text, (5, 0)))
    with torch.no_grad():
        torch.testing.assert_close(model.loss(padded)["total"], model.loss(batch)["total"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("future", "steps", "terms"), [(True, 0, "visual"), (False, 3, "latent"), (True, 1, "both")])
def test_ablations_score_what_they_name(future, steps, terms):
    record = replace(VipraPretrainingConfig.tiny().record, future=future, latent_steps=steps)
    model = make(record=record)
    found = model.loss(batch_for(model))
    assert ("visual" in found, "latent" in found) == {
        "visual": (True, False), "latent": (False, True), "both": (True, True)
    }[terms]  # fmt: skip
    found["total"].backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert not unused


def test_checkpointed_activations_give_the_same_gradients():
    plain, saving = make().train(), make().train()
    saving.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = batch_for(plain)
    for model in (plain, saving):
        model.loss(batch)["total"].backward()
    mine, theirs = (m.backbone.layers[0].mlp.up_proj.weight.grad for m in (plain, saving))
    torch.testing.assert_close(mine, theirs)


def tokenizer_config() -> VisualEncoderConfig:
    tokenizer = TokenFlow(TokenFlowConfig.tiny())
    return VisualEncoderConfig.of_tokenizer(tokenizer, family="tokenflow", tokens="codes")


def test_cached_ids_and_pictures_of_the_context_are_the_same():
    image = FrameCodesConfig(encoder=tokenizer_config(), size=64, width=32, reserved=2)
    record = replace(VipraPretrainingConfig.tiny().record, history=(-1, 0))
    model = make(image=image, frame_tokens=30, frame_codes=256, history=(-1, 0), record=record)
    assert sum(p.requires_grad for p in model.image_tokens.encoder.parameters()) == 0
    batch = batch_for(model)
    ids = model.frame_contents(batch.images)["frames"]
    assert ids.shape == (2, 2 * 30)
    cached = batch._replace(images=torch.zeros(2, 0, dtype=torch.uint8), frames=ids)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(cached)["total"], model.loss(batch)["total"])


def test_released_shape_counts_the_released_tokens():
    from headrace.vlm.vipra_sequences import VipraSizes, pretraining

    record = replace(VipraPretrainingConfig.tiny().record, horizon=14, latent_steps=14, history=(-1, 0))
    config = VipraPretrainingConfig(
        cameras=("video",),
        history=(-1, 0),
        image=ImageTokensConfig(),
        backbone=BackboneConfig(),
        record=record,
        words=("go",),
    )
    with torch.device("meta"):
        model = VipraPretraining(replace(config, image=ImageTokensConfig.tiny(width=4096), camera_size=64))
    numbers = sum(p.numel() for name, p in model.named_parameters() if name.startswith("backbone."))
    assert 6.4e9 < numbers < 6.6e9  # LLaMA-2-7B without its token tables
    spans = pretraining(VipraSizes()).build(
        {
            "instruction": "go", "frames": torch.zeros(512), "future": torch.zeros(256), "latents": torch.zeros(224)
        },
        encode_text=lambda text: [5],
    ).spans  # fmt: skip
    assert [end - start for start, end in spans.values()] == [1, 514, 257, 238]
    assert model.layout.loss_weights == {"mark": 0.02, "visual": 0.48, "latent": 0.48}


def policy_like(model: VipraPretraining, **changes) -> VipraPolicy:
    tiny, own = VipraConfig.tiny(SPEC), model.config
    return VipraPolicy(replace(tiny, image=own.image, words=own.words, **changes)).eval()


def test_a_policy_takes_over_everything_but_its_head(model):
    policy = policy_like(model)
    report = carry_over(model, policy)
    assert {name.split(".")[0] for name in report.fresh} == {"decoder", "proprio"}
    assert {name.split(".")[0] for name in report.left} == {"tables", "heads"}
    for name in ("backbone.norm.weight", "backbone.layers.1.self_attn.q_proj.weight", "image_tokens.project.weight"):
        assert torch.equal(policy.state_dict()[name], model.state_dict()[name])
    assert torch.equal(policy.delimiters.weight, model.delimiters.weight[:7])


def test_words_are_carried_by_name(model):
    words = ("a", "cube", "lift", "the")
    policy = policy_like(model)
    policy = VipraPolicy(replace(policy.config, words=words)).eval()
    before = policy.text.weight.detach().clone()
    carry_over(model, policy)
    assert torch.equal(policy.text.weight[3], model.text.weight[2 + model.config.words.index("cube")])
    assert torch.equal(policy.text.weight[4], before[4])


def test_another_trunk_is_refused_by_name(model):
    policy = VipraPolicy(replace(VipraConfig.tiny(SPEC), backbone=replace(model.config.backbone, layers=3)))
    with pytest.raises(ValueError, match=r"backbone\.layers\.2"):
        carry_over(model, policy)


@pytest.mark.parametrize(
    ("history", "rate", "override", "message"),
    [((-1, 0), 20.0, (), "frames"), ((0,), 10.0, (), "steps a second"), ((0,), 20.0, ("fps",), "override takes")],
)
def test_other_conditions_than_pretraining_are_refused(model, history, rate, override, message):
    with pytest.raises(ValueError, match=message):
        require_same_conditions(model.config.record, history=history, rate=rate, override=override)


def test_differences_that_are_named_pass(model):
    require_same_conditions(model.config.record, history=(-1, 0), rate=5.0, override=("history", "rate"))


def test_demonstrations_fit_at_the_labels_rate_and_at_that_of_the_videos(model):
    record = replace(model.config.record, history=(-1, 0), rate=5.0, stride=4)
    require_same_conditions(record, history=(-1, 0), rate=5.0)
    require_same_conditions(record, history=(-4, 0), rate=20.0)
    require_same_conditions(record, history=(-4, 0), rate=19.9)  # the tolerance that the labels had
    with pytest.raises(ValueError, match=r"pretrained on frames \(-4, 0\), the policy is to see \(-1, 0\)"):
        require_same_conditions(record, history=(-1, 0), rate=20.0)
    with pytest.raises(ValueError, match="5 steps a second on videos of 20 Hz, the demonstrations have 10"):
        require_same_conditions(record, history=(-1, 0), rate=10.0)


def test_views_are_carried_by_moment_across_a_stride():
    tiny = VipraPretrainingConfig.tiny()
    record = replace(tiny.record, history=(-1, 0), rate=5.0, stride=4)
    source = VipraPretraining(replace(tiny, history=(-1, 0), record=record))
    target = policy_like(source, history=(-4, 0))
    carry_over(source, target, frames_per_step=4)
    assert torch.equal(target.view.weight, source.view.weight)


def test_a_record_that_contradicts_the_network_cannot_exist():
    with pytest.raises(ValueError, match="record says"):
        replace(VipraPretrainingConfig.tiny(), history=(-1, 0))
