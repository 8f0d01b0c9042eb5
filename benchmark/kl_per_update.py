"""KL per update: how far each update moves the policy, at the defaults and at ten times the learning rate or delta.

    python benchmark/kl_per_update.py                         # task `sort`, 18 runs: a quarter of an hour on two cores

The scripts log different KLs: TRPO the exact one to the old policy, PPO an estimate from the samples, REINFORCE none.
Here all three are measured alike: the exact KL from the old policy to the new one, mean over the tokens of the batch
that the update learned from. Then docs/kl_per_update.png is drawn, medians over nine updates and over seeds.
"""

import functools
import importlib
import itertools
import json
import sys
from dataclasses import dataclass

import numpy as np
import throughput
import torch
import tyro
from learning_curves import COLORS
from matplotlib.figure import Figure

STEP_SIZES = {"reinforce_lm": "learning_rate", "ppo_lm": "learning_rate", "trpo_lm": "max_kl"}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds to train each script with
    factors: tuple[float, ...] = (1, 10)  # of the default learning rate (TRPO: --max-kl)
    total_episodes: int = 51_200  # episodes of each run


def install():
    """In the process of a script: make sampling measure, and print, what the update before it did."""
    import common
    import trpo_lm

    sample, last, updates = common.sample, [], itertools.count(1)

    @torch.no_grad()
    def measuring_sample(policy, tokenizer, end_ids, args, *others, **settings):
        is_batch = len(others) == 2  # rows and samples per prompt: no evaluation and no trial
        if last and is_batch:
            kl = trpo_lm.exact_kl(last[1], common.response_logits(policy, *last[0], args), args.temperature).mean()
            print("record", json.dumps(["kl", kl.item(), next(updates), 0, 0]))
        results = sample(policy, tokenizer, end_ids, args, *others, **settings)
        if is_batch:
            last[:] = results[:3], common.response_logits(policy, *results[:3], args)  # (n, V)
        return results

    common.sample = measuring_sample
    throughput.install()


def main(args):
    sys.path.insert(0, str(throughput.ROOT))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(args.factors), sharey=True))
    print("| | times | median KL | 99 % of updates below | largest | exact match after |", "|" + " --- |" * 6, sep="\n")
    for (axis, factor), (script, name) in itertools.product(zip(axes, args.factors), STEP_SIZES.items()):
        flags = {name: factor * importlib.import_module(script).TINY[name]} | dict(eval_every=0, device="cpu")
        run = functools.partial(throughput.run_script, f"{script}.py", module="kl_per_update", **flags)
        metrics = [run(seed=seed, total_episodes=args.total_episodes).metrics for seed in args.seeds]
        kl = np.array([[*run["kl"].values()] for run in metrics])  # (S, I - 1)
        figures = f"{np.median(kl):.4f} | {np.quantile(kl, 0.99):.3f} | {kl.max():.3f}"
        exact = ", ".join(f"{100 * [*run['eval/exact'].values()][-1]:.1f}" for run in metrics)
        print(f"| `{script}.py` | {factor:g} | {figures} | {exact} % |", flush=True)
        windows = np.lib.stride_tricks.sliding_window_view(kl, min(9, kl.shape[1]), axis=1)
        y, x = np.median(windows, axis=-1), np.arange(windows.shape[1]) + windows.shape[-1] // 2 + 1
        axis.plot(x, np.median(y, axis=0), color=COLORS[script], linewidth=1.2, label=f"{script}.py")
        axis.fill_between(x, y.min(0), y.max(0), color=COLORS[script], alpha=0.2, linewidth=0)
        axis.set(title=f"{factor:g} times the default", xlabel="update", yscale="log", xlim=(0, None))
    axes[0].set_ylabel("exact KL per update, nats per token")
    axes[0].legend(frameon=False)
    figure.savefig(throughput.ROOT / "docs" / "kl_per_update.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
