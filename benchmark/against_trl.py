"""reinforce_lm.py and TRL's RLOOTrainer and GRPOTrainer with a pretrained model, the same prompts and the same reward.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/against_trl.py --model DIR --dataset FILE --eval-dataset FILE --reward FILE.py:function

Each of the three is tried with every learning rate and the first seed, then its best one with the other seeds. Greedy
responses to the same held-out prompts are scored, while the clock stands still; the learning rate is chosen by the last
of these scores. A row is printed as soon as its run ends. Everything runs on the CPU, one run at a time, with float32
weights under bfloat16 autocast; `reinforce_lm.py` samples, and all are evaluated, with weights rounded to bfloat16.
"""

import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import throughput
import torch
import tyro
from transformers.utils import logging as transformers_logging


@dataclass
class Args:
    model: str
    """folder of a causal language model"""
    dataset: str
    """training prompts, FILE.jsonl"""
    eval_dataset: str
    """held-out prompts, FILE.jsonl"""
    reward: str
    """FILE.py:function(prompts, responses, **columns)"""
    contestants: tuple[str, ...] = ("reinforce_lm.py", "RLOO", "GRPO")
    """what to train, in this order"""
    learning_rates: tuple[float, ...] = (2e-5, 5e-5)
    """each contestant is tried with all of them and the first seed, and goes on with the best"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds"""
    updates: int = 20
    """updates of a run; the learning rate falls to 0 over them"""
    eval_every: int = 10
    """updates between evaluations"""
    eval_size: int = 128
    """held-out prompts"""
    batch_size: int = 32
    """responses per update, 4 to each prompt"""
    micro_batch_size: int = 16
    """responses per forward and backward pass"""
    response_length: int = 24
    """longest response, in tokens"""
    kl_coef: float = 0.05
    """weight of the KL penalty to the reference"""


def train(name, learning_rate, seed, args, scratch):
    """Seconds of each update, and {updates: score of greedy responses to the held-out prompts}."""
    if name.endswith(".py"):
        flags = {flag: getattr(args, flag) for flag in ("model", "dataset", "eval_dataset", "reward", "eval_every")}
        flags |= {flag: getattr(args, flag) for flag in ("eval_size", "micro_batch_size", "response_length", "kl_coef")}
        flags |= dict(learning_rate=learning_rate, seed=seed)
        run = throughput.run_script(name, scratch, args.batch_size, args.updates, **flags)
        return run.seconds, run.score
    rows, eval_rows = [common.load_rows(getattr(args, name), common.flag(name)) for name in ("dataset", "eval_dataset")]
    flags = SimpleNamespace(reward=args.reward, reward_clip=0.0)
    reward = common.load_reward(flags, "cpu", rows)
    scored = args.model, eval_rows[: args.eval_size], reward, args.response_length
    clock = throughput.Clock(throughput.greedy_scorer(*scored, dtype=torch.bfloat16), args.eval_every)
    accumulated = args.batch_size // args.micro_batch_size
    settings = dict(per_device_train_batch_size=args.micro_batch_size, gradient_accumulation_steps=accumulated)
    settings |= dict(steps_per_generation=accumulated, max_completion_length=args.response_length, beta=args.kl_coef)
    settings |= dict(bf16=True, output_dir=f"{scratch}/trl")
    throughput.train_trl(name, args.model, rows, args.updates, learning_rate, seed, reward, clock, **settings)
    return clock.seconds, clock.scores


def main(args):
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    titles = {name: f"{name}Trainer of TRL {version('trl')}" for name in ("RLOO", "GRPO")}

    def run(name, learning_rate, seed):
        with tempfile.TemporaryDirectory() as scratch:
            seconds, scores = train(name, learning_rate, seed, args, scratch)
        points = ", ".join(f"{count * args.batch_size}: {score:.3f}" for count, score in sorted(scores.items()))
        figures = learning_rate, seed, points, f"{sum(seconds):.0f}", f"{median(seconds):.1f}"
        print(f"| {' | '.join(map(str, (titles.get(name, f'`{name}`'), *figures)))} |", flush=True)
        return scores[max(scores)]

    header = "", "learning rate", "seed", "responses: score", "seconds of training", "s per update"
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}", flush=True)
    for name in args.contestants:
        first = {rate: run(name, rate, args.seeds[0]) for rate in args.learning_rates}
        for seed in args.seeds[1:]:
            run(name, max(first, key=first.get), seed)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
