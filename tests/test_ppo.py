"""ppo_lm.py against hand-worked advantages, enumerated gradients, REINFORCE, and its own bookkeeping."""

import common
import ppo_lm
import reinforce_lm
from common import in_micro_batches
from ppo_lm import (
    Args,
    Critic,
    adapt_penalty,
    clipped_surrogate,
    generalized_advantages,
    value_loss,
)

import pytest
import torch
from helpers import recorded_gradients, reward_file, run_main, tiny_model
from test_reinforce import MASK, SCORES, Enumerated
from test_runs import scalars

SHORT = ["--batch-size", 32, "--eval-size", 4, "--eval-every", 0, "--device", "cpu"]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_generalized_advantages_by_hand(gae_lambda):
    """[a, end], [a, b, c] cut at the limit and bootstrapped, and [a, b] with a token in between that is masked."""
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, True]])
    rewards = torch.tensor([[0.1, 1.0, 0.0], [0.2, 0.0, 2.0], [0.3, 0.0, -1.0]])
    values = torch.tensor([[0.5, 0.7, 9.0], [0.1, 0.2, 0.3], [0.4, 9.0, 0.6]])
    next_values = torch.tensor([0.0, 0.8, 0.0])
    gamma, decay = 0.9, 0.9 * gae_lambda
    last = [1.0 - 0.7, 2.0 + 0.9 * 0.8 - 0.3, -1.0 - 0.6]
    middle = 0.0 + 0.9 * 0.3 - 0.2 + decay * last[1]
    expected = torch.tensor(
        [
            [0.1 + 0.9 * 0.7 - 0.5 + decay * last[0], last[0], 0.0],
            [0.2 + 0.9 * 0.2 - 0.1 + decay * middle, middle, last[1]],
            [0.3 + 0.9 * 0.6 - 0.4 + decay * last[2], 0.0, last[2]],
        ]
    )
    advantages = generalized_advantages(rewards, values, mask, next_values, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected)


def test_generalized_advantages_are_the_double_sum():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    lengths, next_values = [7, 1, 4, 7, 6], torch.tensor([0.0, 0.0, 0.0, 0.6, 0.0])
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    advantages = generalized_advantages(rewards, values, mask, next_values, 0.9, 0.8)
    for i, length in enumerate(lengths):
        following = [*values[i, 1:length].tolist(), next_values[i].item()]
        deltas = [rewards[i, t].item() + 0.9 * following[t] - values[i, t].item() for t in range(length)]
        for t in range(7):
            expected = sum((0.9 * 0.8) ** (later - t) * deltas[later] for later in range(t, length))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-5)
    without_critic = generalized_advantages(rewards.where(mask, 0.0), torch.zeros(5, 7), mask, torch.zeros(5), 1.0, 1.0)
    torch.testing.assert_close(
        without_critic, reinforce_lm.discounted_returns(rewards.where(mask, 0.0), mask, 1.0).where(mask, 0.0)
    )


def test_gradient_at_the_old_policy_is_that_of_reinforce_and_the_enumerated_one():
    case = Enumerated()
    logprobs = case.logprobs(case.policy)
    old_logprobs = logprobs.detach()
    probabilities = old_logprobs.where(MASK, 0.0).sum(1).exp()
    advantages = SCORES[:, None].expand(7, 2)
    weights = probabilities[:, None]
    ratio = (logprobs - old_logprobs).exp()
    clipped = (weights * clipped_surrogate(ratio, advantages, 0.2, 0.2)).where(MASK, 0.0).sum()
    reinforce = -reinforce_lm.policy_gradient_loss(logprobs, weights * advantages, MASK, 1)
    penalty = ratio - 1 - (logprobs - old_logprobs)
    penalised = (weights * (ratio * advantages - 5.0 * penalty)).where(MASK, 0.0).sum()
    expected = case.exact_gradient(kl_ref_coef=0.0, gamma=1.0)
    for value in (clipped, reinforce, penalised):
        gradient = torch.autograd.grad(value, list(case.policy.parameters()), retain_graph=True)
        torch.testing.assert_close(torch.cat([g.flatten() for g in gradient]), expected, rtol=1e-9, atol=1e-9)


def test_clipping_takes_the_gradient_on_the_right_side_only():
    ratio = torch.tensor([[0.5, 0.9, 1.0, 1.25, 1.5] * 2]).requires_grad_()
    advantages = torch.tensor([[1.0] * 5 + [-1.0] * 5])
    clipped_surrogate(ratio, advantages, 0.2, 0.3).sum().backward()
    assert ratio.grad.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0]]


def test_the_sampled_penalty_has_the_value_and_the_gradient_of_the_exact_kl():
    """Under the samples of the old policy, enumerated, and away from it: the docstring's claim about (7)."""
    case, old = Enumerated(), tiny_model(vocab_size=3, dtype=torch.float64, seed=7)
    with torch.no_grad():
        old_logprobs = case.logprobs(old)
    logprobs, probabilities = case.logprobs(case.policy), old_logprobs.where(MASK, 0.0).sum(1).exp()
    logratio = logprobs - old_logprobs
    sampled = (probabilities[:, None] * (logratio.exp() - 1 - logratio)).where(MASK, 0.0).sum()
    old_logits, new_logits = [
        common.response_logits(model, case.sequences, case.attention_mask, MASK, case.args) / case.args.temperature
        for model in (old, case.policy)
    ]
    categorical = torch.distributions.Categorical
    kl = torch.distributions.kl_divergence(categorical(logits=old_logits.detach()), categorical(logits=new_logits))
    exact = (probabilities[:, None].expand(7, 2)[MASK] * kl).sum()
    assert exact > 0.05
    torch.testing.assert_close(sampled, exact)
    torch.testing.assert_close(case.gradient(sampled), case.gradient(exact), rtol=1e-8, atol=1e-10)


def test_penalty_rule():
    assert adapt_penalty(3.0, 0.0066, 0.01) == 1.5
    assert adapt_penalty(3.0, 0.0067, 0.01) == 3.0
    assert adapt_penalty(3.0, 0.0150, 0.01) == 3.0
    assert adapt_penalty(3.0, 0.0151, 0.01) == 6.0


def test_value_loss_and_its_clipping():
    values, targets = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    new_values = torch.tensor([[0.1, 0.5, 0.5]]).requires_grad_()
    plain = value_loss(new_values, values, targets, 0.0)
    torch.testing.assert_close(plain, 0.5 * torch.tensor([[0.81, 0.25, 2.25]]))
    clipped = value_loss(new_values, values, targets, 0.2)
    torch.testing.assert_close(clipped, 0.5 * torch.tensor([[0.81, 0.64, 2.25]]))
    clipped.sum().backward()  # the second value is beyond the limit on the way to its target: it is left alone
    torch.testing.assert_close(new_values.grad, torch.tensor([[-0.9, 0.0, 1.5]]))


OPT = dict(hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
OPT |= dict(word_embed_proj_dim=8, do_layer_norm_before=False)  # its last hidden states are narrower, as in OPT-350M


@pytest.mark.parametrize("kind, size", [("gpt2", {}), ("llama", {}), ("opt", OPT)])
def test_critic_starts_at_zero_as_a_copy_and_reads_the_right_states(kind, size):
    policy, args = tiny_model(kind, **size), Args(dtype="float32", response_length=3)
    critic = Critic(policy)
    sequences = torch.randint(1, 12, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(sequences, dtype=torch.bool)
    mask[1, :2] = False
    assert (critic(sequences, mask, args) == 0).all()
    for copied, weight in zip(critic.backbone.parameters(), policy.base_model.parameters()):
        assert torch.equal(copied, weight) and copied.data_ptr() != weight.data_ptr()
    torch.nn.init.normal_(critic.head.weight)
    values = critic(sequences, mask, args)
    assert values.shape == (4, 4)
    for t in range(4):  # V_t reads the prompt and the t tokens before, and nothing after them
        changed = sequences.clone()
        changed[:, 4 + t :] = 1
        torch.testing.assert_close(critic(changed, mask, args)[:, : t + 1], values[:, : t + 1])
        single = critic.head(critic.backbone(sequences[1:2, 2 : 4 + t]).last_hidden_state[:, -1])[0, 0]
        torch.testing.assert_close(values[1, t], single, rtol=1e-4, atol=1e-5)
    micro_batches = [torch.tensor([3, 0, 1]), torch.tensor([2])]
    batched = in_micro_batches(lambda *rows: critic(*rows, args), micro_batches, sequences, mask)
    torch.testing.assert_close(batched, values.detach())
    assert not batched.requires_grad


def test_a_model_without_layers_below_its_head_has_no_critic():
    policy = tiny_model()
    policy.base_model_prefix = "none"
    with pytest.raises(SystemExit, match="--model: expected layers below a head, for the critic"):
        Critic(policy)


def ppo_run(tmp_path, *flags):
    """Run ppo_lm.py; returns what it logged, tag -> list of values."""
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    run_main(ppo_lm, *SHORT, "--output-dir", folder, *flags)
    (run_dir,) = folder.iterdir()
    return {tag: [value for _, value in values] for tag, values in scalars(run_dir).items()}


def test_equal_returns_have_nothing_to_explain(tmp_path):
    reward = reward_file(tmp_path, "def fn(prompts, responses, **columns):\n    return [1.0] * len(responses)\n")
    flags = ["--reward", reward, "--kl-ref-coef", 0, "--gae-lambda", 1, "--total-episodes", 96]
    seen = ppo_run(tmp_path, *flags)
    assert set(seen["value/explained_variance"]) == {0.0} and seen["value/mean"][-1] > 0


@pytest.mark.parametrize("surrogate", ["clip", "kl_penalty"])
def test_first_minibatch_has_ratio_one_and_the_optimizers_step_once_per_minibatch(surrogate, tmp_path, model_folder):
    folder = model_folder("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    flags = ["--model", folder, "--surrogate", surrogate, "--update-epochs", 3, "--num-minibatches", 5]
    with recorded_gradients(torch.optim.Adam) as steps:
        logged = ppo_run(tmp_path, *flags, "--total-episodes", 64)
    assert len(steps) == 2 * 2 * 3 * 5  # iterations, networks, epochs, minibatches
    assert logged["policy/update_epochs_done"] == [3.0, 3.0]
    assert logged["policy/ratio_first_minibatch"] == [1.0, 1.0]
    assert min(logged["policy/approx_kl"]) > 1e-5  # measured after the update, which did move


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    recorded = []
    flags = ["--total-episodes", 32, "--response-length", 12, "--num-minibatches", 2, "--update-epochs", 1]
    for size in (10_000, 1, 60, 150):  # a minibatch, one row, some rows, some prompts with their responses
        with recorded_gradients(torch.optim.Adam) as steps:
            ppo_run(tmp_path, *flags, "--micro-batch-tokens", size, "--max-grad-norm", 1e9)
        recorded.append(steps)
    for steps in recorded[1:]:
        for step, expected in zip(steps[:2], recorded[0][:2], strict=True):  # the first step of critic and policy
            assert (step - expected).norm() < 1e-5 * expected.norm()


def test_early_stop_stops(tmp_path):
    flags = ["--total-episodes", 64, "--update-epochs", 4, "--num-minibatches", 2, "--learning-rate", 0.01]
    with recorded_gradients(torch.optim.Adam) as steps:
        logged = ppo_run(tmp_path, *flags, "--target-kl", 1e-6)
    assert logged["policy/update_epochs_done"] == [0.5, 0.5]  # one step; the second minibatch saw the KL it caused
    assert len(steps) == 2 * 2
    with recorded_gradients(torch.optim.Adam) as steps:
        logged = ppo_run(tmp_path, *flags, "--target-kl", 1e6)
    assert logged["policy/update_epochs_done"] == [4.0, 4.0] and len(steps) == 2 * 2 * 4 * 2


def test_the_penalty_follows_the_divergence(tmp_path):
    flags = ["--surrogate", "kl_penalty", "--total-episodes", 128, "--update-epochs", 1, "--num-minibatches", 1]
    logged = ppo_run(tmp_path, *flags, "--penalty-target", 1e-9)
    assert logged["policy/penalty_coef"] == [1.0, 2.0, 4.0, 8.0] and min(logged["policy/approx_kl"]) > 1.5e-9
    logged = ppo_run(tmp_path, *flags, "--penalty-target", 1e9)
    assert logged["policy/penalty_coef"] == [1.0, 0.5, 0.25, 0.125]


def test_the_penalty_is_adapted_by_the_logged_kl(tmp_path, monkeypatch):
    adapted, adapt = [], ppo_lm.adapt_penalty
    monkeypatch.setattr(ppo_lm, "adapt_penalty", lambda c, kl, target: adapted.append(kl) or adapt(c, kl, target))
    logged = ppo_run(tmp_path, "--surrogate", "kl_penalty", "--total-episodes", 64)
    assert adapted == pytest.approx(logged["policy/approx_kl"], rel=1e-6)


def test_in_bfloat16_the_first_ratio_is_one_whatever_the_sizes_of_the_batches(tmp_path, model_folder):
    """Micro-batches of a minibatch and of some of its prompts: rows are scored beside the same rows as in the loss, for
    beside others they are rounded in another way."""
    flags = ["--model", model_folder("llama"), "--dtype", "bfloat16", "--response-length", 12, "--total-episodes", 64]
    flags += ["--kl-ref-coef", 0]
    for micro_batch_tokens, num_minibatches in ((10_000, 3), (100, 3)):
        sizes = ["--micro-batch-tokens", micro_batch_tokens, "--num-minibatches", num_minibatches]
        logged = ppo_run(tmp_path, *flags, *sizes, "--learning-rate", 1e-2)
        assert logged["policy/ratio_first_minibatch"] == [1.0] * 2
        assert min(logged["policy/approx_kl"]) > 0
