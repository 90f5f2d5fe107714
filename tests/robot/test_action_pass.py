import pytest
import torch
from torch import nn
from transformers import LlamaModel

from headrace.robot.action_pass import ActionPass, reads_weights_of
from headrace.robot.vipra_config import BackboneConfig
from headrace.robot.vipra_trunk import additive, positions
from headrace.vlm.kv_cache import KVCache

PREFIX, HORIZON, WIDTH = 9, 5, 48


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    config = BackboneConfig(width=WIDTH, layers=3, heads=3, mlp=80, rope_theta=1e4)
    model = LlamaModel(config.llama()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)  # ones would hide a norm that is left out
        else:
            parameter.data.mul_(8)  # attention of freshly drawn weights is flat
    return model


def whole(backbone, embeddings, valid, causal, cache=None):
    """All positions in one pass; the prefix is causal."""
    total = embeddings.shape[1]
    seen = torch.ones(total, total).tril().bool()
    if not causal:
        seen[-HORIZON:, -HORIZON:] = True
    mask = (seen & valid[:, None]) | torch.eye(total).bool()
    return backbone(
        inputs_embeds=embeddings,
        attention_mask=additive(mask[:, None], embeddings.dtype),
        position_ids=positions(valid),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state[:, -HORIZON:]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [(0,), (0, 4, 1)])
def test_it_gives_the_states_of_the_whole_sequence(backbone, causal, padding):
    batch = len(padding)
    prefix, first, second = torch.randn(batch, PREFIX + 2 * HORIZON, WIDTH).split((PREFIX, HORIZON, HORIZON), 1)
    valid = torch.arange(PREFIX) >= torch.tensor(padding)[:, None]
    everything = torch.cat((valid, valid.new_ones(batch, HORIZON)), 1)
    cache = KVCache()
    whole(backbone, torch.cat((prefix, first), 1), everything, causal, cache)
    cache.rewind(PREFIX)
    later = ActionPass(backbone, cache, valid, horizon=HORIZON, causal=causal)
    for actions in (second, first, second):  # what an earlier pass left in the stores must not be seen
        expected = whole(backbone, torch.cat((prefix, actions), 1), everything, causal)
        assert expected.std() > 0.3
        torch.testing.assert_close(later(actions), expected, rtol=1e-5, atol=1e-5)


def test_it_leaves_the_prefix_alone(backbone):
    prefix, actions = torch.randn(1, PREFIX, WIDTH), torch.randn(1, HORIZON, WIDTH)
    cache = KVCache()
    backbone(inputs_embeds=prefix, past_key_values=cache, use_cache=True)
    before = [layer.keys.clone() for layer in cache.layers]
    later = ActionPass(backbone, cache, torch.ones(1, PREFIX, dtype=torch.bool), horizon=HORIZON, causal=True)
    later(actions)
    assert cache.length == PREFIX and all(torch.equal(a, b.keys) for a, b in zip(before, cache.layers, strict=True))


def test_tokens_of_another_horizon_are_named(backbone):
    cache = KVCache()
    backbone(inputs_embeds=torch.randn(1, PREFIX, WIDTH), past_key_values=cache, use_cache=True)
    later = ActionPass(backbone, cache, torch.ones(1, PREFIX, dtype=torch.bool), horizon=HORIZON, causal=True)
    with pytest.raises(ValueError, match=rf"tokens.*{HORIZON}.*{WIDTH}"):
        later(torch.randn(1, HORIZON + 1, WIDTH))


class Adapted(nn.Linear):
    """A linear map with something added, as adapters do."""

    def forward(self, x):
        return super().forward(x) + 1


def test_adapted_maps_are_recognised(backbone):
    assert reads_weights_of(backbone)
    attention = backbone.layers[1].self_attn
    attention.v_proj = Adapted(WIDTH, WIDTH, bias=False)
    assert not reads_weights_of(backbone)
