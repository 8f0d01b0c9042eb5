"""Times updates, rollouts and scripts by the code of one tree of this project, this one or an older one.

    python benchmark/one_tree.py TREE '{"what": "update", "model": "DIR", "dtype": "bfloat16"}' ...

Each argument is a case: `CASE` with other values, for which a JSON line is printed when it is measured. The other
benchmarks run this in processes of its own, to compare trees and settings. All tokens are random.
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
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # of the processes that are started, as in common.py
ROOT = Path(__file__).resolve().parent.parent
# what: "update", forward and backward passes of a policy; "rollout"; or "generate", transformers'. model: a folder.
CASE = dict(what="update", model="", dtype="float32", device="cpu", repeats=1)
# Lengths are of the longest; the shortest prompt has a quarter. Responses are "exponential", a third of the columns is
# real; "linear", from an eighth to all; or "fixed", and so are prompts. samples: responses to a prompt.
CASE |= dict(responses=64, samples=8, prompt_length=16, response_length=64, lengths="exponential")
# flags: of the script, or of the GenerationConfig. compile: the layers. rate: operations of a product per second.
CASE |= dict(flags={}, compile=False, rate=0.0)
START = "import runpy, sys; _, folder, module, *sys.argv = sys.argv; sys.path.append(folder)\n"
START += "__import__(module).install(); runpy.run_path(sys.argv[0], run_name='__main__')"


def run_cases(tree, cases):
    """Measure cases with the code of `tree`, in one process of its own; yields the result of each."""
    command = [sys.executable, __file__, str(tree), *map(json.dumps, cases)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from (json.loads(line) for line in process.stdout if line.startswith("{"))


def install(plain=SummaryWriter.add_scalar):
    """In the process of a script: print what it logs, when, and at its end the peak of memory."""

    def record(writer, name, value, step):
        print("record", json.dumps([name, float(value), step, time.perf_counter(), time.process_time()]))
        plain(writer, name, value, step)

    SummaryWriter.add_scalar = record
    atexit.register(lambda: print("peak", peak_gib("cuda" if torch.cuda.is_initialized() else "cpu")))


def run_script(script, *more, tree=ROOT, module="one_tree", **flags):
    """Run a script of `tree` in a process of its own, after `install` of a module of this folder.

    Returns a namespace: `seconds` and `cpu_seconds` of each update, from end to end but without evaluations;
    `metrics`, {name: {episode: value}}; `gib`, peak memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", START, str(ROOT / "benchmark"), module, script]
        flags = {"output_dir": folder, "save_every": 0} | flags
        command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        result = subprocess.run([*command, *more], cwd=tree, capture_output=True, text=True)
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
    """Peak of memory: what PyTorch allocated on the GPU, or else, on Linux, the resident memory of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else "VmHWM: 0"
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def timed(call, device, repeats=1, warm_up=None):
    """Medians of the seconds and CPU seconds of a call; and the seconds of `warm_up`, or a call, before the first."""
    times = []
    for function in [warm_up or call] + [call] * repeats:
        start = time.perf_counter(), time.process_time()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        if len(times) == 1:
            reset_peak(device)
    return *map(median, zip(*times[1:])), times[0][0]


def random_model(folder, shape, device="cpu", eos_token_id=0):
    """Save a Qwen2 with random weights, and a tokenizer of digits, its first ids; the others have no text."""
    import common

    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    settings = dict(bos_token_id=0, eos_token_id=0, max_position_embeddings=4096, tie_word_embeddings=True)
    torch.manual_seed(1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**dict(zip(names.split(), shape)), **settings))
    model.generation_config = GenerationConfig(eos_token_id=eos_token_id, pad_token_id=0)
    for part in (model, common.load_tokenizer("tiny", [{"prompt": "0123456789"}])):
        part.save_pretrained(folder)
    return str(folder)


def random_batch(case, vocab_size):
    """Rows with prompts (N), and a batch: sequences, their mask (B, P+R), and the response mask (B, R)."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(case.prompt_length * 3 // 4 + 1, (case.responses // case.samples, 1), generator=generator)
    prompt_mask = torch.arange(case.prompt_length) >= starts * (case.lengths != "fixed")  # (N, P)
    share = (torch.randperm(case.responses, generator=generator) + 0.5) / case.responses  # (B,)
    share = {"fixed": share**0, "linear": 1 / 8 + 7 / 8 * share, "exponential": -0.35 * share.log()}[case.lengths]
    ends = (case.response_length * share).ceil().clamp(1, case.response_length)  # (B,)
    masks = prompt_mask, torch.arange(case.response_length) < ends[:, None]  # (N, P), (B, R)
    ids = [torch.randint(1, vocab_size, mask.shape, generator=generator).where(mask, 0) for mask in masks]
    rows = [{"input_ids": prompt[mask].tolist()} for prompt, mask in zip(ids[0], prompt_mask)]
    batch = [torch.cat([p.repeat_interleave(case.samples, 0), r], 1) for p, r in (ids, masks)]
    return rows, [tensor.to(case.device) for tensor in (*batch, masks[1])]


def compile_layers(policy, **settings):
    """Compile the layers of a policy; what is compiled serves all of them."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # or each layer would be compiled, for its number
    Cache.update = torch.compiler.disable(Cache.update)  # which looks layers up by number
    for layer in [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]:
        layer.forward = torch.compile(layer.forward, **settings)


def measure(case):
    """Measure a case in this process, with the tree that is first on the path: {column of a table: figure}.

    Tokens are real that are no padding, prompts once each. The norm of the gradient should be that of other trees.
    """
    import common
    import reinforce_lm

    case = SimpleNamespace(**CASE | case)
    reset_peak(case.device)
    is_old = hasattr(common, "policy_logprobs")  # commit fad5699 and before
    flags = dict(model=case.model, dtype=case.dtype, device=case.device, samples_per_prompt=case.samples)
    flags |= dict(response_length=case.response_length) | (case.flags if case.what != "generate" else {})
    args = reinforce_lm.Args(**flags)
    device, ids = common.start_ranks(args.device if is_old else args)[2], [0] * case.prompt_length
    policy = common.load_policy(args, None, [ids] if is_old else [{"input_ids": ids}]).to(device)
    rows, batch = random_batch(case, policy.config.vocab_size)
    ends = policy.generation_config.eos_token_id
    end_ids = [-1] if case.lengths == "fixed" else ends if isinstance(ends, list) else [ends]
    found = SimpleNamespace(tokens=batch[2].sum().item())

    def update(limit=None):
        found.computed, indices = 0, torch.arange(case.responses, device=device)
        groups = (indices, batch[2]) if is_old else (indices.view(-1, case.samples), batch[1])
        for part in common.micro_batches_of(*groups, args)[:limit]:
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
            mask = common.sample(policy, policy, tokenizer, end_ids, args, rows, **settings)[2]
        found.tokens = mask.sum().item()

    @torch.no_grad()
    def generate():
        settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=case.response_length)
        config = GenerationConfig(**settings, num_return_sequences=case.samples, pad_token_id=0, **case.flags)
        prompts = torch.tensor([row["input_ids"] for row in rows], device=device)
        policy.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)

    def count(embedding, inputs):
        found.computed += inputs[0].numel()

    call, warm_up = {"update": update, "rollout": rollout, "generate": generate}[case.what], None
    if case.what == "update":
        if case.compile:
            compile_layers(policy, dynamic=True)  # for all widths
        policy = common.prepare(policy, device, args)
        policy.get_input_embeddings().register_forward_pre_hook(count)
        warm_up = (lambda: update(1)) if device.type == "cpu" else None
    elif is_old or case.what == "generate":  # which sample with rounded weights
        policy = AutoModelForCausalLM.from_pretrained(case.model, dtype=getattr(torch, case.dtype)).to(device).eval()
        policy.generation_config.eos_token_id = None  # nothing ends a response of `generate`
    seconds, cpu_seconds, first = timed(call, device.type, case.repeats, warm_up)
    times = {"s": seconds, "first call, s": first} if device.type == "cuda" else {"CPU s": cpu_seconds, "s": seconds}
    figures = times | {"response tokens/s": found.tokens / seconds, "peak GiB": peak_gib(device.type)}
    if case.what == "update":
        real = found.tokens + sum(len(row["input_ids"]) for row in rows)
        figures |= {"real share of tokens": real / found.computed, "norm of the gradient": found.norm}
    if case.rate:
        figures["of a product's rate"] = 6 * policy.num_parameters() * real / seconds / case.rate
    return figures


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    for text in sys.argv[2:]:
        try:
            print(json.dumps(measure(json.loads(text))), flush=True)
        except Exception as error:  # such as too little memory
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}), flush=True)
