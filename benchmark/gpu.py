"""The section `gpu` of throughput.py: what a card can do, whether its results are right, how fast the scripts are.

Each row is printed when it is measured, the cheap ones first, so that a time limit loses only what comes after it.
Random weights in the shape of a Qwen2.5; prompts of 16 to 64 tokens, 8 responses to each, whose lengths differ, up to
`--gpu-length`. Shares are of the bandwidth and the matrix products that the part `card` measured in the same run.
"""

import contextlib
import gc
import importlib.util
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import common
import trpo_lm

import numpy as np
import throughput
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

QWEN2_SHAPES = {  # hidden size, layers, heads, key-value heads, intermediate size, vocabulary, tied embeddings
    "tiny": (64, 2, 4, 2, 128, 512, True),
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
}
SAMPLES, PROMPT_LENGTH = 8, 64


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def table(title, *header):
    print(f"\n**gpu**: {title}\n")
    row(*header)
    row(*["---"] * len(header))


def seconds_of(call, device, repeats):
    """Median seconds of a call, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def peak_gib(device):
    """GiB allocated at most since the last call; 0 on a CPU."""
    if device == "cpu":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def free(device):
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def tf32(enabled):
    """float32 matrix products of CUDA with TF32 or without."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def failure_is_a_row(name, device, width):
    """Whatever goes wrong inside becomes a row of `width` cells, with the peak of the memory."""
    try:
        yield
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        row(name, f"failed at {peak_gib(device):.1f} GiB: {message}", *[""] * (width - 2))
    free(device)


def flags_of(args, **changes):
    """The flags of a script that its passes read."""
    flags = dict(response_length=args.gpu_length, temperature=1.0, dtype="bfloat16", rollout_batch_size=2**20)
    flags |= dict(samples_per_prompt=SAMPLES, micro_batch_size=args.micro_batch_size, cuda_graph=True, seed=1)
    flags |= dict(activation_checkpointing=False, compile=False, lora_rank=0)
    return SimpleNamespace(**flags | changes)


def random_batch(args, vocab_size, num_prompts, response_length):
    """Ragged prompts (n, P) with their mask, and sequences (n k, P+R) with theirs, of random tokens."""
    torch.manual_seed(1)
    lengths = np.random.default_rng(1).integers(PROMPT_LENGTH // 4, PROMPT_LENGTH + 1, num_prompts)
    ids = [torch.randint(1, vocab_size, (length,)).tolist() for length in lengths]
    prompts, prompt_mask = common.Prompts(ids, ids).padded(args.device)
    num_rows = num_prompts * SAMPLES
    ends = torch.linspace(response_length / 8, response_length, num_rows)[torch.randperm(num_rows)].round().clamp(min=1)
    response_mask = (torch.arange(response_length) < ends[:, None]).to(args.device)
    responses = torch.randint(1, vocab_size, (num_rows, response_length)).to(args.device)
    sequences = torch.cat([prompts.repeat_interleave(SAMPLES, 0), responses], 1)
    attention_mask = torch.cat([prompt_mask.repeat_interleave(SAMPLES, 0), response_mask], 1)
    return prompts, prompt_mask, sequences, attention_mask


def checkpoint_of(shape, scratch, device):
    """Folder of a Qwen2 with random weights, and a file of prompts of digits.

    The tokenizer is one of digits: it knows the first eleven ids, and the text of the others is empty. One id in a
    hundred ends a response, so that their lengths differ.
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    size = dict(zip((*names, "vocab_size", "tie_word_embeddings"), QWEN2_SHAPES[shape]))
    tokenizer = common.character_tokenizer("0123456789")
    end = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(1)
    config = Qwen2Config(**size, **end, max_position_embeddings=4096)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[0, *range(100, size["vocab_size"], 100)], pad_token_id=0)
    model.save_pretrained(f"{scratch}/qwen2")
    tokenizer.save_pretrained(f"{scratch}/qwen2")
    random = np.random.default_rng(1)
    lengths = random.integers(PROMPT_LENGTH // 4, PROMPT_LENGTH + 1, 1024)
    texts = ["".join(map(str, random.integers(0, 10, length))) for length in lengths]
    rows = [json.dumps({"prompt": text, "reference": text}) + "\n" for text in texts]
    Path(scratch, "prompts.jsonl").write_text("".join(rows))
    return f"{scratch}/qwen2", f"{scratch}/prompts.jsonl"


# ===== card =====


def part_card(args, card, folder, dataset, scratch):
    """Fill `card` with bytes and operations per second."""
    on_cuda = args.device == "cuda"
    table("the card", "", "measured")
    numbers = torch.empty(2**29 if on_cuda else 2**22, device=args.device)  # 2 GiB
    copied = torch.empty_like(numbers)
    card["bandwidth"] = 2 * numbers.nbytes / seconds_of(lambda: copied.copy_(numbers), args.device, 5)
    row("copy, read and written", f"{card['bandwidth'] / 1e12:.2f} TB/s")
    numbers = copied = None
    free(args.device)
    size = 8192 if on_cuda else 256
    for name, dtype, enabled in (
        ("bfloat16", torch.bfloat16, False),
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
    ):
        a, b = torch.randn(2, size, size, device=args.device, dtype=dtype)
        with tf32(enabled):
            card[name] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, args.device, 5)
        row(f"matrix product, {name}", f"{card[name] / 1e12:.1f} TFLOP/s")


# ===== correctness =====


def relative(found, expected):
    return f"{(found - expected).norm().item() / expected.norm().item():.1e}"


def part_correctness(args, card, folder, dataset, scratch):
    table("correctness, a Qwen2 of 3M parameters", "", "relative error or gap")
    on_cpu, model = throughput.small_qwen2(2048), throughput.small_qwen2(2048).to(args.device)
    prompts, prompt_mask, sequences, attention_mask = random_batch(args, 2048, min(4, args.gpu_prompts), 32)
    response_mask = attention_mask[:, -32:]
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(response_mask.shape, generator=generator).to(args.device)
    v, w = torch.randn(2, on_cpu.num_parameters(), generator=generator)

    def passes(network, dtype="float32", vectors=True):
        """Gradient of a surrogate, F v and F w, on the CPU."""
        device = next(network.parameters()).device
        data = [tensor.to(device) for tensor in (sequences, attention_mask, response_mask)]
        flags, rows = flags_of(args, response_length=32, dtype=dtype), [torch.arange(len(sequences), device=device)]
        inputs = data, rows, advantages.to(device), advantages.to(device), response_mask.sum().to(device)
        gradient, _ = trpo_lm.surrogate_gradient(network, *inputs, flags)
        vectors = (v, w) if vectors else ()
        products = [trpo_lm.fisher_vector_product(x.to(device), network, data, rows, flags) for x in vectors]
        return [vector.cpu() for vector in (gradient, *products)]

    expected = passes(on_cpu)
    for name, enabled in (("float32", False), ("TF32", True)):
        with tf32(enabled):
            gradient, product, other = passes(model)
        row(f"gradient, {name}, against the CPU", relative(gradient, expected[0]))
        row(f"Fisher product, {name}, against the CPU", relative(product, expected[1]))
        asymmetry = abs((w @ product - v @ other) / (v @ product)).item()
        row(f"w'Fv - v'Fw, {name}, relative to v'Fv", f"{asymmetry:.1e}")
    row("gradient, bfloat16, against the CPU", relative(passes(model, "bfloat16", vectors=False)[0], expected[0]))

    def kl_of_a_step(network):
        device = next(network.parameters()).device
        data = [tensor.to(device) for tensor in (sequences, attention_mask, response_mask)]
        theta, rows = trpo_lm.flatten(network), [torch.arange(len(sequences), device=device)]
        step = expected[1].to(device) * (1e-3 * theta.norm() / expected[1].norm())
        inputs = network, theta, data, rows, advantages.to(device), response_mask.sum().to(device)
        trpo_lm.set_parameters(network, theta + step)
        kl = trpo_lm.surrogate_gain_and_kl(*inputs, flags_of(args, response_length=32, dtype="float32"))[1]
        trpo_lm.set_parameters(network, theta)
        return kl

    exact = kl_of_a_step(on_cpu)
    for name, enabled in (("float32", False), ("TF32", True)):
        with tf32(enabled):
            row(f"KL of a step of {exact:.4f} nats, {name}", f"{abs(kl_of_a_step(model) / exact - 1):.1e}")

    widths, bad = range(4, 257) if args.device == "cuda" else (4, 64, 100), []
    for width in widths:  # masked attention, whose gradient was NaN on some cards at some widths
        tokens = torch.randint(1, 2048, (4, width + 1)).to(args.device)
        mask = (torch.arange(width + 1) >= torch.arange(4)[:, None]).to(args.device)  # padding of 0 to 3 tokens
        logprobs, _ = common.policy_logprobs(model, tokens, mask, flags_of(args, response_length=1))
        logprobs.sum().backward()
        bad += [width] if not all(p.grad.isfinite().all() for p in model.parameters()) else []
        model.zero_grad()
    row(f"widths of {min(widths)} to {max(widths)} with a gradient that is not finite", bad or "none")

    sampler = common.copy_network(model, torch.bfloat16)
    for graph in (True, False) if args.device == "cuda" else (False,):
        flags = flags_of(args, response_length=64, cuda_graph=graph)
        responses, mask, logprobs = common.rollout(sampler, prompts, prompt_mask, [0], flags, SAMPLES)
        batch = torch.cat([prompts.repeat_interleave(SAMPLES, 0), responses], 1)
        batch_mask = torch.cat([prompt_mask.repeat_interleave(SAMPLES, 0), mask], 1)
        scored, _ = common.policy_logprobs(model, batch, batch_mask, flags)
        gap = common.mean((scored - logprobs).abs().detach(), mask).item()
        row(f"sampler gap in nats, bfloat16, {'with' if graph else 'without'} a CUDA graph", f"{gap:.1e}")


# ===== rollout =====


def part_rollout(args, card, folder, dataset, scratch):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(args.device).eval()
    end_ids, vocab_size = model.generation_config.eos_token_id, model.config.vocab_size
    length, num_responses = args.gpu_length, args.gpu_prompts * SAMPLES
    ragged, ragged_mask, *_ = random_batch(args, vocab_size, args.gpu_prompts, length)
    prompts = torch.randint(1, vocab_size, (args.gpu_prompts, PROMPT_LENGTH), device=args.device)
    mask, captures, token_counts = torch.ones_like(prompts).bool(), [], []
    capture = common.Decoder.capture
    common.Decoder.capture = lambda decoder: captures.append(1) or capture(decoder)
    model.generation_config.eos_token_id = None  # nothing ends a response of `generate`
    settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length, pad_token_id=0)

    def ours(ids, id_mask, end_ids, graph):
        generator = torch.Generator(args.device).manual_seed(1)
        flags = flags_of(args, cuda_graph=graph)
        return common.rollout(model, ids, id_mask, end_ids, flags, SAMPLES, generator)[1].sum().item()

    def generate(**options):
        config = GenerationConfig(**settings, num_return_sequences=SAMPLES, **options)
        with torch.no_grad():
            output = model.generate(prompts, attention_mask=mask.long(), generation_config=config)
        return output[:, PROMPT_LENGTH:].numel()

    ways = {
        "`common.rollout`, fixed length": lambda: ours(prompts, mask, [-1], True),
        "`common.rollout`, ragged": lambda: ours(ragged, ragged_mask, end_ids, True),
        "`common.rollout`, ragged, no graph": lambda: ours(ragged, ragged_mask, end_ids, False),
        "`generate`, dynamic cache": generate,
        "`generate`, static cache": lambda: generate(cache_implementation="static", disable_compile=True),
        "`generate`, static cache, compiled": lambda: generate(cache_implementation="static"),
    }
    size = f"{model.num_parameters() / 1e6:.0f}M parameters, bfloat16"
    title = f"rollout, {num_responses} responses of up to {length} tokens, {size}"
    table(title, "", "tokens/s", "seconds", "captures", "share of the bandwidth", "peak GiB")
    config, weights = model.config, 2 * model.num_parameters()
    head_size = config.hidden_size // config.num_attention_heads
    cache_row = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size  # bytes of a token
    for name, way in ways.items():
        with failure_is_a_row(name, args.device, 6):
            captures.clear()
            token_counts.clear()
            seconds = seconds_of(lambda way=way: token_counts.append(way()), args.device, args.rounds)
            tokens, share = token_counts[-1], ""
            if "fixed" in name and "bandwidth" in card:  # each step reads the weights and all of the fixed cache
                step = weights + num_responses * (PROMPT_LENGTH + length) * cache_row
                share = f"{100 * length * step / seconds / card['bandwidth']:.0f} %"
            figures = f"{tokens / seconds:,.0f}", f"{seconds:.2f}", len(captures) // len(token_counts)
            row(name, *figures, share, f"{peak_gib(args.device):.1f}")
    common.Decoder.capture = capture
    model = None
    free(args.device)
    with failure_is_a_row("vLLM, fixed length", args.device, 6):
        if importlib.util.find_spec("vllm") is None:
            row("vLLM", "not installed", *[""] * 4)
            return
        from vllm import LLM, SamplingParams

        sampling = SamplingParams(n=SAMPLES, temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": ids} for ids in prompts.tolist()]
        engine = LLM(folder, dtype="bfloat16", max_model_len=PROMPT_LENGTH + length)
        seconds = seconds_of(lambda: engine.generate(inputs, sampling, use_tqdm=False), args.device, args.rounds)
        row("vLLM, fixed length", f"{num_responses * length / seconds:,.0f}", f"{seconds:.2f}", "", "", "")


# ===== update =====


WAYS = {  # precision of the matrix products, flags, whether prompts are shared
    "shared prompts": ("bfloat16", {}, True),
    "padded": ("bfloat16", {}, False),
    "--micro-batch-size 64": ("bfloat16", dict(micro_batch_size=64), True),
    "--lora-rank 8": ("bfloat16", dict(lora_rank=8), True),
    "--lora-rank 8 --micro-batch-size 64": ("bfloat16", dict(lora_rank=8, micro_batch_size=64), True),
    "--activation-checkpointing": ("bfloat16", dict(activation_checkpointing=True), True),
    "--temperature 0.7": ("bfloat16", dict(temperature=0.7), True),
    "--dtype float32, TF32": ("TF32", dict(dtype="float32"), True),
    "--dtype float32": ("float32", dict(dtype="float32"), True),
}


def part_update(args, card, folder, dataset, scratch):
    """A forward and backward pass of the policy over the whole batch, in several ways; a profile of one micro-batch."""
    update_rows(args, card, folder, WAYS)


def part_compile(args, card, folder, dataset, scratch):
    """The same pass compiled, which takes minutes, after the plain one."""
    update_rows(
        args,
        card,
        folder,
        {"shared prompts": WAYS["shared prompts"], "--compile": ("bfloat16", dict(compile=True), True)},
    )


def update_rows(args, card, folder, ways):
    vocab_size, share_prompts, profile = QWEN2_SHAPES[args.shape][5], common.share_prompts, []
    *_, sequences, attention_mask = random_batch(args, vocab_size, args.gpu_prompts, args.gpu_length)
    response_mask = attention_mask[:, -args.gpu_length :]
    tokens, lengths = response_mask.sum().item(), attention_mask.sum(1)
    title = f"forward and backward pass over {len(sequences)} ragged responses, {tokens:,} tokens of them"
    table(title, "", "seconds", "response tokens/s", "model FLOPs utilization", "peak GiB")
    for name, (precision, changes, shared) in ways.items():
        with failure_is_a_row(name, args.device, 5), tf32(precision == "TF32"):
            flags = flags_of(args, **changes)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            num_parameters = model.num_parameters()
            if flags.lora_rank:
                common.add_adapters(model, flags)
            model = common.prepare(model, torch.device(args.device), flags)
            rows = torch.arange(len(sequences), device=args.device)
            micro_batches = common.micro_batches_of(rows, response_mask, flags)

            def update(model=model, flags=flags, micro_batches=micro_batches, count=None):
                for inds in micro_batches[:count]:
                    logprobs, _ = common.policy_logprobs(model, sequences[inds], attention_mask[inds], flags)
                    (logprobs.where(response_mask[inds], 0.0).sum() / tokens).backward()
                model.zero_grad()

            common.share_prompts = share_prompts if shared else throughput.padded_inputs
            peak_gib(args.device)
            seconds = seconds_of(update, args.device, 2)
            prompt_tokens = (lengths.sum() - tokens).item() // (SAMPLES if shared else 1)
            work = 6 * num_parameters * (tokens + prompt_tokens)  # a forward and a backward pass, without attention
            share = (
                f"{100 * work / seconds / card[precision]:.0f} %" if precision in card and not flags.lora_rank else ""
            )
            row(name, f"{seconds:.2f}", f"{tokens / seconds:,.0f}", share, f"{peak_gib(args.device):.1f}")
            if name == "shared prompts" and "--compile" not in ways:
                profile = profile_of(lambda update=update: update(count=1), args.device)
        model = update = None
        free(args.device)
    common.share_prompts = share_prompts
    if profile:
        table("the fifteen longest kernels in one micro-batch of the first of these", "", "share")
    for name, share in profile:
        row(f"`{name[:80]}`", f"{100 * share:.0f} %")


def profile_of(call, device):
    """The fifteen kernels that take longest and the time without a kernel, as shares of the time of a call."""
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, device.upper())]) as profiler:
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds = time.perf_counter() - start
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, name) / 1e6 / seconds for event in profiler.key_averages()}
    ranked = sorted(times.items(), key=lambda item: -item[1])
    return [*ranked[:15], ("nothing runs", max(0.0, 1 - sum(times.values())))]


# ===== scripts and trl =====


def part_scripts(args, card, folder, dataset, scratch):
    num_responses = args.gpu_prompts * SAMPLES
    title = f"scripts, {num_responses} responses per update, `--micro-batch-size {args.micro_batch_size}`"
    header = "rollout s", "update s", "rollout tokens/s", "update tokens/s", "peak GiB", "update, against REINFORCE's"
    table(title, "", *header)
    first = None
    for rank in (0, 8):
        for script in throughput.SCRIPTS:
            name = f"`{script}`" + f", --lora-rank {rank}" * bool(rank)
            flags = dict(model=folder, dataset=dataset, device=args.device, samples_per_prompt=SAMPLES)
            flags |= dict(response_length=args.gpu_length, micro_batch_size=args.micro_batch_size, dtype="bfloat16")
            flags |= dict(rollout_batch_size=num_responses, eval_size=8, lora_rank=rank, timeout=args.gpu_timeout)
            with failure_is_a_row(name, args.device, 7):
                run = throughput.run_script(script, scratch, num_responses, args.gpu_updates, **flags)
                shutil.rmtree(Path(run.model).parent)  # the disk may not hold all of them
                rollout = median(run.rollout[1:])
                update = median(whole - part for whole, part in zip(run.iteration[1:], run.rollout[1:]))
                tokens = median(speed * seconds for speed, seconds in zip(run.speed[1:], run.iteration[1:]))
                first = update if "reinforce" in script else first
                speeds = f"{rollout:.2f}", f"{update:.2f}", f"{tokens / rollout:,.0f}", f"{tokens / update:,.0f}"
                row(name, *speeds, f"{run.peak / 2**30:.1f}", f"{update / first:.1f}" if first else "")


def part_trl(args, card, folder, dataset, scratch):
    """TRL's trainers with the same model, prompts and sizes, in bfloat16, in the micro-batches of the scripts."""
    table("trainers of TRL, updates with their rollout", "", "s per update", "peak GiB")
    if any(importlib.util.find_spec(package) is None for package in ("trl", "accelerate", "datasets")):
        row("TRL", "not installed (benchmark/requirements.txt)", "")
        return
    num_responses, size = args.gpu_prompts * SAMPLES, min(args.micro_batch_size, args.gpu_prompts * SAMPLES)
    rows = [json.loads(line) for line in Path(dataset).read_text().splitlines()]
    settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=num_responses // size)
    settings |= dict(steps_per_generation=num_responses // size, num_generations=SAMPLES)
    settings |= dict(max_completion_length=args.gpu_length, bf16=True, use_cpu=args.device == "cpu")
    for name in ("RLOO", "GRPO"):
        with failure_is_a_row(f"{name}Trainer of TRL {version('trl')}", args.device, 3):
            seconds = throughput.train_trl(name, folder, rows, args.gpu_updates, 1e-6, seed=1, **settings).seconds
            figures = f"{median(seconds[1:]):.2f}", f"{peak_gib(args.device):.1f}"
            row(f"{name}Trainer of TRL {version('trl')}", *figures)


def measure(args, scratch):
    if args.device == "cuda" and not torch.cuda.is_available():
        print("\n**gpu**: needs a GPU, and there is none here (`--shape tiny --device cpu` tries the code)")
        return
    common.start_ranks(args.device)  # as the scripts do: without cuDNN's attention, with TF32
    backends = torch.backends.cuda
    names = {"flash": backends.flash_sdp_enabled(), "memory-efficient": backends.mem_efficient_sdp_enabled()}
    names |= {"math": backends.math_sdp_enabled(), "cuDNN": backends.cudnn_sdp_enabled()}
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    attention = ", ".join(name for name, enabled in names.items() if enabled)
    print(f"{card}, CUDA {torch.version.cuda}, shape {args.shape}, attention: {attention}", flush=True)
    folder, dataset = checkpoint_of(args.shape, scratch, args.device)
    measured = {}
    for part in args.gpu_parts:
        start = time.perf_counter()
        globals()[f"part_{part}"](args, measured, folder, dataset, scratch)
        free(args.device)
        print(f"\n({part}: {time.perf_counter() - start:.0f} s)", flush=True)
