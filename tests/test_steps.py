"""What main does with a batch, against the equations in the docstring of each script, response by response.

The rollout is replaced: the test chooses the responses, their lengths and how they end, and which of their tokens were
sampled: the others are holes, such as the output of a tool. Log-probabilities, returns, advantages and losses are then
computed again, one response at a time and without padding, as sums over the sampled tokens in plain Python.
"""

import importlib
from dataclasses import dataclass

import common
import ppo_lm
import trpo_lm

import pytest
import torch
from helpers import flat_gradient, recorded_gradients, run_main, tiny_model
from test_runs import scalars
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

B, K, LENGTH = 16, 4, 5
BETA, GAMMA, LAMBDA, T = 0.3, 0.9, 0.8, 0.7


PROMPTS = {(0, 1): "01", (2, 0, 4): "204", (1,): "1", (6, 10, 9, 0): "6<end>90"}  # two differ in a 0 in front
REWARD = "def fn(prompts, texts, **_):\n    pairs = zip(prompts, texts)\n"
REWARD += "    return [len(p) + sum(map(int, r)) % 7 / 3 for p, r in pairs]\n"


def score(prompt, response):
    """The reward file of the test, for ids."""
    return len(PROMPTS[tuple(prompt)]) + sum(3 if token == 8 else token for token in response if token < 10) % 7 / 3


def checkpoint(folder):
    """Ids 0 to 9 are digits, 10 and 9 end a response: id 0, which pads, is an ordinary token, and prompts hold ends.

    Id 8 is the text 12, whose ids are 1 and 2: responses do not survive decoding and encoding.
    """
    vocabulary = {"12" if i == 8 else str(i): i for i in range(10)} | {"<end>": 10}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    model = tiny_model(vocab_size=11)
    for parameter in model.parameters():  # loud weights are hard to move
        parameter.data.mul_(0.4 if parameter.ndim > 1 else 1.0)
    model.config.eos_token_id, model.generation_config.eos_token_id = 10, [10, 9]
    model.save_pretrained(folder)


@dataclass
class Response:
    prompt: list[int]
    tokens: list[int]  # up to the end
    ended: bool
    sampled: list[bool]  # of each token

    def actions(self):
        return torch.tensor(self.tokens)[self.sampled]


class Recorded:
    """Iterations of a script's main, on responses that are chosen here.

    steps: (network, rows of its batch, parameters before the step, gradient, learning rate), in order.
    batches: a list of responses for each iteration.
    """

    def __init__(self, name, tmp_path, monkeypatch, *flags, iterations=1, holes=False):
        self.module, self.batches, self.steps, forwards = importlib.import_module(name), [], [], []
        self.value_losses = []
        self.truncation = "bootstrap" if "bootstrap" in flags else "terminal"
        (tmp_path / "mine.py").write_text(REWARD)
        (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in PROMPTS.values()))
        checkpoint(tmp_path / "checkpoint")
        generator, sample = torch.Generator().manual_seed(0), common.sample

        def rollout(model, prompts, prompt_mask, end_ids, args, samples_per_prompt, _, greedy):
            if greedy:  # the last token of the prompt and the end
                responses = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
                responses[:, 0], responses[:, 1] = prompts[:, -1], 10
                mask = common.mask_through_first_end(responses, end_ids)
                return responses, mask, torch.zeros(mask.shape)
            assert samples_per_prompt == K and args.temperature == T and len(prompts) == B / K
            assert sorted(end_ids) == [9, 10]
            forwards.clear()
            if not self.batches:  # away from the reference, which is a copy of what it was
                self.reference = vector(model)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
                self.policy = model
            rows, responses = [], torch.zeros(B, LENGTH, dtype=torch.long)
            mask, logprobs = torch.zeros(B, LENGTH, dtype=torch.bool), torch.zeros(B, LENGTH)
            for i in range(B):
                prompt = prompts[i // K][prompt_mask[i // K]].tolist()
                length = min(1 + i % 8, LENGTH)
                response = torch.randint(9, (length,), generator=generator).tolist()
                if i % 8 < LENGTH:  # the others are cut
                    response[-1] = 9 + i % 2
                ended = response[-1] > 8
                # At the start, in between, and at the end of those that are cut.
                sampled = [not holes or (t + i) % 3 != 1 or (ended and t + 1 == length) for t in range(length)]
                rows.append(Response(prompt, response, ended, sampled))
                responses[i, :length], mask[i, :length] = torch.tensor(response), True
                logprobs[i, :length][sampled] = self.logprobs(rows[i], model).detach()
            self.batches.append(rows)
            self.has_stepped = False
            return responses, mask, logprobs

        def sample_with_holes(*args, greedy=False, **settings):
            sequences, attention_mask, response_mask, *rest = sample(*args, greedy=greedy, **settings)
            if not greedy:
                for mask, row in zip(response_mask, self.batches[-1], strict=True):
                    mask[: len(row.sampled)] = torch.tensor(row.sampled)
            return sequences, attention_mask, response_mask, *rest

        def record(optimizer):
            (group,), self.has_stepped = optimizer.param_groups, True
            kind = "policy" if group["params"][0] is next(self.policy.parameters()) else "critic"
            parameters = torch.cat([p.detach().flatten() for p in group["params"]])
            self.steps.append((kind, list(forwards), parameters, flat_gradient(optimizer), group["lr"]))
            if kind == "policy" or name == "trpo_lm":
                forwards.clear()

        if name != "reinforce_lm":
            init, forward = self.module.Critic.__init__, self.module.Critic.forward

            def loud_head(critic, policy):  # a head of zeros would hide most mistakes
                init(critic, policy)
                torch.nn.init.normal_(critic.head.weight, std=0.3, generator=generator)

            def recording_forward(critic, sequences, attention_mask, args):
                if torch.is_grad_enabled():
                    known = [row.prompt + row.tokens for row in self.batches[-1]]
                    for ids, real in zip(sequences, attention_mask):
                        (row,) = [i for i, text in enumerate(known) if text == ids[real].tolist()]
                        forwards.append(row)
                return forward(critic, sequences, attention_mask, args)

            monkeypatch.setattr(self.module.Critic, "__init__", loud_head)
            monkeypatch.setattr(self.module.Critic, "forward", recording_forward)
        if name == "trpo_lm":
            gradient_of = trpo_lm.surrogate_gradient

            def recording_gradient(policy, *rest):
                result = gradient_of(policy, *rest)
                self.steps.append(("policy", list(range(B)), vector(policy), -result[0].double(), None))
                return result

            monkeypatch.setattr(trpo_lm, "surrogate_gradient", recording_gradient)
        add_sums = common.add_sums

        def checking_sums(sums, mask, values):
            if "ratio" in values and not self.has_stepped:
                assert (values["ratio"][mask] == 1).all(), "log pi_old has to come from the same micro-batches"
            add_sums(sums, mask, values)

        monkeypatch.setattr(common, "add_sums", checking_sums)
        monkeypatch.setattr(common, "rollout", rollout)
        monkeypatch.setattr(common, "sample", sample_with_holes)
        monkeypatch.setattr(common, "try_model", lambda *_: None)
        monkeypatch.setattr(common, "save_model", lambda *_: None)
        data = tmp_path / "data.jsonl"
        run = ["--model", tmp_path / "checkpoint", "--dataset", data, "--eval-dataset", data, "--eval-every", 0]
        run += ["--reward", f"{tmp_path}/mine.py:fn", "--batch-size", B, "--samples-per-prompt", K, "--device", "cpu"]
        run += ["--total-episodes", B * iterations, "--response-length", LENGTH, "--temperature", T]
        run += ["--kl-ref-coef", BETA, "--gamma", GAMMA, "--max-grad-norm", 1e9, "--save-every", 0]
        with recorded_gradients(torch.optim.Adam, record):
            run_main(self.module, *run, "--output-dir", tmp_path / "runs", *flags)
        (run_dir,) = (tmp_path / "runs").iterdir()
        self.logged = {tag: [value for _, value in values] for tag, values in scalars(run_dir).items()}
        assert name != "ppo_lm" or self.logged["policy/ratio_first_minibatch"] == [1.0] * iterations
        self.after = vector(self.policy)
        monkeypatch.undo()

    def logits(self, row, policy, parameters=None):
        """Of the n sampled tokens of one response without any padding: (n, V), at the temperature."""
        if parameters is not None:
            torch.nn.utils.vector_to_parameters(parameters, policy.parameters())
        text = torch.tensor([row.prompt + row.tokens])
        return policy(text, attention_mask=torch.ones_like(text)).logits[0, len(row.prompt) - 1 : -1][row.sampled] / T

    def values(self, row, critic):
        """Of the states before each sampled token and of the one after the last token: (n + 1,)."""
        text = torch.tensor([row.prompt + row.tokens])
        hidden = critic.backbone(text, attention_mask=torch.ones_like(text)).last_hidden_state[0, len(row.prompt) - 1 :]
        return critic.head(hidden[[*row.sampled, True]])[:, 0]

    def logprobs(self, row, policy, parameters=None):
        logits = self.logits(row, policy, parameters)
        return logits.log_softmax(-1).gather(1, row.actions()[:, None])[:, 0]

    def check_kl(self, i, parameters):
        """That of batch i from the policy of that batch to the reference, in the log."""
        with torch.no_grad():
            log_p, log_ref = [
                torch.cat([self.logprobs(row, self.policy, p) for row in self.batches[i]])
                for p in (parameters, self.reference)
            ]
        assert self.logged["objective/kl_ref"][i] == pytest.approx((log_p - log_ref).sum().item() / B, rel=1e-3)

    def rewards(self, row, parameters):
        """(1), with the policy of the batch."""
        with torch.no_grad():
            log_p, log_ref = [self.logprobs(row, self.policy, p) for p in (parameters, self.reference)]
        rewards = (-BETA * (log_p - log_ref)).tolist()
        rewards[-1] += score(row.prompt, row.tokens)
        return rewards

    def advantages(self, iteration, parameters, critic):
        """(3) to (5) as double sums, and the advantages whitened: per row, lists."""
        advantages, returns, old_values = [], [], []
        for row in self.batches[iteration]:
            rewards, values = self.rewards(row, parameters), self.values(row, critic).tolist()
            if row.ended or self.truncation == "terminal":
                values[-1] = 0.0
            deltas = [r + GAMMA * after - v for r, v, after in zip(rewards, values, values[1:])]
            length = len(rewards)
            a = [sum((GAMMA * LAMBDA) ** (n - t) * deltas[n] for n in range(t, length)) for t in range(length)]
            advantages.append(a)
            returns.append([x + v for x, v in zip(a, values)])
            old_values.append(values[:-1])
        everything = torch.tensor([x for a in advantages for x in a])
        white = [(torch.tensor(a) - everything.mean()) / everything.std(correction=0) for a in advantages]
        return white, [torch.tensor(r) for r in returns], [torch.tensor(v) for v in old_values]


def vector(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def assert_gradient(loss, module, found, tolerance=1e-3):
    parts = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    expected = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(module.parameters(), parts)]
    )
    assert expected.norm() > 1e-3 and (found - expected).norm() < tolerance * expected.norm()


BASELINES = [("none", False, False), ("mean", False, True), ("ema", False, False), ("greedy", True, False)]
BASELINES += [("leave_one_out", False, False), ("leave_one_out", True, True)]


@pytest.mark.parametrize("baseline, normalize, holes", BASELINES)
def test_reinforce_takes_the_steps_of_its_equations(baseline, normalize, holes, tmp_path, monkeypatch):
    flags = ["--baseline", baseline, "--micro-batch-tokens", 40, *(["--normalize-advantages"] if normalize else [])]
    run = Recorded("reinforce_lm", tmp_path, monkeypatch, *flags, iterations=3, holes=holes)
    assert len(run.steps) == 3
    ema = 0.0
    for i, (_, _, parameters, gradient, _) in enumerate(run.steps):
        rewards = [run.rewards(row, parameters) for row in run.batches[i]]
        whole = torch.tensor([sum(GAMMA**t * r for t, r in enumerate(row)) for row in rewards])  # G_1
        b = dict(none=torch.zeros(B), mean=whole.mean().expand(B), ema=torch.full((B,), ema))
        b["leave_one_out"] = torch.stack(
            [whole[[m for m in range(B) if m // K == n // K and m != n]].mean() for n in range(B)]
        )
        b["greedy"] = torch.tensor([score(row.prompt, row.prompt[-1:]) for row in run.batches[i]])
        advantages = [
            torch.tensor([sum(GAMMA**n * row[n] for n in range(t, len(row))) for t in range(len(row))]) - b[baseline][n]
            for n, row in enumerate(rewards)
        ]
        if normalize:
            advantages = [a / torch.cat(advantages).std(correction=0) for a in advantages]
        logprobs = [run.logprobs(row, run.policy, parameters) for row in run.batches[i]]
        loss = -sum((a * lp).sum() for a, lp in zip(advantages, logprobs)) / B
        assert_gradient(loss, run.policy, gradient)
        assert run.logged["loss/policy"][i] == pytest.approx(loss.item(), rel=1e-3)
        assert run.logged["objective/baseline"][i] == pytest.approx(b[baseline].mean().item(), rel=1e-3, abs=1e-6)
        logits = [run.logits(row, run.policy, parameters) for row in run.batches[i]]
        entropy = torch.distributions.Categorical(logits=torch.cat(logits)).entropy().mean().item()
        assert run.logged["policy/entropy"][i] == pytest.approx(entropy, rel=1e-3)
        assert run.logged["objective/ended"][i] == pytest.approx(sum(row.ended for row in run.batches[i]) / B)
        run.check_kl(i, parameters)
        ema = whole.mean().item() if i == 0 else 0.9 * ema + 0.1 * whole.mean().item()
    assert [rate for *_, rate in run.steps] == pytest.approx([2e-3, 2e-3 * 2 / 3, 2e-3 / 3])


def check_critic(run, rows, parameters, gradient, critic, returns, old_values, clip, iteration=0):
    torch.nn.utils.vector_to_parameters(parameters, critic.parameters())
    total, count, clipped = 0.0, 0, 0
    for i in rows:
        values = run.values(run.batches[iteration][i], critic)[:-1]
        near = old_values[i] + (values - old_values[i]).clamp(-clip, clip)
        errors = torch.stack([(values - returns[i]) ** 2, (near - returns[i]) ** 2])
        total, count = total + 0.5 * errors.amax(0).sum(), count + len(values)
        clipped += (errors[1] > errors[0]).sum().item()
    assert_gradient(total / count, critic, gradient)
    run.value_losses.append((total / count).item())
    return clipped


CASES = [
    ("clip", "terminal", 1, 0.04, False),
    ("clip", "bootstrap", 1, 0.04, True),
    ("clip", "terminal", 2, 0, False),  # the same range on both sides, and a second epoch with the ratios of the first
    ("kl_penalty", "terminal", 2, 0, True),
]


@pytest.mark.parametrize("surrogate, truncation, epochs, high, holes", CASES)
def test_ppo_takes_the_steps_of_its_equations(surrogate, truncation, epochs, high, holes, tmp_path, monkeypatch):
    """Two minibatches: at the second, ratios have left 1 and values V_old, and clips are active on both sides."""
    flags = ["--surrogate", surrogate, "--truncation", truncation, "--num-minibatches", 2, "--update-epochs", epochs]
    flags += ["--clip-coef", 0.02, "--clip-coef-high", high, "--value-clip", 0.05, "--ent-coef", 0.1]
    flags += ["--micro-batch-tokens", 20] if surrogate == "kl_penalty" else []
    high = 1 + (high or 0.02)
    flags += ["--gae-lambda", LAMBDA, "--learning-rate", 2e-3, "--critic-learning-rate", 2e-3, "--penalty-coef", 3]
    run = Recorded("ppo_lm", tmp_path, monkeypatch, *flags, holes=holes)
    assert [kind for kind, *_ in run.steps] == ["critic", "policy"] * 2 * epochs
    assert sorted(run.steps[0][1] + run.steps[2][1]) == list(range(B))
    critic = ppo_lm.Critic(run.policy)
    torch.nn.utils.vector_to_parameters(run.steps[0][2], critic.parameters())
    old = run.steps[1][2]
    with torch.no_grad():
        advantages, returns, old_values = run.advantages(0, old, critic)
        old_logits = [run.logits(row, run.policy, old) for row in run.batches[0]]
    tokens = [row.actions() for row in run.batches[0]]
    categorical = torch.distributions.Categorical

    def ratios(i, parameters):
        logits = run.logits(run.batches[0][i], run.policy, parameters)
        new, before = categorical(logits=logits), categorical(logits=old_logits[i])
        return (new.log_prob(tokens[i]) - before.log_prob(tokens[i])).exp(), new, before

    clipped_values, sides, entropies, losses = [], set(), [], []
    for (_, rows, parameters, gradient, _), (_, _, theta, policy_gradient, _) in zip(run.steps[::2], run.steps[1::2]):
        clipped_values.append(check_critic(run, rows, parameters, gradient, critic, returns, old_values, 0.05))
        total, entropy = 0.0, []
        for i in rows:
            ratio, new, before = ratios(i, theta)
            if surrogate == "clip":
                for r, a in zip(ratio, advantages[i]):
                    limit = high if a > 0 else 0.98
                    is_clipped = r > limit if a > 0 else r < limit
                    sides |= {(bool(a > 0))} if is_clipped else set()
                    total = total + (limit * a if is_clipped else r * a)
            else:
                total = total + (ratio * advantages[i] - 3 * (ratio - 1 - ratio.log())).sum()
            entropy.append(new.entropy())
        entropy = torch.cat(entropy)
        assert_gradient(-(total + 0.1 * entropy.sum()) / len(entropy), run.policy, policy_gradient)
        losses.append(-total.item() / len(entropy))
        entropies.append(entropy.mean().item())
    assert clipped_values[0] == 0 < clipped_values[1] and (surrogate != "clip" or sides == {True, False})
    assert run.logged["policy/entropy"] == pytest.approx([sum(entropies) / len(entropies)], rel=1e-3)
    assert run.logged["loss/policy"] == pytest.approx([sum(losses) / len(losses)], rel=1e-2, abs=1e-4)
    norms = [gradient.norm().item() for _, _, _, gradient, _ in run.steps[1::2]]
    assert run.logged["policy/grad_norm"] == pytest.approx([sum(norms) / len(norms)], rel=1e-3)
    r, v = torch.cat(returns), torch.cat(old_values)
    assert run.logged["value/explained_variance"] == pytest.approx([1 - ((r - v).var() / r.var()).item()], rel=1e-3)
    run.check_kl(0, old)
    assert run.logged["value/mean"] == pytest.approx([v.mean().item()], rel=1e-3)
    with torch.no_grad():
        final = torch.cat([ratios(i, run.after)[0] for i in range(B)])
    assert run.logged["policy/approx_kl"] == pytest.approx([(final - 1 - final.log()).mean().item()], rel=0.01)
    if surrogate == "clip":
        a = torch.cat(advantages)
        assert run.logged["policy/clipfrac"] == pytest.approx(
            [((a > 0) & (final > high) | (a <= 0) & (final < 0.98)).float().mean().item()]
        )
    assert run.logged["loss/value"] == pytest.approx([sum(run.value_losses) / len(run.value_losses)], rel=1e-2)


@pytest.mark.parametrize("target", [0.0005, 0.002, 0.004, 0.008])
def test_early_stops_look_at_whole_minibatches(target, tmp_path, monkeypatch):
    """Micro-batches of one response change no decision. Some runs stop with minibatches left."""
    steps = []
    for size in (4096, 1):
        flags = ["--num-minibatches", 4, "--update-epochs", 3, "--target-kl", target, "--micro-batch-tokens", size]
        (tmp_path / str(size)).mkdir()
        run = Recorded("ppo_lm", tmp_path / str(size), monkeypatch, *flags)
        steps.append(len(run.steps) / 2)
        assert run.logged["policy/update_epochs_done"] == [steps[-1] / 4]
    assert steps[0] == steps[1] < 12


def test_an_early_stop_leaves_no_gradient_to_the_next_batch(tmp_path, monkeypatch):
    """One step, then a minibatch that is not stepped with, then a new batch: its first step is its own."""
    flags = ["--num-minibatches", 2, "--update-epochs", 1, "--target-kl", 1e-9, "--gae-lambda", LAMBDA]
    run = Recorded("ppo_lm", tmp_path, monkeypatch, *flags, iterations=2)
    assert len(run.steps) == 4 and run.logged["policy/update_epochs_done"] == [0.5, 0.5]
    (_, rows, parameters, gradient, _), (_, _, theta, policy_gradient, _) = run.steps[2:]
    critic = ppo_lm.Critic(run.policy)
    torch.nn.utils.vector_to_parameters(parameters, critic.parameters())
    advantages, returns, old_values = run.advantages(1, theta, critic)
    check_critic(run, rows, parameters, gradient, critic, returns, old_values, 0.2, iteration=1)
    logprobs = torch.cat([run.logprobs(run.batches[1][i], run.policy, theta) for i in rows])
    assert_gradient(-(torch.cat([advantages[i] for i in rows]) * logprobs).mean(), run.policy, policy_gradient)


@pytest.mark.parametrize("truncation, holes", [("terminal", False), ("bootstrap", True)])
def test_trpo_takes_the_steps_of_its_equations(truncation, holes, tmp_path, monkeypatch):
    flags = ["--truncation", truncation, "--num-minibatches", 2, "--update-epochs", 1, "--value-clip", 0.05]
    flags += ["--gae-lambda", LAMBDA, "--critic-learning-rate", 2e-3, "--micro-batch-tokens", 40]
    run = Recorded("trpo_lm", tmp_path, monkeypatch, *flags, holes=holes)
    assert [kind for kind, *_ in run.steps] == ["policy", "critic", "critic"]
    assert sorted(run.steps[1][1] + run.steps[2][1]) == list(range(B))
    critic = trpo_lm.Critic(run.policy)
    torch.nn.utils.vector_to_parameters(run.steps[1][2], critic.parameters())
    old = run.steps[0][2]
    advantages, returns, old_values = run.advantages(0, old, critic)
    logits = [run.logits(row, run.policy, old) for row in run.batches[0]]
    before = torch.distributions.Categorical(logits=torch.cat(logits))
    tokens = torch.cat([row.actions() for row in run.batches[0]])
    assert_gradient(-(torch.cat(advantages) * before.log_prob(tokens)).mean(), run.policy, run.steps[0][3])
    assert run.logged["policy/entropy"] == pytest.approx([before.entropy().mean().item()], rel=1e-3)
    run.check_kl(0, old)
    clipped = [check_critic(run, rows, p, g, critic, returns, old_values, 0.05) for _, rows, p, g, _ in run.steps[1:]]
    assert clipped[0] == 0 < clipped[1]
    assert run.logged["loss/value"] == pytest.approx([sum(run.value_losses) / 2], rel=1e-3)
    step = run.after - old  # of a step that was not shortened
    assert run.logged["trpo/step_fraction"] == [1.0]
    predicted = -(run.steps[0][3] @ step.double()).item()
    assert run.logged["trpo/surrogate_gain_predicted"] == pytest.approx([predicted], rel=1e-2)


@pytest.mark.parametrize("script", ["ppo_lm", "trpo_lm"])
def test_each_epoch_visits_each_response_once_in_another_order(script, tmp_path, monkeypatch):
    flags = ["--num-minibatches", 4, "--update-epochs", 3, "--micro-batch-tokens", 20]
    run = Recorded(script, tmp_path, monkeypatch, *flags)
    rows = [rows for kind, rows, *_ in run.steps if kind == "critic"]
    epochs = [sum(rows[i : i + 4], []) for i in (0, 4, 8)]
    assert len(rows) == 12 and all(sorted(epoch) == list(range(B)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
