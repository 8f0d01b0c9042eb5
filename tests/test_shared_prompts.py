"""Micro-batches, in which prompts are run once for all their responses, against plain padded passes."""

import common
import ppo_lm
import trpo_lm
from ppo_lm import Args

import pytest
import torch
from helpers import SHAPES, flatten, set_parameters, tiny_model

R = 4
# Prompt lengths, and which prompt each row has. A prompt of one token shares nothing.
ROWS = {
    "together": ([5, 9, 7], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
    "one prompt": ([8], [0] * 6),
    "twice": ([5, 9], [0, 0, 1, 1, 0, 0]),
    "a 0 in front": ([6, 5], [0, 0, 1, 1, 1]),
    "all distinct": ([5, 9, 7, 4], [0, 1, 2, 3]),
    "most distinct": ([5, 9, 7], [0, 0, 1, 2, 1]),
    "one token among others": ([1, 9], [0, 0, 1, 1, 1, 0]),
    "one token": ([1], [0] * 5),
    "one response token": ([5, 9], [0, 0, 1, 1, 1]),
}
SHARED = {"together", "one prompt", "twice", "a 0 in front", "one token among others", "one response token"}


def make_batch(lengths, rows, response_length=R, response_lengths=None, width=11, zero_in_front=False):
    """Ids and mask (b, P+R) of rows with given prompts, padded more than they need, and ragged responses.

    Padding may be any id. With `zero_in_front` it is 0, and the first prompt is the second with a 0 in front.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(12, (length,), generator=generator) for length in lengths]
    sequences = torch.randint(12, (len(rows), width + response_length), generator=generator)
    if zero_in_front:
        sequences[:, :width], prompts[0] = 0, torch.cat([torch.zeros(1, dtype=torch.long), prompts[1]])
    mask = torch.zeros_like(sequences, dtype=torch.bool)
    for i, row in enumerate(rows):
        sequences[i, width - lengths[row] : width] = prompts[row]
        length = response_lengths[i] if response_lengths else 1 + i % response_length
        mask[i, width - lengths[row] : width + length] = True
    return sequences, mask


def plain_inputs(sequences, attention_mask):
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return dict(input_ids=sequences, attention_mask=attention_mask, position_ids=positions, use_cache=False)


def plain_statistics(model, critic, sequences, attention_mask, response_mask, temperature):
    """From one pass each, of all columns: log pi (b, R, V), that of the tokens, entropies, and values."""
    length, inputs = response_mask.shape[1], plain_inputs(sequences, attention_mask)
    log_pi = (model(**inputs).logits[:, -length - 1 : -1] / temperature).log_softmax(-1)
    logprobs = log_pi.gather(2, sequences[:, -length:, None])[..., 0]
    values = critic.head(critic.backbone(**inputs).last_hidden_state[:, -length - 1 :])[..., 0]
    return log_pi, logprobs, -(log_pi.exp() * log_pi).sum(-1), values


def models(kind, dtype):
    """A policy, and a critic that does not say 0."""
    settings = SHAPES["llama"] | dict(num_local_experts=3) if kind == "mixtral" else {}
    model = tiny_model(kind, dtype=dtype, **settings)
    critic = ppo_lm.Critic(model).to(dtype)
    torch.nn.init.normal_(critic.head.weight)
    return model, critic


def take_gradients(*networks):
    gradients = [p.grad.clone() for network in networks for p in network.parameters() if p.grad is not None]
    for network in networks:
        network.zero_grad()
    return gradients


def assert_equal(found, expected, tolerance):
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape
        assert (value - reference).norm() <= tolerance * (reference.norm() + 1e-6)


def tokens_of(network):
    """A list that collects how many tokens each pass of a network has."""
    seen = []
    network.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    return seen


CASES = [("gpt2", rows) for rows in ROWS]  # in float64; the norms of the others are in float32
CASES += [(kind, rows) for kind in [*SHAPES, "mixtral"][1:] for rows in ("together", "one token among others")]


@pytest.mark.parametrize("kind, rows", CASES)
def test_log_probabilities_values_and_gradients_are_those_of_padded_passes(kind, rows):
    model, critic = models(kind, torch.float64 if kind == "gpt2" else torch.float32)
    length = 1 if rows == "one response token" else R
    args = Args(dtype="float32", response_length=length, temperature=0.7)
    sequences, mask = make_batch(*ROWS[rows], length, zero_in_front=rows == "a 0 in front")
    response_mask = mask[:, -length:]
    weights = torch.randn(3, len(mask), length, dtype=model.dtype)
    found, seen = [], tokens_of(model)
    for is_plain in (False, True):
        if is_plain:
            _, *parts, values = plain_statistics(model, critic, sequences, mask, response_mask, 0.7)
        else:
            parts = ppo_lm.policy_logprobs(model, sequences, mask, response_mask, args, entropy_gradient=True)
            values = critic(sequences, mask, args)
            assert all((part[~response_mask] == 0).all() for part in parts)
        assert values.shape == (len(mask), length + 1)
        parts = [part.where(response_mask, 0.0) for part in (*parts, values[:, :-1])]
        sum((weight * part).sum() for weight, part in zip(weights, parts)).backward()
        cut = values[mask[:, -1], -1]  # of the state after the last token
        found.append([*parts, cut, *take_gradients(model, critic)])
    assert_equal(*found, tolerance=1e-12 if kind == "gpt2" else 2e-5)
    assert len(seen) == (3 if rows in SHARED else 2), "a pass of the prompts, and one of the rows"
    assert sum(seen[:-1]) < seen[-1]


def groups_of(num_prompts, k):
    return torch.arange(num_prompts * k).view(num_prompts, k)


# Responses to each prompt, length limit, and lengths.
BATCHES = {
    "ragged": (3, R, [1, 4, 2, 3, 3, 1, 2, 4, 1]),
    "full": (3, R, [R] * 9),
    "one token": (3, 1, [1] * 9),
    "ended at once": (3, R, [1] * 9),
    "one sample each": (1, R, [3, 1, 2]),
}
PASSES = [("gpt2", batch) for batch in BATCHES] + [(kind, "ragged") for kind in list(SHAPES)[1:]]


@pytest.mark.parametrize("kind, batch", PASSES)
def test_micro_batches_of_any_size_do_not_change_a_result(kind, batch):
    """Every quantity of the three scripts that is added up over micro-batches, against one plain padded pass."""
    model, critic = models(kind, torch.float64 if kind == "gpt2" else torch.float32)
    k, length, lengths = BATCHES[batch]
    args = trpo_lm.Args(dtype="float32", response_length=length, samples_per_prompt=k, temperature=0.7)
    sequences, mask = make_batch([5, 9, 1], [row for row in range(3) for _ in range(k)], length, lengths)
    response_mask = mask[:, -length:].clone()
    if batch == "ragged":
        response_mask[1, 1] = response_mask[3, 2] = False  # real tokens that were not sampled
    batch, n = (sequences, mask, response_mask), response_mask.sum()
    theta = flatten(model)
    advantages, vector = torch.randn(response_mask.shape, dtype=theta.dtype), torch.randn_like(theta)
    step = 0.3 * vector / vector.norm()

    def plain():
        return plain_statistics(model, critic, *batch, 0.7)

    def masked(*values):
        return [value.detach().where(response_mask, 0.0) for value in values]

    with trpo_lm.plain_attention():  # which can be differentiated twice
        log_pi, logprobs, entropy, values = plain()
        (advantages * (logprobs + entropy + values[:, :-1]))[response_mask].sum().backward(retain_graph=True)
        expected = [*masked(logprobs, entropy, values[:, :-1]), *take_gradients(model, critic)]
        parameters, old = list(model.parameters()), log_pi[response_mask]  # (n, V)
        surrogate = (advantages * logprobs)[response_mask].sum() / n
        expected.append(flat(torch.autograd.grad(surrogate, parameters, retain_graph=True)))
        kl = (old.detach().exp() * (old.detach() - old)).sum() / n
        gradient = flat(
            torch.autograd.grad(kl, parameters, create_graph=True)
        )  # 0; its derivative is the Fisher matrix
        expected.append(flat(torch.autograd.grad(gradient @ vector, parameters)))
    expected.append(vector @ expected[-1])
    with torch.no_grad():
        set_parameters(model, theta + step)
        new, new_logprobs, *_ = plain()
        ratio = (new_logprobs - logprobs)[response_mask].exp()
        kl = (old.exp() * (old - new[response_mask])).sum() / n
        expected.append(torch.stack([((ratio - 1) * advantages[response_mask]).sum() / n, kl]))
        set_parameters(model, theta)

    plans = set()
    for args.micro_batch_tokens in (1, 30, 60, 10**6) if kind == "gpt2" else (40,):
        micro_batches = common.micro_batches_of(groups_of(3, k), mask, args)
        if tuple(map(len, micro_batches)) in plans:
            continue
        plans.add(tuple(map(len, micro_batches)))
        found = [torch.zeros_like(advantages) for _ in range(3)]
        before = ppo_lm.batched_logprobs(model, batch, micro_batches, args)
        for rows in micro_batches:
            *inputs, rows_mask = [tensor[rows] for tensor in batch]
            logprobs, entropy = ppo_lm.policy_logprobs(model, *inputs, rows_mask, args, entropy_gradient=True)
            assert torch.equal(logprobs, before[rows]), "the ratio is 1"
            values = critic(*inputs, args)[:, :-1]
            (advantages[rows] * (logprobs + entropy + values))[rows_mask].sum().backward()
            for result, value in zip(found, (logprobs, entropy, values)):
                result[rows] = value.detach().where(rows_mask, 0.0)
        found += take_gradients(model, critic)
        g, means = trpo_lm.surrogate_gradient(model, batch, micro_batches, advantages, before, n, args)
        assert means["policy/sampler_gap"] == 0 and means["policy/entropy"] == pytest.approx(found[1].sum().item() / n)
        product = trpo_lm.fisher_vector_product(vector, model, batch, micro_batches, args)
        quadratic = trpo_lm.fisher_quadratic_form(vector, model, batch, micro_batches, n, args)
        set_parameters(model, theta + step)
        gain_and_kl = trpo_lm.surrogate_gain_and_kl(model, theta, batch, micro_batches, advantages, n, args)
        set_parameters(model, theta)
        found += [g, product, *[torch.tensor(numbers, dtype=torch.float64) for numbers in (quadratic, gain_and_kl)]]
        assert_equal(found, expected, tolerance=1e-9 if kind == "gpt2" else 1e-3)
    assert kind != "gpt2" or len(plans) >= (2 if k == 1 else 3)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def count_tokens(lines, prompts, lengths, budget):
    """Brute force: tokens of the passes over lines of rows that fill the budget, those with long responses first.

    A pass ends before a line whose longest response is shorter than two thirds of the longest.

    prompts: of each row, equally long. The last token of a row is only predicted, and is not run.
    """
    lines = sorted(lines, key=lambda line: -max(lengths[row] for row in line))
    total, shared = 0, len(prompts[0]) - 1
    while lines:
        longest, k = max(lengths[row] for row in lines[0]), len(lines[0])
        if k > 1 and len(prompts[0]) + k * longest > budget:
            return float("inf")
        widths = [len(prompts[0]) + k * max(lengths[row] for row in line) for line in lines]
        at_once = sum(3 * width >= 2 * widths[0] for width in widths)
        at_once = min(at_once, max(1, budget // (len(prompts[0]) + k * longest)))
        rows, lines = sum(lines[:at_once], []), lines[at_once:]
        runs = 1 + sum(prompts[a][:-1] != prompts[b][:-1] for a, b in zip(rows, rows[1:]))  # of rows that share
        total += shared * (runs if 2 * runs <= len(rows) else len(rows)) + longest * len(rows)
    return total


LAYOUTS = [(2, 4, 64, False), (2, 4, 300, False), (30, 4, 64, False), (30, 4, 300, True), (30, 4, 4000, True)]


@pytest.mark.parametrize("prompt_length, k, budget, is_together", [*LAYOUTS, (12, 1, 300, False)])
def test_the_layout_that_computes_fewer_tokens_is_chosen(prompt_length, k, budget, is_together):
    """Rows of like length for short prompts, rows of a prompt for long ones; and passes are as full as they may be."""
    args = Args(dtype="float32", response_length=24, micro_batch_tokens=budget)
    lengths = torch.empty(16 * k).exponential_(1 / 8, generator=torch.Generator().manual_seed(k)).ceil().clamp(max=24)
    lengths = lengths.int().tolist()
    sequences, mask = make_batch([prompt_length] * 16, [i // k for i in range(16 * k)], 24, lengths, prompt_length + 3)
    groups = groups_of(16, k)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    micro_batches = common.micro_batches_of(groups, mask, args)
    assert sorted(torch.cat(micro_batches).tolist()) == list(range(16 * k)), "every row once"
    model = tiny_model(n_positions=64, n_layer=1)
    seen, prompts = tokens_of(model), sequences[:, 3 : prompt_length + 3].tolist()
    ppo_lm.batched_logprobs(model, (sequences, mask, mask[:, -24:]), micro_batches, args)
    layouts = groups.tolist(), groups.view(-1, 1).tolist()
    together, apart = [count_tokens(lines, prompts, lengths, budget) for lines in layouts]
    assert (together < apart) == is_together and sum(seen) == min(together, apart)
    per_line = k if is_together else 1
    longest = [max(lengths[row] for row in rows) for rows in micro_batches]
    assert longest == sorted(longest, reverse=True)
    for rows, first, following in zip(micro_batches, longest, [*longest[1:], -1000]):
        lines, width = rows.view(-1, per_line).tolist(), prompt_length + per_line * first
        assert len(lines) == 1 or len(lines) * width <= budget
        widths = [prompt_length + per_line * max(lengths[row] for row in line) for line in lines]
        assert all(3 * own >= 2 * width for own in widths)
        narrow = 3 * (prompt_length + per_line * following) < 2 * width
        assert (len(lines) + 1) * width > budget or narrow, "no room for one more line"


def test_a_long_prompt_narrows_only_its_own_micro_batch():
    args = Args(response_length=6, micro_batch_tokens=48)
    _, mask = make_batch([2, 2, 2, 2, 2, 2, 20], [*range(7)], 6, [6, 6, 6, 6, 6, 6, 4], 20)
    micro_batches = common.micro_batches_of(groups_of(7, 1), mask, args)
    assert [rows.tolist() for rows in micro_batches] == [[0, 1, 2, 3, 4, 5], [6]]


@pytest.mark.parametrize("budget", [1, 40, 100, 300])
def test_no_pass_has_more_tokens_than_it_may(budget):
    """Prompts and responses of many lengths: a pass of more than one row stays within the budget."""
    args, k = Args(dtype="float32", response_length=9, micro_batch_tokens=budget), 4
    generator = torch.Generator().manual_seed(3)
    prompt_lengths = torch.randint(1, 20, (12,), generator=generator).tolist()
    lengths = torch.randint(1, 10, (48,), generator=generator).tolist()
    sequences, mask = make_batch(prompt_lengths, [i // k for i in range(48)], 9, lengths, 20)
    model = tiny_model(n_layer=1)
    seen = tokens_of(model)
    micro_batches = common.micro_batches_of(groups_of(12, k), mask, args)
    for rows in micro_batches:
        seen.clear()
        ppo_lm.policy_logprobs(model, *[tensor[rows] for tensor in (sequences, mask, mask[:, -9:])], args)
        assert sum(seen) <= budget or len(rows) == 1
    assert sorted(torch.cat(micro_batches).tolist()) == list(range(48))


def test_padding_never_reaches_the_head():
    model, _ = models("gpt2", torch.float32)
    seen, args = [], trpo_lm.Args(dtype="float32", response_length=R)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    sequences, mask = make_batch(*ROWS["together"])
    response_mask = mask[:, -R:].clone()
    response_mask[2, 1] = False
    batch, n = (sequences, mask, response_mask), response_mask.sum()
    ppo_lm.policy_logprobs(model, *batch, args)
    assert seen == [3, n], "one token of each prompt, as a model has to return something, and the sampled tokens"
    trpo_lm.fisher_vector_product(flatten(model), model, batch, [torch.arange(12)], args)
    assert seen == [3, n] * 3


def test_columns_that_no_row_needs_are_cut():
    sequences, mask = make_batch([5, 3], [0, 1, 0], response_lengths=[1, 2, 1])  # P = 11 and R = 4: 5 and 2 in use
    trimmed, trimmed_mask, length = common.trim(sequences, mask, R)
    assert length == 2 and trimmed.shape == trimmed_mask.shape == (3, 7) and mask.sum() == trimmed_mask.sum()
    assert torch.equal(trimmed[trimmed_mask], sequences[mask])


def test_minibatches_deal_whole_prompts_in_an_order_of_their_key():
    args, mask = Args(num_minibatches=3, response_length=2, micro_batch_tokens=8), torch.ones(28, 3, dtype=torch.bool)
    epochs = []
    for key in ((1, 2, 3), (1, 2, 4), (1, 2, 3)):
        minibatches = [torch.cat(minibatch) for minibatch in common.shuffled_minibatches(mask, args, *key)]
        assert sorted(map(len, minibatches)) == [8, 8, 12]
        assert sorted(torch.cat(minibatches).tolist()) == list(range(28))
        for rows in minibatches:
            assert (rows // 4).unique(return_counts=True)[1].tolist() == [4] * (len(rows) // 4), "all rows of a prompt"
        epochs.append(torch.cat(minibatches).tolist())
    assert epochs[0] == epochs[2] != epochs[1]
