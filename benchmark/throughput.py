"""How fast rollouts, updates and scripts are on a CPU, beside transformers and an older tree of this project.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/throughput.py                                        # with models of random weights
    git worktree add ../older COMMIT                                      # fad5699 or later
    python benchmark/throughput.py --parts update --baseline-tree ../older --model DIR

Everything is measured in a process of its own. What is compared runs in turn, A B C A B C ..., `--rounds` times, so
that a machine whose speed drifts slows all of it down. A figure is the median of the rounds, with their range in
parentheses; a ratio is the median of the rounds' ratios of the first figure to that of the first row. CPU seconds are
those of all threads, and depend less than seconds on what else the machine does. Parts:

- rollout: `common.sample`, and `generate` of transformers, at a fixed length.
- update: forward and backward passes of the policy over a batch; a third of the response columns is real.
- scripts: an update of each script on the task `sort` with the default flags, from end to end.
"""

import functools
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models and data are files
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import reinforce_lm

import one_tree
import torch
import tyro


@dataclass
class Args:
    parts: tuple[Literal["rollout", "update", "scripts"], ...] = ("rollout", "update", "scripts")  # what to measure
    baseline_tree: str = ""  # folder of another tree of this project, to compare with
    model: str = ""  # rollout, update: folder of a model, in place of random weights
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")  # update: precisions
    prompt_length: int = 16  # update: tokens of the longest of 8 prompts
    response_length: int = 64  # update: tokens of the longest of 64 responses
    micro_batch_tokens: int = reinforce_lm.Args.micro_batch_tokens  # update: of this tree
    rounds: int = 3  # times that everything is measured, in turn
    updates: int = 30  # scripts: updates that are timed, after five that are not


def compare(title, calls, rounds=1):
    """Call each of `calls`, {name: function -> {column: figure}}, in turn, `rounds` times, and print a table.

    Rows are printed when they are measured for the last time. What fails is a row, too.
    """
    results, first = {name: [] for name in calls}, None
    for last in [False] * (rounds - 1) + [True]:
        for name, call in calls.items():
            try:
                figures = call()
                if "error" in figures:
                    raise RuntimeError(figures["error"])
            except Exception as error:
                print(f"| {name} | failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]} |", flush=True)
                continue
            results[name].append(figures)
            if last and not first:
                first = [next(iter(figures.values())) or float("nan") for figures in results[name]]
                print(f"\n**{title}**\n\n| | {' | '.join(figures)} | ratio |\n|{' --- |' * (len(figures) + 2)}")
            if last:
                columns = [[result[column] for result in results[name]] for column in figures]
                ratio = median(value / other for value, other in zip(columns[0], first))
                print(f"| {' | '.join([name, *map(spread, columns), f'{ratio:.2f}'])} |", flush=True)


def spread(values):
    """Median and range, or one value."""
    texts = [f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in (median(values), min(values), max(values))]
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if len(values) > 1 else texts[0]


def in_trees(args, call, name="{}"):
    """{name: function} that calls `call` with the folder of this tree, or of the baseline, if there is one."""
    trees = {"this tree": one_tree.ROOT} | ({args.baseline_tree: args.baseline_tree} if args.baseline_tree else {})
    return {name.format(tree): functools.partial(call, folder) for tree, folder in trees.items()}


def part_rollout(args, scratch):
    case = dict(model=args.model, responses=32, response_length=24)
    if not args.model:  # that of `sort`
        flags = reinforce_lm.Args(**reinforce_lm.TINY)
        tokenizer, rows, _ = common.load_prompts(flags, 1)
        common.load_policy(flags, tokenizer, rows).save_pretrained(scratch)
        case = dict(model=scratch, responses=256, prompt_length=5, response_length=6, repeats=20)

    def measure(tree, **more):
        return next(one_tree.run_cases(tree, [case | dict(what="rollout", lengths="fixed", samples=4) | more]))

    static = dict(cache_implementation="static", disable_compile=True)
    calls = in_trees(args, measure, "`common.sample`, {}")
    for name, flags in {"growing": {}, "static": static}.items():
        calls[f"`generate`, {name} cache"] = functools.partial(measure, one_tree.ROOT, what="generate", flags=flags)
    size = f"{case['responses']} responses of {case['response_length']} tokens, 4 to a prompt, float32"
    compare(f"rollout: {args.model or 'tiny'}, {size}", calls, args.rounds)


def part_update(args, scratch):
    model = args.model or one_tree.random_model(f"{scratch}/qwen2", (192, 2, 6, 2, 512, 50_257))
    case = dict(model=model, prompt_length=args.prompt_length, response_length=args.response_length)

    def measure(tree, dtype):
        flags = dict(micro_batch_tokens=args.micro_batch_tokens) if tree == one_tree.ROOT else {}
        return next(one_tree.run_cases(tree, [case | dict(dtype=dtype, flags=flags)]))

    for dtype in args.dtypes:
        size = f"64 responses of up to {args.response_length} tokens, 8 to a prompt of up to {args.prompt_length}"
        title = f"update: {args.model or 'Qwen2 with 50,257 ids, two layers'}, {size}, {dtype}"
        compare(title, in_trees(args, functools.partial(measure, dtype=dtype)), args.rounds)


def iteration(tree, script, skip, **flags):
    """Medians of the iterations of a run, from end to end, but for the first `skip`."""
    run = one_tree.run_script(script, tree=tree, eval_every=0, **flags)
    rollout, tokens = [run.metrics[name] for name in ("time/rollout_seconds", "time/tokens_per_second")]
    series = {"CPU s": run.cpu_seconds, "s": run.seconds, "rollout, s": [*rollout.values()]}
    series = series if flags["device"] == "cpu" else dict([*series.items()][1:])
    medians = {name: median(values[skip:]) for name, values in (series | {"tokens/s": [*tokens.values()]}).items()}
    return medians | {"peak GiB": run.gib}


def part_scripts(args, scratch):
    for script in ("reinforce_lm.py", "ppo_lm.py", "trpo_lm.py"):
        flags = dict(script=script, skip=5, total_episodes=256 * (5 + args.updates), device="cpu")
        calls = in_trees(args, functools.partial(iteration, **flags))
        compare(f"scripts: an iteration of `{script}` on `sort`, 256 responses", calls, args.rounds)


def main(args):
    print(f"torch {torch.__version__}, transformers {version('transformers')}, {torch.get_num_threads()} CPU threads")
    for part in args.parts:
        with tempfile.TemporaryDirectory() as scratch:
            globals()[f"part_{part}"](args, scratch)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
