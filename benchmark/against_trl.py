"""reinforce_lm.py beside TRL's RLOOTrainer and GRPOTrainer: scores by responses and seconds, speed, and memory.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/against_trl.py --model DIR --dataset FILE --reward FILE.py:function
    python benchmark/against_trl.py --batch-size 256 --micro-batch-size 256 --response-length 6 --learning-rates 2e-3

The second takes the task `sort` and a model of random weights. All have the same model, prompts, reward, batches and
weight of the KL, and run on the CPU in turn, A B C A B C, each in a process of its own: with every learning rate and
the first seed, then with the rate of the best last score and the other seeds. With `--lora-ranks 0 8` all weights come
first, then adapters at ten times the rates. Scores are means of the sampled responses in each quarter of a run, given
with the responses and seconds at its end; with more prompts than updates need, none was seen before. A row is printed
when its run ends; its ratio is that of CPU seconds per update to those of the last run of reinforce_lm.py.
"""

import concurrent.futures
import contextlib
import io
import itertools
import multiprocessing
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import reinforce_lm

import one_tree
import tyro
from transformers import TrainerCallback


@dataclass
class Args:
    model: str = "tiny"  # folder of a causal language model
    dataset: str = "sort"  # prompts, as in the scripts
    reward: str = "match"  # as in the scripts
    dtype: str = "float32"  # precision of passes, float32 or bfloat16
    contestants: tuple[str, ...] = ("reinforce_lm.py", "RLOO", "GRPO")  # what to train, in this order
    lora_ranks: tuple[int, ...] = (0,)  # ranks of adapters; 0 trains all weights
    learning_rates: tuple[float, ...] = (2e-5, 5e-5)  # to try, for all weights
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds
    updates: int = 20  # updates of a run; the learning rate falls to 0 over them
    batch_size: int = 32  # responses per update, 4 to a prompt
    response_length: int = 24  # longest response, in tokens
    kl_ref_coef: float = 0.05  # weight of the KL penalty to the reference
    micro_batch_size: int = 16  # responses per pass of TRL's trainers


class Clock(TrainerCallback):
    """The times at which training began and at which each update of a trainer ended."""

    def on_train_begin(self, *_, **__):
        self.times = [(time.perf_counter(), time.process_time())]

    def on_step_end(self, *_, **__):
        self.times.append((time.perf_counter(), time.process_time()))


def train_trl(name, flags, args):
    """Train with a trainer of TRL, "RLOO" or "GRPO", in this process; returns what `train` does."""
    warnings.simplefilter("ignore", FutureWarning)  # about names in the trainers' own code
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    flags = reinforce_lm.Args(**flags)
    tokenizer, rows, _ = common.load_prompts(flags, 1)
    score_responses, columns = common.load_reward(flags, "cpu", rows), [name for name in rows[0] if name != "input_ids"]

    def reward(prompts, completions, **others):
        values = zip(*[{**others, "prompt": prompts}[column] for column in columns])
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return score_responses([dict(zip(columns, row)) for row in values], texts, {})[0].tolist()

    # As close to reinforce_lm.py as the trainers allow. Their own defaults are bfloat16, gradient checkpointing and a
    # learning rate of 1e-6. Each update generates a batch that only it uses.
    passes = max(1, args.batch_size // args.micro_batch_size)
    settings = dict(per_device_train_batch_size=args.batch_size // passes, gradient_accumulation_steps=passes)
    settings |= dict(steps_per_generation=passes, num_generations=4, num_iterations=1, beta=args.kl_ref_coef)
    settings |= dict(max_completion_length=args.response_length, temperature=1.0, top_k=0, top_p=1.0)
    settings |= dict(learning_rate=flags.learning_rate, max_steps=args.updates, seed=flags.seed, max_grad_norm=1.0)
    settings |= dict(lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, disable_dropout=True)
    settings |= dict(bf16=args.dtype == "bfloat16", gradient_checkpointing=False, use_cpu=True, report_to="none")
    settings |= dict(logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    adapters = LoraConfig(r=flags.lora_rank, lora_alpha=32, target_modules="all-linear") if flags.lora_rank else None
    data, clock = Dataset.from_list([{column: row[column] for column in columns} for row in rows]), Clock()
    data = dict(train_dataset=data, reward_funcs=reward, processing_class=tokenizer, callbacks=[clock])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if args.model == "tiny":
            common.load_policy(replace(flags, lora_rank=0), tokenizer, rows).save_pretrained(folder)
        config = getattr(trl, f"{name}Config")(output_dir=folder, **settings)
        model = folder if args.model == "tiny" else args.model
        trainer = getattr(trl, f"{name}Trainer")(model, args=config, peft_config=adapters, **data)
        trainer.train()
    seconds, cpu_seconds = zip(*[(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(clock.times)])
    scores = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return SimpleNamespace(seconds=seconds, cpu_seconds=cpu_seconds, scores=scores, gib=one_tree.peak_gib("cpu"))


def train(name, args, **flags):
    """Train in a process of its own: `seconds`, `cpu_seconds` and `scores` of each update; `gib`, peak memory."""
    shared = "model dataset reward dtype response_length kl_ref_coef batch_size"
    flags |= {flag: getattr(args, flag) for flag in shared.split()} | dict(device="cpu", eval_every=0, eval_size=8)
    if name.endswith(".py"):
        run = one_tree.run_script(name, total_episodes=args.updates * args.batch_size, **flags)
        run.scores = list(run.metrics["objective/score"].values())
        return run
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(train_trl, name, flags, args).result()


def main(args):
    print(f"TRL {version('trl')}, {args.dtype}, medians of {args.updates} updates of {args.batch_size} responses\n")
    header = (
        "| | adapters | learning rate | seed | responses (seconds): score | s per update | CPU s | ratio | peak GiB |"
    )
    print(header, "|" + " --- |" * 9, sep="\n", flush=True)
    for lora_rank in args.lora_ranks:
        best, first = {}, None
        for seed, name in itertools.product(args.seeds, args.contestants):
            rates, last = [rate * (10 if lora_rank else 1) for rate in args.learning_rates], {}
            for rate in [best[name]] if name in best else rates:
                run, points = train(name, args, learning_rate=rate, seed=seed, lora_rank=lora_rank), []
                for end in range(args.updates // 4, args.updates + 1, args.updates // 4):
                    last[rate] = mean(run.scores[end - args.updates // 4 : end])
                    points.append(f"{end * args.batch_size} ({sum(run.seconds[:end]):.0f}): {last[rate]:.3f}")
                wall, cpu = median(run.seconds), median(run.cpu_seconds)
                first = cpu if name == args.contestants[0] else first
                settings = f"{name} | {lora_rank or 'none'} | {rate:g} | {seed} | {', '.join(points)}"
                print(f"| {settings} | {wall:.2f} | {cpu:.2f} | {cpu / first:.2f} | {run.gib:.2f} |", flush=True)
            best[name] = max(last, key=last.get)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
