"""All three scripts against the best policy there is, known in closed form."""

import ppo_lm
import reinforce_lm
import trpo_lm
from reinforce_lm import Args, policy_logprobs

import pytest
import torch
from helpers import character_tokenizer, load_policy, reward_file, run_main, tiny_model
from test_reinforce import MASK, RESPONSES, SCORES


@pytest.mark.parametrize(
    "script, flags",
    [
        (reinforce_lm, ["--total-episodes", 64 * 120, "--learning-rate", 0.02]),
        (ppo_lm, ["--total-episodes", 64 * 75, "--learning-rate", 0.01, "--num-minibatches", 1]),
        (trpo_lm, ["--total-episodes", 64 * 35, "--max-kl", 0.1, "--cg-iters", 5, "--num-minibatches", 1]),
    ],
    ids=["reinforce_lm", "ppo_lm", "trpo_lm"],
)
def test_training_reaches_the_closed_form_optimum(script, flags, tmp_path):
    """The best policy for E[R] - beta KL is pi_ref exp(R / beta) / Z, and its value is beta log Z."""
    model = tiny_model(vocab_size=3, seed=2)
    for parameter in model.parameters():  # loud weights are hard to move
        parameter.data.mul_(0.5 if parameter.ndim > 1 else 1.0)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    character_tokenizer("ab").save_pretrained(folder)
    (tmp_path / "data.jsonl").write_text('{"prompt": "ba"}\n{"prompt": "bb"}\n')
    table = dict(zip(["", "a", "aa", "ab", "b", "ba", "bb"], SCORES.tolist()))
    reward = reward_file(tmp_path, f"T = {table}\ndef fn(prompts, texts, **_):\n    return [T[r] for r in texts]\n")
    run = ["--model", folder, "--dataset", tmp_path / "data.jsonl", "--eval-dataset", tmp_path / "data.jsonl"]
    run += ["--reward", reward, "--eval-every", 0, "--output-dir", tmp_path / "runs"]
    run += ["--kl-ref-coef", 0.5, "--response-length", 2, "--batch-size", 64, "--save-every", 0, "--device", "cpu"]
    run_main(script, *run, *flags)
    (run_dir,) = (tmp_path / "runs").iterdir()
    trained = load_policy(str(run_dir / "model"), None, 4, seed=1)
    args, beta = Args(dtype="float32", response_length=2), 0.5
    for prompt in ([2, 1], [2, 2]):
        sequences = torch.cat([torch.tensor([prompt]).expand(7, 2), RESPONSES], 1)
        attention_mask = torch.cat([torch.ones(7, 2, dtype=torch.bool), MASK], 1)
        log_p, log_ref = [
            policy_logprobs(m, sequences, attention_mask, MASK, args)[0].detach().where(MASK, 0.0).sum(1).double()
            for m in (trained, model)
        ]

        def value(log_p, log_ref=log_ref):
            return (log_p.exp() * (SCORES - beta * (log_p - log_ref))).sum().item()

        best = (beta * (log_ref + SCORES / beta).logsumexp(0)).item()
        assert value((log_ref + SCORES / beta).log_softmax(0)) == pytest.approx(best)
        assert value(log_ref) < best - 0.3
        assert best - 0.02 < value(log_p) <= best + 1e-6
