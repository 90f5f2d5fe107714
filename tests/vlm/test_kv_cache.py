import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.vlm.kv_cache import KVCache


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model, ids, cache=None):
    return model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits


def test_a_rewound_cache_continues_as_if_the_rest_had_never_been(model):
    ids, other = torch.randint(50, (2, 12)), torch.randint(50, (2, 5))
    cache = KVCache()
    logits(model, ids, cache)
    cache.rewind(7)
    assert cache.length == 7
    want = logits(model, torch.cat([ids[:, :7], other], dim=1))[:, 7:]
    torch.testing.assert_close(logits(model, other, cache), want, rtol=1e-5, atol=1e-5)


def test_suffix_can_be_overwritten_many_times(model):
    """The pattern of flow-matching sampling: one prefix, then passes that replace the same slots."""
    prefix = torch.randint(50, (1, 9))
    cache = KVCache()
    logits(model, prefix, cache)
    for _ in range(3):
        suffix = torch.randint(50, (1, 4))
        cache.rewind(9)
        want = logits(model, torch.cat([prefix, suffix], dim=1))[:, 9:]
        torch.testing.assert_close(logits(model, suffix, cache), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_forks_do_not_see_each_other(model, count):
    prefix, questions = torch.randint(50, (1, 6)), torch.randint(50, (count, 4))
    cache = KVCache()
    logits(model, prefix, cache)
    fork = cache.fork(count)
    got = logits(model, questions, fork)
    assert cache.length == 6 and fork.length == 10
    want = logits(model, torch.cat([prefix.expand(count, -1), questions], dim=1))[:, 6:]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_keep_selects_rows_of_every_layer(model):
    cache = KVCache()
    logits(model, torch.randint(50, (2, 8)), cache)
    whole = [layer.keys for layer in cache.layers]
    before = cache.nbytes
    rows = torch.tensor([[0, 3, 5, 7], [1, 2, 6, 7]])
    cache.keep(rows)
    for layer, keys in zip(cache.layers, whole, strict=True):
        for b in range(2):
            assert torch.equal(layer.keys[b], keys[b][:, rows[b]])
    assert cache.length == 4 and cache.nbytes == before // 2


def test_sliding_window_models_rewind_too():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    mistral = MistralForCausalLM(config).eval()
    ids, other = torch.randint(50, (1, 12)), torch.randint(50, (1, 3))
    cache = KVCache()
    logits(mistral, ids, cache)
    cache.rewind(9)
    want = logits(mistral, torch.cat([ids[:, :9], other], dim=1))[:, 9:]
    torch.testing.assert_close(logits(mistral, other, cache), want, rtol=1e-5, atol=1e-5)


def test_impossible_requests_say_why():
    cache = KVCache()
    with pytest.raises(ValueError, match="holds 0 entries, cannot rewind to 3"):
        cache.rewind(3)
    with pytest.raises(ValueError, match="at least 1"):
        cache.fork(0)
