"""How fast the three scripts are, against peers and against each other, as Markdown tables.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/throughput.py                                   # all of it, a quarter of an hour on two cores
    pip install trl==1.10.0 && python benchmark/throughput.py --sections ppo      # the last TRL with a PPOTrainer
    python benchmark/throughput.py --sections rollout --rollout-model DIR
    python benchmark/throughput.py --sections scripts --rollout-model DIR --updates 2 --warmup 1
    python benchmark/throughput.py --sections gpu --gpu-parts card correctness update rollout       # on a GPU
    python benchmark/throughput.py --sections gpu --gpu-parts scripts trl compile
    python benchmark/throughput.py --sections gpu --shape tiny --device cpu --gpu-prompts 4 --gpu-length 8 \\
        --micro-batch-size 8                                         # tries the code of the section `gpu` without one

All sections but `gpu` run on the CPU. What is compared runs in turn, A B C A B C ..., `--rounds` times, so that a
machine whose speed drifts slows all of it down. A figure is the median of the rounds, with their range in parentheses;
a ratio is the median of the rounds' ratios. The scripts run as subprocesses and are read from their TensorBoard files.
An update is timed from the end of the one before to its own end, with everything between: prompts, rewards, logging.
"""

import argparse
import contextlib
import cProfile
import importlib
import importlib.util
import io
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models and data are made here
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import ppo_lm
import reinforce_lm

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("reinforce_lm.py", "ppo_lm.py", "trpo_lm.py")
Part = Literal["card", "correctness", "update", "rollout", "scripts", "trl", "compile"]
Section = Literal["trl", "ppo", "long", "rollout", "prompts", "scripts", "profile", "scaling", "ranks", "gpu"]


@dataclass
class Args:
    sections: tuple[Section, ...] = tuple(name for name in get_args(Section) if name != "ppo")
    """what to measure; ppo needs an older TRL than trl and long"""
    rounds: int = 3
    """times that everything is measured, in turn"""
    updates: int = 30
    """updates that are timed in a round"""
    warmup: int = 5
    """updates before them that are not"""
    target: float = 0.9
    """trl, ppo: exact match on held-out prompts at which the race ends"""
    cap: float = 300.0
    """trl, ppo: seconds after which a run of the race is given up"""
    race_updates: int = 400
    """trl, ppo: updates over which the learning rate falls to 0 in the race, by default as in a run of the scripts"""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """trl, ppo: learning rates that each trainer is tried with; the script runs with its default"""
    seeds: int = 3
    """trl, ppo: runs of the race; the first chooses the learning rate of each trainer"""
    eval_every: int = 10
    """trl, ppo: updates between evaluations in the race, which the clock leaves out"""
    rollout_model: str = ""
    """rollout, scripts: folder of a model to measure, besides the tiny one"""
    rollout_responses: int = 32
    """rollout, scripts: responses of --rollout-model, 4 to a prompt"""
    rollout_length: int = 24
    """rollout, scripts: tokens of each of them"""
    shape: Literal["tiny", "0.5B", "1.5B", "7B"] = "0.5B"
    """gpu: shape of the model, that of a Qwen2.5 with random weights; tiny is for trying the code"""
    device: Literal["cuda", "cpu"] = "cuda"
    """gpu: where it runs; cpu is for trying the code with --shape tiny"""
    gpu_prompts: int = 32
    """gpu: prompts of 16 to 64 tokens, with 8 responses each"""
    gpu_length: int = 256
    """gpu: tokens of the longest response"""
    gpu_parts: tuple[Part, ...] = get_args(Part)
    """gpu: what to measure; the first four are meant to take less than eight minutes, and so are the other three"""
    gpu_timeout: float = 180.0
    """gpu: seconds after which a run of a script is given up"""
    gpu_updates: int = 2
    """gpu: updates of each script, the first of which is not timed"""
    micro_batch_size: int = 16
    """gpu: responses per forward and backward pass of the scripts"""


def parse_args():
    """Parse and check the flags. A wrong value is one line on standard error and exit code 2."""
    with common.one_line_errors():
        args, require = tyro.cli(Args, description=__doc__), common.require
        sizes = ("rounds", "updates", "race_updates", "seeds", "eval_every", "rollout_responses", "rollout_length")
        for name in (*sizes, "cap", "target", "gpu_prompts", "gpu_length", "gpu_timeout", "micro_batch_size"):
            require(getattr(args, name) > 0, common.flag(name), "a positive number", getattr(args, name))
        require(args.warmup >= 0, "--warmup", "0 or more", args.warmup)
        require(args.target <= 1, "--target", "at most 1", args.target)
        rates = args.learning_rates
        require(min(rates, default=0) > 0, "--learning-rates", "positive numbers", rates)
        require(args.rollout_responses % 4 == 0, "--rollout-responses", "a multiple of 4", args.rollout_responses)
        is_model = not args.rollout_model or Path(args.rollout_model, "config.json").is_file()
        require(is_model, "--rollout-model", "a folder with a config.json", args.rollout_model)
        require(args.gpu_updates >= 2, "--gpu-updates", "at least 2", args.gpu_updates)
        missing = [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]
        expected = "the packages of benchmark/requirements.txt (pip install -r benchmark/requirements.txt)"
        needed = {"trl", "ppo", "long"} & set(args.sections)
        require(not needed or not missing, f"--sections {' '.join(needed)}", expected, f"no {', '.join(missing)}")
        has_ppo = not missing and importlib.util.find_spec("trl.experimental.ppo")
        require("ppo" not in needed or has_ppo, "--sections ppo", "pip install trl==1.10.0", "a TRL without PPOTrainer")
    return args


# ===== Runs of the scripts, rounds, tables =====

# Runs a script as `python script.py` would, and prints the memory that it took on the GPU.
WITH_PEAK = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", torch.cuda.max_memory_allocated())
"""


def run_script(script, scratch, batch_size=256, updates=30, ranks=1, threads=None, timeout=None, **flags):
    """Run a script in a process of its own, with flags by keyword, and read what it logged.

    Returns:
        A namespace: `seconds` of each update, from end to end but without evaluations; for each update the metrics
        `iteration`, `rollout` (seconds) and `speed` (tokens per second); `score` and, where it is logged, `exact`, each
        {updates: mean over held-out prompts}; `model`, a folder; `peak`, bytes on the GPU.
    Raises:
        RuntimeError: with the last line on standard error and the peak on the GPU, if the script fails or takes longer
            than `timeout` seconds.
    """
    folder = tempfile.mkdtemp(dir=scratch)
    flags = {"device": "cpu", "eval_every": 0, "save_every": 0, "output_dir": folder, "batch_size": batch_size} | flags
    flags["total_episodes"] = batch_size * updates
    command = [sys.executable, "-c", WITH_PEAK]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / script), *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    try:
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{script}: not done after {timeout:.0f} s") from None
    peaks = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("peak ")]
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        where = f"{script} {' '.join(command[-len(flags) :])}"
        raise RuntimeError(f"{lines[-1][:300]} (peak {max(peaks, default=0) / 2**30:.1f} GiB, {where})")
    run_dir, events = read_events(folder)
    names = {"iteration": "iteration_seconds", "rollout": "rollout_seconds", "speed": "tokens_per_second"}
    run = {name: [event.value for event in events.Scalars(f"time/{tag}")] for name, tag in names.items()}
    for name in {"score", "exact"} & {tag.removeprefix("eval/") for tag in events.Tags()["scalars"]}:
        run[name] = {event.step // batch_size: event.value for event in events.Scalars(f"eval/{name}")}
    evaluations = {event.step: event for event in events.Scalars("eval/score")}
    logged = events.Scalars("time/iteration_seconds")
    run["seconds"], mark = [], logged[0].wall_time - logged[0].value
    for event in logged:
        run["seconds"].append(event.wall_time - mark)
        mark = evaluations.get(event.step, event).wall_time
    return SimpleNamespace(**run, model=f"{run_dir}/model", peak=max(peaks, default=0))


def read_events(folder):
    """The only run directory in `folder`, and its TensorBoard events."""
    run_dir = next(path for path in Path(folder).iterdir() if path.is_dir())
    return run_dir, EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()  # 0 keeps every step


def in_turn(calls, rounds):
    """Call each of `calls`, a dictionary of functions, in turn, `rounds` times: -> {name: list of results}."""
    results = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            results[name].append(call())
    return results


def spread(values, digits=1):
    """Median and range, as the tables have them."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(values, others):
    """Median of the ratios of two measurements, round by round."""
    return f"{median(a / b for a, b in zip(values, others)):.2f}"


def print_table(title, header, rows):
    lines = ["", title, "", f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    print("\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows]), flush=True)


def tiny_checkpoint(scratch):
    """Folder with the random weights of `--model tiny` and its tokenizer, after one step too small to change them."""
    flags = dict(learning_rate=1e-30, kl_coef=0, eval_size=1)
    return run_script("reinforce_lm.py", scratch, batch_size=4, updates=1, **flags).model


# ===== trl, ppo: reinforce_lm.py against RLOOTrainer and GRPOTrainer, ppo_lm.py against PPOTrainer =====

# As close to reinforce_lm.py and its defaults for `--model tiny` as the trainers allow. Their own defaults are
# bfloat16, gradient checkpointing and a learning rate of 1e-6. Each update generates a batch that only it uses.
TRAINER = dict(per_device_train_batch_size=256, gradient_accumulation_steps=1, weight_decay=0.0, temperature=1.0)
TRAINER |= dict(lr_scheduler_type="linear", warmup_steps=0, use_cpu=True, bf16=False, gradient_checkpointing=False)
TRAINER |= dict(logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
TRAINER |= dict(dataloader_pin_memory=False)
TRL_SETTINGS = TRAINER | dict(steps_per_generation=1, num_generations=4, num_iterations=1, max_completion_length=6)
TRL_SETTINGS |= dict(top_k=0, top_p=1.0, beta=0.02, disable_dropout=True, max_grad_norm=1.0)
# As ppo_lm.py: 2 epochs of 4 minibatches. Policy and critic have one learning rate. It takes one response to a prompt.
PPO_SETTINGS = TRAINER | dict(num_ppo_epochs=2, num_mini_batches=4, response_length=6, stop_token="eos", kl_coef=0.02)
PPO_SETTINGS |= dict(local_rollout_forward_batch_size=256, num_sample_generations=0)


def sort_rows(scratch):
    """The prompts of `--dataset sort` as files, so that all sides train on, and are asked, the same ones.

    Returns:
        Training rows, 512 held-out rows, and the flags with which a script reads them.
    """
    rows = common.load_rows("sort", "--dataset")
    parts = {"dataset": rows[:-512], "eval_dataset": rows[-512:]}
    for name, part in parts.items():
        Path(scratch, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return *parts.values(), {name: f"{scratch}/{name}.jsonl" for name in parts}


def greedy_scorer(folder, rows, reward, response_length, dtype=torch.float32):
    """A function of weights of the checkpoint in `folder`: the mean reward of greedy responses to `rows`."""
    tokenizer, policy = common.load_tokenizer(folder, rows), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    prompts = common.encode_prompts(tokenizer, rows, 512).padded()
    end_ids = common.end_token_ids(tokenizer, policy.eval())
    flags = argparse.Namespace(response_length=response_length, temperature=1.0, rollout_batch_size=512)
    columns = {name: [row[name] for row in rows] for name in rows[0]}

    def score(weights):
        policy.load_state_dict(weights)
        responses, mask, _ = common.rollout(policy, *prompts, end_ids, flags, greedy=True)
        arguments = columns | {"responses": common.decode(tokenizer, responses, mask)}
        return float(np.mean(reward(arguments.pop("prompt"), **arguments)))

    return score


class StopTraining(Exception):
    """Raised by `Clock`."""


class Clock(TrainerCallback):
    """For a trainer of TRL: the seconds of each update, and while the clock stands still, scores of its policy.

    Attributes:
        seconds: of each update so far. scores: {updates: score}, by `scorer`, every `eval_every` updates. Training
        ends when `stop(score, seconds so far)` says so.
    """

    def __init__(self, scorer=None, eval_every=1, stop=lambda score, seconds: False):
        self.scorer, self.eval_every, self.stop, self.seconds, self.scores = scorer, eval_every, stop, [], {}

    def on_train_begin(self, *_, **__):
        self.mark = time.perf_counter()

    def on_step_end(self, _, state, __, model, **___):
        self.seconds.append(time.perf_counter() - self.mark)
        if self.scorer and state.global_step % self.eval_every == 0:
            score = self.scores[state.global_step] = self.scorer(getattr(model, "policy", model).state_dict())
            if self.stop(score, sum(self.seconds)):
                raise StopTraining  # PPOTrainer does not look at control.should_training_stop
        self.mark = time.perf_counter()


def train_trl(name, folder, rows, updates, learning_rate, seed, reward=common.match_reward, clock=None, **settings):
    """Train the checkpoint in `folder` with a trainer of TRL, "RLOO" or "GRPO"; returns its `Clock`."""
    warnings.simplefilter("ignore", FutureWarning)  # about names in the trainers' own code
    import trl
    from datasets import Dataset

    def reward_function(prompts, completions, **columns):
        return reward(prompts, completions, **columns)

    clock = clock or Clock()
    settings = dict(output_dir=f"{folder}/trl") | settings
    settings |= dict(learning_rate=learning_rate, max_steps=updates, seed=seed)
    config = getattr(trl, f"{name}Config")(**TRL_SETTINGS | settings)
    data = dict(train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(StopTraining):
        trainer = getattr(trl, f"{name}Trainer")
        trainer(folder, reward_funcs=reward_function, args=config, **data, callbacks=[clock]).train()
    return clock


class RewardNetwork(torch.nn.Module):
    """The reward `match` of `sort` as PPOTrainer wants it, a network: a backbone with hidden states, and a head."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.score = tokenizer, torch.nn.Identity()

    def backbone(self, input_ids, attention_mask, **_):
        texts = [self.tokenizer.decode(ids[mask]) for ids, mask in zip(input_ids, attention_mask.bool())]
        texts = [text.removesuffix(self.tokenizer.eos_token) for text in texts]
        prompts, responses = [text[:5] for text in texts], [text[5:] for text in texts]
        scores = common.match_reward(prompts, responses, ["".join(sorted(prompt)) for prompt in prompts])
        scores = torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1)  # the same at each token
        return SimpleNamespace(hidden_states=[scores])


def train_ppo(folder, rows, updates, learning_rate, seed, clock=None):
    """Train the checkpoint in `folder` on `sort` with TRL's PPOTrainer; returns its `Clock`."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    clock, tokenizer = clock or Clock(), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # PPOTrainer takes no padding token for a real one
    policy, reference = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
    torch.manual_seed(seed)
    critic = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    settings = dict(total_episodes=256 * updates, learning_rate=learning_rate, seed=seed, output_dir=f"{folder}/trl")
    data = Dataset.from_list([{"input_ids": tokenizer(row["prompt"]).input_ids} for row in rows])
    networks = dict(model=policy, ref_model=reference, reward_model=RewardNetwork(tokenizer), value_model=critic)
    data = dict(processing_class=tokenizer, train_dataset=data, eval_dataset=data.select(range(8)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(StopTraining):
        PPOTrainer(PPOConfig(**PPO_SETTINGS | settings), **data, **networks, callbacks=[clock]).train()
    return clock


def section_ppo(args, scratch):
    section_trl(args, scratch, ppo_lm, ("PPO",))
    print("\nPPOTrainer:", ", ".join(f"`{name}={value}`" for name, value in PPO_SETTINGS.items()))


def section_trl(args, scratch, script=reinforce_lm, trainers=("RLOO", "GRPO")):
    folder, updates, script_name = tiny_checkpoint(scratch), args.warmup + args.updates, f"{script.__name__}.py"
    rows, eval_rows, files = sort_rows(scratch)
    titles = {"ours": f"`{script_name}`"} | {name: f"{name}Trainer of TRL {version('trl')}" for name in trainers}

    def ours(**flags):  # `folder` is not `--model tiny`, so the defaults of that are given as flags
        flags = script.TINY | dict(model=folder, eval_every=0, save_every=0) | files | flags
        return run_script(script_name, scratch, **flags)

    def theirs(name, *settings, **more):
        return train_ppo(folder, *settings, **more) if name == "PPO" else train_trl(name, folder, *settings, **more)

    calls = {"ours": lambda: ours(updates=updates).seconds}
    for name in trainers:
        calls[name] = lambda name=name: theirs(name, rows, updates, 2e-3, seed=1).seconds
    runs = in_turn(calls, args.rounds)
    times = {name: [1e3 * median(seconds[args.warmup :]) for seconds in runs[name]] for name in runs}
    table = [(titles[name], spread(values), ratio(values, times["ours"])) for name, values in times.items()]
    title = f"`sort`, 256 responses of up to 6 tokens per update, float32, medians of {args.updates} updates"
    print_table(title, ("", "ms per update", "ratio"), table)
    print(f"\n`{script_name}` has the flags of `--model tiny`. All start from the same weights and prompts.")
    if "RLOO" in trainers:
        print("Both trainers:", ", ".join(f"`{name}={value}`" for name, value in TRL_SETTINGS.items()))
        print("RLOO subtracts the KL penalty from the reward, as `reinforce_lm.py` does. GRPO has it in the loss,")
        print(
            "divides advantages by the standard deviation of their group and averages over tokens, as is its default."
        )

    scorer = greedy_scorer(folder, eval_rows, common.exact_reward, 6)

    def race(name, learning_rate, seed):
        """Seconds to the target, infinite if it was not reached; updates; exact match in the end."""
        if name == "ours":
            run = ours(updates=args.race_updates, eval_every=args.eval_every, seed=seed)
            count = min((count for count, exact in run.exact.items() if exact >= args.target), default=None)
            seconds, exact = run.seconds[:count], run.exact[count or args.race_updates]
        else:
            clock = Clock(scorer, args.eval_every, lambda score, seconds: score >= args.target or seconds >= args.cap)
            theirs(name, rows, args.race_updates, learning_rate, seed, clock=clock)
            seconds, exact = clock.seconds, list(clock.scores.values())[-1]
        in_time = exact >= args.target and sum(seconds) <= args.cap
        return sum(seconds) if in_time else float("inf"), len(seconds), exact

    def describe(seconds, count, exact):
        return f"{seconds:.1f} s, {count} updates" if seconds < float("inf") else f"not reached ({exact:.3f})"

    first = {("ours", "default"): race("ours", None, 1)}
    first |= {(name, rate): race(name, rate, 1) for name in trainers for rate in args.learning_rates}
    ranked = sorted(first, key=lambda key: (first[key][0], -first[key][2]))  # the fastest, then the most exact
    best = [next(key for key in ranked if key[0] == name) for name in titles]
    results = {key: [first[key]] for key in best}
    for seed in range(2, args.seeds + 1):
        for key in best:
            results[key].append(race(*key, seed))
    times = {key: [seconds for seconds, _, _ in runs] for key, runs in results.items()}
    title = f"Time to {100 * args.target:.0f} % exact match on 512 held-out prompts, evaluations not counted"
    table = []
    for name, rate in best:
        values, runs = times[name, rate], results[name, rate]
        figures = f"{median(values):.1f}", ratio(values, times[best[0]])
        table.append((titles[name], rate, *figures, *(describe(*run) for run in runs)))
    header = ("", "learning rate", "median s", "ratio", *(f"seed {seed}" for seed in range(1, args.seeds + 1)))
    print_table(title, header, table)
    table = [(titles[name], rate, describe(*result)) for (name, rate), result in first.items()]
    print_table("Learning rates, with seed 1:", ("", "learning rate", ""), table)


def small_qwen2(vocab_size):
    """A Qwen2 of 3 million random parameters."""
    torch.manual_seed(1)
    config = Qwen2Config(vocab_size=vocab_size, hidden_size=192, num_hidden_layers=6, intermediate_size=512)
    config.num_attention_heads, config.num_key_value_heads, config.eos_token_id, config.bos_token_id = 6, 3, 0, 0
    return AutoModelForCausalLM.from_config(config).eval()


def section_long(args, scratch):
    """Updates at prompts of 384 tokens: reinforce_lm.py runs a prompt once for its responses, TRL once for each."""
    folder, digits, paths = f"{scratch}/long", np.random.default_rng(0).integers(10, size=(400, 384)), {}
    small_qwen2(11).save_pretrained(folder)
    common.character_tokenizer("0123456789").save_pretrained(folder)
    texts = ["".join(map(str, row)) for row in digits]
    rows = [{"prompt": text, "reference": text[:32]} for text in texts]
    for name, part in {"dataset": rows[16:], "eval_dataset": rows[:16]}.items():
        paths[name] = f"{scratch}/{name}.jsonl"
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in part))
    updates = 1 + max(2, args.updates // 10)
    flags = reinforce_lm.TINY | dict(model=folder, batch_size=64, micro_batch_size=64, samples_per_prompt=8) | paths
    flags |= dict(response_length=32, updates=updates, eval_size=1, eval_every=0, save_every=0, learning_rate=1e-4)
    settings = dict(per_device_train_batch_size=64, num_generations=8, max_completion_length=32, seed=1)
    settings |= dict(updates=updates, learning_rate=1e-4)
    calls = {"`reinforce_lm.py`": lambda: run_script("reinforce_lm.py", scratch, **flags).seconds}
    for name in ("RLOO", "GRPO"):
        title = f"{name}Trainer of TRL {version('trl')}"
        calls[title] = lambda name=name: train_trl(name, folder, rows[16:], **settings).seconds
    times = {name: [median(run[1:]) for run in runs] for name, runs in in_turn(calls, args.rounds).items()}
    ours = next(iter(times.values()))
    table = [(name, spread(values, 2), ratio(values, ours)) for name, values in times.items()]
    title = (
        "**long**: prompts of 384 tokens, 64 responses of up to 32 tokens, 8 to each prompt, 3.0M parameters, float32"
    )
    print_table(title, ("", "s per update", "ratio"), table)


# ===== rollout: common.rollout against model.generate =====


def time_sampling(model, prompts, samples, length, rounds, repeats=1):
    """Sample `samples` responses of `length` tokens to each of the (N, P) prompts in several ways.

    Returns:
        Rows of a table: way, tokens per second, how much faster `common.rollout` is, which alone returns
        log-probabilities.
    """
    num_tokens, mask = len(prompts) * samples * length, torch.ones_like(prompts).bool()
    generator = torch.Generator(prompts.device).manual_seed(1)
    model.generation_config.eos_token_id = None  # nothing ends a response, and `generate` need not check for it
    settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length, pad_token_id=0)

    def ours():  # no token has the id -1, so no response ends
        settings = dict(response_length=length, temperature=1.0, rollout_batch_size=2**20, cuda_graph=True)
        flags = argparse.Namespace(**settings)
        return common.rollout(model, prompts, mask, [-1], flags, samples, generator)[0].numel()

    def generate(**options):
        config = GenerationConfig(**settings, num_return_sequences=samples, **options)
        with torch.no_grad():
            output = model.generate(prompts, attention_mask=mask.long(), generation_config=config)
        return output[:, prompts.shape[1] :].numel()

    calls = {"`common.rollout`": ours, "`generate`, dynamic cache": generate}
    calls["`generate`, static cache"] = lambda: generate(cache_implementation="static", disable_compile=True)
    if prompts.device.type == "cuda":
        calls["`generate`, static cache, compiled"] = lambda: generate(cache_implementation="static")
    return speed_rows(calls, num_tokens, rounds, repeats)


def speed_rows(calls, num_tokens, rounds, repeats=1):
    """Rows of a table about `calls`, functions that make and return `num_tokens`. The first is compared to the rest."""

    def speed(call):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return repeats * num_tokens / (time.perf_counter() - start)

    working, failed = {}, []
    for name, call in calls.items():  # once without the clock, to warm up and to see whether it works here
        try:
            found = call()
            if found != num_tokens:
                raise ValueError(f"{found} tokens, not {num_tokens}")
            working[name] = lambda call=call: speed(call)
        except Exception as error:
            failed.append((name, f"does not work here ({' '.join(str(error).split())[:100]})", ""))
    speeds = in_turn(working, rounds)
    first = next(iter(speeds.values()), [])
    return [(name, spread(values, 0), ratio(first, values)) for name, values in speeds.items()] + failed


ROLLOUT_HEADER = ("", "tokens/s", "`common.rollout` is faster by")


def section_rollout(args, scratch):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(scratch), dtype=torch.float32).eval()
    rows = time_sampling(model, torch.randint(1, 11, (64, 5)), 4, 6, args.rounds, repeats=20)
    print_table("**rollout**: tiny model, 64 prompts of 5 tokens, 4 responses of 6 tokens each", ROLLOUT_HEADER, rows)
    if args.rollout_model:
        model = AutoModelForCausalLM.from_pretrained(args.rollout_model, dtype=torch.float32).eval()
        prompts = torch.randint(10, model.config.vocab_size, (args.rollout_responses // 4, 16))
        rows = time_sampling(model, prompts, 4, args.rollout_length, args.rounds)
        size = f"{model.num_parameters() / 1e6:.0f}M parameters, float32, {len(prompts)} prompts of 16 tokens"
        print_table(f"**rollout**: {size}, 4 responses of {args.rollout_length} tokens each", ROLLOUT_HEADER, rows)


# ===== prompts: a prompt run once for its responses against a padded pass =====


def padded_inputs(network, sequences, attention_mask, num_outputs):
    """What `common.share_prompts` returns if nothing is shared."""
    positions = common.position_ids(attention_mask)
    return dict(input_ids=sequences, attention_mask=attention_mask, position_ids=positions, use_cache=False)


def compare_prompt_passes(model, prompts, samples, length, rounds):
    """Passes of an update, padded and shared: the reference's without gradient, the policy's with it.

    Args:
        prompts: `common.Prompts`. samples: responses to each, of 1 to `length` random tokens.
    Returns:
        Cells of a row: padded and shared milliseconds, their ratio, the same for MiB kept for the backward pass.
    """
    ids, mask = prompts.padded()
    num_rows, share_prompts = len(ids) * samples, common.share_prompts
    lengths = torch.linspace(length, max(1, length / 8), num_rows).round().long()
    mask = torch.cat([mask.repeat_interleave(samples, 0), torch.arange(length) < lengths[:, None]], 1)
    responses = torch.randint(1, model.config.vocab_size, (num_rows, length))
    sequences = torch.cat([ids.repeat_interleave(samples, 0), responses], 1)
    flags = SimpleNamespace(response_length=length, temperature=1.0, dtype="float32")

    def update(inputs):
        common.share_prompts, kept = inputs, {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(x):
            storage = x.untyped_storage()
            kept.update({} if storage.data_ptr() in parameters else {storage.data_ptr(): storage.nbytes()})
            return x

        start = time.perf_counter()
        with torch.no_grad():
            common.policy_logprobs(model, sequences, mask, flags)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logprobs, _ = common.policy_logprobs(model, sequences, mask, flags)
        logprobs.where(mask[:, -length:], 0.0).sum().backward()
        model.zero_grad()
        return 1e3 * (time.perf_counter() - start), sum(kept.values()) / 2**20

    calls = {"padded": lambda: update(padded_inputs), "shared": lambda: update(share_prompts)}
    try:
        in_turn(calls, 1)  # to warm up
        (padded, padded_kept), (shared, shared_kept) = [list(zip(*runs)) for runs in in_turn(calls, rounds).values()]
    finally:
        common.share_prompts = share_prompts
    mib = [f"{median(kept):.1f}" for kept in (padded_kept, shared_kept)]
    return spread(padded, 0), spread(shared, 0), ratio(padded, shared), *mib, ratio(padded_kept, shared_kept)


PROMPTS_HEADER = ("ms, padded", "ms, shared", "ratio", "MiB kept, padded", "MiB kept, shared", "ratio")


def section_prompts(args, scratch):
    model, rows = small_qwen2(2048), []
    for length in (8, 64, 384):
        for samples in (1, 4, 8, 16):
            ids = torch.randint(1, 2048, (16 // samples, length)).tolist()
            row = compare_prompt_passes(model, common.Prompts(ids, ids), samples, 32, args.rounds)
            rows.append((length, samples, *row))
    size = f"{model.num_parameters() / 1e6:.1f}M parameters, 16 responses of 4 to 32 tokens, in one micro-batch"
    print_table(f"**prompts**: {size}", ("prompt tokens", "responses to a prompt", *PROMPTS_HEADER), rows)
    if args.rollout_model:
        model = AutoModelForCausalLM.from_pretrained(args.rollout_model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.rollout_model)
        question = "A shop sold {0} boxes with {1} apples each on Monday and half as many on Tuesday. " * 3
        chats = [[{"role": "user", "content": question.format(3 + i, 7 * i + 2)}] for i in range(4)]
        prompts = common.encode_prompts(tokenizer, [{"prompt": chat} for chat in chats], 512)
        row = compare_prompt_passes(model, prompts, 4, 32, args.rounds)
        size = f"{model.num_parameters() / 1e6:.0f}M parameters, 4 chat prompts of {len(prompts.ids[0])} tokens"
        print_table(f"**prompts**: {size}, 4 responses of 4 to 32 tokens each", PROMPTS_HEADER, [row])


# ===== scripts, profile, scaling, ranks: the scripts against each other and themselves =====


def compare_runs(title, settings, args, scratch, per_token=False):
    """Run scripts in turn and print a table. `settings` holds the keyword arguments of `run_script` for each row."""

    def measure(setting):
        run = run_script(scratch=scratch, updates=args.warmup + args.updates, **setting)
        rest = [whole - rollout for whole, rollout in zip(run.seconds, run.rollout)]
        tokens = [speed * seconds for speed, seconds in zip(run.speed, run.iteration)]
        cost = [1e3 * whole / count for whole, count in zip(run.seconds, tokens)]
        return [1e3 * median(values[args.warmup :]) for values in (run.seconds, run.rollout, rest, cost)]

    calls = {name: lambda setting=setting: measure(setting) for name, setting in settings.items()}
    columns = {name: list(zip(*rounds)) for name, rounds in in_turn(calls, args.rounds).items()}
    which = 3 if per_token else 0
    first = next(iter(columns.values()))[which]
    rows = [(name, *map(spread, values), ratio(values[which], first)) for name, values in columns.items()]
    header = ("", "ms per update", "rollout", "the rest", "microseconds per response token", "ratio")
    print_table(title, header, rows)


def section_scripts(args, scratch):
    settings = {f"`{script}`": dict(script=script) for script in SCRIPTS}
    compare_runs("**scripts**: default flags, 256 responses per update", settings, args, scratch)
    if args.rollout_model:
        sizes = dict(model=args.rollout_model, batch_size=args.rollout_responses, response_length=args.rollout_length)
        settings = {
            f"`{script}`, {dtype}": dict(script=script, dtype=dtype, micro_batch_size=16, eval_size=4, **sizes)
            for dtype in ("float32", "bfloat16")
            for script in (SCRIPTS[1], SCRIPTS[2], SCRIPTS[0])
        }
        title = f"**scripts** on {Path(args.rollout_model).name}: {args.rollout_responses} responses per update"
        compare_runs(f"{title} of up to {args.rollout_length} tokens to prompts of `sort`", settings, args, scratch)


def profile_script(name, args, scratch):
    """Run a script under a profiler.

    Returns:
        Milliseconds per update, and a function from names FILE.py:NAME to the share of the time in these functions and
        what they call, in percent; with `caller`, of their calls from that function alone.
    """
    script = importlib.import_module(name)
    flags = dict(output_dir=f"{scratch}/{name}", device="cpu", eval_every=0, eval_size=1, save_every=0)
    flags["total_episodes"] = 256 * (args.warmup + args.updates)
    profiler = cProfile.Profile()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        profiler.runcall(script.main, script.Args(**script.TINY | flags))
    total = sum(event.value for event in read_events(flags["output_dir"])[1].Scalars("time/iteration_seconds"))
    stats = {  # seconds with all that it calls, in all and by caller
        f"{Path(path).name}:{function}": (row[3], {key[2]: calls[3] for key, calls in row[4].items()})
        for (path, _, function), row in pstats.Stats(profiler).stats.items()
        if Path(path).name in ("common.py", f"{name}.py", "_tensor.py", "adamw.py")
    }

    def share(*functions, caller=None):
        found = [stats[function] for function in functions if function in stats]
        return 100 * sum(by_caller.get(caller, 0) if caller else whole for whole, by_caller in found) / total

    return 1e3 * total / (args.warmup + args.updates), share


def section_profile(args, scratch):
    for name in [Path(script).stem for script in SCRIPTS]:
        milliseconds, share = profile_script(name, args, scratch)
        decoder = share("common.py:__init__", "common.py:step")
        logprobs = share("common.py:batched_logprobs")
        values = share("common.py:in_micro_batches") - logprobs
        parts = {
            "rollout, passes of the model": decoder,
            "rollout, sampling and the rest": share("common.py:rollout") - decoder,
            "passes of policy and reference without gradient": logprobs,
        }
        if name == "reinforce_lm":
            parts["forward pass of the loss"] = share("common.py:policy_logprobs", caller="main")
            parts["backward pass"] = share("_tensor.py:backward")
        else:
            parts["passes of the critic without gradient"] = values
        if name == "ppo_lm":
            parts["forward passes of the policy's loss"] = share("common.py:policy_logprobs", caller="main")
            parts["forward passes of the critic's loss"] = share("ppo_lm.py:forward") - values
            parts["backward passes of both"] = share("_tensor.py:backward")
        if name == "trpo_lm":
            parts["gradient of the surrogate"] = share("trpo_lm.py:surrogate_gradient")
            parts["Fisher products"] = share("trpo_lm.py:fisher_vector_product")
            parts["x'Fx on the whole batch"] = share("trpo_lm.py:fisher_quadratic_form")
            parts["line search"] = share("trpo_lm.py:line_search")
            parts["forward passes of the critic's loss"] = share("trpo_lm.py:forward") - values
            parts["backward passes of the critic's loss"] = share("_tensor.py:backward")
        parts["clipping and optimizers"] = share("common.py:clip_gradients", "adamw.py:step")
        parts["texts and rewards"] = share("common.py:decode", "common.py:score_responses")
        parts["all else"] = 100 - sum(parts.values())
        title = f"**profile**: `{name}.py`, default flags, {milliseconds:.0f} ms per update under the profiler"
        print_table(title, ("", "share"), [(part, f"{percent:.0f} %") for part, percent in parts.items()])


def section_scaling(args, scratch):
    whole = dict(script="reinforce_lm.py", micro_batch_size=4096, rollout_batch_size=4096)
    settings = {f"{size} responses": whole | dict(batch_size=size) for size in (64, 256, 1024, 4096)}
    title = "**scaling**: `reinforce_lm.py` by responses per update, in one pass; the ratio compares costs of a token"
    compare_runs(title, settings, args, scratch, per_token=True)


def section_ranks(args, scratch):
    processes = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 1)}
    settings = {name: dict(script=SCRIPTS[0], ranks=ranks, threads=n) for name, (ranks, n) in processes.items()}
    compare_runs("**ranks**: `reinforce_lm.py`, 256 responses per update in all", settings, args, scratch)


def section_gpu(args, scratch):
    import gpu  # benchmark/gpu.py

    gpu.measure(args, scratch)


def main(args):
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    packages = [name for name in ("torch", "transformers", "trl") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"Python {sys.version.split()[0]}, {versions}, {torch.get_num_threads()} CPU threads, {time.strftime('%F')}")
    for section in args.sections:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                globals()[f"section_{section}"](args, scratch)
            except RuntimeError as error:
                sys.exit(f"error: --sections {section}: {error}")


if __name__ == "__main__":
    main(parse_args())
