"""trpo_lm.py against dense matrices, a solver, the enumerated gradient and the promises that a trust region makes."""

import contextlib

import common
import ppo_lm
import reinforce_lm
import trpo_lm
from trpo_lm import Args

import helpers
import pytest
import torch
from helpers import character_tokenizer, load_policy, reward_file, run_main, tiny_model
from test_reinforce import MASK, SCORES, Enumerated
from test_runs import scalars
from transformers.models.llama import modeling_llama

NAN, INF = float("nan"), float("inf")
SHORT = ["--batch-size", 32, "--eval-size", 4, "--eval-every", 0, "--device", "cpu", "--save-every", 0]


class Batch:
    """A tiny policy in float64 and a batch of ragged, left-padded prompts and responses."""

    def __init__(self, kind="gpt2", attention="eager", rows=5):
        self.args = Args(dtype="float32", response_length=3, temperature=0.8)
        self.policy = tiny_model(kind, vocab_size=5, attn_implementation=attention, dtype=torch.float64)
        generator = torch.Generator().manual_seed(3)
        prompts, responses = torch.randint(5, (2, rows, 3), generator=generator)
        self.response_mask = common.mask_through_first_end(responses, [0])
        prompt_mask = torch.arange(3) >= torch.tensor([0, 1, 2, 0, 1] * rows)[:rows, None]
        self.batch = [
            torch.cat([prompts, responses], 1),
            torch.cat([prompt_mask, self.response_mask], 1),
            self.response_mask,
        ]
        self.num_parameters = sum(p.numel() for p in self.policy.parameters())

    def vector(self, seed):
        return torch.randn(self.num_parameters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def micro_batches(self, size=5):
        return torch.arange(len(self.response_mask)).split(size)

    def product(self, vector, micro_batch_size=5):
        return trpo_lm.fisher_vector_product(
            vector, self.policy, self.batch, self.micro_batches(micro_batch_size), self.args
        )

    def surrogate_gradient(self, advantages, num_tokens, policy=None):
        inputs = self.batch, self.micro_batches(2), advantages, torch.zeros_like(advantages), num_tokens, self.args
        return trpo_lm.surrogate_gradient(policy or self.policy, *inputs)[0]

    def quadratic_form(self, vector, size=5):
        inputs = self.batch, self.micro_batches(size), self.response_mask.sum(), self.args
        return trpo_lm.fisher_quadratic_form(vector, self.policy, *inputs)

    def logits(self):
        logits = common.response_logits(self.policy, *self.batch, self.args)
        return logits / self.args.temperature  # (T, V)

    def dense_fisher(self):
        """Mean over tokens of sum_a p(a) grad log p(a) grad log p(a)', from one gradient for each token and action."""
        logprobs = self.logits().log_softmax(-1)
        scaled = []
        for logprob in logprobs.flatten():
            gradient = torch.autograd.grad(logprob, list(self.policy.parameters()), retain_graph=True)
            weight = (logprob.exp().detach() / len(logprobs)).sqrt()
            scaled.append(weight * torch.cat([g.flatten() for g in gradient]))
        scaled = torch.stack(scaled)  # (T * V, D)
        return scaled.T @ scaled


def rms_norm(self, hidden):
    """Llama's norm without its detour over float32, to compare in float64."""
    return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_fisher_products_are_those_of_the_dense_matrix(kind, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", rms_norm)
    case, tolerance = Batch(kind, attention="sdpa"), 1e-8
    fisher = case.dense_fisher()
    for seed in (1, 2):
        v = case.vector(seed)
        expected = fisher @ v
        for micro_batch_size in (1, 2, 5):
            assert (case.product(v, micro_batch_size) - expected).norm() < tolerance * expected.norm()
        quadratic = case.quadratic_form(v, 2)
        assert quadratic == pytest.approx((v @ expected).item(), rel=tolerance)


def test_fisher_products_are_the_double_backward_of_the_kl():
    case = Batch()
    parameters, v = list(case.policy.parameters()), case.vector(1)
    logits = case.logits()
    kl = trpo_lm.exact_kl(logits.detach(), logits, 1.0).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(kl, parameters, create_graph=True)])
    assert gradient.norm() < 1e-12  # the old policy is the minimum
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(gradient @ v, parameters)])
    assert (case.product(v) - expected).norm() < 1e-8 * expected.norm()


def test_fisher_products_of_some_rows_are_those_of_a_batch_of_these_rows():
    case, v = Batch(), Batch().vector(1)
    few = trpo_lm.fisher_vector_product(v, case.policy, case.batch, [torch.tensor([3]), torch.tensor([1])], case.args)
    case.batch = [tensor[[1, 3]] for tensor in case.batch]
    alone = trpo_lm.fisher_vector_product(v, case.policy, case.batch, [torch.arange(2)], case.args)
    torch.testing.assert_close(few, alone)


def test_no_fused_attention_inside_a_product_and_only_there(monkeypatch):
    """The default attention, which has no forward mode when fused, gives the products of the eager one."""
    fused, eager = Batch(attention="sdpa"), Batch(attention="eager")
    v, flags = fused.vector(1), []
    response_logits = common.response_logits

    def recording(*args):
        flags.append(torch.backends.cuda.flash_sdp_enabled())
        return response_logits(*args)

    monkeypatch.setattr(common, "response_logits", recording)
    torch.testing.assert_close(fused.product(v), eager.product(v), rtol=1e-9, atol=1e-12)
    assert flags == [False, False] * 2
    advantages = torch.ones_like(fused.response_mask, dtype=torch.float64)
    flags.clear()
    fused.surrogate_gradient(advantages, fused.response_mask.sum())
    assert flags == [True] * 3
    with pytest.raises(NotImplementedError, match="forward AD"):  # as without the plain kernel
        monkeypatch.setattr(trpo_lm, "plain_attention", contextlib.nullcontext)
        fused.product(v)


def spd(size=12, seed=0, condition=50.0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = q @ torch.diag(torch.linspace(1, condition, size, dtype=torch.float64)) @ q.T
    return matrix, torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_conjugate_gradient_solves(damping):
    matrix, g = spd()
    calls = []
    x, d, residual, iters = trpo_lm.conjugate_gradient(lambda v: calls.append(1) or matrix @ v, g, 50, damping, 1e-10)
    assert d == pytest.approx(damping * (g @ matrix @ g / (g @ g)).item())
    expected = torch.linalg.solve(matrix + d * torch.eye(12, dtype=torch.float64), g)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)
    assert residual <= 1e-10 and iters == len(calls) <= 14
    rough, _, residual, iters = trpo_lm.conjugate_gradient(lambda v: matrix @ v, g, 50, damping, 0.3)
    found = (g - (matrix + d * torch.eye(12, dtype=torch.float64)) @ rough).norm() / g.norm()
    assert residual == pytest.approx(found.item()) and residual <= 0.3 and iters < 12


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_conjugate_gradient_does_not_see_the_size_of_the_gradient(scale):
    matrix, g = spd()
    expected, _, expected_residual, expected_iters = trpo_lm.conjugate_gradient(lambda v: matrix @ v, g, 50, 0.1, 1e-3)
    x, _, residual, iters = trpo_lm.conjugate_gradient(lambda v: matrix @ v, scale * g, 50, 0.1, 1e-3)
    torch.testing.assert_close(x / scale, expected)
    assert iters == expected_iters and residual == pytest.approx(expected_residual)


def test_conjugate_gradient_keeps_the_last_good_x():
    g = torch.tensor([1.0, 2.0, 3.0])
    x, *_ = trpo_lm.conjugate_gradient(torch.zeros_like, g, 10, 0.1, 0.0)
    assert (x == 0).all()
    x, *_ = trpo_lm.conjugate_gradient(lambda v: -v, g, 10, 0.0, 0.0)
    assert (x == 0).all()
    x, *_ = trpo_lm.conjugate_gradient(lambda v: v * float("nan"), g, 10, 0.1, 0.0)
    assert (x == 0).all()
    x, damping, residual, iters = trpo_lm.conjugate_gradient(lambda v: v, torch.zeros(3), 10, 0.1, 0.0)
    assert (x == 0).all() and iters == 0 and residual == 0.0
    matrix = torch.diag(torch.tensor([3.0, 2.0, -1.0]))  # positive along g, negative further on
    x, _, residual, iters = trpo_lm.conjugate_gradient(
        lambda v: matrix @ v, torch.tensor([1.0, 1.0, 0.1]), 10, 0.0, 0.0
    )
    assert x.isfinite().all() and x.norm() > 0 and iters < 10


def test_step_solves_the_trust_region_problem():
    """max g's subject to 1/2 s'Fs <= delta: no step on the boundary gains more than s = sqrt(2 delta / x'Fx) x."""
    matrix, g = spd()
    x, *_ = trpo_lm.conjugate_gradient(lambda v: matrix @ v, g, 50, 0.0, 1e-12)
    delta = 0.05
    step = (2 * delta / (x @ matrix @ x)) ** 0.5 * x
    assert (0.5 * step @ matrix @ step).item() == pytest.approx(delta)
    best = (2 * delta * g @ torch.linalg.solve(matrix, g)) ** 0.5  # by Lagrange
    assert (g @ step).item() == pytest.approx(best.item())
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = torch.randn(12, generator=generator, dtype=torch.float64)
        other *= (2 * delta / (other @ matrix @ other)) ** 0.5
        assert g @ other <= g @ step + 1e-12


def natural_step(case, advantages, delta):
    """The full step of (10) as main takes it, with an undamped solution."""
    num_tokens = case.response_mask.sum()
    g = case.surrogate_gradient(advantages, num_tokens)
    x, *_ = trpo_lm.conjugate_gradient(case.product, g, 10, 0.1, 0.0)
    curvature = case.quadratic_form(x)
    return (2 * delta / curvature) ** 0.5 * x


def test_kl_of_the_step_tends_to_delta_and_its_gain_to_the_prediction():
    case = Batch()
    advantages = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    num_tokens = case.response_mask.sum()
    theta = helpers.flatten(case.policy)
    g = case.surrogate_gradient(advantages, num_tokens)
    for delta in (1e-6, 1e-8):
        step = natural_step(case, advantages, delta)
        helpers.set_parameters(case.policy, theta + step)
        inputs = case.batch, case.micro_batches(2), advantages, num_tokens, case.args
        gain, kl = trpo_lm.surrogate_gain_and_kl(case.policy, theta, *inputs)
        assert kl == pytest.approx(delta, rel=100 * delta**0.5)
        assert gain == pytest.approx((g @ step).item(), rel=100 * delta**0.5)
        helpers.set_parameters(case.policy, theta)


def test_step_is_invariant_to_a_rescaling_of_the_parameters():
    """Parameters phi = theta / 3: the policy that the step reaches is the same, and a plain gradient's is not."""
    case = Batch()
    advantages = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = natural_step(case, advantages, 1e-3)
    policy = case.policy

    class Rescaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.names = [name for name, _ in policy.named_parameters()]
            self.phi = torch.nn.ParameterList([p.detach() / 3 for p in policy.parameters()])

        def get_output_embeddings(self):
            return policy.get_output_embeddings()

        def forward(self, **inputs):
            values = {name: 3 * phi for name, phi in zip(self.names, self.phi)}
            return torch.func.functional_call(policy, values, (), inputs)

    case.policy = Rescaled()
    torch.testing.assert_close(3 * natural_step(case, advantages, 1e-3), step, rtol=1e-8, atol=1e-10)


def test_gradient_is_that_of_reinforce_and_ppo_and_the_enumerated_one():
    case = Enumerated()
    logprobs = case.logprobs(case.policy)
    probabilities = logprobs.detach().where(MASK, 0.0).sum(1).exp()
    advantages = (probabilities * SCORES)[:, None].expand(7, 2)
    batch = [case.sequences, case.attention_mask, MASK]
    for micro_batch_size in (2, 7):
        micro_batches = torch.arange(7).split(micro_batch_size)
        g, means = trpo_lm.surrogate_gradient(
            case.policy, batch, micro_batches, advantages, logprobs.detach(), 1, case.args
        )
        torch.testing.assert_close(g, case.exact_gradient(kl_ref_coef=0.0, gamma=1.0), rtol=1e-9, atol=1e-9)
    assert means["policy/sampler_gap"] < 1e-12 < means["policy/entropy"]
    reinforce = -reinforce_lm.policy_gradient_loss(logprobs, advantages, MASK, 1)
    ratio = (logprobs - logprobs.detach()).exp()
    ppo = ppo_lm.clipped_surrogate(ratio, advantages, 0.2, 0.2).where(MASK, 0.0).sum()
    for value in (reinforce, ppo):
        torch.testing.assert_close(case.gradient(value), g, rtol=1e-9, atol=1e-9)


def test_line_search_restores_bit_for_bit_or_takes_the_first_good_step():
    case = Batch()
    theta, step = helpers.flatten(case.policy), case.vector(1)
    tried = []

    def search(measure, **flags):
        tried.clear()
        args = Args(backtrack_coeff=0.5, backtrack_iters=4, accept_ratio=0.1, **flags)
        return trpo_lm.line_search(case.policy, theta, step, 1.0, lambda: tried.append(1) or measure(), 0.1, args)

    for gain, kl in ((1.0, 0.2), (0.0, 0.0), (-1.0, 0.0), (NAN, 0.0), (1.0, NAN), (INF, 0.0)):
        assert search(lambda gain=gain, kl=kl: (gain, kl)) == (0.0, 0.0, 0.0, 4)
        assert torch.equal(helpers.flatten(case.policy), theta) and len(tried) == 4
    answers = iter([(1.0, 0.11), (0.04, 0.01), (0.03, 0.1)])  # too far; too little for half a step; good
    assert search(lambda: next(answers)) == (0.25, 0.03, 0.1, 3)
    assert torch.equal(helpers.flatten(case.policy), theta + 0.25 * step)


def test_parameters_survive_flattening():
    for kind in ("gpt2", "llama"):
        case = Batch(kind)
        theta = helpers.flatten(case.policy)
        names = dict(case.policy.named_parameters())
        for name, view in trpo_lm.unflatten(theta, case.policy).items():
            assert torch.equal(view, names[name])
        other = case.vector(5)
        helpers.set_parameters(case.policy, other)
        assert torch.equal(helpers.flatten(case.policy), other) and not torch.equal(theta, other)


def trpo_run(tmp_path, *flags):
    """Run trpo_lm.py; returns what it logged, tag -> list of values."""
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    run_main(trpo_lm, *SHORT, "--output-dir", folder, *flags)
    (run_dir,) = folder.iterdir()
    return {tag: [value for _, value in values] for tag, values in scalars(run_dir).items()}


def test_every_accepted_step_keeps_the_trust_region_and_gains(tmp_path, monkeypatch):
    """KL and gain of each step of a short run, computed anew from the parameters before and after it; and the log."""
    updates, searching = [], []
    line_search, gradient, response_logits = trpo_lm.line_search, trpo_lm.surrogate_gradient, common.response_logits
    conjugate_gradient = trpo_lm.conjugate_gradient

    def recording_gradient(policy, batch, micro_batches, advantages, *rest):
        updates.append({"batch": batch, "advantages": advantages})
        return gradient(policy, batch, micro_batches, advantages, *rest)

    def recording_solver(*inputs):
        updates[-1]["solved"] = conjugate_gradient(*inputs)
        return updates[-1]["solved"]

    def recording_search(policy, theta, step, predicted_gain, *rest):
        searching.append(True)
        result = line_search(policy, theta, step, predicted_gain, *rest)
        searching.clear()
        updates[-1] |= {"theta": theta.clone(), "new": helpers.flatten(policy)}
        updates[-1] |= {"predicted": predicted_gain, "fraction": result[0]}
        return result

    def without_graphs(*inputs):
        result = response_logits(*inputs)
        assert not (searching and result.requires_grad)
        return result

    monkeypatch.setattr(common, "response_logits", without_graphs)
    monkeypatch.setattr(trpo_lm, "conjugate_gradient", recording_solver)
    monkeypatch.setattr(trpo_lm, "line_search", recording_search)
    monkeypatch.setattr(trpo_lm, "surrogate_gradient", recording_gradient)
    flags = ["--total-episodes", 32 * 12, "--max-kl", 0.02, "--accept-ratio", 0.8, "--backtrack-coeff", 0.6]
    logged = trpo_run(tmp_path, *flags, "--cg-iters", 3, "--cg-tol", 0)
    assert len(updates) == 12 and sum(logged["trpo/accepted"]) >= 6
    assert logged["trpo/cg_iters"] == [3] * 12
    policy = load_policy("tiny", character_tokenizer("0123456789"), 11, seed=1)
    for i, update in enumerate(updates):
        sequences, attention_mask, mask = update["batch"]
        logits = []
        for theta in (update["theta"], update["new"]):
            helpers.set_parameters(policy, theta)
            with torch.no_grad():
                logits.append(policy(sequences, attention_mask=attention_mask.long()).logits[:, 4:-1].log_softmax(-1))
        old, new = logits
        kl = (old.exp() * (old - new)).sum(-1)[mask].mean().item()
        responses = sequences[:, 5:, None]
        ratio = (new.gather(2, responses) - old.gather(2, responses))[..., 0].exp()
        gain = ((ratio - 1) * update["advantages"])[mask].mean().item()
        assert logged["trpo/kl"][i] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert logged["trpo/surrogate_gain"][i] == pytest.approx(gain, rel=1e-3, abs=1e-5)
        fraction, (_, damping, residual, _) = update["fraction"], update["solved"]
        assert logged["trpo/surrogate_gain_predicted"][i] == pytest.approx(fraction * update["predicted"])
        assert logged["trpo/kl_predicted"][i] == pytest.approx(fraction**2 * logged["trpo/max_kl"][i])
        assert logged["trpo/damping"][i] == pytest.approx(damping)
        assert logged["trpo/cg_residual"][i] == pytest.approx(residual)
        if logged["trpo/accepted"][i]:
            assert 0 < kl <= 0.02 * (1 - i / 12) * (1 + 1e-4) and gain > 0
            assert fraction == 0.6 ** (logged["trpo/line_search_steps"][i] - 1)
            assert logged["trpo/step_fraction"][i] == pytest.approx(fraction)
        else:
            assert torch.equal(update["theta"], update["new"])
    assert any(0 < update["fraction"] < 1 for update in updates), "no step was shortened: raise --accept-ratio"


def test_no_usable_gradient_no_update_and_the_run_goes_on(tmp_path, capsys):
    reward = reward_file(tmp_path, "def fn(prompts, responses, **columns):\n    return [0.0] * len(responses)\n")
    logged = trpo_run(tmp_path, "--reward", reward, "--kl-ref-coef", 0, "--total-episodes", 96)
    assert logged["trpo/accepted"] == [0.0] * 3 and logged["objective/score"] == [0.0] * 3
    assert capsys.readouterr().out.count("policy not updated, 0 steps") == 3


@pytest.mark.parametrize("broken", [float("nan"), -1.0, 0.0])
def test_broken_products_leave_the_policy_alone(broken, tmp_path, monkeypatch, capsys):
    product = trpo_lm.fisher_vector_product
    monkeypatch.setattr(trpo_lm, "fisher_vector_product", lambda *args, **settings: product(*args, **settings) * broken)
    logged = trpo_run(tmp_path, "--total-episodes", 64, "--cg-damping", 0)
    assert logged["trpo/accepted"] == [0.0] * 2
    assert "policy not updated" in capsys.readouterr().out
    (run_dir,) = (tmp_path / "run0").iterdir()
    saved = trpo_lm.common.transformers.AutoModelForCausalLM.from_pretrained(run_dir / "model")
    fresh = load_policy("tiny", character_tokenizer("0123456789"), 11, seed=1)
    for weight, expected in zip(saved.parameters(), fresh.parameters()):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_the_predicted_kl_is_honest_whatever_share_of_the_batch_is_in_the_products(fraction, tmp_path):
    flags = ["--total-episodes", 64 * 2, "--batch-size", 64, "--max-kl", 1e-4, "--response-length", 12]
    logged = trpo_run(tmp_path, *flags, "--fvp-fraction", fraction, "--cg-iters", 5, "--update-epochs", 1)
    assert logged["trpo/accepted"] == [1.0] * 2
    assert logged["trpo/max_kl"] == pytest.approx([1e-4, 1e-4 / 2])
    for kl, predicted in zip(logged["trpo/kl"], logged["trpo/kl_predicted"]):
        assert kl == pytest.approx(predicted, rel=0.1)


def test_micro_batches_change_nothing_but_memory(tmp_path):
    flags = ["--total-episodes", 32, "--response-length", 12]
    whole = trpo_run(tmp_path, *flags)
    for size in (60, 150):  # some rows, some prompts with their responses
        parts = trpo_run(tmp_path, *flags, "--micro-batch-tokens", size)
        for tag in ("kl", "surrogate_gain", "surrogate_gain_predicted", "damping"):
            assert parts[f"trpo/{tag}"] == pytest.approx(whole[f"trpo/{tag}"], rel=1e-3), tag
        assert parts["policy/entropy"] == pytest.approx(whole["policy/entropy"], rel=1e-3)


def test_critic_does_not_move_the_policy_nor_the_policy_the_critic(tmp_path):
    logged = trpo_run(
        tmp_path, "--total-episodes", 64, "--accept-ratio", 0.999999, "--max-kl", 10, "--backtrack-iters", 1
    )
    assert logged["trpo/accepted"] == [0.0, 0.0] and logged["value/mean"][1] != 0.0
    assert logged["objective/kl_ref"] == pytest.approx([0.0, 0.0], abs=1e-5)  # the policy is its reference still
    logged = trpo_run(tmp_path, "--total-episodes", 64, "--critic-learning-rate", 1e-30)
    assert logged["trpo/accepted"] == [1.0, 1.0] and logged["value/mean"] == pytest.approx([0.0, 0.0], abs=1e-20)


def test_products_have_other_rows_in_each_iteration_and_each_row_once(tmp_path, monkeypatch):
    seen, product = [], trpo_lm.fisher_vector_product

    def recording_product(vector, *, micro_batches, **inputs):
        seen.append(torch.cat(micro_batches).tolist())
        return product(vector, micro_batches=micro_batches, **inputs)

    monkeypatch.setattr(trpo_lm, "fisher_vector_product", recording_product)
    trpo_run(tmp_path, "--total-episodes", 96, "--cg-iters", 2, "--fvp-fraction", 0.375, "--micro-batch-tokens", 60)
    rows = {tuple(sorted(inds)) for inds in seen}
    assert all(len(inds) == len(set(inds)) == 12 and set(inds) <= set(range(32)) for inds in seen)
    assert len(rows) == 3, "one choice for all products of an iteration"


@pytest.mark.parametrize("fraction, rows", [(0.6, 19), (0.05, 2), (0.01, 1), (1.0, 32)])
def test_as_many_rows_are_in_the_products_as_the_fraction_says(fraction, rows, tmp_path, monkeypatch):
    seen, product = set(), trpo_lm.fisher_vector_product

    def recording_product(vector, policy, batch, micro_batches, args, out=None):
        seen.add(sum(map(len, micro_batches)))
        return product(vector, policy, batch, micro_batches, args, out)

    monkeypatch.setattr(trpo_lm, "fisher_vector_product", recording_product)
    trpo_run(tmp_path, "--total-episodes", 32, "--fvp-fraction", fraction)  # of batches of 32
    assert seen == {rows}


def test_inner_products_of_long_vectors_are_right():
    a, b = torch.randn(2, 3_000_001, generator=torch.Generator().manual_seed(0))
    exact = (a.double() @ b.double()).item()
    assert abs(trpo_lm.dot(a, b) - exact) < 1e-8 * (a.norm() * b.norm()).item()
    ones = torch.full((2**25 + 1,), 1.0)  # a sum in float32 alone would stop at 2^24
    assert trpo_lm.dot(ones, ones) == 2**25 + 1


def test_one_iteration_of_conjugate_gradient_by_hand():
    """x = a g with a = g'g / g'(F + d I)g, and d = c g'Fg / g'g."""
    fisher, g = torch.diag(torch.tensor([1.0, 2.0, 5.0])).double(), torch.tensor([1.0, 2.0, 2.0]).double()
    x, damping, residual, iterations = trpo_lm.conjugate_gradient(lambda v: fisher @ v, g, 1, 0.1, 0.0)
    assert iterations == 1 and damping == pytest.approx(0.1 * 29 / 9)  # g'Fg = 1 + 8 + 20
    length = 9 / (29 + 0.1 * 29)
    torch.testing.assert_close(x, length * g)
    left = g - length * (fisher @ g + damping * g)
    assert residual == pytest.approx((left.norm() / g.norm()).item())
