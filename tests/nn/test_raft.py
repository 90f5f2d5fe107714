import pytest
import torch
from safetensors.torch import save_file

from headrace.nn.raft import Raft


def test_a_frozen_raft_passes_gradients_to_both_pictures(tmp_path):
    torch.manual_seed(0)
    raft = Raft(updates=1).train()
    assert not any(module.training for module in raft.modules())
    assert not any(parameter.requires_grad for parameter in raft.parameters())
    a, b = (torch.rand(1, 3, 128, 128, requires_grad=True) for _ in range(2))
    flow = raft(a, b)
    assert flow.shape == (1, 2, 128, 128)
    flow.square().mean().backward()
    assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0
    save_file(raft.net.state_dict(), tmp_path / "raft.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(Raft.from_file(tmp_path / "raft.safetensors", updates=1)(a, b), flow.detach())
    with pytest.raises(ValueError, match="at least 128 px"):
        raft(a[..., :64, :64], b[..., :64, :64])
