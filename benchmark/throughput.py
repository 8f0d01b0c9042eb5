"""What the other scripts of this folder measure with: passes, rollouts and runs, each in a process of its own.

CPU seconds, of all threads, depend less than seconds on what else the machine does.
"""

import atexit
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
# What can be measured: "update" or "rollout"; flags of the script; operations per second of a product.
CASE = dict(what="update", model="", dtype="float32", device="cpu", repeats=1, flags={}, rate=1.0)
# Tokens, all random, of the longest. The shortest prompt has a quarter; the lengths of responses are exponential, so
# that a third of the columns is real. With `fixed` all have full length. samples: responses to a prompt.
CASE |= dict(responses=64, samples=8, prompt_length=16, response_length=64, fixed=False)


def run_case(tree, case):
    """`measure` a case with the code of `tree`, in a process of its own."""
    result = subprocess.run([sys.executable, __file__, str(tree), json.dumps(case)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr.strip()[-300:])
    return json.loads(result.stdout.splitlines()[-1])


def install(plain=SummaryWriter.add_scalar):
    """In the process of a script: print what it logs, when, and at its end the peak of memory."""

    def record(writer, name, value, step):
        print("record", json.dumps([name, float(value), step, time.perf_counter(), time.process_time()]))
        plain(writer, name, value, step)

    SummaryWriter.add_scalar = record
    atexit.register(lambda: print("peak", peak_gib("cuda" if torch.cuda.is_initialized() else "cpu")))


START = "import common, runpy, sys; _, folder, module, *sys.argv = sys.argv; sys.path.append(folder)\n"
START += "__import__(module).install(); runpy.run_path(sys.argv[0], run_name='__main__')"


def run_script(script, *more, tree=ROOT, module="throughput", **flags):
    """Run a script in a process of its own, after `install` of a module of this folder.

    Returns a namespace: `seconds` and `cpu_seconds` of each iteration, from end to end but without evaluations;
    `metrics`, {name: {episode: value}}; `gib`, peak memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", START, str(ROOT / "benchmark"), module, script]
        flags = {"output_dir": folder, "save_every": 0} | flags
        command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}  # each common.py sets its own
        result = subprocess.run([*command, *more], cwd=tree, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{script}: {result.stderr.strip()[-300:]}")
    metrics, updates, mark = {}, [], None
    for line in re.findall("^record (.*)", result.stdout, re.M):
        name, value, episode, *clocks = json.loads(line)
        metrics.setdefault(name, {})[episode] = value
        if name == "time/iteration_seconds":
            updates.append([now - before for now, before in zip(clocks, mark)])
        if name.startswith(("time/iteration", "eval/")):
            mark = clocks
    seconds, cpu_seconds = zip(*updates)
    gib = float(re.search("^peak (.*)", result.stdout, re.M)[1])
    return SimpleNamespace(seconds=seconds, cpu_seconds=cpu_seconds, metrics=metrics, gib=gib)


def reset_peak(device):
    """Free what PyTorch holds, and measure the peak of memory anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device):
    """Peak of memory: what PyTorch allocated on the GPU, or else the resident memory of this process, on Linux."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else "VmHWM: 0"
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def timed(call, device, repeats=1):
    """Medians of the seconds and CPU seconds of a call; and the seconds of one before them."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter(), time.process_time()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        if len(times) == 1:
            reset_peak(device)
    return *map(median, zip(*times[1:])), times[0][0]


def random_model(folder, *shape):
    """Save a Qwen2 with random weights, in which one token in a hundred ends a response, and a tokenizer of digits."""
    import common

    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    torch.manual_seed(1)
    config = Qwen2Config(**dict(zip(names.split(), shape)), max_position_embeddings=4096, tie_word_embeddings=True)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[*range(0, shape[-1], 100)], pad_token_id=0)
    for part in (model, common.load_tokenizer("tiny", [{"prompt": "0123456789"}])):
        part.save_pretrained(folder)
    return str(folder)


def random_batch(case, vocab_size):
    """Rows with prompts (N), and a batch: sequences, their mask (B, P+R), and the response mask (B, R)."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(case.prompt_length * 3 // 4 + 1, (case.responses // case.samples, 1), generator=generator)
    prompt_mask = torch.arange(case.prompt_length) >= starts * (not case.fixed)  # (N, P)
    rank = (torch.randperm(case.responses, generator=generator) + 0.5) / case.responses  # (B,)
    share = torch.ones_like(rank) if case.fixed else -0.35 * rank.log()  # (B,)
    ends = (case.response_length * share).ceil().clamp(1, case.response_length)  # (B,)
    masks = prompt_mask, torch.arange(case.response_length) < ends[:, None]  # (N, P), (B, R)
    ids = [torch.randint(1, vocab_size, mask.shape, generator=generator).where(mask, 0) for mask in masks]
    rows = [{"input_ids": prompt[mask].tolist()} for prompt, mask in zip(ids[0], prompt_mask)]
    batch = [torch.cat([p.repeat_interleave(case.samples, 0), r], 1) for p, r in (ids, masks)]
    return rows, [tensor.to(case.device) for tensor in (*batch, masks[1])]


def measure(case):
    """Measure a case in this process, with the tree that is first on the path: {column of a table: figure}.

    "Of a product's rate" counts prompts once, responses without their last token. Norms should be those of other trees.
    """
    import common
    import reinforce_lm

    case = SimpleNamespace(**CASE | case)
    reset_peak(case.device)
    is_old = hasattr(common, "policy_logprobs")  # commit fad5699 and before
    flags = dict(model=case.model, dtype=case.dtype, device=case.device, samples_per_prompt=case.samples)
    args = reinforce_lm.Args(response_length=case.response_length, **flags, **case.flags)
    *_, device, args = (*common.start_ranks(args.device), args) if is_old else common.start_ranks(args)
    ids = [0] * case.prompt_length
    policy = common.load_policy(args, None, [ids] if is_old else [{"input_ids": ids}]).to(device)
    rows, batch = random_batch(case, policy.config.vocab_size)
    end_ids = [-1] if case.fixed else [*range(0, policy.config.vocab_size, 100)]
    found = SimpleNamespace(tokens=batch[2].sum().item())

    def update():
        indices = torch.arange(case.responses, device=device)
        groups = (indices, batch[2]) if is_old else (indices.view(-1, case.samples), batch[1])
        for part in common.micro_batches_of(*groups, args):
            *inputs, mask = [tensor[part] for tensor in batch]
            module, masks = (common, []) if is_old else (reinforce_lm, [mask])
            logprobs, _ = module.policy_logprobs(policy, *inputs, *masks, args)
            (logprobs.where(mask, 0.0).sum() / case.responses).backward()
        found.norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None]).item()
        policy.zero_grad()

    def rollout():
        settings = dict(samples_per_prompt=case.samples, generator=torch.Generator(device).manual_seed(1))
        tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids))  # texts are not measured
        if is_old:
            prompts = common.Prompts(rows, [row["input_ids"] for row in rows]).padded(device)
            responses, mask, _ = common.rollout(policy, *prompts, end_ids, args, **settings)
            common.decode(tokenizer, responses, mask)
        else:
            mask = common.sample(policy, tokenizer, end_ids, args, rows, **settings)[2]
        found.tokens = mask.sum().item()

    if case.what == "update":
        policy = common.prepare(policy, device, args)
    elif is_old:  # which samples with rounded weights
        policy.to(getattr(torch, case.dtype))
    seconds, cpu_seconds, first = timed({"update": update, "rollout": rollout}[case.what], device.type, case.repeats)
    times = {"s": seconds, "first call, s": first} if device.type == "cuda" else {"CPU s": cpu_seconds, "s": seconds}
    figures = times | {"response tokens/s": found.tokens / seconds, "peak GiB": peak_gib(device.type)}
    if case.what == "update":  # six operations per parameter and token
        real = found.tokens - case.responses + sum(len(row["input_ids"]) for row in rows)
        rate = 6 * policy.num_parameters() * real / seconds / case.rate
        figures |= {"of a product's rate": rate, "norm of the gradient": found.norm}
    return figures


def compare(title, calls, rounds=1):
    """Call each of `calls`, {name: function -> {column: figure}}, in turn, `rounds` times, and print a table.

    Cells hold the figures of all rounds; a ratio is the median of the ratios of the first figure to the first row's.
    Rows are printed when they are measured for the last time. What fails is a row, too.
    """
    results, first = {name: [] for name in calls}, None
    for name, call in [*calls.items()] * rounds:
        try:
            results[name].append(call())
        except Exception as error:
            print(f"| {name} | failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]} |", flush=True)
            continue
        columns = {column: [result[column] for result in results[name]] for column in results[name][0]}
        key = next(iter(columns.values()))
        if len(key) == rounds:
            if not first:
                first = key
                print(f"\n{title}\n\n| | {' | '.join(columns)} | ratio |\n|{' --- |' * (len(columns) + 2)}")
            ratio = median(value / (other or float("nan")) for value, other in zip(key, first))
            cells = [", ".join(f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in each) for each in columns.values()]
            print(f"| {' | '.join([name, *cells, f'{ratio:.2f}'])} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    print(json.dumps(measure(json.loads(sys.argv[2]))))
