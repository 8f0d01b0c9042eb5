"""Tokenization, prompts, rollout, scoring and reward: what reinforce_lm.py, ppo_lm.py and trpo_lm.py share.

Functions do not write to the tensors they are given, but for those whose names say so (`add_sums`, `clip_gradients`,
`add_adapters`, `restore_state`). `args` are the flags of a script.
Shapes: N prompts, B responses of a batch on this rank, b of a micro-batch, P prompt length, R response length, p and r
those of a micro-batch after `trim`, V vocabulary.

Prompts are padded on the left, so that every response starts in the same column. With P = 3 and R = 4, a prompt of two
tokens p and a response of two tokens a and an end token e:

    column              0    1    2    3    4    5    6
    sequences           pad  p1   p2   a1   a2   e    pad      (B, P+R)
    attention_mask      0    1    1    1    1    1    0        (B, P+R)
    response_mask                      1    1    1    0        (B, R)      the last R columns of attention_mask
    logits at column              2    3    4    5             (B, R, V)   score a1, a2, e, pad: one column earlier
    values at column              2    3    4    5    6        (B, R+1)    of the states before these, and after pad

The mask ends after the first end token that was sampled, an action like any other. It is made once, by the rollout.
Nothing compares ids with the padding id, which may be the end token's:

>>> responses = torch.tensor([[5, 7, 0, 0], [5, 0, 0, 0], [5, 7, 9, 8]])  # 0 is the end token and also the padding
>>> response_mask = mask_through_first_end(responses, end_ids=[0])
>>> response_mask.int().tolist()  # the first end token counts; what follows does not; the last row never ended
[[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
"""

import ast
import contextlib
import copy
import datetime
import fcntl
import functools
import importlib.util
import inspect
import itertools
import json
import math
import numbers
import os
import re
import shutil
import sys
import threading
import time
import traceback
import warnings
import zlib
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

# Threads that wait by spinning take the cores from other programs. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import transformers
import tyro
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer


# ===== Errors: a mistake of the user is one line on standard error and exit code 2 =====
class InputError(Exception):
    """The user's input is wrong. The message is one line: the flag or row, what was expected, what was found."""


def require(condition, name, expected, found):
    """Raise `InputError` unless `condition` holds."""
    if not condition:
        raise InputError(f"{name}: expected {expected}, found {shorten(found, 300)}")


@contextlib.contextmanager
def blame(name):
    """Turn whatever goes wrong inside into an `InputError` that begins with `name`: a flag, a row or a file.

    Settings of torch and the current folder are put back: a reward, or code that comes with a model, may change them.
    """
    dtype, grad, folder = torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd()
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"{name}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})") from error
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_grad_enabled(grad)
        os.chdir(folder)


run_dir = "RUN_DIR"  # for messages; `start_run` sets it


@contextlib.contextmanager
def one_line_errors():
    """End the process with one line: exit code 2 for bad input, a failed write or a full GPU, 130 for Control-C."""
    hook = threading.excepthook  # TensorBoard's thread raises in the main one, too, when the disk is full
    threading.excepthook = lambda thread: None if issubclass(thread.exc_type, OSError) else hook(thread)
    try:
        yield
    except InputError as error:
        line, code = f"error: {error}", 2
    except OSError as error:
        line, code = f"error: {error} ({run_dir})", 2
    except torch.OutOfMemoryError as error:
        bounds = "--micro-batch-size, --rollout-batch-size, --activation-checkpointing and --lora-rank"
        line, code = f"error: out of memory, which {bounds} bound: {error}", 2
    except KeyboardInterrupt:
        line, code = f"stopped; --resume {run_dir} goes on from the last checkpoint", 130
    else:
        return
    finally:
        threading.excepthook = hook
    show(" ".join(line.split()), sys.stderr)
    sys.exit(code)


def show(line, file=None, end="\n"):
    """Print a line over the line of progress, if there is one: `end=""` makes a line that the next one overwrites."""
    on_terminal, file = sys.stderr.isatty(), file or sys.stdout
    line = line.encode(file.encoding or "utf-8", "backslashreplace").decode(file.encoding or "utf-8")
    try:
        if on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(line, file=file, end=end if on_terminal else "\n", flush=True)
    except OSError:  # nobody reads any more, as after `| head`: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def shorten(value, length=60):
    """`repr` of a value, or of a chat's last message, in at most `length` characters."""
    is_chat = isinstance(value, list) and value and isinstance(value[-1], dict)
    text = repr(value[-1].get("content") if is_chat else value)
    return text if len(text) <= length else text[: length - 3] + "..."


# ===== Flags =====

Number = TypeVar("Number", int, float)
Positive = Annotated[Number, ("a positive number", lambda x: x > 0)]
NonNegative = Annotated[Number, ("0 or more", lambda x: x >= 0)]
UpToOne = Annotated[Number, ("more than 0 and at most 1", lambda x: 0 < x <= 1)]
ZeroToOne = Annotated[Number, ("0 to 1", lambda x: 0 <= x <= 1)]

# Where a group of --help begins: the first field of Args in it -> its title.
GROUPS = {"model": "model", "dataset": "data", "reward": "reward", "total_episodes": "batch", "output_dir": "run"}
GROUPS |= {"kl_coef": "algorithm"}
# What a resumed run may change: its length, what bounds memory or sets speed, and how often to evaluate and save.
CHANGEABLE = {"resume", "device", "save_every", "eval_every", "micro_batch_size", "rollout_batch_size"}
CHANGEABLE |= {"activation_checkpointing", "compile", "cuda_graph", "total_episodes"}


def flag(name):
    """total_episodes -> --total-episodes"""
    return "--" + name.replace("_", "-")


def parse(args_class, argv, defaults, description):
    """Parse a command line with tyro into an instance of the dataclass `args_class`, with --help in `GROUPS`."""
    body = ast.parse(inspect.getsource(args_class)).body[0].body
    texts = {a.target.id: b.value.value for a, b in itertools.pairwise(body) if isinstance(a, ast.AnnAssign)}
    groups, title = {}, "algorithm"
    for name, hint in get_type_hints(args_class, include_extras=True).items():
        title = GROUPS.get(name, title)
        hint = Annotated[hint, tyro.conf.arg(help=texts[name])]
        groups.setdefault(title, []).append((name, hint, field(default=getattr(defaults, name))))
    no_text = tyro.conf.arg(help="")  # or tyro would search source code for one
    flags = [(title, Annotated[make_dataclass(title, group), no_text]) for title, group in groups.items()]
    grouped = tyro.conf.OmitArgPrefixes[make_dataclass("Flags", flags)]
    parsed = tyro.cli(grouped, args=argv, description=description)
    return args_class(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def parse_flags(args_class, tiny, argv=None):
    """Parse the command line of a script: -> args, and the checkpoint of --resume or None.

    The defaults are those of the dataclass `args_class`, with `--model tiny` those of the dictionary `tiny`, and with
    `--resume RUN_DIR` those of that run, so that nothing has to be repeated.
    """
    script = (sys.modules[args_class.__module__].__doc__ or "").partition("\n")[0]
    listed = ", ".join(f"{flag(name)} {value}" for name, value in tiny.items())
    description = f"{script}\n\nThe defaults below are for a pretrained --model. A run without --model learns "
    description += f"to sort digits, from random weights, with these defaults instead: {listed}."
    args, checkpoint = parse(args_class, argv, args_class(), description), None
    defaults = asdict(args_class()) | (tiny if args.model == "tiny" else {})
    if args.resume:
        checkpoint = load_checkpoint(args.resume)
        defaults = {name: checkpoint["args"].get(name, value) for name, value in defaults.items()}
    elif args.lora_rank:  # adapters take about ten times the rates of full training (Schulman et al. 2025)
        defaults = {name: 10 * x if name.endswith("learning_rate") else x for name, x in defaults.items()}
    args = parse(args_class, argv, args_class(**defaults), description)
    runs_code = args.resume and (".py:" in args.reward or args.trust_remote_code)
    if runs_code and os.environ.get("RANK", "0") == "0":
        show(f"--resume runs code: --reward {args.reward}, --trust-remote-code {args.trust_remote_code}", sys.stderr)
    return args, checkpoint


def check_flags(args, script, world_size, checkpoint):
    """Raise `InputError` for the first flag with a value that makes no sense, or that a resumed run may not change."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        finite = not isinstance(value, (int, float)) or abs(value) < 2**63
        require(finite, flag(name), "a finite number of 63 bits", value)
        for expected, holds in getattr(hint, "__metadata__", ()):
            require(holds(value), flag(name), expected, value)
    require(args.kl_coef or not args.kl_target, "--kl-target", "a positive --kl-coef to adapt", args.kl_coef)
    smallest = args.batch_size // 5 + 1 if args.kl_target else 0  # or beta could become negative
    require(args.kl_horizon >= smallest, "--kl-horizon", f"at least {smallest}", args.kl_horizon)
    enough = args.total_episodes >= args.batch_size or not args.total_episodes
    require(enough, "--total-episodes", "at least --batch-size, or 0 to evaluate and not train", args.total_episodes)
    group, per_rank = args.samples_per_prompt * world_size, args.batch_size // world_size
    multiple = f"a multiple of {group} (--samples-per-prompt times ranks)"
    require(args.batch_size % group == 0, "--batch-size", multiple, args.batch_size)
    minibatches = getattr(args, "num_minibatches", 1)
    require(minibatches <= per_rank, "--num-minibatches", f"at most the {per_rank} responses of a rank", minibatches)
    if checkpoint:
        saved = checkpoint["script"]
        require(script == saved, "--resume", f"script {saved!r}, as in {args.resume}", script)
        if world_size != checkpoint["world_size"] and not (dist.is_initialized() and dist.get_rank()):
            show(f"--resume: {checkpoint['world_size']} ranks before, {world_size} now: other samples", sys.stderr)
        for name, value in asdict(args).items():
            saved = checkpoint["args"].get(name)
            require(name in CHANGEABLE or value == saved, flag(name), f"{saved!r} as in {args.resume}", value)
        done = checkpoint["iteration"] * args.batch_size
        require(args.total_episodes >= done, "--total-episodes", f"at least {done}, already done", args.total_episodes)
    with blame("--output-dir"):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)


# ===== Runs: ranks, randomness, statistics, files =====
def start_ranks(device):
    """Join torchrun's process group, if there is one: "auto", "cpu" or "cuda" -> rank, world_size, this rank's device.

    Raises `InputError` if a CUDA device is asked for where there is none.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(device != "cuda" or gpus, "--device", "a CUDA device on this machine (or --device cpu)", "none")
    device = ("cuda" if gpus else "cpu") if device == "auto" else device
    torch.backends.cuda.enable_cudnn_sdp(False)  # gradients of masked attention can be NaN (pytorch issue 196678)
    torch.backends.cuda.matmul.allow_tf32 = True  # a tenth of bfloat16's error, in less than half of float32's time
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        require(local_rank < gpus, "--nproc-per-node", f"at most the {gpus} GPUs of this machine", f"rank {local_rank}")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # The other ranks wait while rank 0 writes a checkpoint, and for the slowest reward.
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=datetime.timedelta(hours=2))
    return rank, world_size, torch.device(device)


def make_generator(device, *key):
    """A torch.Generator that depends on the integers of `key` alone.

    Randomness is a function of (seed, iteration, rank), never of what ran before: a resumed run draws the same numbers.
    """
    # The length of the key counts, or (1, 2) and (1, 2, 0) would be one stream.
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence((*key, len(key))).generate_state(1)[0]))


def prompt_indices(num_prompts, start, count, seed):
    """A list: positions start ... start + count - 1 of an endless stream of shuffled epochs over range(num_prompts)."""
    epochs = range(start // num_prompts, (start + count - 1) // num_prompts + 1)
    stream = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_prompts) for epoch in epochs])
    return stream[start % num_prompts :][:count].tolist()


def all_reduce(tensor):
    """Return the sum of `tensor` over all ranks; with one rank, `tensor` itself."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def mean(values, mask=None):
    """Mean of `values`, where `mask` is True if there is one, over all ranks: two tensors of one shape -> scalar.

    Summed in float64, so that the mean of equal values is that value: a rounding error would be taken for an advantage.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    total, count = all_reduce(torch.stack([values.where(mask, 0.0).double().sum(), mask.sum().double()]))
    return (total / count).to(values.dtype)


def variance(values, mask):
    """Population variance of `values` where `mask` is True, over all ranks: two tensors of one shape -> scalar."""
    return mean((values - mean(values, mask)) ** 2, mask)


def whiten(values, mask, shift_mean=True):
    """Shift (if `shift_mean`) and scale to mean 0 and deviation 1 where `mask` is True, over all ranks; 0 elsewhere."""
    shift = mean(values, mask) if shift_mean else 0.0
    return ((values - shift) / (variance(values, mask).sqrt() + 1e-8)).where(mask, 0.0)


def add_sums(sums, mask, values):
    """Add to the dictionary `sums`, under their names, the sums of (b, r) tensors where `mask` (b, R) is True."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.detach().where(mask[:, : value.shape[1]], 0.0).double().sum()


def means_over_ranks(sums, count):
    """A dictionary of sums, summed over all ranks and divided by `count`, as one of floats."""
    return dict(zip(sums, (all_reduce(torch.stack(list(sums.values()))) / count).tolist()))


def clip_gradients(network, max_grad_norm):
    """Clip the norm of the gradients in place to `max_grad_norm`, and return the norm before clipping."""
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters_with_gradients(network), max_grad_norm)).item()
    name, expected = f"gradient of the {type(network).__name__}", "finite; try a lower learning rate, or --reward-clip"
    require(math.isfinite(norm), name, expected, norm)
    return norm


def start_run(script, args, episode):
    """Make the run directory, or go on with that of --resume, and write the flags there: -> run_dir, SummaryWriter.

    episode: number of episodes that are done; what a resumed run had logged after it is dropped.
    """
    parts = [script, Path(args.model).name, Path(args.dataset).stem, args.seed, time.strftime("%Y%m%d-%H%M%S")]
    global run_dir
    run_dir = args.resume or str(Path(args.output_dir, f"{'__'.join(map(str, parts))}-{os.getpid()}"))
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    lock = open(Path(run_dir, "lock"), "w")
    with blame(f"could not lock {run_dir}, which another process may be using"):
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    writer = SummaryWriter(run_dir, purge_step=episode + 1 if args.resume else None)
    writer.lock = lock  # held as long as this process lives
    Path(run_dir, "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    for summary in hparams(asdict(args), {"eval/score": 0}):  # TensorBoard's HPARAMS tab
        writer.file_writer.add_summary(summary)
    return run_dir, writer


def save_checkpoint(run_dir, iteration, state, keep=2):
    """Write `state` to run_dir/checkpoint_{iteration}.pt and delete all but the newest `keep`.

    The file is written under another name, flushed to the disk and renamed: a checkpoint is whole or not there.
    """
    path = Path(run_dir, f"checkpoint_{iteration:08d}.pt")
    unfinished = path.with_suffix(".tmp")
    try:
        with blame(f"writing {path}"), open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    for old in sorted(Path(run_dir).glob("checkpoint_*.pt"))[:-keep]:
        old.unlink()


def load_checkpoint(run_dir):
    """Load the newest checkpoint of `run_dir` onto the CPU; raise `InputError` if there is none or it is damaged."""
    paths = sorted(Path(run_dir).glob("checkpoint_*.pt"))
    require(paths, "--resume", "a run directory with a checkpoint_*.pt file", str(run_dir))
    with blame(f"--resume: could not read {paths[-1]}"):
        return torch.load(paths[-1], map_location="cpu", mmap=True, weights_only=True)


# ===== Models =====
def character_tokenizer(characters):
    """A tokenizer with one token per character, and `<end>` as end and padding token. Unknown characters raise."""
    vocabulary = {token: index for index, token in enumerate(["<end>", *sorted(set(characters))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def load_tokenizer(model, rows, trust_remote_code=False):
    """The tokenizer of a checkpoint, or for `model == "tiny"` one of the characters that occur in `rows`."""
    if model == "tiny":
        texts = [str(row[column]) for row in rows for column in ("prompt", "reference") if column in row]
        return character_tokenizer("".join(texts))
    with blame(f"--model: expected `tiny` or a checkpoint with a tokenizer, found {model!r}"):
        return transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)


def load_policy(args, tokenizer, ids):
    """The causal language model of --model in float32 on the CPU, in evaluation mode, with every dropout at 0.

    "tiny" is a GPT-2 of about 100k random parameters from --seed. Raises `InputError` if there is no such checkpoint,
    it is not whole, or does not fit `ids`, the lists of ids of all prompts.
    """
    model, code = args.model, args.trust_remote_code
    context_length = max(map(len, ids)) + args.response_length
    if model == "tiny":
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
        size = dict(vocab_size=len(tokenizer), n_positions=context_length, n_embd=64, n_layer=2, n_head=4)
        # The activation of GPT-2's own default is several kernels.
        config = transformers.GPT2Config(**size, **special, activation_function="gelu_pytorch_tanh")
    else:
        with blame(f"--model: expected `tiny` or a checkpoint, found {model!r}"):
            config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=code)
    # With dropout the loss would score another policy than the one that sampled, and PPO's ratio would not start at 1.
    text_config = config.get_text_config()
    for name, value in vars(text_config).items():
        if re.search(r"dropout|pdrop", name) and isinstance(value, float):
            setattr(text_config, name, 0.0)
    positions = getattr(text_config, "max_position_embeddings", None) or math.inf
    expected = f"prompt and response to fit the {positions} positions of {model}"
    require(context_length <= positions, "--response-length", expected, f"{context_length} with the longest prompt")
    settings = dict(config=config, dtype=torch.float32, trust_remote_code=code, output_loading_info=True)
    with torch.random.fork_rng(devices=[]), blame(f"--model: expected a causal language model in {model!r}"):
        torch.manual_seed(args.seed)
        if model == "tiny":
            policy, missing = transformers.AutoModelForCausalLM.from_config(config), []
        else:
            policy, keys = transformers.AutoModelForCausalLM.from_pretrained(model, **settings)
            missing = sorted(keys["missing_keys"])
    require(not missing, "--model", f"all weights of the model in {model!r}", f"none for {missing}")
    rows, largest = policy.get_input_embeddings().weight.shape[0], max(map(max, ids))
    require(largest < rows, "--model", f"a tokenizer of the {rows} ids that the model has", f"id {largest} in a prompt")
    for module in policy.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # it would stop the gradient of the padding id, which may be an end token
    # Columns cut out of the hidden states are not contiguous, and PyTorch would copy a frozen head for each row.
    policy.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
    if args.lora_rank:
        add_adapters(policy, args)
    return policy.eval()


def add_adapters(policy, args):
    """Freeze the policy, and give all linear layers but the head LoRA adapters (Hu et al. 2022), of no effect at first.

    With --dtype bfloat16 these layers are held in bfloat16, as autocast would cast them anyway. TRPO needs float32.
    """
    with blame("--lora-rank (pip install peft)"), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        from peft import LoraConfig

        warnings.simplefilter("ignore")  # about GPT-2's layers, which peft transposes
        torch.manual_seed(args.seed)
        policy.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"))
    for module in adapted_layers(policy).values():
        if args.dtype == "bfloat16" and not hasattr(args, "max_kl"):
            module.base_layer.weight.data = module.base_layer.weight.data.bfloat16()


def adapted_layers(network):
    """{name: layer with an adapter}"""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def trained_parameters(network):
    """{name: parameter}, with adapters those alone."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def parameters_with_gradients(network):
    """The trained parameters, in order; one without a gradient, an expert that no token was routed to, gets zeros."""
    trained = list(trained_parameters(network).values())
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return trained


def copy_network(network, dtype=None):
    """A copy that shares the frozen parameters, by deepcopy's memo: with adapters the base, else none.

    dtype: of the copy's parameters, if not that of the network's; buffers (rotary frequencies) keep their precision.
    """
    shared = {id(p): p for p in network.parameters() if not p.requires_grad and dtype in (None, p.dtype)}
    network = copy.deepcopy(network, shared)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return network


def prepare(network, device, args):
    """Move a network to the device, or spread it over ranks, with --activation-checkpointing and --compile; returns it.

    Copies have to be made before: the layers of a copy would call those of the original.
    """
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    wanted, expected = args.activation_checkpointing or args.compile, "layers that transformers can checkpoint"
    require(layers or not wanted, "--activation-checkpointing, --compile", expected, type(network))
    if args.compile:
        # What is compiled serves all layers and widths; prompts, responses, and passes without gradient have their own.
        torch._dynamo.config.recompile_limit = 64  # for all networks together
        torch._dynamo.config.allow_unspec_int_on_nn_module = True  # or each layer's number would have its own, too
    for layer in layers:
        if args.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if args.activation_checkpointing:  # the layer keeps only its input; the backward pass computes the rest again
            layer.forward = functools.partial(recomputed, layer.forward)
    # A frozen base of adapters is whole on each rank.
    base = {p for p in network.parameters() if not p.requires_grad} if args.lora_rank else set()
    if not dist.is_initialized() or len(base) == len(list(network.parameters())):
        return network.to(device)
    for parameter in base:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*reversed(layers), network]:  # a layer inside another one first
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=base)
        # Losses are divided by counts over all ranks, so the ranks' gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True)  # an expert that no token of this rank was routed to
    return network


def whole(tensor):
    """A tensor that is spread over ranks, gathered; all ranks have to call this. Other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(part, parameter):
    """The whole tensor of which `part` is this rank's, if it is spread over ranks like `parameter`."""
    if not isinstance(parameter, DTensor):
        return part
    layout = dict(shape=parameter.shape, stride=parameter.stride(), run_check=False)
    return whole(DTensor.from_local(part, parameter.device_mesh, parameter.placements, **layout))


def local(tensor):
    """This rank's part of a tensor that is spread over ranks, a view. Other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards(network):
    """The modules whose parameters FSDP2 gathers at once, the outermost first; without ranks the network alone."""
    return [module for module in network.modules() if isinstance(module, FSDPModule)] or [network]


# A checkpoint holds whole tensors of all that is trained, whatever the number of ranks.
STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


# Calls a function so that the backward pass computes it again; without gradient, as in sampling, just calls it.
recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
@torch.no_grad()
def whole_weights(sampler, policy):
    """Inside, the sampler has the policy's weights, whole on each rank and in its own precision, and outside none.

    All ranks have to call this. Frozen parameters, and a sampler that is the policy, stay as they are.
    """
    copies, copied = dict(zip(policy.modules(), sampler.modules())), []
    for module in shards(policy):  # at once, as gathering each parameter alone takes up to twice as long
        is_shard = isinstance(module, FSDPModule)
        if is_shard:
            module.unshard()
        for new, old in zip(module.parameters(), copies[module].parameters()):
            if new.requires_grad and new is not old and not isinstance(new, DTensor):  # not another module's to gather
                old.data = new.to(old.dtype, copy=True)
                copied.append(old)
        if is_shard:
            module.reshard()
    yield
    for parameter in copied:
        parameter.data = parameter.new_empty(0)


@contextlib.contextmanager
def replaced_parameters(network, tensors, replace):
    """Inside, the network runs with other parameters, replace(parameter, tensor) for each of `tensors`; never compiled.

    tensors: {name: tensor in the shape of this rank's part of the parameter}. They are gathered when a layer runs.
    """
    replacements = {network.get_parameter(name): tensor for name, tensor in tensors.items()}
    places = {shard: [] for shard in shards(network)}
    shard_of = {module: shard for shard in places for module in shard.modules()}  # the innermost
    for module, shard in shard_of.items():
        parameters = module.named_parameters(recurse=False)
        places[shard] += [(module._parameters, name, p) for name, p in parameters if p in replacements]

    def enter(shard, inputs):
        for held, name, parameter in places[shard]:
            held[name] = replace(held[name].detach(), gathered(replacements[parameter], parameter))

    def leave(shard, inputs, output):
        for held, name, parameter in places[shard]:
            held[name] = parameter

    with contextlib.ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
        for shard in places:
            hooks.enter_context(shard.register_forward_pre_hook(enter))
            hooks.enter_context(shard.register_forward_hook(leave))
        yield


def gather_state(network, *optimizers):
    """What a checkpoint holds of a network and its optimizers: whole tensors of all that is trained, on rank 0's CPU.

    All ranks have to call this. Any number of ranks can load the result.
    """
    weights, moments = get_state_dict(network, optimizers, options=STATE)
    return {"weights": weights, "optimizer": moments}


def restore_state(state, network, *optimizers):
    """Load what `gather_state` returned, tensor by tensor."""
    states = dict(model_state_dict=state["weights"], optim_state_dict=state["optimizer"])
    set_state_dict(network, optimizers, **states, options=STATE)


def save_model(args, tokenizer, ids, weights, folder):
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load; raise `InputError` if that fails.

    It is written under another name and renamed: a folder is whole or not there. Adapters are saved beside it, in
    `adapter`, and then merged. The model is loaded anew, by `load_policy`, and gets the `weights`.
    """
    transformers.utils.logging.disable_progress_bar()
    model = load_policy(replace(args, dtype="float32"), tokenizer, ids)
    model.load_state_dict(weights, strict=False)
    with blame(f"writing {folder}"):
        adapted = adapted_layers(model)
        if adapted:
            model.save_pretrained(Path(folder).parent / "adapter")
            model._hf_peft_config_loaded = False  # or only adapters would be saved
        for name, layer in adapted.items():
            layer.merge()
            model.set_submodule(name, layer.base_layer)
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        for part in (model, tokenizer):
            part.save_pretrained(f"{folder}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(f"{folder}.tmp", folder)


def end_token_ids(tokenizer, model):
    """All ids that end a response: the tokenizer's end token and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    end_ids = {tokenizer.eos_token_id, *configured} - {None}
    require(end_ids, "--model", "an end token in the tokenizer or the generation config", None)
    return sorted(end_ids)


# ===== Passes over a micro-batch: a prompt is run once for its responses, and columns that no row needs are cut =====
def position_ids(attention_mask):
    """Positions of the real tokens, counted from 0 after the left padding: (B, L) mask -> (B, L) integers."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def micro_batches_of(inds, response_mask, args):
    """Row indices (n,) as a list of micro-batches: rows of a prompt together, prompts with the longest responses first.

    Prompts with responses of about the same length need few columns, and what needs most memory comes first.
    """
    lengths, prompts = response_mask[inds].sum(1), inds // args.samples_per_prompt  # (n,), (n,)
    longest = torch.zeros_like(response_mask[:, 0], dtype=torch.long).scatter_reduce(0, prompts, lengths, "amax")
    keys = longest[prompts] * len(response_mask) + prompts  # (n,), one number for each prompt
    order = keys.argsort(descending=True, stable=True)  # (n,)
    return inds[order].split(args.micro_batch_size)


def shuffled_minibatches(response_mask, args, *key):
    """One pass over the batch: a list of minibatches, which are lists of micro-batches.

    Prompts come in a random order that depends on `key`, and the rows of a prompt stay together.
    """
    k, device = args.samples_per_prompt, response_mask.device
    order = torch.randperm(len(response_mask) // k, generator=make_generator("cpu", *key)).to(device)
    rows = (order[:, None] * k + torch.arange(k, device=device)).flatten()  # (B,)
    return [micro_batches_of(inds, response_mask, args) for inds in rows.tensor_split(args.num_minibatches)]


def trim(sequences, attention_mask, response_length):
    """Cut columns that are padding in all rows: (b, P+R), (b, P+R) -> (b, p+r), (b, p+r), r."""
    used = attention_mask.any(0).nonzero()[:, 0]  # (p+r,)
    start, end = used[0].item(), used[-1].item() + 1
    length = response_length - (sequences.shape[1] - end)
    return sequences[:, start:end], attention_mask[:, start:end], length


class PromptLayer(DynamicLayer):
    """Keys and values of prompts. Writes over old ones, since a checkpointed layer runs twice."""

    def update(self, keys, values, *_, **__):
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


class ResponseLayer(DynamicLayer):
    """Gives each row the keys and values of its prompt, a row of a `PromptLayer`, and keeps nothing."""

    def __init__(self, prompts, rows):
        super().__init__()
        self.keys, self.values, self.rows, self.is_initialized = prompts.keys, prompts.values, rows, True

    def update(self, keys, values, *_, **__):
        pairs = (self.keys, keys), (self.values, values)
        return tuple(torch.cat([shared.index_select(0, self.rows), own], 2) for shared, own in pairs)


class SharedCache(Cache):
    """A cache whose update is never compiled: it looks its layers up by number, so each would be compiled anew."""

    update = torch.compiler.disable(Cache.update)


MIN_SAVED_TOKENS = 256  # or two passes cost more than they save


def share_prompts(network, sequences, attention_mask, num_outputs):
    """Run each distinct prompt of the (b, L) rows once, and return what `network` is to be called with for the rest.

    The prompts' pass fills a cache; gradients flow back into it, summed over the rows that share a prompt. The call
    that is left returns at least the last `num_outputs` columns; the first of these is the prompt's last token, so that
    token stays with each row.
    """
    inputs = dict(input_ids=sequences, attention_mask=attention_mask, position_ids=position_ids(attention_mask))
    length = sequences.shape[1] - num_outputs  # of what may be shared
    prompts = sequences[:, :length].where(attention_mask[:, :length], -1)  # (b, L - num_outputs)
    distinct, rows = prompts.unique(dim=0, return_inverse=True) if length else (prompts, None)
    saves = (len(prompts) - len(distinct)) * length >= max(MIN_SAVED_TOKENS, sequences.numel() / 4)
    if all_reduce(torch.tensor(int(not saves), device=sequences.device)):  # all ranks make the same number of passes
        return inputs | dict(use_cache=False)
    mask, cache = distinct >= 0, SharedCache(layer_class_to_replicate=PromptLayer)
    settings = dict(attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache, use_cache=True)
    output = network(input_ids=distinct.clamp(min=0), **settings)[0]  # (n, 1, V) or (n, L - num_outputs, hidden size)
    if dist.is_initialized():  # FSDP2 gathers a layer again when its output gets a gradient; the last one's would not
        cache.layers[-1].keys = cache.layers[-1].keys + 0.0 * output[0, -1, 0]
    inputs |= {name: inputs[name][:, length:] for name in ("input_ids", "position_ids")}
    cache = SharedCache([ResponseLayer(layer, rows) for layer in cache.layers])
    return inputs | dict(past_key_values=cache, use_cache=True)


# ===== Log-probabilities =====
def autocast(device, args):
    """A context for passes in the precision of --dtype.

    With --activation-checkpointing weights are rounded anew for each layer: a cache would hold all of them at once.
    """
    enabled, cache_enabled = args.dtype == "bfloat16", not args.activation_checkpointing
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cache_enabled)


def response_logits(model, sequences, attention_mask, args):
    """Logits of the responses, at temperature 1: (b, P+R), (b, P+R) -> (b, r, V).

    For each response token given what stands before it, up to r, the longest response of these rows.
    """
    sequences, attention_mask, length = trim(sequences, attention_mask, args.response_length)  # (b, p+r)
    with autocast(sequences.device, args):
        prompt_pass = functools.partial(model, logits_to_keep=1)
        # Runs each prompt once, if that pays. The last token is only predicted.
        inputs = share_prompts(prompt_pass, sequences[:, :-1], attention_mask[:, :-1], length)
        return model(**inputs, logits_to_keep=length).logits


def tempered_log_softmax(logits, temperature):
    """log_softmax(logits / temperature) over the vocabulary, in float32 at least, of the sampler and of the loss."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits if temperature == 1 else logits.to(dtype) / temperature
    return logits.log_softmax(-1, dtype=dtype)


def token_statistics(logits, tokens, temperature):
    """Log-probability of each token and entropy of its distribution: (b, r, V), (b, R) -> (b, R), (b, R), 0 after r.

    Large logits are taken a few rows at a time and again in the backward pass, so that only they are kept for it, in
    the precision that they come in. Pieces fit a CPU's cache, and are larger on a GPU, where each costs launches.
    """

    def of_rows(logits, tokens):  # (n, V), (n,) -> (n,), (n,)
        log_p = tempered_log_softmax(logits, temperature)
        return log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    length = logits.shape[1]
    n = max(1, 2 ** (22 if logits.device.type == "cpu" else 27) // logits.shape[-1])
    pieces = list(zip(logits.flatten(0, 1).split(n), tokens[:, :length].flatten().split(n)))  # (n, V), (n,) each
    run = functools.partial(recomputed, of_rows) if len(pieces) > 1 else of_rows
    logprobs, entropy = [torch.cat(parts) for parts in zip(*(run(*piece) for piece in pieces))]  # (b r,), (b r,)
    padding = 0, tokens.shape[1] - length
    return tuple(torch.nn.functional.pad(values.view(-1, length), padding) for values in (logprobs, entropy))


def policy_logprobs(model, sequences, attention_mask, args):
    """Log-probability of each response token and entropy of its distribution: (b, P+R), (b, P+R) -> (b, R), (b, R).

    The one way to a log-probability: of the policy in the loss, and, by `batched_logprobs`, of the old policy and the
    reference. So the first ratio pi / pi_old is exactly 1 if both come from the same micro-batches.
    """
    logits = response_logits(model, sequences, attention_mask, args)  # (b, r, V)
    return token_statistics(logits, sequences[:, -args.response_length :], args.temperature)


@torch.no_grad()
def in_micro_batches(function, micro_batches, *tensors):
    """Call `function` without gradient on the rows of each micro-batch: (B, ...) tensors -> (B, ...).

    function: takes the rows of `tensors`, (b, ...) each, and returns a tensor (b, ...).
    micro_batches: tensors of row indices, every row once. In bfloat16 a row's rounding error depends on the others.
    """
    results = torch.cat([function(*[tensor[inds] for tensor in tensors]) for inds in micro_batches])
    return results[torch.cat(list(micro_batches)).argsort()]


def batched_logprobs(model, sequences, attention_mask, micro_batches, args):
    """Log-probabilities of a whole batch by `policy_logprobs`, without gradient, in micro-batches: -> (B, R)."""
    return in_micro_batches(
        lambda *rows: policy_logprobs(model, *rows, args)[0], micro_batches, sequences, attention_mask
    )


# ===== Prompts =====
@dataclass
class Prompts:
    """Rows of a data set: N dictionaries with `prompt` and any other columns, and the N lists of the prompts' ids."""

    rows: list
    ids: list

    def select(self, indices):
        """The prompts at `indices`, in that order."""
        return Prompts([self.rows[i] for i in indices], [self.ids[i] for i in indices])

    def padded(self, device="cpu"):
        """Ids and mask of real tokens, (N, P) each, left-padded to the longest of these prompts."""
        length = max(map(len, self.ids))
        ids = torch.tensor([[PAD_ID] * (length - len(tokens)) + tokens for tokens in self.ids])
        mask = torch.arange(length) >= length - torch.tensor([len(tokens) for tokens in self.ids])[:, None]
        return ids.to(device), mask.to(device)


def digest(*prompts):
    """A number that tells whether several `Prompts` are the same as before."""
    return zlib.crc32(json.dumps([part.rows for part in prompts], default=str).encode())


PAD_ID = 0  # masks decide which tokens are real, so padding may be any id of the vocabulary, the end token's included
NUM_SORT_PROMPTS = 2**15


def load_rows(dataset, name, prompt_column="prompt", reference_column="reference"):
    """Read a data set: "sort", a file of JSON lines, or a hub name NAME[@CONFIG][:SPLIT] (with the package `datasets`).

    Returns dictionaries whose prompt is called `prompt` and whose reference, if there is one, `reference`. Raises
    `InputError`, naming the flag `name` and the row, if a row has no prompt or not the columns of the first.
    """
    if dataset == "sort":  # five digits; the reference is the same digits in order
        digits = np.random.default_rng(0).permutation(100_000)[:NUM_SORT_PROMPTS]
        rows = [{"prompt": f"{i:05d}", "reference": "".join(sorted(f"{i:05d}"))} for i in digits]
    elif dataset.endswith((".jsonl", ".json")) or os.path.exists(dataset):
        with blame(f"{name}: could not read {dataset}"):
            lines = Path(dataset).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        rows = []  # JSON may hold other line separators
        for number, line in enumerate(lines, 1):
            with blame(f"{name} {dataset} row {number}: expected a JSON object, found {line[:40]!r}"):
                rows.append({**json.loads(line)})
                json.dumps(rows[-1], ensure_ascii=False).encode()  # half an emoji, as \ud83d, is no text
    else:
        path, _, split = dataset.partition(":")
        path, _, config = path.partition("@")
        with blame(f"{name}: expected `sort`, a FILE.jsonl, or a hub name (pip install datasets), found {dataset!r}"):
            from datasets import load_dataset

            rows = [dict(row) for row in load_dataset(path, config or None, split=split or "train")]
    require(rows, name, "at least one row", f"{dataset} with none")
    columns = {*rows[0], prompt_column, *({reference_column} - {"reference"})}
    for number, row in enumerate(rows, 1):
        where = f"{name} {dataset} row {number} (--prompt-column, --reference-column)"
        require(set(row) == columns, where, f"the columns {sorted(columns)}", sorted(row))
        prompt, chosen = row.pop(prompt_column), {"reference": row.pop(reference_column, None)}
        messages = prompt if isinstance(prompt, list) else []
        is_chat = all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages)
        expected = "text or a list of messages with role and content, not empty"
        require(prompt and is_chat and isinstance(prompt, (str, list)), where, expected, prompt)
        row |= {"prompt": prompt} | (chosen if reference_column in columns else {})
    return rows


def encode_prompts(tokenizer, rows, prompt_length):
    """`Prompts` with the token ids of the rows' prompts. Lists of messages go through the tokenizer's chat template.

    Raises `InputError`, naming the first row whose prompt has no token or more than `prompt_length`.
    """
    texts = [row["prompt"] for row in rows]
    kinds = {type(text) for text in texts}
    require(len(kinds) == 1, "prompts", "texts, or lists of messages, and not both", kinds)
    require(kinds == {str} or tokenizer.chat_template, "--model", "a chat template, since prompts are messages", None)
    for number, text in enumerate(texts, 1):  # before megabytes become gigabytes of tokens
        where, limit = f"--prompt-length, row {number} ({shorten(text)})", 100 * prompt_length
        require(len(str(text)) <= limit, where, f"at most {limit:,} characters", f"{len(str(text)):,}")
    with blame("prompts: a character that the tokenizer of --model does not know"):
        ids = tokenizer(texts).input_ids if kinds == {str} else [None] * len(texts)
    for number, text in enumerate(texts):
        where = f"row {number + 1} ({shorten(text)})"
        if kinds == {list}:
            with blame(f"{where}: expected messages for the chat template"):  # a role that it does not take, say
                ids[number] = tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False)
        elif ids[number][-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
            ids[number] = ids[number][:-1]  # it was added, and a response could not follow an end token
        found = len(ids[number])
        require(0 < found <= prompt_length, f"--prompt-length, {where}", f"1 to {prompt_length} tokens", found)
    return Prompts(rows, ids)


def split_prompts(prompts, eval_size):
    """Training and held-out `Prompts`: `eval_size`, at most a tenth, the same ones whatever the seed.

    Training rows with the prompt of a held-out row are left out.
    """
    order = np.random.default_rng(0).permutation(len(prompts.rows)).tolist()
    num_held_out = max(1, min(eval_size, len(order) // 10))
    seen = {json.dumps(prompts.rows[i]["prompt"]) for i in order[:num_held_out]}
    train = [i for i in order[num_held_out:] if json.dumps(prompts.rows[i]["prompt"]) not in seen]
    require(train, "--dataset", "a training prompt that is not held out (or --eval-dataset)", f"{len(order)} rows")
    return prompts.select(train), prompts.select(order[:num_held_out])


def load_prompts(args, checkpoint=None):
    """The tokenizer of --model, and training and held-out `Prompts`, which must be those of the checkpoint, if any."""
    columns = args.prompt_column, args.reference_column
    dataset = args.dataset if args.total_episodes else args.eval_dataset or args.dataset  # none to train on
    rows = load_rows(dataset, "--dataset", *columns)
    eval_rows = load_rows(args.eval_dataset, "--eval-dataset", *columns)[: args.eval_size] if args.eval_dataset else []
    tokenizer = load_tokenizer(args.model, rows + eval_rows, args.trust_remote_code)
    train = encode_prompts(tokenizer, rows, args.prompt_length)
    if eval_rows:
        held_out = encode_prompts(tokenizer, eval_rows, args.prompt_length)
    else:
        train, held_out = split_prompts(train, args.eval_size)
    same = not checkpoint or checkpoint["data"] == digest(train, held_out)
    files = f"{args.dataset} {args.eval_dataset}"
    require(same, "--dataset, --eval-dataset", f"the prompts that {args.resume} began with", f"others in {files}")
    return tokenizer, train, held_out


# ===== Rollout =====
def mask_through_first_end(responses, end_ids):
    """(B, R) ids -> (B, R) booleans: True up to and including the first end token."""
    is_end = torch.isin(responses, torch.tensor(end_ids, device=responses.device))
    return is_end.cumsum(1) - is_end.long() == 0


def has_ended(responses, end_ids):
    """(B, R) ids -> (B,) booleans: True for responses with an end token, False for those cut at the length limit."""
    return torch.isin(responses, torch.tensor(end_ids, device=responses.device)).any(1)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # each length would be compiled anew
def rollout(model, prompts, prompt_mask, end_ids, args, samples_per_prompt=1, generator=None, greedy=False):
    """Sample responses token by token.

    Tokens come from softmax(logits / temperature) and nothing else: no top-k, top-p or repetition penalty, whatever the
    checkpoint's generation_config.json says, so that the sampled distribution is the one whose gradient is taken.

    Args:
        prompts, prompt_mask: (N, P) left-padded ids and where they are real; a prompt is run once for all its samples.
        greedy: take the most likely token instead of sampling.
    Returns:
        responses, response_mask, logprobs: (N * samples_per_prompt, R) each, samples of one prompt next to each other:
            ids, True up to and including the first of `end_ids`, and the sampler's log-probabilities; 0 after the end.
    """
    prompts_at_once = max(1, args.rollout_batch_size // samples_per_prompt)
    end_tensor, on_cuda = torch.tensor(end_ids, device=prompts.device), prompts.device.type == "cuda"
    chunks = []
    for chunk, chunk_mask in zip(prompts.split(prompts_at_once), prompt_mask.split(prompts_at_once)):
        fixed_size = on_cuda and args.cuda_graph
        decoder = Decoder(model, chunk, chunk_mask, samples_per_prompt, args.response_length, fixed_size)
        size = len(chunk) * samples_per_prompt, args.response_length
        responses = torch.full(size, PAD_ID, device=chunk.device)  # (b, R)
        logprobs = torch.zeros(size, device=chunk.device)  # (b, R)
        rows = torch.arange(len(responses), device=chunk.device)  # (b,), those that have not ended
        ended = torch.zeros_like(rows, dtype=torch.bool)  # (b,)
        for t in range(args.response_length):
            step_logprobs = tempered_log_softmax(decoder.logits, args.temperature)  # (b, V)
            if greedy:
                tokens = step_logprobs.argmax(-1, keepdim=True)  # (b, 1)
            else:  # exponential race (the Gumbel-max trick): argmax p_i / q_i is i with probability p_i
                noise = torch.empty_like(step_logprobs).exponential_(generator=generator)  # (b, V)
                tokens = (step_logprobs.exp() / noise).argmax(-1, keepdim=True)  # (b, 1)
            responses[rows, t] = tokens[:, 0]
            logprobs[rows, t] = step_logprobs.gather(1, tokens)[:, 0]
            ended |= (tokens == end_tensor).any(1)  # `isin` sorts many end ids, and then waits for the GPU
            if t + 1 == args.response_length:
                break
            if not on_cuda or t % 16 == 15:  # counting the rows that go on waits for the GPU
                going_on = (~ended).nonzero()[:, 0]  # (b,)
                if not len(going_on):
                    break
                if len(going_on) <= len(rows) / 2:
                    decoder.select(going_on)
                    rows, ended, tokens = rows[going_on], ended[going_on], tokens[going_on]
            decoder.step(tokens)
        response_mask = mask_through_first_end(responses, end_ids)  # (b, R)
        chunks.append((responses.where(response_mask, PAD_ID), response_mask, logprobs.where(response_mask, 0.0)))
        decoder = None  # frees its cache before the next one is made
    responses, response_mask, logprobs = [torch.cat(parts) for parts in zip(*chunks)]
    require(logprobs.isfinite().all(), "--model", "finite logits; try a lower learning rate", "NaN or infinity")
    return responses, response_mask, logprobs


MIN_TOKENS_LEFT = 8  # to sample after this one; recording a graph costs what it saves over about three tokens


class Decoder:
    """Runs a model over prompts and then over one more token of each response at a time.

    On the CPU the cache of keys and values grows. On CUDA it has its final size from the start, so that the pass of one
    token is the same work each time: it is captured as a graph and replayed, since launching its kernels one by
    one takes longer than running them; below `MIN_TOKENS_LEFT`, the capture would not pay.
    """

    def __init__(self, model, prompts, prompt_mask, samples_per_prompt, response_length, fixed_size):
        """Run the (n, P) prompts, once for all their samples. `self.logits` (b, V) score the first response token.

        fixed_size: preallocate the cache, and capture graphs (on CUDA alone), if the model has attention over all
            positions and nothing else.
        """
        room = torch.ones((len(prompts), response_length), dtype=torch.bool, device=prompts.device)
        self.attention_mask = torch.cat([prompt_mask, room], 1).long()  # (n, P+R)
        self.model, self.length, self.graph = model, prompts.shape[1], None
        cache = StaticCache(model.config, self.length + response_length) if fixed_size else None
        # Sliding windows count positions outside of tensors, where a captured graph would not see them move.
        self.fixed_size = fixed_size and all(type(layer) is StaticLayer for layer in cache.layers)
        self.cache = cache if self.fixed_size else None
        self.tokens, self.positions = prompts, position_ids(prompt_mask)  # (n, P), (n, P)
        self.logits = self.forward()  # (n, V)
        self.tokens, self.positions = prompts[:, -1:].clone(), self.positions[:, -1:]  # (n, 1), (n, 1)
        self.select(torch.arange(len(prompts), device=prompts.device).repeat_interleave(samples_per_prompt))

    def select(self, rows):
        """Go on with these rows alone, a tensor of indices, which may repeat."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        for name in ("logits", "tokens", "positions", "attention_mask"):
            setattr(self, name, getattr(self, name)[rows])
        self.graph = None

    def step(self, tokens):
        """Append a token (b, 1) to each row. `self.logits` (b, V) then score the next."""
        self.tokens.copy_(tokens)
        self.positions += 1
        self.length += 1
        if self.graph:
            self.graph.replay()  # writes to self.logits
            return
        self.logits = self.forward()
        if self.fixed_size and self.attention_mask.shape[1] - self.length >= MIN_TOKENS_LEFT:
            self.graph = self.capture()

    def forward(self):
        """A pass over `self.tokens`, which on CUDA, like the other tensors, keeps its place in memory."""
        mask = self.attention_mask if self.fixed_size else self.attention_mask[:, : self.length]
        settings = dict(position_ids=self.positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        output = self.model(self.tokens, attention_mask=mask, **settings)
        if self.cache is None:
            self.cache = getattr(output, "past_key_values", None)
            kinds = {type(layer) for layer in getattr(self.cache, "layers", [None])}
            known = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}  # those that `select` knows
            require(known, "--model", "a cache of keys and values and nothing else", f"{type(self.model)}'s {kinds}")
        return output.logits[:, -1]

    def capture(self):
        """Record the kernels of `forward` as a CUDA graph, after `step` ran them: a first pass can't be recorded."""
        graph, logits = torch.cuda.CUDAGraph(), self.logits
        with blame("--cuda-graph: this model needs --no-cuda-graph"):
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
                self.logits = self.forward()  # where replays write; recorded and not run
        self.logits.copy_(logits)  # of the pass that `step` has run
        return graph


def decode(tokenizer, responses, response_mask):
    """Texts of (B, R) responses without special tokens: for the reward and the reader, never to be encoded again."""
    pairs = zip(responses.tolist(), response_mask.tolist())
    return tokenizer.batch_decode([list(itertools.compress(*pair)) for pair in pairs], skip_special_tokens=True)


# ===== Reward: fn(prompts, responses, **columns) -> one float each =====
def match_reward(prompts, responses, reference, **columns):
    """Share of the reference's characters that are at their place in the response, its end counted as one more."""
    pairs = [(response, str(text)) for response, text in zip(responses, reference)]
    return [(sum(a == b for a, b in zip(r, t)) + (len(r) == len(t))) / (len(t) + 1) for r, t in pairs]


def exact_reward(prompts, responses, reference, **columns):
    """1 if response and reference are the same except for white space around them, else 0."""
    return [float(response.strip() == str(text).strip()) for response, text in zip(responses, reference)]


def rouge_reward(prompts, responses, reference, **columns):
    """ROUGE-L F1 (Lin 2004), from 0 to 1, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(str(text), response)["rougeL"].fmeasure for response, text in zip(responses, reference)]


def bleu_reward(prompts, responses, reference, **columns):
    """Sentence BLEU (Papineni et al. 2002) with sacrebleu's exponential smoothing, from 0 to 1."""
    from sacrebleu import sentence_bleu

    return [sentence_bleu(response, [str(text)]).score / 100 for response, text in zip(responses, reference)]


REWARDS = {"match": match_reward, "exact": exact_reward, "rouge": rouge_reward, "bleu": bleu_reward}


class RewardModel:
    """A reward function: one logit of a sequence classifier, for prompt and response in one text.

    The text is tokenized anew with the classifier's own tokenizer, so it may have another vocabulary than the policy.
    If prompts are lists of messages, the response is the assistant's, and the chat template makes the text. Of a text
    that is too long for the classifier its last tokens are read.
    """

    def __init__(self, name, logit=-1, batch_size=64, device="cpu", trust_remote_code=False):
        """Load the checkpoint `name`, in bfloat16 on CUDA, in float32 elsewhere. batch_size: texts at once."""
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        settings = dict(dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True)
        with blame(f"--reward: expected a sequence classifier in {name!r}"):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            self.model, keys = transformers.AutoModelForSequenceClassification.from_pretrained(name, **settings)
        # A head with random weights, or one that lost its bias, still returns numbers.
        of_head = [key for key in keys["unexpected_keys"] if not key.startswith(self.model.base_model_prefix + ".")]
        wrong = sorted(keys["missing_keys"]) + of_head
        require(not wrong, "--reward", f"a sequence classifier in {name!r} with the weights of its class", wrong)
        labels = self.model.config.num_labels
        require(-labels <= logit < labels, "--reward-logit", f"one of the {labels} logits of {name}", logit)
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer.truncation_side = "left"  # of a text that is too long, the response stays
        self.tokenizer.padding_side = "right"  # positions count from the first token, whatever it is
        # A decoder's score is read at its last token that is not padding; an end token may close a text and count.
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.bos_token or self.tokenizer.eos_token
        require(self.tokenizer.pad_token, "--reward", f"a padding, start or end token in {name!r}", None)
        config = self.model.config.get_text_config()
        config.pad_token_id = self.tokenizer.pad_token_id
        positions = (getattr(config, "max_position_embeddings", None) or 2**30) - 2  # RoBERTa's begin at 2
        self.max_length = min(positions, self.tokenizer.model_max_length)
        self.logit, self.batch_size, self.device = logit, batch_size, device

    @torch.no_grad()
    def __call__(self, prompts, responses, **columns):
        """Texts -> (B,) float32 scores."""
        is_text, pairs, scores = isinstance(prompts[0], str), zip(prompts, responses), []
        if is_text:
            texts = [prompt + response for prompt, response in pairs]
        else:
            chats = [[*prompt, {"role": "assistant", "content": response}] for prompt, response in pairs]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        settings = dict(truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
        settings |= dict(add_special_tokens=is_text)  # a chat template has written them already
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(texts[start : start + self.batch_size], **settings).to(self.device)
            scores.append(self.model(**inputs).logits[:, self.logit].float())
        return torch.cat(scores).cpu()


def load_reward(args, device, rows):
    """The reward function of --reward, after a trial on the first of `rows`, with an empty response."""
    name, (path, _, function) = args.reward, args.reward.rpartition(":")
    if name in REWARDS:
        reward_fn = REWARDS[name]
        for row in rows:
            if not isinstance(row.get("reference"), (str, int, float)):
                require(False, f"--reward {name} ({shorten(row['prompt'])})", "a text reference", row.get("reference"))
    elif name.startswith("model:"):
        settings = args.reward_logit, args.micro_batch_size, device, args.trust_remote_code
        reward_fn = RewardModel(name.removeprefix("model:"), *settings)
    else:
        expected = f"one of {', '.join(REWARDS)}, model:NAME or an existing FILE.py with :function"
        require(path.endswith(".py") and os.path.isfile(path), "--reward", expected, name)
        spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(Path(path).resolve().parent))  # it may import what is beside it
        with blame(f"--reward: importing {path}"):
            spec.loader.exec_module(module)
        reward_fn = getattr(module, function, None)
        require(callable(reward_fn), "--reward", f"a function {function!r} in {path}", reward_fn)
    is_async = inspect.iscoroutinefunction(reward_fn)
    require(not is_async, "--reward", "a function that returns scores", f"async def {function}")
    score_responses(reward_fn, args, rows[:1], [""], {"ended": [True], "num_tokens": [1]})
    return reward_fn


def score_responses(reward_fn, args, rows, responses, facts):
    """Call the reward function, on copies, and check what it returns: scores, or scores and a dictionary of parts.

    Args:
        rows: N rows of a data set. responses: N * k texts, the k of one prompt next to each other.
        facts: lists with an entry for each response, which the function gets if it has a parameter of that name:
            `ended`, False for a response that was cut at the length limit, and `num_tokens`.
    Returns:
        scores: (N * k,) float32 tensor on the CPU, clipped to plus and minus --reward-clip; and the parts as such.
    Raises:
        InputError: naming the reward and the prompt, if it raises or does not return that many finite numbers.
    """
    rows, name = [row for row in rows for _ in range(len(responses) // len(rows))], f"--reward {args.reward}"
    columns = copy.deepcopy({column: [row[column] for row in rows] for column in rows[0]})
    with blame(name):
        wanted = inspect.signature(reward_fn).parameters
        columns |= {fact: list(values) for fact, values in facts.items() if fact in wanted}
        returned = reward_fn(columns.pop("prompt"), list(responses), **columns)
        has_parts = isinstance(returned, tuple) and isinstance(returned[-1], dict)
        scores, parts = returned if has_parts else (returned, {})
        taken = {"scores", "score", "exact"} & set(parts)
        require(not taken, name, "parts with other names than scores, score and exact", sorted(taken))
        parts = {"scores": scores} | dict(sorted(parts.items()))
        parts = {part: values.tolist() if hasattr(values, "tolist") else values for part, values in parts.items()}
    for part, values in parts.items():
        is_list = isinstance(values, (list, tuple)) and len(values) == len(responses)
        require(is_list, name, f"a list of {len(responses)} {part}", values)
        for value, row, response in zip(values, rows, responses):
            if not (isinstance(value, numbers.Real) and abs(value) <= torch.finfo(torch.float32).max):
                where = f"{name}, prompt {shorten(row['prompt'])}, response {shorten(response)}"
                require(False, where, f"finite {part}", value)
        parts[part] = torch.tensor([float(value) for value in values])
    scores = parts.pop("scores")
    return scores.clamp(-args.reward_clip, args.reward_clip) if args.reward_clip else scores, parts


# ===== What a reader sees =====
def log_evaluation(writer, episode, means, rows, texts, scores):
    """Log the means of an evaluation and eight samples, and print the means and three of the samples."""
    triples = zip(rows[:8], texts, scores.tolist())
    samples = [f"    {shorten(row['prompt'])} -> {shorten(text)}  score {score:.3f}" for row, text, score in triples]
    for name, value in means.items():
        writer.add_scalar(name, value, episode)
    writer.add_text("samples", "\n".join(samples), episode)  # indented: as code
    for sample in samples[:3]:
        show(sample)
    show(f"evaluation after {episode:,} episodes: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))


def show_progress(iteration, num_iterations, metrics):
    """One line about an iteration on standard error; on a terminal the next line replaces it."""
    line = f"iteration {iteration}/{num_iterations}: score {metrics['objective/score']:.3f}, "
    line += f"KL {metrics['objective/kl_ref']:.2f}, " if "objective/kl_ref" in metrics else ""
    show(line + f"{metrics['time/tokens_per_second']:.0f} tokens/s", sys.stderr, end="")


def show_summary(run_dir, before, after, facts):
    """Write the means of the first and the last evaluation, and `facts`, to summary.json and in one line."""
    summary = {f"{name.replace('/', '_')}_before": value for name, value in before.items()}
    summary |= {name.replace("/", "_"): value for name, value in after.items()} | facts
    Path(run_dir, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    figures = [f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in summary.items()]
    show(f"final {' '.join(figures)}")
