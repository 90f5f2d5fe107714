from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.nn.quantizers.multi_scale import MultiScaleConfig, MultiScaleQuantizer
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.vlm.next_scale import HeadNorm, NextScaleConfig, NextScaleGenerator
from headrace.vlm.next_scale_passes import CachedPasses, RecomputedPasses
from headrace.vlm.next_scale_prompts import end_ids, prompt_ids, training_caption
from headrace.vlm.next_scale_sampling import Sampling, draw, generate_codes

CONFIG = NextScaleConfig.tiny()
PROMPTS = [[3, 9, 14, 2], [7, 2]]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    model = NextScaleGenerator(CONFIG).eval()
    with torch.no_grad():
        model.language.lm_head.weight.normal_(std=0.5)  # the initial 0.02 makes all codes about equally likely
        model.language.model.embed_tokens.weight.normal_()
    quantizer = MultiScaleQuantizer(MultiScaleConfig(scales=CONFIG.scales, dims=(16, 8), codes=CONFIG.codes)).eval()
    return model, quantizer


@pytest.fixture(scope="module")
def codes():
    return torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sampling", [Sampling.greedy(), Sampling.greedy(passes=3, guidance=2.0)])
def test_cache_gives_identical_greedy_codes(parts, sampling):
    model, quantizer = parts
    prompt, nothing = model.pad(PROMPTS), model.pad([[2], [2]])
    runs = [
        generate_codes(model, quantizer, prompt, unconditional=nothing, sampling=sampling, passes=passes)
        for passes in (CachedPasses, RecomputedPasses)
    ]
    assert torch.equal(*runs)
    assert runs[0].shape == (2, 30) and len(runs[0].unique()) > 5
    assert not torch.equal(runs[0][0], runs[0][1])


def test_the_cache_holds_each_scale_as_its_first_pass_left_it(parts, codes):
    model, quantizer = parts
    prompt = model.pad(PROMPTS)
    runs = []
    for refined in (False, True):
        passes = CachedPasses(model, quantizer, prompt)
        with torch.no_grad():
            passes.states(codes[:, :0], refine=False)
            for stop in (1, 5, 14):
                passes.states(codes[:, :stop], refine=False)
                if refined:
                    passes.states(codes[:, : {1: 5, 5: 14, 14: 30}[stop]], refine=True)
                    passes.states(codes.flip(1)[:, : {1: 5, 5: 14, 14: 30}[stop]], refine=True)
        entries = CONFIG.counts
        runs.append(passes.cache.copy(0, prompt.ids.shape[1] - 1 + sum(entries[:-1])))
    for layer, (keys, values) in runs[0].items():
        assert torch.equal(keys, runs[1][layer][0]) and torch.equal(values, runs[1][layer][1])


def test_the_likeliest_code_and_guidance_on_states_are_those_of_the_logits(parts):
    model, _ = parts
    wanted, unwanted = torch.randn(2, 2, 5, 128, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        mixed = 3 * model.code_logits(wanted) - 2 * model.code_logits(unwanted)
        assert torch.equal(model.likeliest_codes(3 * wanted - 2 * unwanted), mixed.argmax(-1))


def test_refinement_and_guidance_change_the_codes(parts):
    model, quantizer = parts
    prompt, nothing = model.pad(PROMPTS), model.pad([[2], [2]])
    plain = generate_codes(model, quantizer, prompt, sampling=Sampling.greedy())
    refined = generate_codes(model, quantizer, prompt, sampling=Sampling.greedy(passes=2))
    guided = generate_codes(model, quantizer, prompt, unconditional=nothing, sampling=Sampling.greedy(guidance=5.0))
    assert torch.equal(plain[:, :1], refined[:, :1]) and torch.equal(plain[:, :1], guided[:, :1])
    assert not torch.equal(plain, refined) and not torch.equal(plain, guided)


def test_one_pass_over_all_scales_equals_the_scales_one_by_one(parts):
    model, quantizer = parts
    prompt = model.pad(PROMPTS)
    codes = generate_codes(model, quantizer, prompt, sampling=Sampling.greedy())
    with torch.no_grad():
        logits = model.image_logits(prompt, quantizer.next_scale_inputs(codes))
    assert torch.equal(logits.argmax(-1), codes)


def test_a_scale_sees_itself_and_what_is_before_but_not_later_scales(parts):
    model, _ = parts
    prompt = model.pad(PROMPTS)
    torch.manual_seed(2)
    rows = torch.randn(2, 29, 24)
    changed = rows.clone()
    changed[:, 12] += 1  # a row of the third scale: codes 5..13 are rows 4..12
    with torch.no_grad():
        difference = (model.image_logits(prompt, rows) - model.image_logits(prompt, changed)).abs().amax((0, 2))
    assert difference[:5].max() == 0
    assert difference[5:].min() > 0


def test_filling_on_the_left_changes_nothing(parts):
    model, _ = parts
    torch.manual_seed(3)
    rows = torch.randn(1, 29, 24)
    with torch.no_grad():
        alone = model.image_logits(model.pad([PROMPTS[1]]), rows)
        filled = model.image_logits(model.pad(PROMPTS), rows.expand(2, -1, -1))[1:]
    torch.testing.assert_close(alone, filled, rtol=1e-4, atol=1e-4)


def test_loss_is_the_cross_entropy_of_the_one_pass_logits(parts, codes):
    model, quantizer = parts
    prompt = model.pad(PROMPTS)
    with torch.no_grad():
        loss = model.loss(prompt, codes, quantizer)
        rows = quantizer.next_scale_inputs(codes)
        embeds = torch.cat([model.embed_prompt(prompt), model.embed_rows(rows, start=1)], dim=1)
        positions = torch.stack([torch.arange(33), torch.cat([torch.zeros(2).long(), torch.arange(31)])])
        hidden = model.hidden(embeds, model.mask(prompt.real, 29), positions)
        logits = model.language.lm_head(hidden[:, 3:])
    wanted = F.cross_entropy(logits.transpose(1, 2), codes + CONFIG.text_vocab)
    torch.testing.assert_close(loss.codes, wanted)
    assert loss.total != loss.codes  # the end id is predicted, too


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 14, dtype=torch.int64), r"\(2, 30\)"),
        (torch.full((2, 30), -1), r"0\.\.255"),
        (torch.full((2, 30), 256), r"0\.\.255"),
    ],
)
def test_codes_that_cannot_be_predicted_are_refused(parts, codes, message):
    model, quantizer = parts
    with pytest.raises(ValueError, match=message):
        model.loss(model.pad(PROMPTS), codes, quantizer)


def test_a_generator_in_half_precision_learns_and_samples(parts, codes):
    _, quantizer = parts
    torch.manual_seed(0)
    half = NextScaleGenerator(CONFIG).bfloat16()
    loss = half.loss(half.pad(PROMPTS), codes, quantizer).total
    loss.backward()
    assert loss.isfinite() and half.place.grad.isfinite().all()
    made = generate_codes(half.eval(), quantizer, half.pad(PROMPTS), sampling=Sampling.greedy(passes=2))
    assert made.shape == (2, 30)


def test_training_fits_a_picture(codes):
    torch.manual_seed(0)
    model = NextScaleGenerator(NextScaleConfig.tiny())
    quantizer = MultiScaleQuantizer(MultiScaleConfig(scales=CONFIG.scales, dims=(16, 8), codes=CONFIG.codes))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    prompt = model.pad(PROMPTS)
    for _ in range(50):
        loss = model.loss(prompt, codes, quantizer).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        likeliest = model.image_logits(prompt, quantizer.next_scale_inputs(codes)).argmax(-1)
    assert (likeliest == codes).float().mean() > 0.5  # chance is 1 in 256


def test_a_generator_starts_from_a_language_model(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    language = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **shape))
    with torch.no_grad():
        for name, weight in language.named_parameters():
            if "norm" in name:
                weight.add_(torch.rand_like(weight))  # a fresh Llama's norms are all ones
    language.save_pretrained(tmp_path)
    quantizer = MultiScaleConfig(scales=(1, 2, 3), dims=(16, 8), codes=100)
    config = NextScaleConfig.around(language.config, quantizer, end=(1, 2))
    model = NextScaleGenerator.from_language_model(tmp_path, config)
    own, given = model.language.state_dict(), language.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(own[name][:60], given[name]) and own[name].shape == (161, 32)
        assert 0.01 < own[name][60:160].std() < 0.03
    layer = "model.layers.1."
    assert torch.equal(own[f"{layer}self_attn.k_proj.0.weight"], given[f"{layer}self_attn.k_proj.weight"])
    for name in ("self_attn.q_proj.0", "input_layernorm", "post_attention_layernorm", "mlp.up_proj"):
        assert torch.equal(own[f"{layer}{name}.weight"], given[f"{layer}{name.replace('.0', '')}.weight"]), name
    prompt, codes = model.pad([[5, 3]]), torch.zeros(1, 14, dtype=torch.int64)
    model.loss(prompt, codes, MultiScaleQuantizer(quantizer)).total.backward()
    # the ids of the end are trained as codes are
    assert model.language.lm_head.weight.grad[1].norm() > 0 and model.language.lm_head.weight.grad[60].norm() > 0
    with pytest.raises(ValueError, match=r"hidden_size 32 for 64.*vocab_size 60 for text_vocab 61"):
        NextScaleGenerator.from_language_model(language, replace(config, width=64, text_vocab=61))
    with pytest.raises(ValueError, match="attention_bias"):
        biased = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, attention_bias=True, **shape))
        NextScaleGenerator.from_language_model(biased, config)


def test_text_becomes_a_picture(byte_text):
    torch.manual_seed(0)
    tokenizer = TokenFlow(TokenFlowConfig.tiny()).eval()
    config = replace(CONFIG, text_vocab=len(byte_text), end=end_ids(byte_text))
    model = NextScaleGenerator(config).eval()
    prompts = [prompt_ids(byte_text, text) for text in ("a red cube", "")]
    codes = generate_codes(model, tokenizer.quantizer, model.pad(prompts[:1]), unconditional=model.pad(prompts[1:]))
    with torch.no_grad():
        assert tokenizer.decode(codes).shape == (1, 3, 64, 64)


def test_prompts_are_cut_and_captions_dropped_as_often_as_published(byte_text):
    start, close = (byte_text.convert_tokens_to_ids(word) for word in ("<img>", "</img>"))
    ids = prompt_ids(byte_text, "x" * 300)
    assert len(ids) == 128 + 1 and ids[0] == byte_text.bos_token_id and ids[-1] == start
    assert prompt_ids(byte_text, "") == [byte_text.bos_token_id, start]
    assert end_ids(byte_text) == (close, byte_text.eos_token_id)
    rng = np.random.default_rng(0)
    text = "A cat. It sleeps! Where?"
    seen = [training_caption(text, rng) for _ in range(5000)]
    assert set(seen) == {"", "A cat.", text}
    assert seen.count("") == pytest.approx(500, abs=80)
    assert seen.count("A cat.") == pytest.approx(900, abs=110)


def test_filters_keep_what_they_promise():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 1, 4)
    generator = torch.Generator().manual_seed(0)
    seen = [
        set(draw(logits, top_k=k, top_p=p, generator=generator).flatten().tolist())
        for k, p in ((4, 0.0), (3, 0.0), (4, 0.69), (4, 0.71), (1, 0.5), (9, 1.0))
    ]
    assert seen == [{0, 1, 2, 3}, {0, 1, 2}, {0, 1}, {0, 1, 2}, {0}, {0, 1, 2, 3}]


def test_head_norm_normalises_each_head():
    normed = HeadNorm(8)(torch.randn(2, 3, 32) * 5)
    torch.testing.assert_close(normed.unflatten(-1, (4, 8)).square().mean(-1), torch.ones(2, 3, 4), rtol=1e-3, atol=0)


def test_saved_generator_gives_the_same_codes(parts, tmp_path):
    model, quantizer = parts
    model.save_pretrained(tmp_path)
    again = NextScaleGenerator.from_pretrained(tmp_path)
    prompt = model.pad(PROMPTS)
    runs = [generate_codes(m, quantizer, prompt, sampling=Sampling.greedy()) for m in (model, again)]
    assert torch.equal(*runs)


def test_published_size():
    with torch.device("meta"):
        model = NextScaleGenerator(NextScaleConfig.llama2_7b())
    count = sum(p.numel() for p in model.parameters())
    assert 7.0e9 < count < 7.06e9  # the release has 7.03 billion
    assert sum(model.config.counts) == 817


def test_bad_input_is_named(parts):
    model, quantizer = parts
    with pytest.raises(ValueError, match="unconditional"):
        generate_codes(model, quantizer, model.pad(PROMPTS))
    with pytest.raises(ValueError, match=r"ids in 0\.\.63"):
        model.pad([[64]])
    other = MultiScaleQuantizer(MultiScaleConfig(scales=(1, 2, 4), dims=(16, 8), codes=256))
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\)"):
        generate_codes(model, other, model.pad(PROMPTS), sampling=Sampling.greedy())
    with pytest.raises(ValueError, match="per pass"):
        Sampling(top_k=(1, 2), top_p=(0.0,))
    with pytest.raises(ValueError, match="begin with 1"):
        NextScaleConfig(scales=(2, 4))
