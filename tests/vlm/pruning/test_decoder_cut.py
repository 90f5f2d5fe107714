import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.vlm.kv_cache import KVCache
from headrace.vlm.prefill import read
from headrace.vlm.prompt import Prompt, left_pad
from headrace.vlm.pruning.decoder_cut import cut_decoder, fastv_prompt_scores, flowcut_prompt_scores


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(10)
            layer.self_attn.k_proj.weight.mul_(10)
    return model


def prompt(model, length=20, visual=slice(3, 15), seed=0):
    ids = torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed))
    mark = torch.zeros(length, dtype=torch.bool)
    mark[visual] = True
    return Prompt(ids, model.get_input_embeddings()(ids), torch.arange(length)[None], mark)


@torch.no_grad()
def run(model, given, keep, scorer=fastv_prompt_scores, layer=1):
    cache, batch = KVCache(), left_pad([given])
    with cut_decoder(model, cache, given.visual, layer=layer, keep=keep, scorer=scorer) as cut:
        logits = read(model, batch, cache, past=batch.mask[:, :0])
    return logits, cache, cut


def test_keeping_all_visual_tokens_changes_no_bit(model):
    given = prompt(model)
    with torch.no_grad():
        plain = model(inputs_embeds=given.embeds[None], logits_to_keep=1).logits[:, -1]
    logits, cache, cut = run(model, given, keep=12)
    assert torch.equal(logits, plain) and cut is None and cache.length == 20


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_fastv_keeps_what_the_full_attention_matrix_ranks_first(model, implementation):
    given = prompt(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(inputs_embeds=given.embeds[None], output_attentions=True).attentions[1]
    row = weights[0].mean(0)[-1, given.visual]
    want = (given.visual.nonzero()[:, 0])[row.topk(5).indices].sort().values
    model.set_attn_implementation(implementation)
    _, cache, cut = run(model, given, keep=5)
    assert torch.equal(cut.kept[given.visual[cut.kept]], want)
    assert cache.length == 13 and all(layer.keys.shape[2] == 13 for layer in cache.layers)


def test_flowcut_scores_by_hand(model):
    generator = torch.Generator().manual_seed(1)
    from headrace.vlm.pruning.observe import Qkv

    q, k, v = (torch.randn(1, 2, 6, 4, generator=generator) for _ in range(3))
    visual = torch.tensor([1, 2, 4])
    a = (q[:, :, -1:] @ k[:, :, visual].transpose(-1, -2) * 0.5).softmax(-1).mean(1)[:, 0]
    s = (v[:, :, -1:] @ v[:, :, visual].transpose(-1, -2) * 0.5).softmax(-1).mean(1)[:, 0]
    want = (a + s) * v[:, :, visual].mean(1).abs().sum(-1)
    torch.testing.assert_close(flowcut_prompt_scores(Qkv(q, k, v, 0.5), visual), want)


@torch.no_grad()
def test_later_blocks_and_later_tokens_see_the_kept_positions_only(model):
    """Against a full pass in which blocks after the cut are masked by hand to the kept positions."""
    given = prompt(model)
    logits, _, cut = run(model, given, keep=4, scorer=flowcut_prompt_scores)
    decoder = model.model
    hidden, positions = given.embeds[None], given.positions
    tables = decoder.rotary_emb(hidden, positions)
    causal = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    for index, block in enumerate(decoder.layers):
        if index == 2:
            hidden, tables = hidden[:, cut.kept], tuple(t[:, cut.kept] for t in tables)
            causal = causal[..., cut.kept, :][..., cut.kept]
        hidden = block(hidden, attention_mask=causal, position_embeddings=tables)
    want = model.lm_head(decoder.norm(hidden[:, -1]))
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
    nothing = model(inputs_embeds=given.embeds[None]).logits[:, -1]
    assert not torch.allclose(logits, nothing, atol=1e-3)


def test_bad_requests_are_named(model):
    given = prompt(model)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        run(model, given, keep=3, layer=3)
