"""What one GPU does, in two calls of at most ten minutes, or, on smaller models, a CPU.

    git worktree add ../older fad5699
    python benchmark/gpu.py --baseline-tree ../older --parts card correctness steps rollout update
    python benchmark/gpu.py --parts scripts trl adapters

Rows are printed when they are measured, so that a time limit loses only what comes after it. The baseline is another
tree of this project, commit fad5699 or later. A ratio is that of the first figure to the first row's. Parts:

- card: a copy, read and written, and a matrix product, as this card does them.
- correctness: gradients and Fisher products against float32 on the CPU; greedy tokens with and without a CUDA graph.
- steps: one more token of each row: the pass of the model, as a CUDA graph, and the sampling from its logits, as in
  `common.rollout`; then with one attention mask for all layers, with layers compiled, with the sampling compiled.
- rollout: responses of full length, and ragged ones, of which one token in a hundred is the last.
- update: forward and backward passes over ragged responses, of which a third of the columns is real.
- scripts: a whole iteration of each script on prompts of `sort`, alone on the card; on a CPU, of its default run.
- trl: four updates of reinforce_lm.py beside TRL's (pip install -r benchmark/requirements.txt).
- adapters: a whole iteration of each script with --lora-rank 8, of a model in the shape of Qwen2.5 7B.
"""

import functools
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are files
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import reinforce_lm
import trpo_lm

import against_trl
import throughput
import torch
import transformers
import tyro

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANGES = "pass", "pass, one mask", "pass, one mask, compiled layers", "sampling", "sampling, compiled"
# For `throughput.random_model`: Qwen2.5 0.5B and 7B, one for a CPU, and one to try the code.
QWEN, QWEN_7B = (896, 24, 14, 2, 4864, 151_936), (3584, 28, 28, 4, 18_944, 152_064)
TWO_LAYERS, SMALL = (192, 2, 6, 2, 512, 50_257), (64, 2, 4, 2, 128, 512)


@dataclass
class Args:
    parts: tuple[str, ...] = ("card", "correctness", "steps", "rollout", "update", "scripts")  # what to measure
    baseline_tree: str = ""  # folder of another tree, to compare rollouts, updates and scripts with
    model: str = ""  # update: folder of a model; random weights without
    rounds: int = 1  # rollout, update, scripts: times that all is measured, in turn, A B A B ...
    small: bool = False  # a tiny shape, on a CPU too, to try the code


def load(folder, device=DEVICE, **flags):
    """A policy as the scripts load it, and their flags."""
    args = reinforce_lm.Args(model=folder, **flags)
    return common.load_policy(args, None, [{"input_ids": [0]}]).to(device), args


# ===== card, correctness =====
def product_rate(dtype=torch.bfloat16):
    """Operations per second of a matrix product, of float32 in TF32."""
    size = 8192 if DEVICE == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
    return 2 * size**3 / throughput.timed(lambda: a @ b, DEVICE, 10)[0]


def part_card(args, sizes, folder):
    numbers, copied = torch.empty(2, 2**29 if DEVICE == "cuda" else 2**22, device=DEVICE)  # 2 GiB each
    rates = {"copy, TB/s": 2 * numbers.nbytes / throughput.timed(lambda: copied.copy_(numbers), DEVICE, 10)[0] / 1e12}
    rates |= {"bfloat16, TFLOP/s": product_rate() / 1e12, "TF32, TFLOP/s": product_rate(torch.float32) / 1e12}
    throughput.compare("card", {"": lambda: rates})


def part_correctness(args, sizes, folder):
    folder = throughput.random_model(f"{folder}/correctness", *SMALL)
    case = throughput.CASE | dict(responses=32, response_length=32, prompt_length=32)
    _, batch = throughput.random_batch(SimpleNamespace(**case), SMALL[-1])  # on the CPU

    def gradients(device, dtype):
        """The gradient of the mean log-probability, and, in float32 as in TRPO, a Fisher product of it."""
        policy, flags = load(folder, device, response_length=32, dtype=dtype)
        inputs, rows = [tensor.to(device) for tensor in batch], [torch.arange(32, device=device)]
        (reinforce_lm.policy_logprobs(policy, *inputs, flags)[0].sum() / batch[2].sum()).backward()
        gradient, flags.dtype = trpo_lm.take_gradient(policy), "float32"
        return gradient.cpu(), trpo_lm.fisher_vector_product(gradient, policy, inputs, rows, flags).cpu()

    def errors(dtype):
        pairs, results = zip(gradients(DEVICE, dtype), gradients("cpu", "float32")), []
        relative = [((found - exact).norm() / exact.norm()).item() for found, exact in pairs]
        for cuda_graph in (True, False):
            policy, flags = load(folder, response_length=64, dtype=dtype, cuda_graph=cuda_graph)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
                prompts = [tensor[:, :32].to(DEVICE) for tensor in batch[:2]]
                results.append(common.rollout(policy, *prompts, [-1], flags, greedy=True)[0])
        equal = (results[0] == results[1]).cumprod(1).float().mean().item()
        return dict(zip(("error of the gradient", "of a Fisher product"), relative)) | {"equal tokens": equal}

    calls = {dtype: functools.partial(errors, dtype) for dtype in ("float32", "bfloat16")}
    throughput.compare("correctness, float32 with TF32", calls)


# ===== steps =====
def one_token_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of one token: the heads that share keys and values become its queries, so that none is copied."""
    packed = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    out = torch.nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(len(query), 1, query.shape[1], -1), None


def token_pass(folder, rows, sizes, change):
    """Run prompts, and return the pass of one token of each row after them: a function () -> logits (b, V)."""
    policy, _ = load(folder)
    length, size = sizes["prompt_length"], sizes["prompt_length"] + sizes["response_length"]
    prompts = torch.arange(rows // 8 * length, device=DEVICE).view(-1, length) % policy.config.vocab_size
    cache = transformers.Cache([common.FixedLayer(size) for _ in policy.model.layers])
    mask = torch.ones(rows, size, dtype=torch.long, device=DEVICE)  # (b, P+R)
    settings = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
    policy(prompts, attention_mask=mask[: len(prompts)], **settings)
    cache.reorder_cache(torch.arange(rows, device=DEVICE) // 8)
    inputs = prompts[:, -1:].repeat_interleave(8, 0)  # (b, 1)
    positions, column = torch.full_like(inputs, length), cache.layers[0].cumulative_length.view(1)  # (b, 1), (1,)
    if change != "pass":
        mask = torch.full((rows, 1, 1, size), -torch.inf, dtype=cache.layers[0].keys.dtype, device=DEVICE)
        mask[..., :length] = 0.0
    if change == "pass, one mask, compiled layers":
        transformers.AttentionInterface.register("one_token", one_token_attention)
        policy.set_attn_implementation("one_token")
        torch._dynamo.config.allow_unspec_int_on_nn_module = True  # or each layer would be compiled, for its number
        settings = dict(use_cache=False, logits_to_keep=1)

        def forward(compiled, own, hidden, past_key_values, **others):
            return compiled(hidden, past_key_values=own, **others)

        for layer, kept in zip(policy.model.layers, cache.layers):
            for part in (*layer.self_attn.children(), *layer.mlp.children()):
                part.bfloat16()  # here, or a compiled layer would round its weights in each pass
            compiled = torch.compile(layer.forward, dynamic=False)
            layer.forward = functools.partial(forward, compiled, kept)

    def run():
        if change != "pass":
            mask.index_fill_(3, column, 0.0)
        return policy(inputs, attention_mask=mask, position_ids=positions, **settings).logits[:, -1]

    return run


def sampled(logits, noise):
    """A token of each row and its log-probability, as in `common.rollout`: (b, V), (b, V) -> (b, 1), (b,)."""
    step_logprobs = (logits / 1.0).log_softmax(-1)
    tokens = (step_logprobs.exp() / noise).argmax(-1, keepdim=True)
    return tokens, step_logprobs.gather(1, tokens)[:, 0]


@torch.no_grad()
def step(folder, rows, sizes, change, kept):
    """Figures of a pass, or of sampling from the logits of the first pass, `kept`."""
    throughput.reset_peak(DEVICE)
    start, repeats = time.perf_counter(), sizes["response_length"] // 4
    with torch.autocast(DEVICE, torch.bfloat16):
        if "pass" in change:
            call = token_pass(folder, rows, sizes, change)
            kept.append(call().clone())
            call()  # first passes can't be recorded
            if DEVICE == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
                call = graph.replay
        else:
            function = torch.compile(sampled, dynamic=False) if "compiled" in change else sampled
            call = functools.partial(lambda x: function(x, torch.empty_like(x).exponential_()), kept[0])
        call()
        begin = time.perf_counter() - start
        ms = 1e3 * throughput.timed(lambda: [call() for _ in range(repeats)], DEVICE)[0] / repeats
        with torch.profiler.profile() as profiler:
            throughput.timed(call, DEVICE)  # twice
    kind = getattr(torch.autograd.DeviceType, DEVICE.upper())
    kernels = sum(event.count for event in profiler.key_averages() if event.device_type == kind) / 2
    figures = {"ms": ms, "kernels": kernels, "us per kernel": 1e3 * ms / kernels, "s to begin": begin}
    figures["peak GiB"] = throughput.peak_gib(DEVICE)
    return figures | {"logits differ by": (kept[-1] - kept[0]).abs().max().item()}


def part_steps(args, sizes, folder):
    for rows in (sizes["responses"], 8 * sizes["responses"]):
        kept = []
        calls = {change: functools.partial(step, folder, rows, sizes, change, kept) for change in CHANGES}
        throughput.compare(f"steps: {rows:,} rows", calls)


# ===== rollout, update, scripts, trl, adapters =====
def compare_cases(title, ours, baseline, args):
    """`throughput.compare` {name: case} of this tree and of the baseline, if there is one."""
    calls = {f"baseline, {name}": (args.baseline_tree, case) for name, case in baseline.items() if args.baseline_tree}
    calls |= {name: (throughput.ROOT, case) for name, case in ours.items()}
    calls = {name: functools.partial(throughput.run_case, *call) for name, call in calls.items()}
    throughput.compare(title, calls, args.rounds)


def part_rollout(args, sizes, folder):
    many, case = {"responses": 8 * sizes["responses"]}, sizes | dict(what="rollout", model=folder, dtype="bfloat16")
    baseline = {"full length": case | {"fixed": True}, "ragged": case}
    ours = baseline | {f"{name}, 8 times as many": case | many for name, case in baseline.items()}
    ours["ragged, 8 times as many, all at once"] = case | many | {"flags": {"rollout_tokens": 2**30}}
    compare_cases(f"rollout, {case}", ours, baseline, args)


def part_update(args, sizes, folder):
    old, new = ((16, 64), (4096, 16384, 32768)) if DEVICE == "cuda" else ((8,), (1024, 256))  # the defaults come first
    for dtype in ("bfloat16", "float32"):
        case = sizes | dict(model=args.model or folder, dtype=dtype, rate=product_rate(getattr(torch, dtype)))
        baseline = {f"--micro-batch-size {n}": case | dict(flags=dict(micro_batch_size=n)) for n in old}
        ours = {f"--micro-batch-tokens {n}": case | dict(flags=dict(micro_batch_tokens=n)) for n in new}
        compare_cases(f"update, {case}", ours, baseline, args)


def part_scripts(args, sizes, folder, **more):
    skip, flags = 5, dict(total_episodes=35 * 256)  # `sort`
    if DEVICE == "cuda" or args.small:
        skip, rows = 1, sizes["responses"]
        flags = dict(model=folder, samples_per_prompt=8, batch_size=rows, total_episodes=3 * rows, eval_size=8)
        flags |= dict(dtype="bfloat16", response_length=sizes["response_length"]) | more

    def iteration(tree, script):  # from end to end, without evaluations
        run = throughput.run_script(script, tree=tree, eval_every=0, device=DEVICE, **flags)
        figures = {"CPU s": run.cpu_seconds} if DEVICE == "cpu" else {}
        figures |= {"s": run.seconds, "rollout, s": [*run.metrics["time/rollout_seconds"].values()]}
        return {name: median(values[skip:]) for name, values in figures.items()} | {"peak GiB": run.gib}

    trees = {"baseline": args.baseline_tree, "this tree": throughput.ROOT}
    for script in ("reinforce_lm.py", "ppo_lm.py", "trpo_lm.py"):
        calls = {name: functools.partial(iteration, tree, script) for name, tree in trees.items() if tree}
        throughput.compare(f"{script}, {flags}", calls, args.rounds)


def part_trl(args, sizes, folder):
    flags = dict(batch_size=sizes["responses"], response_length=sizes["response_length"], updates=4, seeds=(1,))
    against_trl.main(against_trl.Args(model=folder, dtype="bfloat16", device=DEVICE, **flags))


def part_adapters(args, sizes, folder):
    folder = throughput.random_model(f"{folder}/large", *(SMALL if args.small else QWEN_7B))
    part_scripts(args, sizes, folder, lora_rank=8)


def main(args):
    common.start_ranks(reinforce_lm.Args())  # as the scripts do: without cuDNN's attention, with TF32
    print(torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", torch.__version__, transformers.__version__)
    sizes = dict(responses=64, prompt_length=16, response_length=64, device=DEVICE)
    if args.small:
        sizes |= dict(responses=32, prompt_length=8, response_length=16)
    elif DEVICE == "cuda":
        sizes |= dict(responses=256, prompt_length=64, response_length=256, repeats=2)
    with tempfile.TemporaryDirectory() as folder:
        throughput.random_model(folder, *(SMALL if args.small else QWEN if DEVICE == "cuda" else TWO_LAYERS))
        for part in ",".join(args.parts).split(","):  # with or without commas
            start = time.perf_counter()
            globals()[f"part_{part}"](args, sizes, folder)
            throughput.reset_peak(DEVICE)  # frees memory for other processes
            print(f"\n({part}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
