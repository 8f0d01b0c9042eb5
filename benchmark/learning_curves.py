"""Learning curves: train each script with several seeds, print a table, and draw docs/learning_curves.png.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/learning_curves.py > docs/learning_curves.md    # task `sort`, nine runs: ten minutes on two cores
    python benchmark/learning_curves.py --kl --eval-every 0 --flags="--total-episodes 51200"         # KL of each update

Both x-axes count training alone: episodes, and the sum of `time/iteration_seconds`, without start and evaluation. The
scripts log different KLs. With --kl all are measured alike: exact, from the old policy to the new one, mean over the
tokens of the batch that the update learned from.
"""

import functools
import itertools
import json
import os
import shlex
import subprocess
import time
from dataclasses import dataclass

import numpy as np
import throughput
import torch
import tyro
from matplotlib.figure import Figure

COLORS = {"reinforce_lm": "#0072B2", "ppo_lm": "#D55E00", "trpo_lm": "#009E73"}  # distinct for color-blind readers
ABOUT = """
Greedy responses to held-out prompts after the last update. KL to the reference: nats per response, last tenth of the
batches. To 90%: until the first evaluation with so many exact matches. How it was measured:
"""


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(COLORS)  # scripts to train
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds to train each script with
    flags: str = ""  # more flags for every script, as in --flags="--total-episodes 5120"
    eval_every: int = 10  # iterations between evaluations, the resolution of the curves
    kl: bool = False  # measure the exact KL of each update but the last, which takes time, and draw nothing


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


def train(script, seeds, args, group):
    """Run a script with the next seed and append its curves to `group`: {column: figure}."""
    flags, start = f"--eval-every {args.eval_every} {args.flags}".strip(), time.time()
    module = "learning_curves" if args.kl else "throughput"
    run = throughput.run_script(f"{script}.py", *shlex.split(flags), module=module, seed=next(seeds)).metrics
    metrics = {name: np.array([*values.items()]).T for name, values in run.items()}  # (2, steps) each
    iterations, seconds = metrics["time/iteration_seconds"]  # (I,), (I,)
    episodes, exact = metrics["eval/exact"]  # (E,), (E,)
    elapsed = np.concatenate([[0.0], seconds.cumsum()])[np.searchsorted(iterations, episodes, side="right")]  # (E,)
    group.append({"episodes": episodes, "elapsed": elapsed, "exact": exact})
    figures = {"exact match, %": 100 * exact[-1], "score": metrics["eval/score"][1, -1]}
    if args.kl:
        kl = metrics["kl"][1]  # (I - 1,)
        return {"median KL": np.median(kl), "99% below": np.quantile(kl, 0.99), "largest": kl.max()} | figures
    figures |= {"KL": metrics["objective/kl_ref"][1, -max(1, len(seconds) // 10) :].mean()}
    figures |= {"episodes to 90%": min(episodes[exact >= 0.9], default=np.inf)}
    figures |= {"seconds to 90%": min(elapsed[exact >= 0.9], default=np.inf)}
    return figures | {"tokens/s": np.median(metrics["time/tokens_per_second"][1]), "command, s": time.time() - start}


def draw(runs, path):
    """Mean (line) and range (shade) of the runs {script: S runs}, against episodes and against seconds."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, unit, label in zip(axes, ("episodes", "elapsed"), ("episodes (responses)", "seconds of training")):
        for script, group in runs.items():
            x = np.mean([run[unit] for run in group], axis=0)  # (E,), an evaluation stands at the mean of its S times
            y = np.stack([run["exact"] for run in group])  # (S, E)
            axis.plot(x, y.mean(0), color=COLORS[script], linewidth=1.5, label=f"{script}.py")
            axis.fill_between(x, y.min(0), y.max(0), color=COLORS[script], alpha=0.2, linewidth=0)
        axis.set(xlabel=label, xlim=(0, None))
    axes[0].set_ylabel("exact match on held-out prompts")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(args):
    os.chdir(throughput.ROOT)
    runs = {script: [] for script in args.scripts}
    calls = {f"`{s}.py`": functools.partial(train, s, itertools.cycle(args.seeds), args, runs[s]) for s in runs}
    throughput.compare(f"Seeds {args.seeds}:", calls, len(args.seeds))
    commit = subprocess.getoutput("git describe --always --dirty")[-30:]
    print(ABOUT, f"{args}, commit {commit}, {os.cpu_count()} CPU cores, {time.strftime('%F')}", sep="\n")
    if not args.kl:
        draw(runs, "docs/learning_curves.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
