import pytest
import torch

from headrace.contracts import ActionSpec
from headrace.robot.vipra_actor import PolicyInput
from headrace.robot.vipra_bins import VipraBins, VipraBinsConfig

SPEC = ActionSpec(names=("x", "gripper"), frame="base_delta", rotation="none", gripper="open_is_1", rate=20.0)


@pytest.fixture
def model() -> VipraBins:
    torch.manual_seed(0)
    return VipraBins(VipraBinsConfig.tiny(SPEC)).eval()


def some_inputs(model: VipraBins) -> PolicyInput:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 1, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return PolicyInput(images, torch.randn(2, 15, generator=generator), model.encode_text(["push the cube", "pull it"]))


def test_cached_logits_are_those_of_one_pass(model):
    inputs = some_inputs(model)
    ids = model._with_ends(torch.randint(8, (2, 8), generator=torch.Generator().manual_seed(1)))
    with torch.inference_mode():
        cached = model.logits(model.compute_prefix(inputs), ids)
        torch.testing.assert_close(cached, model.logits_uncached(inputs, ids), atol=1e-5, rtol=1e-5)


def test_sampling_takes_the_most_likely_bin_after_those_written(model):
    inputs = some_inputs(model)
    actions = model.sample(inputs)
    assert actions.shape == (2, 4, 2)
    ids = model._with_ends(model.bins.encode(actions).flatten(1))
    with torch.inference_mode():
        likely = model.logits_uncached(inputs, ids)[..., :8].argmax(-1)
    numbers = ids != 8
    assert torch.equal(likely[numbers], ids[numbers])


def test_the_loss_is_the_mean_over_steps_that_count(model):
    inputs, actions = some_inputs(model), torch.rand(2, 4, 2) * 2 - 1
    valid = torch.tensor([[True, True, False, False], [True, False, False, False]])
    ids = model._with_ends(model.bins.encode(actions).flatten(1))
    with torch.no_grad():
        entropy = torch.nn.functional.cross_entropy(
            model.logits_uncached(inputs, ids).transpose(1, 2), ids, reduction="none"
        ).view(2, 4, 3)
        total = model.loss(inputs, actions, valid)["total"]
    torch.testing.assert_close(total, entropy[valid].mean(), atol=1e-5, rtol=1e-5)


def test_learning_one_chunk_brings_it_back(model):
    inputs, actions = some_inputs(model), torch.full((2, 4, 2), 0.6)
    actions[:, 2:] = -0.4
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(25):
        optimizer.zero_grad()
        model.loss(inputs, actions, None)["total"].backward()
        optimizer.step()
    torch.testing.assert_close(model.eval().sample(inputs), model.bins.decode(model.bins.encode(actions)))


def test_saved_policies_write_the_same_actions(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VipraBins.from_pretrained(tmp_path)
    inputs = some_inputs(model)
    torch.testing.assert_close(again.sample(inputs), model.sample(inputs), rtol=0, atol=0)
