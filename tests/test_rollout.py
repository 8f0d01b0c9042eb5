"""Rollout, masks, padding and scored log-probabilities: against plain forward passes of single prompts."""

import json
import weakref

import common
import reinforce_lm
from common import batched_logprobs, policy_logprobs
from reinforce_lm import Args

import pytest
import torch
from helpers import load_policy, rollout, tiny_model
from transformers import AutoModelForCausalLM

KINDS = ["gpt2", "llama"]


def ragged_prompts(pad_id, seed=1):
    """Four prompts of lengths 5, 3, 1 and 4, as left-padded ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 12, (length,), generator=generator) for length in (5, 3, 1, 4)]
    ids = torch.stack([torch.cat([torch.full((5 - len(p),), pad_id), p]) for p in prompts])
    mask = torch.stack([torch.arange(5) >= 5 - len(p) for p in prompts])
    return prompts, ids, mask


@pytest.mark.parametrize("pad_id", [0, 7], ids=["pad is the end token", "pad is another token"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_batch_scores_like_single_prompts(kind, pad_id, monkeypatch):
    monkeypatch.setattr(common, "PAD_ID", pad_id)
    model, args = tiny_model(kind), Args(dtype="float32", response_length=4, temperature=0.7)
    prompts, ids, mask = ragged_prompts(pad_id)
    generator = torch.Generator().manual_seed(3)
    responses, response_mask, _ = rollout(model, ids, mask, 4, end_ids=[0, 9], generator=generator)
    sequences, attention_mask = torch.cat([ids, responses], 1), torch.cat([mask, response_mask], 1)
    logprobs, entropy = policy_logprobs(model, sequences, attention_mask, args)
    assert len(set(response_mask.sum(1).tolist())) > 1, "the test wants responses of different lengths"
    for i, prompt in enumerate(prompts):
        length = int(response_mask[i].sum())
        text = torch.cat([prompt, responses[i, :length]])
        expected = (model(text[None]).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)  # no padding, no mask
        torch.testing.assert_close(
            logprobs[i, :length], expected.gather(1, responses[i, :length, None])[:, 0], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            entropy[i, :length], torch.distributions.Categorical(logits=expected).entropy(), rtol=1e-5, atol=1e-5
        )
    in_micro_batches = batched_logprobs(model, sequences, attention_mask, torch.tensor([2, 0, 3, 1]).split(3), args)
    in_micro_batches, logprobs = [values.where(response_mask, 0.0) for values in (in_micro_batches, logprobs)]
    torch.testing.assert_close(in_micro_batches, logprobs, rtol=1e-5, atol=1e-5)


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
        logprobs, _ = policy_logprobs(model, torch.cat([ids, responses], 1), torch.cat([mask, response_mask], 1), args)
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
    responses, response_mask, logprobs = rollout(
        model,
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        2,
        end_ids=[0],
        samples_per_prompt=count,
        temperature=0.7,
        generator=torch.Generator().manual_seed(0),
    )
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


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_loss_agree_at_another_temperature(kind):
    model, args = tiny_model(kind), Args(dtype="float32", response_length=6, temperature=0.7)
    _, ids, mask = ragged_prompts(0)
    responses, response_mask, sampler_logprobs = rollout(
        model,
        ids,
        mask,
        6,
        end_ids=[0],
        samples_per_prompt=3,
        temperature=0.7,
        generator=torch.Generator().manual_seed(0),
    )
    sequences = torch.cat([ids.repeat_interleave(3, 0), responses], 1)
    attention_mask = torch.cat([mask.repeat_interleave(3, 0), response_mask], 1)
    logprobs, _ = policy_logprobs(model, sequences, attention_mask, args)
    torch.testing.assert_close(logprobs.where(response_mask, 0.0), sampler_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [("gpt2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)), ("llama", dict(attention_dropout=0.5))],
)
def test_dropout_is_off(settings, model_folder):
    kind, dropout = settings
    folder = model_folder(kind, **dropout)
    tokenizer = common.load_tokenizer(folder, [])
    ids = torch.arange(1, 9)[None]
    noisy = AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits), "the checkpoint has dropout"
    model = load_policy(folder, tokenizer, 16, seed=1).train()
    assert torch.equal(model(ids).logits, model(ids).logits)
    torch.testing.assert_close(model(ids).logits, noisy.eval()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_that_is_also_the_padding_is_trained_as_an_input(kind, model_folder):
    """Embedding layers stop the gradient of the configured padding id, unless they are told not to."""
    folder = model_folder(kind, pad_token_id=0, tie_word_embeddings=False)
    model = load_policy(folder, None, 8, seed=1)
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
    assert common.has_ended(torch.tensor(rows), [0, 9]).tolist() == [True, True, False, True, True, True]


def test_samples_of_a_prompt_differ_and_a_rerun_is_the_same():
    model = tiny_model()
    _, ids, mask = ragged_prompts(0)

    def sample(*key, **settings):
        generator = common.make_generator("cpu", *key)
        return rollout(model, ids, mask, 6, end_ids=[0], samples_per_prompt=8, generator=generator, **settings)[0]

    responses = sample(1, 5, 0)
    assert torch.equal(responses, sample(1, 5, 0))
    for other in ((2, 5, 0), (1, 6, 0), (1, 5, 1)):  # seed, iteration, rank
        assert not torch.equal(responses, sample(*other))
    shuffle = common.make_generator("cpu", 1, 5, 0, 0)  # seed, iteration, rank, epoch
    assert not torch.equal(
        torch.rand(9, generator=shuffle), torch.rand(9, generator=common.make_generator("cpu", 1, 5, 0))
    )
    for group in responses.view(4, 8, 6):
        assert len({tuple(row.tolist()) for row in group}) > 1
    chunked = sample(1, 5, 0, rollout_batch_size=8)
    assert chunked.shape == responses.shape and not torch.equal(chunked[:8], chunked[8:16])


def test_equal_prompts_are_sampled_apart():
    prompts = torch.tensor([[1, 2, 3]] * 4)
    generator = torch.Generator().manual_seed(0)
    responses, *_ = rollout(tiny_model("llama"), prompts, prompts.bool(), 6, [], 2, generator=generator)
    assert len({tuple(row) for row in responses.tolist()}) == 8


def test_one_cache_at_a_time(monkeypatch):
    alive, init = weakref.WeakSet(), common.Decoder.__init__

    def counting_init(decoder, *rest):
        assert not alive
        alive.add(decoder)
        init(decoder, *rest)

    monkeypatch.setattr(common.Decoder, "__init__", counting_init)
    _, ids, mask = ragged_prompts(0)
    responses, *_ = rollout(tiny_model(), ids, mask, 3, [0], rollout_batch_size=1)
    assert len(responses) == 4


def test_one_row_that_is_not_finite_is_one_line():
    model, prompts = tiny_model("llama"), torch.tensor([[5, 1], [1, 1]])
    model.get_input_embeddings().weight.data[5] = float("nan")
    with pytest.raises(common.InputError, match="finite logits"):
        rollout(model, prompts, prompts > 0, 1, [0], greedy=True)


def test_greedy_rollout_is_the_argmax_of_full_forwards():
    model = tiny_model("llama")
    prompts, ids, mask = ragged_prompts(0)
    responses, response_mask, _ = rollout(model, ids, mask, 5, end_ids=[0], rollout_batch_size=3, greedy=True)
    for i, prompt in enumerate(prompts):
        text = prompt
        for _ in range(int(response_mask[i].sum())):
            text = torch.cat([text, model(text[None]).logits[0, -1:].argmax(-1)])
        assert torch.equal(responses[i][response_mask[i]], text[len(prompt) :])


def test_rollout_stops_when_all_have_ended():
    model, calls = tiny_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    prompts = torch.ones(3, 2, dtype=torch.long)
    every_token = list(range(12))
    responses, response_mask, _ = rollout(
        model, prompts, prompts.bool(), 20, end_ids=every_token, generator=torch.Generator().manual_seed(0)
    )
    assert len(calls) == 1 and response_mask.sum(1).tolist() == [1, 1, 1] and responses.shape == (3, 20)


def test_rollout_reads_a_prompt_once_for_all_its_samples():
    model, shapes = tiny_model(), []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    prompts = torch.ones(3, 4, dtype=torch.long)
    rollout(
        model, prompts, prompts.bool(), 2, end_ids=[], samples_per_prompt=5, generator=torch.Generator().manual_seed(0)
    )
    assert shapes == [(3, 4), (15, 1)]
