"""Rollout, masks, padding and scored log-probabilities: against plain forward passes of single prompts."""

import json

import common
import reinforce_lm
from reinforce_lm import Args, batched_logprobs, policy_logprobs

import pytest
import torch
from helpers import character_tokenizer, load_policy, rollout, tiny_model
from transformers import AutoModelForCausalLM

KINDS = ["gpt2", "llama"]


def ragged_prompts(pad_id, seed=1):
    """Four prompts of lengths 5, 3, 1 and 4, as left-padded ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 12, (length,), generator=generator) for length in (5, 3, 1, 4)]
    ids = torch.stack([torch.cat([torch.full((5 - len(p),), pad_id), p]) for p in prompts])
    mask = torch.stack([torch.arange(5) >= 5 - len(p) for p in prompts])
    return prompts, ids, mask


def join(ids, mask, responses, response_mask):
    """The batch of prompts and responses, as `common.sample` returns it."""
    return torch.cat([ids, responses], 1), torch.cat([mask, response_mask], 1), response_mask


@pytest.mark.parametrize("pad_id", [0, 7], ids=["pad is the end token", "pad is another token"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_scored_like_single_prompts(kind, pad_id, monkeypatch):
    monkeypatch.setattr(common, "PAD_ID", pad_id)
    model, args = tiny_model(kind), Args(dtype="float32", response_length=4, temperature=0.7)
    prompts, ids, mask = ragged_prompts(pad_id)
    settings = dict(end_ids=[0, 9], temperature=0.7, generator=torch.Generator().manual_seed(3))
    responses, response_mask, sampler_logprobs = rollout(model, ids, mask, 4, **settings)
    batch = join(ids, mask, responses, response_mask)
    logprobs, entropy = policy_logprobs(model, *batch, args)
    assert len(set(response_mask.sum(1).tolist())) > 1, "the test wants responses of different lengths"
    close = dict(rtol=1e-5, atol=1e-5)
    for i, prompt in enumerate(prompts):
        length = int(response_mask[i].sum())
        text = torch.cat([prompt, responses[i, :length]])
        expected = (model(text[None]).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)  # no padding, no mask
        chosen = expected.gather(1, responses[i, :length, None])[:, 0]
        torch.testing.assert_close(logprobs[i, :length], chosen, **close)
        torch.testing.assert_close(sampler_logprobs[i, :length], chosen, **close)
        expected_entropy = torch.distributions.Categorical(logits=expected).entropy()
        torch.testing.assert_close(entropy[i, :length], expected_entropy, **close)
        for values in (logprobs, entropy, sampler_logprobs):
            assert not values[i, length:].any()
    micro_batches = torch.tensor([2, 0, 3, 1]).split(3)
    torch.testing.assert_close(batched_logprobs(model, batch, micro_batches, args), logprobs, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_does_not_see_the_padding(kind):
    model, args = tiny_model(kind, dtype=torch.float64), Args(dtype="float32", response_length=3)
    gradients = []
    for pad_id, width in ((0, 5), (7, 5), (3, 9)):
        _, ids, mask = ragged_prompts(pad_id)
        ids = torch.cat([torch.full((4, width - 5), pad_id), ids], 1)
        mask = torch.cat([torch.zeros(4, width - 5, dtype=torch.bool), mask], 1)
        responses = torch.tensor([[1, 0, pad_id], [0, pad_id, pad_id], [4, 5, 6], [8, 9, 0]])
        response_mask = common.mask_through_first_end(torch.tensor([[1, 0, 0], [0, 0, 0], [4, 5, 6], [8, 9, 0]]), [0])
        logprobs, _ = policy_logprobs(model, *join(ids, mask, responses, response_mask), args)
        loss = reinforce_lm.policy_gradient_loss(logprobs, torch.ones(4, 3), response_mask, 4)
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert gradients[-1].isfinite().all() and gradients[-1].norm() > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-6, atol=1e-6)  # Llama's norms are fp32


def test_samples_follow_softmax_whatever_the_generation_config_says(tmp_path):
    tiny_model(vocab_size=6).save_pretrained(tmp_path)
    hostile = dict(do_sample=True, top_k=2, top_p=0.3, min_p=0.2, temperature=0.1, repetition_penalty=5.0)
    hostile |= dict(no_repeat_ngram_size=1, suppress_tokens=[1], forced_eos_token_id=3, max_length=3, eos_token_id=0)
    (tmp_path / "generation_config.json").write_text(json.dumps(hostile))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.generation_config.repetition_penalty == 5.0
    prompt, count = torch.tensor([[1, 2, 1]]), 40_000
    settings = dict(samples_per_prompt=count, temperature=0.7, generator=torch.Generator().manual_seed(0))
    responses, response_mask, logprobs = rollout(model, prompt, prompt > 0, 2, end_ids=[0], **settings)
    first = (model(prompt).logits[0, -1] / 0.7).softmax(-1)
    chi_square = ((torch.bincount(responses[:, 0], minlength=6) - count * first) ** 2 / (count * first)).sum()
    assert chi_square < 25.7  # 0.9999 quantile of chi-square with 5 degrees of freedom
    token = int(first[1:].argmax()) + 1  # the second step, given the most likely first token that does not end
    second = (model(torch.cat([prompt, torch.tensor([[token]])], 1)).logits[0, -1] / 0.7).softmax(-1)
    seconds = responses[responses[:, 0] == token, 1]
    expected = len(seconds) * second
    assert ((torch.bincount(seconds, minlength=6) - expected) ** 2 / expected).sum() < 25.7
    torch.testing.assert_close(logprobs[:, 0], first.log()[responses[:, 0]], rtol=1e-4, atol=1e-5)
    assert not response_mask[responses[:, 0] == 0, 1].any()


def test_noise_and_distribution_are_float32_where_passes_are_bfloat16(model_folder):
    """Tokens and their log-probabilities are those of the same logits, noise and softmax in float32."""
    policy, logits = load_policy(model_folder("llama"), None, 16), []
    _, ids, mask = ragged_prompts(0)
    ids = ids.clamp(max=10)
    policy.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[:, -1]))
    settings = dict(end_ids=[], samples_per_prompt=64, temperature=0.7)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _, logprobs = rollout(policy, ids, mask, 5, generator=common.make_generator("cpu", 1), **settings)
    assert len(logits) == 5 and logits[0].dtype == torch.float32
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    exact = policy(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert 1e-4 < (logits[0] - exact).abs().max() < 0.1, "the passes were in bfloat16"
    generator = common.make_generator("cpu", 1)
    for t, step in enumerate(logits[:5]):
        log_pi = (step.double().repeat_interleave(256 // len(step), 0) / 0.7).log_softmax(-1)  # (256, V)
        noise = torch.empty(256, 11, dtype=torch.float32).exponential_(generator=generator)
        assert torch.equal(tokens[:, t], (log_pi.exp() / noise).argmax(-1))
        expected = log_pi.gather(1, tokens[:, t, None])[:, 0]
        torch.testing.assert_close(logprobs[:, t].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind, dropout",
    [("gpt2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)), ("llama", dict(attention_dropout=0.5))],
)
def test_dropout_is_off(kind, dropout, model_folder):
    folder = model_folder(kind, **dropout)
    ids = torch.arange(1, 9)[None]
    noisy = AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits), "the checkpoint has dropout"
    model = load_policy(folder, None, 16)
    torch.testing.assert_close(model(ids).logits, noisy.eval()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_that_is_also_the_padding_is_trained_as_an_input(kind, model_folder):
    """Embedding layers stop the gradient of the configured padding id, unless they are told not to."""
    folder = model_folder(kind, pad_token_id=0, tie_word_embeddings=False)
    model = load_policy(folder, None, 8)
    model(torch.tensor([[1, 0, 2]])).logits[0, -1, 3].backward()
    assert (model.get_input_embeddings().weight.grad[:3].abs().sum(1) > 0).all()


def test_mask_ends_with_the_first_of_several_end_tokens():
    rows = [[5, 9, 3, 0, 1], [9, 0, 9, 9, 9], [1, 2, 3, 4, 5], [1, 2, 3, 4, 0], [0, 1, 2, 3, 4], [1, 9, 2, 3, 4]]
    expected = []
    for row in rows:
        ends = [i for i, token in enumerate(row) if token in (0, 9)]
        length = ends[0] + 1 if ends else len(row)
        expected.append([i < length for i in range(len(row))])
    assert common.mask_through_first_end(torch.tensor(rows), [0, 9]).tolist() == expected


def test_samples_of_a_prompt_differ_and_a_rerun_is_the_same():
    model = tiny_model()
    _, ids, mask = ragged_prompts(0)

    def sample(*key):
        generator = common.make_generator("cpu", *key)
        return rollout(model, ids, mask, 6, end_ids=[0], samples_per_prompt=8, generator=generator)[0]

    responses = sample(1, 5, 0)
    assert torch.equal(responses, sample(1, 5, 0))
    keys = (1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1), (1, 5, 0, 0)  # seed, iteration, rank, and epoch of a shuffle
    assert len({tuple(sample(*key).flatten().tolist()) for key in keys}) == len(keys)
    for group in responses.view(4, 8, 6):
        assert len({tuple(row.tolist()) for row in group}) > 1


def sample(rows, samples_per_prompt=1, rollout_tokens=10**6, **settings):
    """`common.sample` with a small model whose responses, of up to six tokens, end with 0 or 9."""
    model, tokenizer = tiny_model("llama"), character_tokenizer("abcdefghijk")
    args = Args(dtype="float32", response_length=6, rollout_tokens=rollout_tokens)
    rows = [{"input_ids": ids} for ids in rows]
    return common.sample(model, tokenizer, [0, 9], args, rows, samples_per_prompt, **settings)


PROMPTS = [[5, 6, 7, 8, 1], [1, 2, 3], [4], [7, 7, 3, 2]]


@pytest.mark.parametrize("rollout_tokens", [43, 44, 66])
def test_how_many_rows_are_sampled_at_once_changes_no_greedy_response(rollout_tokens, monkeypatch):
    sizes, rollout_of = [], common.rollout
    monkeypatch.setattr(common, "rollout", lambda *args, **kw: sizes.append(len(args[1])) or rollout_of(*args, **kw))
    *whole, logprobs, texts, facts = sample(PROMPTS, 2, greedy=True)
    *parts, part_logprobs, part_texts, part_facts = sample(PROMPTS, 2, rollout_tokens, greedy=True)
    # A response and its prompt take 5 + 6 tokens at most, and both responses to a prompt are sampled together.
    assert sizes == [4] + {43: [1] * 4, 44: [2, 2], 66: [3, 1]}[rollout_tokens]
    assert all(torch.equal(part, all) for part, all in zip(parts, whole)) and part_texts == texts
    assert part_facts == facts
    torch.testing.assert_close(part_logprobs, logprobs, rtol=1e-5, atol=1e-5)


def test_what_a_sample_holds():
    generator = common.make_generator("cpu", 3)
    sequences, attention_mask, response_mask, logprobs, texts, facts = sample(PROMPTS, 3, generator=generator)
    assert len(set(facts["num_tokens"])) > 2 and len(set(facts["ended"])) == 2
    for i, (row, real) in enumerate(zip(sequences, attention_mask)):
        prompt, length = PROMPTS[i // 3], facts["num_tokens"][i]
        response = row[5 : 5 + length].tolist()
        assert row[real].tolist() == prompt + response and real[5:].tolist() == response_mask[i].tolist()
        assert not row[~real].any()
        assert facts["ended"][i] == (response[-1] in (0, 9)) and (facts["ended"][i] or length == 6)
        assert not {0, 9} & set(response[:-1])
        assert texts[i] == "".join("abcdefghijk"[token - 1] for token in response if token)
        assert (logprobs[i] < 0).tolist() == response_mask[i].tolist()


def test_equal_prompts_are_sampled_apart():
    prompts = torch.tensor([[1, 2, 3]] * 4)
    generator = torch.Generator().manual_seed(0)
    responses, *_ = rollout(tiny_model("llama"), prompts, prompts.bool(), 6, [], 2, generator=generator)
    assert len({tuple(row) for row in responses.tolist()}) == 8


def test_one_row_that_is_not_finite_is_one_line():
    model, prompts = tiny_model("llama"), torch.tensor([[5, 1], [1, 1]])
    model.get_input_embeddings().weight.data[5] = float("nan")
    with pytest.raises(SystemExit, match="--model: expected finite logits"):
        rollout(model, prompts, prompts > 0, 1, [0], greedy=True)


def test_a_greedy_rollout_is_the_argmax_of_full_forwards():
    model = tiny_model("llama")
    prompts, ids, mask = ragged_prompts(0)
    responses, response_mask, _ = rollout(model, ids, mask, 5, end_ids=[0], greedy=True)
    for i, prompt in enumerate(prompts):
        text = prompt
        for _ in range(int(response_mask[i].sum())):
            text = torch.cat([text, model(text[None]).logits[0, -1:].argmax(-1)])
        assert torch.equal(responses[i][response_mask[i]], text[len(prompt) :])


def test_a_rollout_stops_when_all_have_ended():
    model, calls = tiny_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    prompts, generator = torch.ones(3, 2, dtype=torch.long), torch.Generator().manual_seed(0)
    responses, response_mask, _ = rollout(model, prompts, prompts > 0, 20, end_ids=list(range(12)), generator=generator)
    assert len(calls) == 1 and response_mask.sum(1).tolist() == [1, 1, 1] and responses.shape == (3, 20)


def test_a_rollout_reads_a_prompt_once_for_all_its_samples():
    model, shapes = tiny_model(), []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    prompts, generator = torch.ones(3, 4, dtype=torch.long), torch.Generator().manual_seed(0)
    rollout(model, prompts, prompts > 0, 2, end_ids=[], samples_per_prompt=5, generator=generator)
    assert shapes == [(3, 4), (15, 1)]
