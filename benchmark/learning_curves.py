"""Learning curves: train each script with several seeds, then draw docs/NAME.png and write the table docs/NAME.md.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/learning_curves.py             # task `sort`, nine runs, offline: eleven minutes on two cores
    python benchmark/learning_curves.py --reuse     # draw those runs again
    python benchmark/learning_curves.py --name reviews --output-dir runs/reviews --seeds 1 --metric score \\
        --flags="--model DIR --dataset FILE.jsonl --reward FILE.py:function"                         # another task

Scripts that need different flags are trained one by one into the same folder (`--scripts ppo_lm --flags="..."`) and
drawn together with `--reuse`. All paths are relative to the repository. Both x-axes count training alone: episodes, and
the sum of `time/iteration_seconds`, without start and evaluation. Shapes: S seeds, E evaluations of a run, the one
before the first update included, I iterations.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
COLORS = {"reinforce_lm": "#0072B2", "ppo_lm": "#D55E00", "trpo_lm": "#009E73"}  # distinct for color-blind readers
GOAL = 0.9  # share of exact matches; the table says when it is reached


@dataclass
class Args:
    scripts: tuple[Literal["reinforce_lm", "ppo_lm", "trpo_lm"], ...] = tuple(COLORS)
    """scripts to train, one after the other"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds to train each script with"""
    flags: str = ""
    """more flags for every script, in one string and with an equals sign: --flags="--total-episodes 5120" """
    eval_every: int = 10
    """iterations between evaluations, the resolution of the curves"""
    output_dir: str = "runs/learning_curves"
    """folder for the run directories"""
    name: str = "learning_curves"
    """name of the picture and the table in docs/"""
    metric: Literal["exact", "score"] = "exact"
    """what to draw; runs without --reward match or exact log no exact matches, and always show the score"""
    reuse: bool = False
    """train nothing, and draw the newest finished run of each script and seed in --output-dir"""


def git_commit():
    """Short hash of the commit that is checked out, and whether tracked files differ from it."""
    status, output = subprocess.getstatusoutput('git describe --always --exclude "*" --dirty=" + changes"')
    return output if status == 0 else "unknown"  # a copy without its history


def machine(on_gpu):
    """The GPU, or else the CPU, and the number of cores."""
    name, cpu_info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if on_gpu:
        name = torch.cuda.get_device_name()
    elif cpu_info.exists():  # where Linux keeps the name that `platform` does not know
        names = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def train(script, seed, args):
    """Run a script to its end, and note in its run directory what the event files do not hold (benchmark.json)."""
    command = f"python {script}.py --output-dir {shlex.quote(args.output_dir)} --save-every 0"
    command += f" --eval-every {args.eval_every} {args.flags}".rstrip() + " --seed"
    print(command, seed, flush=True)
    facts = {"command": f"{command} N", "commit": git_commit(), "date": time.strftime("%Y-%m-%d")}
    start = time.time()
    argv = [sys.executable, *shlex.split(command)[1:], str(seed)]
    process = subprocess.run(argv, capture_output=True, text=True)
    if process.returncode:
        sys.stderr.write(process.stderr)
        raise common.InputError(f"{command} {seed}: exit code {process.returncode}, for the reason above")
    facts |= {"seconds": time.time() - start, "torch": torch.__version__}
    facts["machine"] = machine(on_gpu=" x cuda" in process.stdout)
    print(process.stdout.splitlines()[-1], flush=True)
    (find_run(script, seed, args.output_dir) / "benchmark.json").write_text(json.dumps(facts, indent=2) + "\n")


def find_run(script, seed, output_dir):
    """The newest finished run directory, SCRIPT__MODEL__DATASET__SEED__TIME-PID, of a script and seed."""
    runs = [path.parent for path in Path(output_dir).glob(f"{script}__*/summary.json")]
    runs = [run for run in runs if run.name.split("__")[-2] == str(seed)]
    common.require(runs, "--output-dir", f"a finished run of {script} with seed {seed} in {output_dir}", None)
    return max(runs, key=lambda run: run.name.split("__")[-1])


def read_run(run_dir):
    """What a run left behind.

    Returns:
        A dictionary of arrays: `episodes` and `seconds` of training at each evaluation, `score` and `exact` there (E,);
        `tokens_per_second` (I,); `kl`, nats per response, mean over the last tenth of the iterations. With
        a reward other than match and exact, `exact` is [None]; without a KL penalty `kl` is None. And `facts`, what
        `train` noted; empty for a run that was started by hand.
    """
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()  # 0 keeps every step
    values = {tag: np.array([event.value for event in events.Scalars(tag)]) for tag in events.Tags()["scalars"]}
    episodes = np.array([event.step for event in events.Scalars("eval/score")])
    iterations = [event.step for event in events.Scalars("time/iteration_seconds")]
    seconds = np.concatenate([[0.0], values["time/iteration_seconds"].cumsum()])  # (I + 1,)
    facts = run_dir / "benchmark.json"
    kl = values.get("objective/kl_ref")  # (I,)
    return {
        "episodes": episodes,
        "seconds": seconds[np.searchsorted(iterations, episodes, side="right")],
        "score": values["eval/score"],
        "exact": values.get("eval/exact", [None]),
        "kl": None if kl is None else kl[-max(1, len(kl) // 10) :].mean(),
        "tokens_per_second": values["time/tokens_per_second"],
        "facts": json.loads(facts.read_text()) if facts.exists() else {},
    }


def draw(runs, path, metric):
    """Mean (line) and range (shade) over seeds, against episodes and against seconds.

    Args:
        runs: script -> S runs. An evaluation stands at the mean of its S times. metric: "exact" or "score".
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, unit in zip(axes, ("episodes", "seconds")):
        for script, group in runs.items():
            x = np.mean([run[unit] for run in group], axis=0)  # (E,)
            y = np.stack([run[metric] for run in group])  # (S, E)
            axis.plot(x, y.mean(0), color=COLORS[script], linewidth=1.5, label=f"{script}.py")
            axis.fill_between(x, y.min(0), y.max(0), color=COLORS[script], alpha=0.2, linewidth=0)
        axis.set_xlabel("seconds of training" if unit == "seconds" else "episodes (responses)")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    if metric == "exact":
        axes[0].set_ylim(0, 1.02)
    axes[0].set_ylabel(("exact match" if metric == "exact" else "score") + " on held-out prompts")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def at_goal(group, unit):
    """Median over S runs of the episodes or seconds at the first evaluation that reaches GOAL, as text."""
    if any(run["exact"][-1] is None for run in group):
        return "-"
    times = [min(run[unit][run["exact"] >= GOAL], default=np.inf) for run in group]
    reached = int(np.isfinite(times).sum())
    text = f"{np.median(times):,.0f}" if np.isfinite(np.median(times)) else "not reached"
    return text if reached in (0, len(group)) else f"{text} ({reached} of {len(group)} seeds reached it)"


def markdown(rows):
    """Dictionaries with the same keys as a Markdown table."""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def each(pattern, values):
    """One text for several values; None stands for what a run does not have."""
    return ", ".join("-" if value is None else pattern.format(value) for value in values)


def report(runs, seeds):
    """Two Markdown tables: the results, and how they were measured. `runs` as in `draw`; `seeds`: S integers."""
    results, methods, goal = [], [], f"{GOAL:.0%}".replace("%", " %")
    for script, group in runs.items():
        speeds = np.concatenate([run["tokens_per_second"] for run in group])  # (S * I,)
        results.append(
            {
                "script": f"`{script}.py`",
                "seeds": each("{}", seeds),
                "exact match": each("{:.1%}", [run["exact"][-1] for run in group]).replace("%", " %"),
                "score": each("{:.3f}", [run["score"][-1] for run in group]),
                "KL to the reference": each("{:.2f}", [run["kl"] for run in group]),
                f"episodes to {goal}": at_goal(group, "episodes"),
                f"seconds to {goal}": at_goal(group, "seconds"),
                "tokens/s": f"{np.median(speeds):,.0f}",
                "seconds, whole command": each("{:.0f}", [run["facts"].get("seconds") for run in group]),
            }
        )
        methods.append({"script": f"`{script}.py`"})
        for name in ("command", "commit", "machine", "torch", "date"):
            found = dict.fromkeys(run["facts"].get(name, "not noted") for run in group)  # each once
            methods[-1][name] = each("`{}`" if name == "command" else "{}", found)
    spacing = {script: f"{np.diff(group[0]['episodes']).max():,}" for script, group in runs.items()}
    return f"""{markdown(results)}

Exact match and score: greedy responses to the held-out prompts after the last update, one figure for each seed. KL:
nats per response, mean over the last tenth of the batches. Episodes and seconds to {goal}: at the first evaluation that
finds so many exact matches, median over seeds; there is one every {", ".join(dict.fromkeys(spacing.values()))}
episodes. These seconds are of training alone, the whole command also starts and evaluates. Tokens/s: response tokens,
median over iterations.

How it was measured; N stands for the seed:

{markdown(methods)}
"""


def main(args):
    os.chdir(ROOT)
    common.require(not (args.reuse and args.flags), "--flags", "none with --reuse, which trains nothing", args.flags)
    runs = {}
    for script in args.scripts:
        if not args.reuse:
            for seed in args.seeds:
                train(script, seed, args)
        runs[script] = [read_run(find_run(script, seed, args.output_dir)) for seed in args.seeds]
        found = {tuple(run["episodes"].tolist()) for run in runs[script]}
        common.require(len(found) == 1, "--reuse", f"runs of {script} with evaluations at the same episodes", found)
    has_exact = all(run["exact"][-1] is not None for group in runs.values() for run in group)
    Path("docs").mkdir(exist_ok=True)
    draw(runs, f"docs/{args.name}.png", args.metric if has_exact else "score")
    Path(f"docs/{args.name}.md").write_text(report(runs, args.seeds), encoding="utf-8")
    print(f"\n{report(runs, args.seeds)}\nwrote docs/{args.name}.png and docs/{args.name}.md")


if __name__ == "__main__":
    with common.one_line_errors():
        main(tyro.cli(Args, description=__doc__))
