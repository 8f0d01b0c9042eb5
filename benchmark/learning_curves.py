"""Learning curves: train each script with several seeds, then draw docs/NAME.png and write the table docs/NAME.md.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/learning_curves.py             # task `sort`, nine runs, offline: ten minutes on two cores
    python benchmark/learning_curves.py --name reviews --metric score --seeds 1 --scripts ppo_lm \\
        --flags="--model DIR --dataset FILE.jsonl --reward FILE.py:function"                     # another task
    python benchmark/learning_curves.py --name reviews --metric score --seeds 1 --reuse          # draws what is there

runs/NAME keeps what runs logged, so that scripts with different flags can be trained one by one and drawn together.
Both x-axes count training alone: episodes, and the sum of `time/iteration_seconds`, without start and evaluation.
"""

import json
import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import one_tree
import torch
import tyro
from matplotlib.figure import Figure

COLORS = {"reinforce_lm": "#0072B2", "ppo_lm": "#D55E00", "trpo_lm": "#009E73"}  # distinct for color-blind readers
HEADER = "script | exact match, % | score | KL | episodes to 90 % | seconds to 90 % | tokens/s | whole command, s"
ABOUT = """Greedy responses to held-out prompts after the last update, one figure for each seed. KL: to the reference,
nats per response, mean of the last tenth of the batches. To 90 %: of training alone, at the first evaluation with so
many exact matches, median over seeds. Tokens/s: response tokens, median over iterations. How it was measured:"""


@dataclass
class Args:
    scripts: tuple[Literal["reinforce_lm", "ppo_lm", "trpo_lm"], ...] = tuple(COLORS)  # scripts to train
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds to train each script with
    flags: str = ""  # more flags for every script, as in --flags="--total-episodes 5120"
    eval_every: int = 10  # iterations between evaluations, the resolution of the curves
    name: str = "learning_curves"  # name of the picture, the table and the runs
    metric: Literal["exact", "score"] = "exact"  # what to draw; only some rewards are about exact matches
    reuse: bool = False  # train nothing


def train(script, seed, args, path):
    """Run a script to its end, and keep what it logged and how it was run."""
    flags, start = f"--eval-every {args.eval_every} {args.flags}".strip(), time.time()
    metrics = one_tree.run_script(f"{script}.py", *shlex.split(flags), seed=seed).metrics
    failed, commit = subprocess.getstatusoutput('git describe --always --exclude "*" --dirty=" + changes"')
    names = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc") else []
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else [*names, "CPU"][0]
    about = "unknown" if failed else commit, machine, f"{os.cpu_count()} cores, torch {torch.__version__}"
    notes = f"- `python {script}.py {flags} --seed N`, commit {', '.join(about)}, {time.strftime('%F')}"
    path.write_text(json.dumps({"metrics": metrics, "notes": notes, "seconds": time.time() - start}))


def read_run(path):
    """What a run logged: `episodes`, `elapsed` seconds, `score` and `exact` at its E evaluations, and more."""
    run = json.loads(path.read_text())
    metrics = {name: np.array([[int(x), y] for x, y in run["metrics"][name].items()]).T for name in run["metrics"]}
    iterations, seconds = metrics["time/iteration_seconds"]  # (I,), (I,)
    episodes, score = metrics["eval/score"]  # (E,), (E,)
    elapsed = np.concatenate([[0.0], seconds.cumsum()])[np.searchsorted(iterations, episodes, side="right")]  # (E,)
    exact = metrics.get("eval/exact", [score * np.nan])[-1]  # (E,)
    kl = metrics.get("objective/kl_ref", np.full((2, 1), np.nan))[1]  # (I,)
    kl, speed = kl[-max(1, len(kl) // 10) :].mean(), metrics["time/tokens_per_second"][1]
    return run | dict(episodes=episodes, elapsed=elapsed, score=score, exact=exact, kl=kl, speed=speed)


def draw(runs, path, metric):
    """Mean (line) and range (shade) of the runs {script: S runs}, against episodes and against seconds."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, unit, label in zip(axes, ("episodes", "elapsed"), ("episodes (responses)", "seconds of training")):
        for script, group in runs.items():
            x = np.mean([run[unit] for run in group], axis=0)  # (E,), an evaluation stands at the mean of its S times
            y = np.stack([run[metric] for run in group])  # (S, E)
            axis.plot(x, y.mean(0), color=COLORS[script], linewidth=1.5, label=f"{script}.py")
            axis.fill_between(x, y.min(0), y.max(0), color=COLORS[script], alpha=0.2, linewidth=0)
        axis.set(xlabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{metric.replace('exact', 'exact match')} on held-out prompts")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def row(script, group):
    """A row of the table, of the S runs of a script."""
    cells = [f"`{script}.py`", ", ".join(f"{100 * run['exact'][-1]:.1f}" for run in group)]
    cells += [", ".join(f"{run['score'][-1]:.3f}" for run in group), ", ".join(f"{run['kl']:.1f}" for run in group)]
    for unit in ("episodes", "elapsed"):
        reached = np.median([min(run[unit][run["exact"] >= 0.9], default=np.inf) for run in group])
        cells.append(f"{reached:,.0f}".replace("inf", "not reached"))
    cells.append(f"{np.median(np.concatenate([run['speed'] for run in group])):,.0f}")
    cells.append(", ".join(f"{run['seconds']:.0f}" for run in group))
    return f"| {' | '.join(cells)} |".replace("nan", "-")


def main(args):
    os.chdir(one_tree.ROOT)
    folder, runs, rows = Path("runs", args.name), {}, [f"| {HEADER} |", "|" + " --- |" * 8]
    folder.mkdir(parents=True, exist_ok=True)
    for script in args.scripts:
        paths = {seed: folder / f"{script}_{seed}.json" for seed in args.seeds}
        for seed, path in paths.items() if not args.reuse else []:
            train(script, seed, args, path)
        runs[script] = [read_run(path) for path in paths.values()]
        rows.append(row(script, runs[script]))
        print(rows[-1], flush=True)
    draw(runs, f"docs/{args.name}.png", args.metric)
    notes = dict.fromkeys(run["notes"] for group in runs.values() for run in group)  # each once
    Path(f"docs/{args.name}.md").write_text("\n".join([*rows, "", ABOUT, "", *notes, ""]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
