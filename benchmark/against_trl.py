"""reinforce_lm.py beside TRL's RLOOTrainer and GRPOTrainer: scores, seconds per update, and memory.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/against_trl.py --model DIR --dataset FILE --reward FILE.py:function --learning-rate 5e-5

All have the same model, prompts, reward, batches and weight of the KL, and run in processes of their own, in turn,
A B C A B C, once for each seed. Scores are means of the sampled responses in each quarter of the updates; seconds
are medians of the updates, from end to end. Adapters, with `--lora-ranks 0 8`, learn at ten times the rate.
"""

import concurrent.futures
import contextlib
import functools
import io
import itertools
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import reinforce_lm

import throughput
import torch
import tyro
from transformers import TrainerCallback


@dataclass
class Args:
    model: str = "tiny"  # folder of a causal language model
    dataset: str = "sort"  # prompts, as in the scripts
    reward: str = "match"  # as in the scripts
    dtype: str = "float32"  # precision of passes, float32 or bfloat16
    device: str = "cpu"  # cpu or cuda
    contestants: tuple[str, ...] = ("reinforce_lm.py", "RLOO", "GRPO")  # what to train
    lora_ranks: tuple[int, ...] = (0,)  # ranks of adapters; 0 trains all weights
    learning_rate: float = 2e-5  # for all weights; falls to 0
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds
    updates: int = 20  # updates of a run
    batch_size: int = 32  # responses per update, 4 to a prompt
    rows_per_pass: int = 16  # of them that TRL runs at once; reinforce_lm.py has its own default
    response_length: int = 24  # longest response, in tokens
    kl_ref_coef: float = 0.05  # weight of the KL penalty to the reference


class Clock(TrainerCallback):
    """The times at which training began and at which each update of a trainer ended."""

    def on_train_begin(self, *_, **__):
        self.times = [*getattr(self, "times", []), (time.perf_counter(), time.process_time())]

    on_step_end = on_train_begin


def train_trl(name, flags, args):
    """Train with a trainer of TRL, "RLOO" or "GRPO", in this process."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    flags = reinforce_lm.Args(**flags)
    tokenizer, rows, _ = common.load_prompts(flags, 1)
    score_responses = common.load_reward(flags, torch.device(args.device), rows)
    columns = [name for name in rows[0] if name != "input_ids"]

    def reward(prompts, completions, **others):
        values = zip(*[{**others, "prompt": prompts}[column] for column in columns])
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return score_responses([dict(zip(columns, row)) for row in values], texts, {})[0].tolist()

    # As close to reinforce_lm.py as the trainers allow. Each update generates a batch that only it uses.
    passes = max(1, args.batch_size // args.rows_per_pass)
    settings = dict(per_device_train_batch_size=args.batch_size // passes, gradient_accumulation_steps=passes)
    settings |= dict(steps_per_generation=passes, num_generations=4, num_iterations=1, beta=args.kl_ref_coef)
    settings |= dict(max_completion_length=args.response_length, temperature=1.0, top_k=0, top_p=1.0)
    settings |= dict(learning_rate=flags.learning_rate, max_steps=args.updates, seed=flags.seed, max_grad_norm=1.0)
    settings |= dict(lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, disable_dropout=True)
    settings |= dict(bf16=args.dtype == "bfloat16", gradient_checkpointing=False, report_to="none")
    settings |= dict(logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=args.device == "cpu")
    adapters = LoraConfig(r=flags.lora_rank, lora_alpha=32, target_modules="all-linear") if flags.lora_rank else None
    data, clock = Dataset.from_list([{column: row[column] for column in columns} for row in rows]), Clock()
    data = dict(train_dataset=data, reward_funcs=reward, processing_class=tokenizer, callbacks=[clock])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        common.load_policy(replace(flags, lora_rank=0), tokenizer, rows).save_pretrained(folder)  # `tiny` is no file
        config = getattr(trl, f"{name}Config")(output_dir=folder, **settings)
        trainer = getattr(trl, f"{name}Trainer")(folder, args=config, peft_config=adapters, **data)
        trainer.train()
    seconds, cpu_seconds = zip(*[(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(clock.times)])
    scores = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return SimpleNamespace(
        seconds=seconds, cpu_seconds=cpu_seconds, scores=scores, gib=throughput.peak_gib(args.device)
    )


def train(name, lora_rank, seeds, args):
    """Train in a process of its own, with the next seed: {column of a table: figure}."""
    flags = {flag: getattr(args, flag) for flag in "model dataset reward dtype kl_ref_coef batch_size".split()}
    flags |= dict(response_length=args.response_length, device=args.device, eval_every=0, eval_size=8, seed=next(seeds))
    flags |= dict(lora_rank=lora_rank, learning_rate=args.learning_rate * (10 if lora_rank else 1))
    if name.endswith(".py"):
        run = throughput.run_script(name, total_episodes=args.updates * args.batch_size, **flags)
        run.scores = [*run.metrics["objective/score"].values()]
    else:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
            run = executor.submit(train_trl, name, flags, args).result()
    quarters = [run.scores[i * args.updates // 4 : (i + 1) * args.updates // 4] for i in range(4)]
    figures = {"CPU s": median(run.cpu_seconds), "s": median(run.seconds), "s in all": sum(run.seconds)}
    figures |= {f"score, quarter {i}": mean(scores) for i, scores in enumerate(quarters, 1)}
    return figures | {"peak GiB": run.gib}


def main(args):
    calls = {}
    for lora_rank, name in itertools.product(args.lora_ranks, args.contestants):
        title = f"{name}, rank {lora_rank}" if lora_rank else name
        calls[title] = functools.partial(train, name, lora_rank, itertools.cycle(args.seeds), args)
    throughput.compare(f"TRL, {args}", calls, len(args.seeds))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
