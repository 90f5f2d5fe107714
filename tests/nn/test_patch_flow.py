import pytest
import torch

from headrace.nn.patch_flow import PatchFlow, PatchFlowConfig, power_grid
from headrace.nn.time_embedding import sinusoid_features


@pytest.fixture
def head():
    torch.manual_seed(0)
    return PatchFlow(PatchFlowConfig(patch_dim=12, condition_dim=8, width=16, depth=2))


def test_a_head_narrower_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"192 wide.*588"):
        PatchFlowConfig(patch_dim=588, condition_dim=192, width=192)
    assert PatchFlowConfig(patch_dim=588, condition_dim=192, width=192, allow_narrow=True).width == 192


def test_patches_do_not_see_each_other(head):
    x, t, c = torch.randn(5, 12), torch.rand(5), torch.randn(5, 8)
    whole = head(x, t, c)
    torch.testing.assert_close(head(x[2:3], t[2:3], c[2:3]), whole[2:3])


def test_zero_init_starts_at_zero_velocity_and_the_default_does_not(head):
    config = PatchFlowConfig(patch_dim=12, condition_dim=8, width=16, depth=2, zero_init=True)
    inputs = torch.randn(5, 12), torch.rand(5), torch.randn(5, 8)
    assert PatchFlow(config)(*inputs).abs().max() == 0
    assert head(*inputs).abs().max() > 0


def test_wrong_condition_is_named(head):
    with pytest.raises(ValueError, match=r"condition.*\(5, 8\).*\(5, 7\)"):
        head(torch.randn(5, 12), torch.rand(5), torch.randn(5, 7))


def test_power_grid_is_uniform_at_one_and_fine_near_data_below():
    assert power_grid(4) == pytest.approx((0, 0.25, 0.5, 0.75, 1))
    quarter = power_grid(4, 0.25)
    assert quarter[0] == 0 and quarter[-1] == 1
    assert quarter[1] - quarter[0] > quarter[-1] - quarter[-2]


def test_sinusoids_are_cosine_first_and_scaled():
    t = torch.tensor([0.25])
    features = sinusoid_features(t, 6, scale=1000.0)
    assert features[0, 0].item() == pytest.approx(torch.tensor(250.0).cos().item(), abs=1e-4)
    assert features[0, 3].item() == pytest.approx(torch.tensor(250.0).sin().item(), abs=1e-4)


def test_a_gain_reaches_the_condition_and_leaves_the_way_of_the_noise():
    torch.manual_seed(0)
    head = PatchFlow(PatchFlowConfig(patch_dim=48, condition_dim=64, width=256, depth=1, init_gain=1.0))
    for layer in (head.cond_embed, head.out_modulation, head.res_blocks[0].modulation):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.02)
    for layer in (head.input_proj, head.out):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    with pytest.raises(ValueError, match="init_gain"):
        PatchFlowConfig(patch_dim=4, condition_dim=4, width=4, init_gain=-1.0)
