"""KL per update: how far each update moves the policy, at the defaults and at ten times the learning rate or delta.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/kl_per_update.py             # task `sort`, 18 runs, offline: a quarter of an hour on two cores
    python benchmark/kl_per_update.py --reuse     # draw those runs again

The scripts log different KLs: TRPO the exact one to the old policy, PPO an estimate from the samples, REINFORCE none.
Here all three are measured alike: the exact KL from the old policy to the new one, mean over the tokens of the batch
that the update learned from. Draws docs/kl_per_update.png and prints a table. Shapes: S seeds, I iterations.
"""

import importlib
import json
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))

import common

import numpy as np
import torch
import tyro
from learning_curves import COLORS, ROOT, find_run, markdown
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEP_SIZES = {"reinforce_lm": "learning_rate", "ppo_lm": "learning_rate", "trpo_lm": "max_kl"}
WATCHED = {"ppo_lm": "policy/clipfrac", "trpo_lm": "trpo/step_fraction"}  # shows how often steps are cut


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds to train each script with"""
    factors: tuple[float, ...] = (1, 10)
    """what to multiply the default learning rate (TRPO: --max-kl) with"""
    total_episodes: int = 51_200
    """episodes of each run"""
    output_dir: str = "runs/kl_per_update"
    """folder for the run directories"""
    reuse: bool = False
    """train nothing, and draw the newest finished runs in --output-dir"""


def train(script, factor, seed, args):
    """Run a script in this process, with a rollout that first measures what the update before it did."""
    module, rollout, kls, last = importlib.import_module(script), common.rollout, [], None

    def log_p(model, sequences, mask, flags):
        return common.tempered_log_softmax(common.response_logits(model, sequences, mask, flags), flags.temperature)

    def measuring_rollout(model, prompts, mask, end_ids, flags, samples_per_prompt=1, greedy=False, **settings):
        nonlocal last
        if last and not greedy:
            *batch, old = last
            kl = (old.exp() * (old - log_p(model, *batch, flags))).sum(-1)  # (B, r)
            response_mask = batch[1][:, -flags.response_length :]  # (B, R)
            kls.append(kl[response_mask[:, : kl.shape[1]]].mean().item())
        responses = rollout(model, prompts, mask, end_ids, flags, samples_per_prompt, greedy=greedy, **settings)
        if not greedy:
            pairs = zip((prompts, mask), responses[:2])
            batch = [torch.cat([p.repeat_interleave(samples_per_prompt, 0), r], 1) for p, r in pairs]
            last = *batch, log_p(model, *batch, flags)
        return responses

    common.rollout = torch.no_grad()(measuring_rollout)
    step_size = factor * (vars(module.Args()) | module.TINY)[STEP_SIZES[script]]
    flags = dict(
        total_episodes=args.total_episodes, seed=seed, output_dir=f"{args.output_dir}/{factor:g}", save_every=0
    )
    argv = [f"{common.flag(name)}={value}" for name, value in (flags | {STEP_SIZES[script]: step_size}).items()]
    with common.one_line_errors():
        module.main(*common.parse_flags(module.Args, module.TINY, argv))
    (find_run(script, seed, flags["output_dir"]) / "kl.json").write_text(json.dumps(kls))


def read_run(run):
    """kl (I - 1,), the last evaluation's share of exact matches, and metric name -> values (I,)."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()  # 0 keeps every step
    scalars = {name: np.array([event.value for event in events.Scalars(name)]) for name in events.Tags()["scalars"]}
    return np.array(json.loads((run / "kl.json").read_text())), scalars["eval/exact"][-1], scalars


def draw(runs, path):
    """One panel for each factor: median over seeds (line) and their range (shade), smoothed over 9 updates."""
    factors = list(dict.fromkeys(factor for _, factor in runs))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axis, factor in zip(np.atleast_1d(figure.subplots(1, len(factors), sharey=True)), factors):
        for script in COLORS:
            kl = np.stack([run[0] for run in runs[script, factor]])  # (S, I - 1)
            windows = np.lib.stride_tricks.sliding_window_view(kl, min(9, kl.shape[1]), axis=1)
            y, x = np.median(windows, axis=-1), np.arange(windows.shape[1]) + windows.shape[-1] // 2 + 1
            axis.plot(x, np.median(y, axis=0), color=COLORS[script], linewidth=1.2, label=f"{script}.py")
            axis.fill_between(x, y.min(0), y.max(0), color=COLORS[script], alpha=0.2, linewidth=0)
        axis.set(
            title="defaults" if factor == 1 else f"{factor:g} times", xlabel="update", yscale="log", xlim=(0, None)
        )
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("exact KL per update, nats per token")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def report(runs):
    """A Markdown table of all factors and scripts."""
    rows = []
    for (script, factor), group in runs.items():
        kl = np.stack([run[0] for run in group])  # (S, I - 1)
        watched = [run[2][WATCHED[script]] for run in group] if script in WATCHED else []
        rows.append(
            {
                "script": f"`{script}.py`",
                "times": f"{factor:g}",
                "KL per update: median": f"{np.median(kl):.4f}",
                "99 %": f"{np.quantile(kl, 0.99):.3f}",
                "largest": f"{kl.max():.3f}",
                "exact match after": ", ".join(f"{100 * run[1]:.1f}" for run in group) + " %",
                "entropy after": ", ".join(f"{run[2]['policy/entropy'][-20:].mean():.2f}" for run in group),
                "watch": f"`{WATCHED[script]}` {np.mean(watched):.2f}" if watched else "-",
            }
        )
    return markdown(rows)


def main(args):
    settings = [(script, factor) for factor in args.factors for script in COLORS]
    for script, factor in settings if not args.reuse else []:
        for seed in args.seeds:
            process = multiprocessing.get_context("spawn").Process(target=train, args=(script, factor, seed, args))
            process.start()
            process.join()
            common.require(
                process.exitcode == 0, "--factors", f"{script} to reach its end", f"exit code {process.exitcode}"
            )
    folders = {(script, factor): f"{args.output_dir}/{factor:g}" for script, factor in settings}
    runs = {key: [read_run(find_run(key[0], seed, folder)) for seed in args.seeds] for key, folder in folders.items()}
    draw(runs, ROOT / "docs" / "kl_per_update.png")
    print(f"\n{report(runs)}\nwrote docs/kl_per_update.png")


if __name__ == "__main__":
    with common.one_line_errors():
        main(tyro.cli(Args, description=__doc__))
