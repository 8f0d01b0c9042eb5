"""reinforce_lm.py against enumerated gradients, written-out loops, and itself under other settings."""

import itertools
import types

import common
import reinforce_lm
from common import mean, whiten
from reinforce_lm import (
    Args,
    adapt_kl_ref_coef,
    compute_baseline,
    discounted_returns,
    policy_gradient_loss,
    policy_logprobs,
    shaped_rewards,
)

import pytest
import torch
from helpers import character_tokenizer, load_policy, recorded_gradients, reward_file, run_main, tiny_model
from test_runs import scalars

# Every response of a vocabulary of 3 with at most 2 tokens, where 0 is the end token: [0] is one, [1, 1] is another.
RESPONSES = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]])
MASK = common.mask_through_first_end(RESPONSES, [0])
SCORES = torch.tensor([0.3, -1.0, 0.5, 2.0, 0.0, 1.5, -0.7], dtype=torch.float64)
PROMPT = torch.tensor([[2, 1]])


class Enumerated:
    """A tiny policy and its reference over all 7 responses to one prompt."""

    def __init__(self, temperature=0.8):
        self.args = Args(dtype="float32", response_length=2, temperature=temperature)
        self.policy = tiny_model(vocab_size=3, dtype=torch.float64, seed=1)
        self.reference = tiny_model(vocab_size=3, dtype=torch.float64, seed=2)
        self.sequences = torch.cat([PROMPT.expand(7, 2), RESPONSES], 1)
        self.attention_mask = torch.cat([torch.ones(7, 2, dtype=torch.bool), MASK], 1)

    def logprobs(self, model):
        return policy_logprobs(model, self.sequences, self.attention_mask, MASK, self.args)[0]

    def gradient(self, value):
        gradients = torch.autograd.grad(value, list(self.policy.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in gradients])

    def exact_gradient(self, kl_ref_coef, gamma):
        """Gradient of J written as a sum over all responses, by automatic differentiation of the sum itself."""
        logprobs = self.logprobs(self.policy).where(MASK, 0.0)
        ref_logprobs = self.logprobs(self.reference).where(MASK, 0.0)
        objective = 0.0
        for i, length in enumerate(MASK.sum(1).tolist()):
            probability = logprobs[i].sum().exp()
            value = gamma ** (length - 1) * SCORES[i]
            for t in range(length):
                value = value - gamma**t * kl_ref_coef * (logprobs[i, t] - ref_logprobs[i, t])
            objective = objective + probability * value
        return self.gradient(objective)


@pytest.mark.parametrize("kl_ref_coef, gamma", [(0.0, 1.0), (0.3, 1.0), (0.3, 0.9)])
@pytest.mark.parametrize("kind", ["none", "mean", "ema", "leave_one_out", "greedy"])
def test_expected_gradient_is_the_enumerated_one(kind, kl_ref_coef, gamma):
    case = Enumerated()
    logprobs = case.logprobs(case.policy)
    assert logprobs.where(MASK, 0.0).sum(1).exp().sum().item() == pytest.approx(1.0)
    with torch.no_grad():
        rewards = shaped_rewards(SCORES, logprobs, case.logprobs(case.reference), MASK, kl_ref_coef)
        returns = discounted_returns(rewards, torch.ones_like(rewards, dtype=torch.bool), gamma)
        probabilities = logprobs.where(MASK, 0.0).sum(1).exp()
    greedy_scores = SCORES[probabilities.argmax()].expand(2)
    expected_loss = 0.0
    for pair in itertools.product(range(7), repeat=2):  # every batch of two responses to the prompt
        pair = list(pair)
        baseline = compute_baseline(kind, returns[pair, 0], 2, ema=0.4, greedy_scores=greedy_scores)
        advantages = returns[pair] - baseline[:, None]
        loss = policy_gradient_loss(logprobs[pair], advantages, MASK[pair], num_responses=2)
        expected_loss = expected_loss + probabilities[pair].prod() * loss
    expected = case.exact_gradient(kl_ref_coef, gamma)
    scale = 1 - 1 / 2 if kind == "mean" else 1.0  # the batch mean holds the response itself, see (9)
    assert expected.norm() > 0.1
    torch.testing.assert_close(-case.gradient(expected_loss), scale * expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["leave_one_out", "greedy", "ema", "mean"])
def test_baselines_lower_the_variance(kind):
    """Of a score with a large mean, over all batches of two; a baseline that is ignored would not."""
    case, spread = Enumerated(), {}
    logprobs = case.logprobs(case.policy)
    probabilities = logprobs.where(MASK, 0.0).sum(1).exp().detach()
    returns = (SCORES + 10.0)[:, None].expand(7, 2)
    for name in ("none", kind):
        second_moment = 0.0
        for pair in itertools.combinations_with_replacement(range(7), 2):
            pair = list(pair)
            baseline = compute_baseline(name, returns[pair, 0], 2, ema=10.0, greedy_scores=torch.full((2,), 10.0))
            loss = policy_gradient_loss(logprobs[pair], returns[pair] - baseline[:, None], MASK[pair], 2)
            gradient = torch.autograd.grad(loss, list(case.policy.parameters()), retain_graph=True)
            weight = probabilities[pair].prod() * (1 if pair[0] == pair[1] else 2)
            second_moment += weight * sum((g**2).sum() for g in gradient)
        spread[name] = second_moment.item()
    assert spread[kind] < 0.2 * spread["none"]


def test_the_moving_average_is_that_of_all_ranks(tmp_path, monkeypatch):
    seen, baseline, mean_of_ranks = [], reinforce_lm.compute_baseline, common.mean

    def recording_baseline(kind, returns, samples_per_prompt, ema, greedy_scores):
        seen.append(ema)
        return baseline(kind, returns, samples_per_prompt, ema, greedy_scores)

    monkeypatch.setattr(reinforce_lm, "compute_baseline", recording_baseline)
    monkeypatch.setattr(common, "mean", lambda *inputs: mean_of_ranks(*inputs) + 1)  # as if other ranks had more
    flags = ["--total-episodes", 96, "--batch-size", 32, "--eval-size", 4, "--baseline", "ema", "--ema-decay", 0]
    run_main(reinforce_lm, *flags, "--device", "cpu", "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    assert seen == pytest.approx([0.0, *(value for _, value in scalars(run_dir)["objective/J"][:2])])


def test_the_end_token_gets_gradient_and_what_follows_gets_none():
    case, logits = Enumerated(), []
    case.policy.get_output_embeddings().register_forward_hook(lambda *call: logits.append(call[2]))
    loss = policy_gradient_loss(case.logprobs(case.policy), torch.ones(7, 2), MASK, 7)
    logits[-1].retain_grad()  # the pass over the prompts came first
    loss.backward()
    gradient = logits[-1].grad[0]
    assert len(gradient) == MASK.sum(), "what follows [end] has no logits"
    assert gradient[0, 0] < 0 and gradient[2, 0] < 0, "[end] and [1, end]: the end becomes more likely"


def test_rewards_and_returns_by_hand():
    """A response that ended, one that was cut, one of an end token alone, and one with tokens that were not sampled."""
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [True, False, True]])
    logprobs = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -0.25, -1.0], [-3.0, 9.0, 9.0], [-1.0, 9.0, -2.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -7.0], [-0.5, -1.25, -3.0], [-2.0, -7.0, -7.0], [-2.0, -7.0, -1.5]])
    rewards = shaped_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), logprobs, ref_logprobs, mask, kl_ref_coef=0.1)
    expected = torch.tensor([[-0.05, 1.1, 0.0], [0.0, -0.1, 1.8], [3.1, 0.0, 0.0], [-0.1, 0.0, 4.05]])
    torch.testing.assert_close(rewards, expected)
    for gamma in (1.0, 0.9):
        by_loop = torch.zeros(4, 3)
        for i, t in itertools.product(range(4), range(3)):
            reward_to_go = sum(gamma ** (later - t) * expected[i, later] for later in range(t, 3))
            by_loop[i, t] = gamma**t * reward_to_go
        torch.testing.assert_close(
            discounted_returns(rewards, torch.ones_like(rewards, dtype=torch.bool), gamma), by_loop
        )


@pytest.mark.parametrize("value", [0.1, 0.7, -3.3])
def test_equal_values_are_whitened_to_zero(value):
    values = torch.full((7, 9), value)
    mask = torch.arange(9) < torch.arange(1, 8)[:, None]
    assert mean(values, mask) == values[0, 0]
    assert whiten(values, mask).count_nonzero() == 0


def test_leave_one_out_by_loop():
    returns = torch.tensor([1.0, 0.0, 3.0, 2.0, 2.0, 2.0, -1.0, 5.0, 0.5])
    baseline = compute_baseline("leave_one_out", returns, 3, 0.0, None)
    for i, value in enumerate(baseline.tolist()):
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        assert value == pytest.approx(sum(returns[j].item() for j in group if j != i) / 2)
    equal = torch.full((4,), 0.7)
    assert (equal - compute_baseline("leave_one_out", equal, 4, 0.0, None)).abs().max() < 1e-6


def test_whitening():
    values = torch.tensor([[1.0, 2.0, 99.0], [4.0, -7.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    kept = values[mask]
    expected = (kept - kept.mean()) / kept.std(correction=0)
    torch.testing.assert_close(whiten(values, mask)[mask], expected)
    torch.testing.assert_close(whiten(values, mask, shift_mean=False)[mask], kept / kept.std(correction=0))
    assert (whiten(values, mask)[~mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_statistics_and_their_gradient_are_those_of_autograd(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    tokens = torch.randint(7, (6,), generator=generator)
    weights = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    categorical = torch.distributions.Categorical(logits=logits / temperature)
    expected = torch.stack([categorical.log_prob(tokens), categorical.entropy()])
    found = torch.stack(reinforce_lm.token_statistics(logits, tokens, temperature, entropy_gradient=True))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad((weights * found).sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad((weights * expected).sum(), logits)[0])


@pytest.mark.parametrize("dtype, temperature", [("float32", 1.0), ("float32", 0.7), ("bfloat16", 0.7)])
def test_of_all_logits_one_tensor_is_kept_for_the_backward_pass(temperature, dtype):
    """A vocabulary so large that the statistics come in two pieces, which are those of the whole."""
    model, kept = tiny_model("llama", vocab_size=2**18), []
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[:2, -1] = False  # 10 real response tokens
    batch = torch.arange(32).view(4, 8), mask, mask[:, -3:]
    head = model.get_output_embeddings()
    head.forward = types.MethodType(common.full_precision_product, head)  # as in load_policy
    args = Args(dtype=dtype, response_length=3, temperature=temperature)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logprobs, entropy = policy_logprobs(model, *batch, args)
    assert logprobs.requires_grad and not entropy.requires_grad
    of_head = model.config.hidden_size, 2**18  # the shape of its weights, transposed
    logits = [t.untyped_storage() for t in kept if t.shape[-1] == 2**18 and t.shape != of_head]
    storages = {storage.data_ptr(): storage.nbytes() for storage in logits}
    assert sum(storages.values()) == 10 * 2**18 * 4, "one float32 number for each, and of no other position"
    with torch.no_grad():
        logits = common.response_logits(model, *batch, args) / temperature
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs[batch[2]].detach(), categorical.log_prob(batch[0][:, -3:][batch[2]]))
    torch.testing.assert_close(entropy[batch[2]], categorical.entropy())


def test_kl_coefficient_follows_its_target():
    args = Args(kl_ref_target=6.0, kl_ref_horizon=10_000)
    assert adapt_kl_ref_coef(0.1, 60.0, 512, args) == pytest.approx(0.1 * (1 + 0.2 * 512 / 10_000))  # clipped above
    assert adapt_kl_ref_coef(0.1, 0.0, 512, args) == pytest.approx(0.1 * (1 - 0.2 * 512 / 10_000))  # and below
    assert adapt_kl_ref_coef(0.1, 6.3, 512, args) == pytest.approx(0.1 * (1 + 0.05 * 512 / 10_000))
    assert adapt_kl_ref_coef(0.1, -60.0, 10**6, args) == pytest.approx(0.08)  # a batch that is longer than the horizon
    assert adapt_kl_ref_coef(0.1, 60.0, 10**6, args) == pytest.approx(0.12)
    assert adapt_kl_ref_coef(0.1, 60.0, 512, Args(kl_ref_target=0.0)) == 0.1


SHORT = ["--total-episodes", 32, "--batch-size", 32, "--eval-size", 4, "--save-every", 0, "--device", "cpu"]


def one_step_gradient(tmp_path, *flags):
    with recorded_gradients(torch.optim.Adam) as steps:
        run_main(reinforce_lm, *SHORT, "--max-grad-norm", 1e9, "--output-dir", tmp_path, *flags)
    assert len(steps) == 1
    return steps[0]


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    whole = one_step_gradient(tmp_path, "--response-length", 12)  # long enough for responses to end at different places
    for size in (1, 60, 250):  # one row, some rows, some prompts with their responses
        gradient = one_step_gradient(tmp_path, "--response-length", 12, "--micro-batch-tokens", size)
        assert (gradient - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("score", [1.0, 0.7])
@pytest.mark.parametrize("flags", [[], ["--normalize-advantages"], ["--baseline", "mean"]], ids=str)
def test_equal_scores_and_no_kl_leave_the_weights_alone(score, flags, tmp_path):
    """No remainder of rounding either: Adam's steps do not depend on the size of a gradient."""
    reward = reward_file(tmp_path, f"def fn(prompts, responses, **columns):\n    return [{score}] * len(responses)\n")
    flags = [*flags, "--batch-size", 48, "--total-episodes", 48, "--samples-per-prompt", 6, "--kl-ref-coef", 0]
    assert one_step_gradient(tmp_path, *flags, "--reward", reward).abs().max() == 0


def test_reference_is_only_kept_when_it_is_paid_for(tmp_path, monkeypatch):
    copies = []
    deepcopy = common.copy.deepcopy

    def recording_deepcopy(thing, *memo):
        copied = deepcopy(thing, *memo)
        if hasattr(thing, "config"):
            copies.append(copied)
        return copied

    monkeypatch.setattr(common.copy, "deepcopy", recording_deepcopy)
    one_step_gradient(tmp_path, "--kl-ref-coef", 0)
    assert not copies
    one_step_gradient(tmp_path, "--kl-ref-coef", 0.1)
    assert len(copies) == 1
    fresh = load_policy("tiny", character_tokenizer("0123456789"), 11, seed=1)
    for reference_weight, weight in zip(copies[0].parameters(), fresh.parameters()):
        assert torch.equal(reference_weight, weight) and not reference_weight.requires_grad
