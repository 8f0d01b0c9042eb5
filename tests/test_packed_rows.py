"""Packed rows, without padding and with each prompt once for its responses, against plain padded passes."""

import common
import ppo_lm
import trpo_lm
from ppo_lm import Args

import pytest
import torch
from helpers import SHAPES, flatten, set_parameters, tiny_model

R = 4
# Prompt lengths, and which prompt each row has.
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


def models(kind, dtype, **settings):
    """A policy, and a critic that does not say 0."""
    settings |= SHAPES["llama"] | dict(num_local_experts=3) if kind == "mixtral" else {}
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
    found, seen, of_critic = [], tokens_of(model), tokens_of(critic.backbone)
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
    lengths, order = ROWS[rows]
    prompts = sum(lengths[row] for i, row in enumerate(order) if i == 0 or row != order[i - 1])
    real = prompts + response_mask.sum()  # of a prompt for its rows together once
    assert of_critic == [real, mask.numel()] and seen == [real - len(mask), mask.numel()], "not of responses the last"


LONG = dict(gpt2=dict(n_positions=300), gemma2=dict(max_position_embeddings=300, sliding_window=70))


@pytest.mark.parametrize("kind", LONG)
def test_long_rows_are_attended_to_in_blocks_of_like_length(kind):
    """Lengths beyond 32, 64 and 128 tokens, also of a sliding window, and no block much wider than its rows."""
    model, _ = models(kind, torch.float64, **LONG[kind])
    args, lengths = Args(dtype="float32", response_length=150, temperature=0.7), [1, 150, 64, 70, 129, 3, 20, 9]
    sequences, mask = make_batch([90, 5], [0, 0, 0, 0, 0, 1, 1, 1], 150, lengths, 95)
    response_mask, found = mask[:, -150:], []
    for is_plain in (False, True):
        logprobs = ppo_lm.policy_logprobs(model, sequences, mask, response_mask, args)[0][response_mask]
        if is_plain:  # each row alone, without padding
            rows = [(row[real], len(row[real]) - length) for row, real, length in zip(sequences, mask, lengths)]
            log_pi = [(model(row[None]).logits[0] / 0.7).log_softmax(-1)[start - 1 : -1] for row, start in rows]
            pairs = zip(log_pi, rows)
            logprobs = torch.cat([all_of_it.gather(1, row[start:, None])[:, 0] for all_of_it, (row, start) in pairs])
        logprobs.square().sum().backward()
        found.append([logprobs, *take_gradients(model)])
    assert_equal(*found, tolerance=1e-11 if kind == "gpt2" else 1e-5)  # whose softmax of attention is in float32
    inputs, places = common.pack(sequences, mask, 150)
    blocks, order = inputs["packed"]
    assert sorted(order.tolist()) != order.tolist() and len(order) == 95 + sum(lengths) == places.max() + 1
    sizes = [(len(queries), queries.shape[1], keys.shape[1]) for queries, keys, *_ in blocks]
    # Up to 32 tokens, 64, 128 and more; the first row of a prompt with the prompt, after the others.
    assert sizes == [(2, 20, 25), (1, 8, 8), (1, 64, 154), (1, 70, 160), (1, 91, 91), (2, 150, 240)]


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
    assert kind != "gpt2" or len(plans) >= (2 if k == 1 or max(lengths) == 1 else 3)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("budget", [1, 40, 100, 300, 10**6])
@pytest.mark.parametrize("k", [1, 4])
def test_micro_batches_are_as_full_as_they_may_be(k, budget):
    """Prompts and responses of many lengths, in any order: groups too large for a pass are split."""
    args = Args(dtype="float32", response_length=9, micro_batch_tokens=budget)
    generator = torch.Generator().manual_seed(3)
    prompt_lengths = torch.randint(1, 20, (12,), generator=generator).tolist()
    lengths = torch.randint(1, 10, (12 * k,), generator=generator).tolist()
    sequences, mask = make_batch(prompt_lengths, [i // k for i in range(12 * k)], 9, lengths, 20)
    model = tiny_model(n_layer=1)
    seen, groups = tokens_of(model), groups_of(12, k)[torch.randperm(12, generator=generator)]
    micro_batches = common.micro_batches_of(groups, mask, args)
    assert torch.equal(torch.cat(micro_batches), groups.flatten()), "every row once"

    def tokens(rows):
        return sum(lengths[row] for row in rows) + sum(prompt_lengths[prompt] for prompt in {row // k for row in rows})

    def cost(rows):  # copies of keys and values count, too
        return tokens(rows) + sum(prompt_lengths[row // k] // 8 for row in rows)

    for rows, following in zip(micro_batches, [*micro_batches[1:], None]):
        ppo_lm.policy_logprobs(model, *[tensor[rows] for tensor in (sequences, mask, mask[:, -9:])], args)
        assert seen.pop() == tokens(rows.tolist()) - len(rows) and (cost(rows.tolist()) <= budget or len(rows) == 1)
        assert following is None or cost([*rows.tolist(), following[0].item()]) > budget, "no room for one more row"


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
    trpo_lm.fisher_vector_product(flatten(model), model, batch, [torch.arange(12)], args)
    assert seen == [n] * 3, "the sampled tokens"


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
