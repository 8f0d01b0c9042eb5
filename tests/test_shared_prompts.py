"""Prompts that are run once for all their responses, and columns that are cut: against plain padded passes."""

import common
import ppo_lm
import trpo_lm
from ppo_lm import Args

import pytest
import torch
from helpers import SHAPES, tiny_model

R = 4
# Prompt lengths, and which prompt each row has. A prompt of one token shares nothing.
ROWS = {
    "together": ([5, 9, 7], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
    "shuffled": ([5, 9, 7], [2, 0, 1, 1, 0, 2, 0, 2, 1, 0, 1, 2]),
    "one prompt": ([8], [0] * 6),
    "all distinct": ([5, 9, 7, 4], [0, 1, 2, 3]),
    "one token among others": ([1, 9], [0, 1, 1, 0, 1, 1]),
    "one token": ([1], [0] * 5),
    "one response token": ([5, 9], [0, 0, 1, 1, 1]),
}


def make_batch(lengths, rows, response_length=R, width=11, longest=None):
    """Ids and mask (b, P+R) of rows with given prompts, padded more than they need, and ragged responses."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 12, (length,), generator=generator) for length in lengths]
    sequences = torch.randint(0, 12, (len(rows), width + response_length), generator=generator)
    mask = torch.zeros_like(sequences, dtype=torch.bool)
    for i, row in enumerate(rows):
        sequences[i, width - lengths[row] : width] = prompts[row]
        mask[i, width - lengths[row] : width + 1 + i % (longest or response_length)] = True
    return sequences, mask


def plain_inputs(network, sequences, attention_mask, num_outputs):
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return dict(input_ids=sequences, attention_mask=attention_mask, position_ids=positions, use_cache=False)


def tokens_of(network):
    """A list that collects how many tokens each pass of a network has."""
    embedding = network.get_input_embeddings() if hasattr(network, "get_input_embeddings") else network.backbone.wte
    seen = []
    embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    return seen


@pytest.fixture(autouse=True)
def share_whatever_it_saves(monkeypatch):
    monkeypatch.setattr(common, "MIN_SAVED_TOKENS", 0)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", [*SHAPES, "mixtral"])
def test_log_probabilities_values_and_gradients_are_those_of_padded_passes(kind, rows, monkeypatch):
    settings = dict(num_local_experts=3) if kind == "mixtral" else {}
    exact = kind == "gpt2"  # the norms of the others are in float32
    size = SHAPES["llama"] if kind == "mixtral" else {}
    model = tiny_model(kind, dtype=torch.float64 if exact else torch.float32, **(size | settings))
    torch.manual_seed(1)
    critic = ppo_lm.Critic(model).to(model.dtype)
    torch.nn.init.normal_(critic.head.weight)
    length = 1 if rows == "one response token" else R
    args = Args(dtype="float32", response_length=length, temperature=0.7)
    sequences, mask = make_batch(*ROWS[rows], length)
    response_mask, seen = mask[:, -length:], tokens_of(model)
    weights = torch.randn(3, len(mask), length, dtype=model.dtype)
    found = []
    for inputs in (common.share_prompts, plain_inputs):
        monkeypatch.setattr(common, "share_prompts", inputs)
        logprobs, entropy = common.policy_logprobs(model, sequences, mask, args)
        values = critic(sequences, mask, args)
        assert logprobs.shape == entropy.shape == (len(mask), length) and values.shape == (len(mask), length + 1)
        parts = [part.where(response_mask, 0.0) for part in (logprobs, entropy, values[:, :-1])]
        sum((weight * part).sum() for weight, part in zip(weights, parts)).backward()
        gradients = [p.grad.clone() for p in [*model.parameters(), *critic.parameters()] if p.grad is not None]
        model.zero_grad()
        critic.zero_grad()
        found.append([*parts, *gradients])
    for shared, plain in zip(*found, strict=True):
        scale = plain.norm() + 1e-6
        assert (shared - plain).norm() <= (1e-12 if exact else 2e-5) * scale
    shares = rows not in ("all distinct", "one token")
    assert len(seen) == (3 if shares else 2), "a pass of the prompts, and one of the rows"
    assert sum(seen[:-1]) < seen[-1] if shares else seen[0] == seen[1]


@pytest.mark.parametrize("kind", SHAPES)
def test_the_products_and_the_line_search_of_trpo_share_prompts(kind, monkeypatch):
    exact = kind == "gpt2"
    model = tiny_model(kind, dtype=torch.float64 if exact else torch.float32)
    args = trpo_lm.Args(dtype="float32", response_length=R, samples_per_prompt=4, micro_batch_size=7)
    sequences, mask = make_batch(*ROWS["together"], longest=3)
    batch = sequences, mask, mask[:, -R:]
    micro_batches = common.micro_batches_of(torch.arange(len(mask)), batch[2], args)
    theta = trpo_lm.flatten(model)
    torch.manual_seed(2)
    vector, advantages = torch.randn_like(theta), torch.randn(len(mask), R, dtype=theta.dtype)
    num_tokens, found = batch[2].sum(), []
    for inputs in (common.share_prompts, plain_inputs):
        monkeypatch.setattr(common, "share_prompts", inputs)
        trpo_lm.set_parameters(model, theta)
        g, _ = trpo_lm.surrogate_gradient(model, batch, micro_batches, advantages, advantages, num_tokens, args)
        product = trpo_lm.fisher_vector_product(vector, model, batch, micro_batches, args)
        quadratic = trpo_lm.fisher_quadratic_form(vector, model, batch, micro_batches, num_tokens, args)
        trpo_lm.set_parameters(model, theta + 0.01 * vector / vector.norm())
        gain_and_kl = trpo_lm.surrogate_gain_and_kl(model, theta, batch, micro_batches, advantages, num_tokens, args)
        found.append([g, product, torch.tensor([quadratic]), torch.tensor(gain_and_kl)])
        assert quadratic == pytest.approx((vector @ product).item(), rel=1e-4)
    for shared, plain in zip(*found, strict=True):
        assert (shared - plain).norm() <= (1e-9 if exact else 1e-3) * plain.norm()


def test_few_tokens_are_not_shared(monkeypatch):
    sequences, mask = make_batch(*ROWS["together"])
    model, saved = tiny_model(), (12 - 3) * 10  # of which prompts of 11 columns have all but the last
    for least, calls in ((saved, 2), (saved + 1, 1)):
        monkeypatch.setattr(common, "MIN_SAVED_TOKENS", least)
        seen = tokens_of(model)
        common.share_prompts(model, sequences, mask, R + 1) if calls == 2 else model(
            **common.share_prompts(model, sequences, mask, R + 1)
        )
        assert len(seen) == 1 and (seen[0] < sequences.numel()) == (calls == 2)


def test_columns_that_no_row_needs_are_cut():
    sequences, mask = make_batch([5, 3], [0, 1, 0], longest=2)  # P = 11 and R = 4, of which 5 and 2 are in use
    trimmed, trimmed_mask, length = common.trim(sequences, mask, R)
    assert length == 2 and trimmed.shape == trimmed_mask.shape == (3, 7) and mask.sum() == trimmed_mask.sum()
    assert torch.equal(trimmed[trimmed_mask], sequences[mask])
    model, args = tiny_model(), Args(dtype="float32", response_length=R)
    assert common.response_logits(model, sequences, mask, args).shape == (3, 2, 12)
    logprobs, _ = common.policy_logprobs(model, sequences, mask, args)
    assert (logprobs[:, 2:] == 0).all()
    padded = model(**plain_inputs(model, sequences, mask, R)).logits[:, 10:12].log_softmax(-1)
    torch.testing.assert_close(logprobs[:, :2], padded.gather(2, sequences[:, 11:13, None])[..., 0])


def test_micro_batches_keep_prompts_together_and_rows_of_one_length():
    args = Args(samples_per_prompt=4, micro_batch_size=8)
    lengths = torch.randint(1, 65, (64,), generator=torch.Generator().manual_seed(0))
    response_mask = torch.arange(64) < lengths[:, None]
    rows = torch.randperm(16, generator=torch.Generator().manual_seed(1))[:12]  # prompts of a minibatch
    inds = (rows[:, None] * 4 + torch.arange(4)).flatten()
    micro_batches = common.micro_batches_of(inds[torch.randperm(48)], response_mask, args)
    assert [len(micro_batch) for micro_batch in micro_batches] == [8] * 6
    assert sorted(torch.cat(micro_batches).tolist()) == sorted(inds.tolist())
    longest = []
    for micro_batch in micro_batches:
        assert len(set((micro_batch // 4).tolist())) == 2, "whole groups of a prompt"
        longest += [lengths[group].max().item() for group in micro_batch.view(2, 4)]
    assert longest == sorted(longest, reverse=True)


def test_shuffled_rows_keep_prompts_together():
    args = Args(num_minibatches=6)
    rows = torch.stack(
        [inds for (inds,) in common.shuffled_minibatches(torch.ones(24, 1, dtype=torch.bool), args, 1, 2, 3)]
    )
    assert sorted(rows.flatten().tolist()) == list(range(24)) and (rows // 4 == rows[:, :1] // 4).all()
    others = torch.stack(
        [inds for (inds,) in common.shuffled_minibatches(torch.ones(24, 1, dtype=torch.bool), args, 1, 2, 4)]
    )
    assert not torch.equal(rows, others)
