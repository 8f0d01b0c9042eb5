"""Tokenisation, prompts, rollout and reward: what reinforce_lm.py, ppo_lm.py and trpo_lm.py share.

Nothing here knows an algorithm. Functions take explicit arguments and do not write to the tensors they are given, but
for those whose names say so (`all_reduce_in_place`, `copy_weights`).
Shapes: N prompts of the data set, B responses of a batch, P prompt length, R response length, V vocabulary.

The one convention to remember is the response mask. It ends behind the first end token that was sampled, an action like
any other, and is made once, by the rollout. Nothing compares ids with the padding id, which may be the end token's:

>>> responses = torch.tensor([[5, 7, 0, 0], [5, 0, 0, 0], [5, 7, 9, 8]])  # 0 is the end token and also the padding
>>> response_mask = mask_through_first_end(responses, end_ids=[0])
>>> response_mask.int().tolist()  # the first end token is counted; what follows is not; the last row never ended
[[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
"""

import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import numbers
import os
import re
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

# ===== Command line: every mistake of the user is one line on standard error and exit code 2 =====


class InputError(Exception):
    """What the user gave is wrong. The message is one line: the flag or row, what was expected, what was found."""


def require(condition, name, expected, found):
    """Raise `InputError` unless `condition` holds."""
    if not condition:
        found = repr(found)
        raise InputError(f"{name}: expected {expected}, found {found if len(found) < 300 else found[:300] + ' ...'}")


@contextlib.contextmanager
def one_line_errors():
    """Turn an `InputError` into one line on standard error and exit code 2; the same for a lost connection, code 3.

    Control-C ends in one line too, with the shell's code 130.
    """

    def stop(message, code):
        for bar in list(tqdm._instances):
            bar.close()  # or it would be drawn again below the message
        print(message, file=sys.stderr)
        sys.exit(code)

    try:
        yield
    except KeyboardInterrupt:
        stop("stopped; --resume RUN_DIR goes on from the newest checkpoint, if there is one", 130)
    except (InputError, RuntimeError) as error:
        is_input_error = isinstance(error, InputError)
        if not is_input_error and not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = f"rank {os.environ.get('RANK', 0)} ends because another rank has ended; the cause is with that one: "
        message = ("" if is_input_error else lost) + str(error)
        stop("error: " + " ".join(message.split()), 2 if is_input_error else 3)


def parse_command_line(args_class, argv=None, default=None, description=None):
    """Parse the command line with tyro into an instance of the dataclass `args_class`.

    Raises:
        InputError: for an unknown flag or a value that does not parse.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(args_class, args=argv, default=default, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│╭╰╮╯─ ") for line in errors.getvalue().splitlines()[1:]]
        raise InputError(" ".join(line for line in lines if line and not line.startswith("For full help"))) from None


def parse_flags(args_class, argv=None):
    """Parse the command line of a script.

    With `--resume RUN_DIR` the flags of that run are the defaults, so that nothing else has to be repeated.

    Returns:
        args: an instance of the dataclass `args_class`.
        checkpoint: what `save_checkpoint` wrote last into RUN_DIR, or None without `--resume`.
    Raises:
        InputError: for an unknown flag or a value that does not parse.
    """
    description = (sys.modules[args_class.__module__].__doc__ or "").partition("\n")[0]
    args = parse_command_line(args_class, argv, description=description)
    if not args.resume:
        return args, None
    checkpoint = load_checkpoint(args.resume)
    known = {name: value for name, value in checkpoint["args"].items() if hasattr(args, name)}
    return parse_command_line(args_class, argv, args_class(**known), description), checkpoint


def flag(name):
    """total_episodes -> --total-episodes"""
    return "--" + name.replace("_", "-")


def check_args(args, world_size):
    """Raise `InputError` for the first flag that all scripts have with a value that makes no sense."""
    for name, value in asdict(args).items():
        require(not isinstance(value, float) or math.isfinite(value), flag(name), "a finite number", value)
    for name in ("total_episodes", "batch_size", "samples_per_prompt", "prompt_length", "response_length", "eval_size"):
        require(getattr(args, name) > 0, flag(name), "a positive number", getattr(args, name))
    for name in ("micro_batch_size", "rollout_batch_size", "save_every", "eval_every", "kl_coef", "kl_target"):
        require(getattr(args, name) >= 0, flag(name), "0 or more", getattr(args, name))
    require(args.reward_clip >= 0, "--reward-clip", "0 or more", args.reward_clip)
    for name in ("temperature", "kl_horizon"):
        require(getattr(args, name) > 0, flag(name), "a positive number", getattr(args, name))
    require(0 < args.gamma <= 1, "--gamma", "more than 0 and at most 1", args.gamma)
    require(0 <= args.seed < 2**63, "--seed", "0 or more, in 63 bits", args.seed)
    require(args.kl_coef or not args.kl_target, "--kl-target", "a positive --kl-coef to adapt", args.kl_coef)
    expected = f"more than a fifth of --batch-size ({args.batch_size}), or beta could become negative"
    require(not args.kl_target or 5 * args.kl_horizon > args.batch_size, "--kl-horizon", expected, args.kl_horizon)
    require(args.total_episodes >= args.batch_size, "--total-episodes", "at least --batch-size", args.total_episodes)
    k, per_rank = args.samples_per_prompt, args.batch_size // world_size
    multiple = f"a multiple of --samples-per-prompt times ranks ({k} x {world_size})"
    require(args.batch_size % (k * world_size) == 0, "--batch-size", multiple, args.batch_size)
    multiple = f"a divisor of the {per_rank} responses of a rank"
    require(per_rank % (args.micro_batch_size or 1) == 0, "--micro-batch-size", multiple, args.micro_batch_size)
    require(args.rollout_batch_size % k == 0, "--rollout-batch-size", f"a multiple of {k}", args.rollout_batch_size)


# Flags that a resumed run may change: they bound memory, or say where and when to write.
CHANGEABLE = {"resume", "device", "output_dir", "save_every", "eval_every", "micro_batch_size", "rollout_batch_size"}
CHANGEABLE |= {"activation_checkpointing", "compile", "cuda_graph"}


def check_resume(args, checkpoint, script, world_size):
    """Raise `InputError` if the checkpoint is another script's, or a flag or the ranks make it another run."""
    require(checkpoint["script"] == script, "--resume", f"a run of {script}", checkpoint["script"])
    ranks = checkpoint["world_size"]
    require(world_size == ranks, "--resume", f"the {ranks} ranks of {args.resume}", world_size)
    is_annealed = any(value for name, value in asdict(args).items() if name.startswith("anneal"))
    changeable = CHANGEABLE | (set() if is_annealed else {"total_episodes"})
    done = checkpoint["iteration"] * checkpoint["args"]["batch_size"]
    require(
        args.total_episodes >= done, "--total-episodes", f"at least the {done} of {args.resume}", args.total_episodes
    )
    for name, value in asdict(args).items():
        saved = checkpoint["args"].get(name)
        expected = f"{saved!r} as in {args.resume}"
        if name == "total_episodes":
            expected += " (what is annealed has ended there; train on with --model RUN_DIR/model)"
        require(value == saved or name in changeable, flag(name), expected, value)


# ===== Runs: ranks, randomness, checkpoints =====


def start_ranks(device):
    """Join torchrun's process group, if there is one.

    Args:
        device: "auto", "cpu" or "cuda".
    Returns:
        rank, world_size and the torch.device of this rank.
    Raises:
        InputError: if a CUDA device is asked for where there is none.
    """
    require(device in ("auto", "cpu", "cuda"), "--device", "auto, cpu or cuda", device)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: expected a CUDA device on this machine, found none (use --device cpu)")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        require(local_rank < gpus, "--nproc-per-node", f"at most the {gpus} GPUs of this machine", f"rank {local_rank}")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return rank, world_size, torch.device(device)


def all_reduce(tensor):
    """Return the sum of `tensor` over all ranks; with one rank, `tensor` itself."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def all_reduce_in_place(tensors, bucket_size=2**25):
    """Replace each tensor by its sum over all ranks.

    They travel in flat copies of at most `bucket_size` numbers, or one tensor: few calls, and little more memory.
    """
    buckets, room = [], 0
    for tensor in tensors if dist.is_initialized() else []:
        if tensor.numel() > room:
            buckets.append([])
            room = bucket_size
        buckets[-1].append(tensor)
        room -= tensor.numel()
    for bucket in buckets:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.copy_(part.view_as(tensor))


def make_generator(device, *key):
    """A torch.Generator that depends on the integers of `key` alone.

    Randomness is a function of (seed, iteration, rank), never of what ran before: a resumed run draws the same numbers.
    """
    # The length of the key counts, or (1, 2) and (1, 2, 0) would be one stream.
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence((*key, len(key))).generate_state(1)[0]))


def prompt_indices(num_prompts, start, count, seed):
    """Indices of the prompts at positions start ... start + count - 1 of an endless stream of shuffled epochs.

    Returns:
        A list of `count` integers below `num_prompts`; each epoch of `num_prompts` positions holds every index once.
    """
    positions = np.arange(start, start + count)
    epochs = {
        e: np.random.default_rng([seed, int(e)]).permutation(num_prompts) for e in np.unique(positions // num_prompts)
    }
    return [int(epochs[position // num_prompts][position % num_prompts]) for position in positions]


def save_checkpoint(run_dir, iteration, state, keep=2):
    """Write `state` to run_dir/checkpoint_{iteration}.pt and delete all but the newest `keep`.

    The file is written under another name, flushed to the disk and renamed: a checkpoint is whole or not there.

    Raises:
        InputError: if the disk is full or not writable; older checkpoints are then untouched.
    """
    path = Path(run_dir) / f"checkpoint_{iteration:08d}.pt"
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        unfinished.unlink(missing_ok=True)
        raise InputError(
            f"--save-every: could not write {path} ({error}); older checkpoints in {run_dir} are whole, "
            f"make room and go on with --resume {run_dir}"
        ) from None
    for old in sorted(Path(run_dir).glob("checkpoint_*.pt"))[:-keep]:
        old.unlink()


def load_checkpoint(run_dir):
    """Load the newest checkpoint of `run_dir` onto the CPU; raise `InputError` if there is none or it is damaged."""
    paths = sorted(Path(run_dir).glob("checkpoint_*.pt"))
    if not paths:
        raise InputError(
            f"--resume: expected a run directory with a checkpoint_*.pt file, found none in {str(run_dir)!r}"
        )
    try:
        return torch.load(paths[-1], map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        hint = f"; without that file {paths[-2]} is the newest" if len(paths) > 1 else ""
        raise InputError(f"--resume: could not read {paths[-1]} ({error}){hint}") from None


# ===== Tokenisation and models =====


def character_tokenizer(characters):
    """A tokenizer with one token per character, and `<end>` as end and padding token. Unknown characters raise."""
    vocabulary = {token: index for index, token in enumerate(["<end>", *sorted(set(characters))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def load_tokenizer(model, rows, trust_remote_code=False):
    """The tokenizer of a checkpoint, or for `model == "tiny"` one of the characters that occur in `rows`."""
    if model == "tiny":
        texts = [row[column] for row in rows for column in ("prompt", "reference") if column in row]
        return character_tokenizer({character for text in texts for character in str(text)})
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"--model: expected `tiny` or a checkpoint with a tokenizer, found {model!r} ({error})"
        ) from None


def load_policy(model, tokenizer, context_length, seed, trust_remote_code=False):
    """A causal language model in fp32, in evaluation mode, with every dropout at 0.

    Args:
        model: folder or hub name of a checkpoint, or "tiny" for a GPT-2 of about 100k random parameters.
        context_length: P + R, the number of positions that the model has to have.
        seed: of the random weights of "tiny".
    Raises:
        InputError: if there is no such checkpoint, or its context is too short.
    """
    if model == "tiny":
        end = tokenizer.eos_token_id
        size = dict(vocab_size=len(tokenizer), n_positions=context_length, n_embd=64, n_layer=2, n_head=4)
        size["activation_function"] = "gelu_pytorch_tanh"  # one kernel, where GPT-2's default is several
        config = GPT2Config(**size, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    else:
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise InputError(f"--model: expected `tiny` or a checkpoint, found {model!r} ({error})") from None
    # With dropout the loss would score another policy than the one that sampled, and PPO's ratio would not start at 1.
    text_config = config.get_text_config()
    for name, value in vars(text_config).items():
        if re.search(r"dropout|pdrop", name) and isinstance(value, float):
            setattr(text_config, name, 0.0)
    positions = getattr(text_config, "max_position_embeddings", None) or math.inf
    if positions < context_length:
        raise InputError(
            f"--response-length: expected prompt and response to fit the {positions} positions of {model}, "
            f"found {context_length} (longest prompt plus --response-length)"
        )
    if model == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = AutoModelForCausalLM.from_config(config)
    else:
        settings = dict(config=config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        try:
            policy = AutoModelForCausalLM.from_pretrained(model, **settings)
        except Exception as error:
            expected = "the weights of a causal language model"
            raise InputError(f"--model: expected {expected} in {model!r} ({error})") from None
    for module in policy.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # it would stop the gradient of the padding id, which may be an end token
    return policy.eval()


def checkpoint_activations(model):
    """Make the layers of `model` keep only their inputs for a backward pass, which computes the rest again.

    Without gradients, as in sampling, nothing changes. Copies of the model have to be made before.

    Raises:
        InputError: if the layers are not marked as layers that can be run again.
    """

    def run(forward, *inputs, **settings):
        if not torch.is_grad_enabled():
            return forward(*inputs, **settings)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **settings)

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    require(layers, "--activation-checkpointing", "a model whose layers transformers can checkpoint", type(model))
    for layer in layers:
        layer.forward = functools.partial(run, layer.forward)


def bfloat16_copy(model):
    """A copy of `model` with bfloat16 parameters, for sampling; buffers (rotary frequencies) keep theirs."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model.requires_grad_(False)


@torch.no_grad()
def copy_weights(source, target):
    """Copy the parameters of one model into another of the same shape, in place, rounding to the target's precision."""
    for old, new in zip(target.parameters(), source.parameters()):
        old.copy_(new)


def save_model(model, tokenizer, folder):
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load; raise `InputError` if that fails."""
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise InputError(f"--output-dir: could not write the trained model to {folder} ({error})") from None


def end_token_ids(tokenizer, model):
    """All ids that end a response: the tokenizer's end token and those of the model's generation config."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    end_ids = {tokenizer.eos_token_id, *configured} - {None}
    if not end_ids:
        raise InputError("--model: expected an end token in the tokenizer or the generation config, found none")
    return sorted(end_ids)


def position_ids(attention_mask):
    """Positions of the real tokens, counted from 0 behind the left padding: (B, L) mask -> (B, L) integers."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def full_precision(logits):
    """bfloat16 -> float32; anything else stays as it is."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits


class TokenStatistics(torch.autograd.Function):
    """Log-probability of each token and entropy of its distribution: logits (b, R, V), tokens (b, R) -> two (b, R).

    Autograd would keep several (b, R, V) tensors for the backward pass. This keeps the logits alone, in the precision
    that they come in, and computes in float32 by pieces of a few rows.
    """

    @staticmethod
    def pieces(*tensors):
        """Pieces of tensors (b, R, ...) along their b * R rows, the first of which, the logits, in full precision."""
        rows = max(1, 2**22 // tensors[0].shape[-1])
        for logits, *rest in zip(*[tensor.flatten(0, 1).split(rows) for tensor in tensors]):
            yield full_precision(logits), *rest

    @staticmethod
    def forward(ctx, logits, tokens):
        ctx.save_for_backward(logits, tokens)
        logprobs, entropy = [], []
        for z, token in TokenStatistics.pieces(logits, tokens):
            log_p = z.log_softmax(-1)  # (n, V)
            logprobs.append(log_p.gather(1, token[:, None])[:, 0])
            entropy.append(-(log_p.exp() * log_p).sum(-1))
        return torch.cat(logprobs).view_as(tokens), torch.cat(entropy).view_as(tokens)

    @staticmethod
    def backward(ctx, logprob_gradient, entropy_gradient):
        gradients, inputs = [], (*ctx.saved_tensors, logprob_gradient[..., None], entropy_gradient[..., None])
        for z, token, g_logprob, g_entropy in TokenStatistics.pieces(*inputs):
            log_p = z.log_softmax(-1)  # (n, V)
            p = log_p.exp()  # (n, V)
            entropy = -(p * log_p).sum(-1, keepdim=True)  # (n, 1)
            gradient = -p * (g_logprob + g_entropy * (log_p + entropy))  # (n, V)
            gradient.scatter_add_(1, token[:, None], g_logprob)
            gradients.append(gradient.to(inputs[0].dtype))
        return torch.cat(gradients).view_as(inputs[0]), None


token_statistics = TokenStatistics.apply


# ===== Prompts =====


@dataclass
class Prompts:
    """Rows of a data set and their token ids.

    rows: N dictionaries with `prompt` and any other columns. names: N names of the rows for messages.
    ids, mask: (N, P) token ids, left-padded to the longest prompt, and where they are real tokens.
    """

    rows: list
    names: list
    ids: torch.Tensor
    mask: torch.Tensor

    def select(self, indices):
        """The prompts at `indices` (a list of integers), in that order, padded to the longest of them."""
        rows, names = [self.rows[i] for i in indices], [self.names[i] for i in indices]
        length = self.mask[indices].sum(1).max() if indices else 0
        return Prompts(rows, names, self.ids[indices, -length:], self.mask[indices, -length:])


NUM_SORT_PROMPTS = 2**15


def _read_jsonl(path, flag_name):
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag_name}: could not read {path} ({error})") from None
    rows = []
    for number, line in enumerate(text.split("\n") if text else [], start=1):  # JSON may hold other line separators
        try:
            rows.append(json.loads(line))
            json.dumps(rows[-1], ensure_ascii=False).encode()  # half an emoji, as \ud83d, is no text
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{flag_name}: expected a JSON object in {path} line {number}, found {line[:40]!r} ({error})"
            ) from None
        where = f"{flag_name} {path} line {number}"
        require(isinstance(rows[-1], dict), where, "a JSON object, one in each line", rows[-1])
    return rows


def load_rows(dataset, flag_name):
    """Read a data set: "sort", a file of JSON lines, or a hub name NAME[@CONFIG][:SPLIT] (with the package `datasets`).

    Returns:
        A list of dictionaries, and a name of each row for messages.
    Raises:
        InputError: if there is no such data set, it has no rows, or a line is not a JSON object.
    """
    if dataset == "sort":  # five digits; the reference is the same digits in order
        digits = np.random.default_rng(0).permutation(100_000)[:NUM_SORT_PROMPTS]
        rows = [{"prompt": f"{i:05d}", "reference": "".join(sorted(f"{i:05d}"))} for i in digits]
        return rows, [f"sort row {i + 1}" for i in range(len(rows))]
    if dataset.endswith((".jsonl", ".json")) or os.path.exists(dataset):
        rows = _read_jsonl(dataset, flag_name)
        names = [f"{dataset} line {i + 1}" for i in range(len(rows))]
    else:
        if importlib.util.find_spec("datasets") is None:
            expected = "`sort`, a FILE.jsonl, or a hub name with the package datasets installed (pip install datasets)"
            raise InputError(f"{flag_name}: expected {expected}, found {dataset!r}")
        from datasets import load_dataset

        name, _, split = dataset.partition(":")
        name, _, config = name.partition("@")
        try:
            rows = [dict(row) for row in load_dataset(name, config or None, split=split or "train")]
        except Exception as error:
            raise InputError(f"{flag_name}: could not load {dataset!r} from the hub ({error})") from None
        names = [f"{dataset} row {i + 1}" for i in range(len(rows))]
    require(rows, flag_name, "at least one row", f"{dataset} with none")
    return rows, names


def rename_columns(rows, names, prompt_column, reference_column):
    """Rows whose prompt is called `prompt` and whose reference, if there is one, `reference`.

    Raises:
        InputError: if a row's prompt is missing, empty or of another type, or its columns are not the first row's.
    """
    renamed = []
    for row, name in zip(rows, names):
        require(prompt_column in row, f"--prompt-column ({name})", f"a column {prompt_column!r}", sorted(row))
        prompt = row[prompt_column]
        is_chat = isinstance(prompt, list) and all(
            isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt
        )
        if not prompt or not (isinstance(prompt, str) or is_chat):
            expected = "text or a list of messages with role and content, not empty"
            raise InputError(f"--prompt-column ({name}): expected {expected}, found {prompt!r}")
        if reference_column in rows[0] or reference_column != "reference":
            require(
                reference_column in row, f"--reference-column ({name})", f"a column {reference_column!r}", sorted(row)
            )
        if set(row) != set(rows[0]):
            raise InputError(f"{name}: expected the columns {sorted(rows[0])} of the first row, found {sorted(row)}")
        new_row = {column: row[column] for column in row if column not in (prompt_column, reference_column)}
        if reference_column in row:
            new_row["reference"] = row[reference_column]
        renamed.append({**new_row, "prompt": prompt})
    return renamed


# Masks decide which tokens are real, so padding may be any id of the vocabulary, the end token's included.
PAD_ID = 0


def without_added_end(tokenizer, text, tokens):
    """`tokens` of a text without the end token that some tokenizers add: a response could not follow it.

    A list of messages keeps what its chat template wrote.
    """
    ends = isinstance(text, str) and len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id
    return tokens[:-1] if ends and not text.endswith(tokenizer.eos_token) else tokens


def encode_prompts(tokenizer, rows, names, prompt_length):
    """Token ids of the prompts, padded on the left, so that every response starts at the same column.

    Lists of messages go through the tokenizer's chat template and end where the assistant's answer begins.

    Returns:
        `Prompts` with (N, P) ids, P being the longest prompt.
    Raises:
        InputError: with the name of the first row whose prompt has no token or more than `prompt_length`.
    """
    texts = [row["prompt"] for row in rows]
    if all(isinstance(text, str) for text in texts):
        encoded = tokenizer(texts).input_ids
    elif tokenizer.chat_template is None:
        raise InputError(
            "--model: expected a chat template, since prompts are lists of messages; the tokenizer has none"
        )
    else:
        template = dict(add_generation_prompt=True, return_dict=False)
        encoded = []
        for text, name in zip(texts, names):
            try:
                is_text = isinstance(text, str)
                encoded.append(
                    tokenizer(text).input_ids if is_text else tokenizer.apply_chat_template(text, **template)
                )
            except Exception as error:  # a role that the template does not take, say
                raise InputError(f"{name}: expected messages for the chat template, found {text!r} ({error})") from None
    encoded = [without_added_end(tokenizer, *pair) for pair in zip(texts, encoded)]
    for tokens, name in zip(encoded, names):
        require(
            0 < len(tokens) <= prompt_length, f"--prompt-length ({name})", f"1 to {prompt_length} tokens", len(tokens)
        )
    length = max(map(len, encoded))
    ids = torch.tensor([[PAD_ID] * (length - len(tokens)) + tokens for tokens in encoded])
    mask = torch.arange(length) >= length - torch.tensor([len(tokens) for tokens in encoded])[:, None]
    return Prompts(rows, names, ids, mask)


def split_prompts(prompts, eval_size):
    """Split off held-out prompts: `eval_size` of them, at most a tenth, the same ones whatever the seed.

    Training rows with the prompt of a held-out row are left out.

    Returns:
        Training and held-out `Prompts`.
    """
    order = np.random.default_rng(0).permutation(len(prompts.rows)).tolist()
    num_held_out = max(1, min(eval_size, len(order) // 10))
    held_out = [prompts.rows[i]["prompt"] for i in order[:num_held_out]]
    seen = {json.dumps(prompt) for prompt in held_out}
    train = [i for i in order[num_held_out:] if json.dumps(prompts.rows[i]["prompt"]) not in seen]
    require(train, "--dataset", "a training prompt that is not held out (or --eval-dataset)", f"{len(order)} rows")
    return prompts.select(train), prompts.select(order[:num_held_out])


def load_prompts(
    model, dataset, eval_dataset, eval_size, prompt_column, reference_column, prompt_length, trust_remote_code
):
    """The tokenizer of `model`, and training and held-out prompts. The arguments are the flags of the same names.

    Returns:
        tokenizer, training `Prompts`, held-out `Prompts`.
    """
    rows, names = load_rows(dataset, "--dataset")
    rows = rename_columns(rows, names, prompt_column, reference_column)
    eval_rows, eval_names = [], []
    if eval_dataset:
        eval_rows, eval_names = load_rows(eval_dataset, "--eval-dataset")
        eval_rows = rename_columns(eval_rows, eval_names, prompt_column, reference_column)[:eval_size]
    tokenizer = load_tokenizer(model, rows + eval_rows, trust_remote_code)
    prompts = encode_prompts(tokenizer, rows, names, prompt_length)
    if eval_dataset:
        return tokenizer, prompts, encode_prompts(tokenizer, eval_rows, eval_names, prompt_length)
    return tokenizer, *split_prompts(prompts, eval_size)


# ===== Rollout =====


def mask_through_first_end(responses, end_ids):
    """(B, R) ids -> (B, R) booleans: True up to and including the first end token."""
    is_end = torch.isin(responses, torch.tensor(end_ids, device=responses.device))
    return is_end.cumsum(1) - is_end.long() == 0


def has_ended(responses, end_ids):
    """(B, R) ids -> (B,) booleans: True for responses with an end token, False for those cut at the length limit."""
    return torch.isin(responses, torch.tensor(end_ids, device=responses.device)).any(1)


class Decoder:
    """Runs a model over prompts and then over one more token of each response at a time.

    On the CPU the cache of keys and values grows. On CUDA it has its final size from the start, so that the pass of one
    token is the same work each time: it is captured once as a graph and replayed, since launching its kernels one by
    one takes longer than running them.
    """

    def __init__(self, model, prompts, prompt_mask, samples_per_prompt, response_length, fixed_size):
        """Run the prompts, once for all their samples. `self.logits` (b, V) are those of the first response token.

        Args:
            prompts, prompt_mask: (n, P).
            fixed_size: preallocate the cache, if the model has attention over all positions and nothing else.
        Raises:
            InputError: if the model has another kind of cache, or none.
        """
        room = torch.ones((len(prompts), response_length), dtype=torch.bool, device=prompts.device)
        self.model, self.length = model, prompts.shape[1]
        self.attention_mask = torch.cat([prompt_mask, room], 1).long()  # (n, P+R)
        cache = StaticCache(config=model.config, max_cache_len=self.length + response_length) if fixed_size else None
        # Sliding windows count positions outside of tensors, where a captured graph would not see them move.
        self.fixed_size = fixed_size and all(type(layer) is StaticLayer for layer in cache.layers)
        self.captures, self.graph = self.fixed_size and prompts.device.type == "cuda", None
        output = model(
            prompts,
            attention_mask=self.attention_mask if self.fixed_size else self.attention_mask[:, : self.length],
            position_ids=position_ids(prompt_mask),
            past_key_values=cache if self.fixed_size else None,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = getattr(output, "past_key_values", None)
        kinds = {type(layer) for layer in getattr(self.cache, "layers", [None])}
        known = kinds <= {StaticLayer, DynamicLayer, DynamicSlidingWindowLayer}  # those that `select` knows
        require(known, "--model", "a cache of keys and values and nothing else", f"{type(model).__name__}'s {kinds}")
        self.logits, self.positions = output.logits[:, -1], position_ids(prompt_mask)[:, -1:]  # (n, V), (n, 1)
        self.tokens = torch.zeros_like(self.positions)  # (n, 1)
        self.select(torch.arange(len(prompts), device=prompts.device).repeat_interleave(samples_per_prompt))

    def select(self, rows):
        """Go on with these rows alone, a tensor of indices, which may repeat."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        for name in ("logits", "tokens", "positions", "attention_mask"):
            setattr(self, name, getattr(self, name)[rows])
        self.graph = None

    def step(self, tokens):
        """Append a token (b, 1) to each row. `self.logits` (b, V) are then those of the next."""
        self.tokens.copy_(tokens)
        self.positions += 1
        self.length += 1
        if not self.captures:
            self.logits = self.forward()
            return
        if self.graph is None:
            self.capture()
        self.graph.replay()  # writes to self.logits

    def forward(self):
        """The pass of one token, over tensors that keep their place."""
        return self.model(
            self.tokens,
            attention_mask=self.attention_mask if self.fixed_size else self.attention_mask[:, : self.length],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def capture(self):
        """Record the kernels of `forward` as a CUDA graph."""
        lengths = [layer.cumulative_length.clone() for layer in self.cache.layers]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self.forward()  # libraries allocate their workspaces in the first pass
            torch.cuda.current_stream().wait_stream(stream)
            for layer, length in zip(self.cache.layers, lengths):
                layer.cumulative_length.copy_(length)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
                self.logits = self.forward()
        except RuntimeError as error:
            raise InputError(f"--cuda-graph: this model needs --no-cuda-graph ({error})") from None


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # each length would be compiled anew
def rollout(
    model,
    prompts,
    prompt_mask,
    response_length,
    end_ids,
    samples_per_prompt=1,
    temperature=1.0,
    generator=None,
    rollout_batch_size=0,
    greedy=False,
    cuda_graph=True,
):
    """Sample responses token by token.

    Tokens come from softmax(logits / temperature) and nothing else: no top-k, top-p or repetition penalty, whatever the
    checkpoint's generation_config.json says, so that the sampled distribution is the one whose gradient is taken.

    Args:
        model: a causal language model, without dropout.
        prompts, prompt_mask: (N, P) left-padded ids and where they are real; a prompt is run once for all its samples.
        end_ids: ids that end a response; the end token belongs to the response.
        rollout_batch_size: responses sampled at once, a multiple of samples_per_prompt; 0 for all. Bounds memory.
        greedy: take the most likely token instead of sampling.
        cuda_graph: on CUDA, whether to use `Decoder`'s cache of fixed size and its graph.
    Returns:
        responses: (N * samples_per_prompt, R) ids, samples of one prompt next to each other, `PAD_ID` after the end.
        response_mask: the same shape, True up to and including the first end token.
        logprobs: the same shape, the sampler's log-probabilities of the tokens, 0 after the end.
    Raises:
        InputError: if logits are not finite.
    """
    prompts_at_once = max(1, rollout_batch_size // samples_per_prompt) if rollout_batch_size else len(prompts)
    end_tensor = torch.tensor(end_ids, device=prompts.device)
    on_cuda = prompts.device.type == "cuda"
    chunks = []
    for chunk, chunk_mask in zip(prompts.split(prompts_at_once), prompt_mask.split(prompts_at_once)):
        decoder = Decoder(model, chunk, chunk_mask, samples_per_prompt, response_length, on_cuda and cuda_graph)
        batch_size = len(chunk) * samples_per_prompt
        responses = torch.full((batch_size, response_length), PAD_ID, device=chunk.device)  # (b, R)
        logprobs = torch.zeros((batch_size, response_length), device=chunk.device)  # (b, R)
        rows = torch.arange(batch_size, device=chunk.device)  # (b,), those that are still decoded
        ended = torch.zeros(batch_size, dtype=torch.bool, device=chunk.device)  # (b,)
        for t in range(response_length):
            step_logprobs = (decoder.logits.float() / temperature).log_softmax(-1)  # (b, V)
            if greedy:
                tokens = step_logprobs.argmax(-1, keepdim=True)  # (b, 1)
            else:  # with exponential q, p_i / q_i is the largest with probability p_i; nothing waits for the GPU
                noise = torch.empty_like(step_logprobs).exponential_(generator=generator)  # (b, V)
                tokens = (step_logprobs.exp() / noise).argmax(-1, keepdim=True)  # (b, 1)
            responses[rows, t] = tokens[:, 0]
            logprobs[rows, t] = step_logprobs.gather(1, tokens)[:, 0]
            ended |= torch.isin(tokens[:, 0], end_tensor)
            if t + 1 == response_length:
                break
            if not on_cuda or t % 16 == 15:  # asking how many go on waits for the GPU
                going_on = (~ended).nonzero()[:, 0]  # (b,)
                if not len(going_on):
                    break
                if len(going_on) <= len(rows) / 2:
                    decoder.select(going_on)
                    rows, ended, tokens = rows[going_on], ended[going_on], tokens[going_on]
            decoder.step(tokens)
        response_mask = mask_through_first_end(responses, end_ids)  # (b, R)
        chunks.append((responses.where(response_mask, PAD_ID), response_mask, logprobs.where(response_mask, 0.0)))
    responses, response_mask, logprobs = [torch.cat(parts) for parts in zip(*chunks)]
    require(logprobs.isfinite().all(), "--model", "finite logits; try a lower learning rate", "NaN or infinity")
    return responses, response_mask, logprobs


def decode(tokenizer, responses, response_mask):
    """Texts of (B, R) responses without special tokens: for the reward and the reader, never to be encoded again."""
    rows = zip(responses.tolist(), response_mask.tolist())
    tokens = [list(itertools.compress(row, mask)) for row, mask in rows]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


# ===== Reward: fn(prompts, responses, **columns) -> one float each =====


def match_reward(prompts, responses, reference, **columns):
    """Share of the reference's characters that stand at their place in the response, its end counted as one more."""

    def match(response, reference):
        right = sum(a == b for a, b in zip(response, reference)) + (len(response) == len(reference))
        return right / (len(reference) + 1)

    return [match(response, str(text)) for response, text in zip(responses, reference)]


def exact_reward(prompts, responses, reference, **columns):
    """1 if response and reference are the same but for white space around them, else 0."""
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

    The text is tokenised anew with the classifier's own tokenizer, so it may have another vocabulary than the policy.
    If prompts are lists of messages, the response is the assistant's, and the chat template makes the text.
    """

    def __init__(self, name, logit, batch_size, device, trust_remote_code=False):
        """Load the checkpoint `name`, in bfloat16 on CUDA, in float32 elsewhere.

        Args:
            logit: which logit is the score. batch_size: texts at once.
        Raises:
            InputError: if it cannot be loaded whole, or has no such logit.
        """
        settings = dict(trust_remote_code=trust_remote_code)
        on_cuda = torch.device(device).type == "cuda"
        dtype = torch.bfloat16 if on_cuda and torch.cuda.is_bf16_supported() else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, **settings)
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, output_loading_info=True, **settings
            )
        except Exception as error:
            raise InputError(f"--reward: expected a sequence classifier in {name!r} ({error})") from None
        # A head with random weights, or one that lost its bias, still returns numbers.
        of_head = [key for key in loading["unexpected_keys"] if not key.startswith(self.model.base_model_prefix + ".")]
        wrong = sorted(loading["missing_keys"]) + of_head
        require(not wrong, "--reward", f"a sequence classifier in {name!r} with the weights of its class", wrong)
        labels = self.model.config.num_labels
        require(-labels <= logit < labels, "--reward-logit", f"one of the {labels} logits of {name}", logit)
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer.truncation_side = "left"  # of a text that is too long, the response stays
        self.tokenizer.padding_side = "right"  # positions are counted from the first token, whatever it is
        # A decoder's score is that of its last token that is no padding, by the id that the config names. If it was
        # trained without one, the end token of a text counted, and the start token can stand in: none ends with that.
        config = self.model.config.get_text_config()
        if self.tokenizer.pad_token is None and config.pad_token_id in self.tokenizer.get_vocab().values():
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(config.pad_token_id)
        if self.tokenizer.pad_token is None:
            pad_token = self.tokenizer.bos_token or self.tokenizer.eos_token
            require(pad_token, "--reward", f"a padding, start or end token in {name!r}", None)
            self.tokenizer.pad_token = pad_token
        config.pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(config, "max_position_embeddings", None)
        for module in self.model.modules():  # RoBERTa's positions begin behind the padding id
            if isinstance(module, torch.nn.Embedding) and module.num_embeddings == positions and module.padding_idx:
                positions -= module.padding_idx + 1
        self.max_length = int(min(positions or math.inf, self.tokenizer.model_max_length, 2**30))
        self.name, self.logit, self.batch_size, self.device = name, logit, batch_size, device
        self.has_warned = False

    def text(self, prompt, response):
        """What the classifier reads."""
        if isinstance(prompt, str):
            return prompt + response
        messages = [*prompt, {"role": "assistant", "content": response}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    @torch.no_grad()
    def __call__(self, prompts, responses, **columns):
        """Texts -> (B,) fp32 scores. Of a text that is too long for the model the last tokens are read."""
        scores = []
        for start in range(0, len(responses), self.batch_size):
            batch = slice(start, start + self.batch_size)
            texts = [self.text(*pair) for pair in zip(prompts[batch], responses[batch])]
            is_text = isinstance(prompts[start], str)  # the chat template has written the special tokens already
            encode = functools.partial(
                self.tokenizer, texts, padding=True, add_special_tokens=is_text, return_tensors="pt"
            )
            inputs = encode(verbose=False)
            longest = inputs.input_ids.shape[1]
            if longest > self.max_length:
                inputs = encode(truncation=True, max_length=self.max_length)
                if not self.has_warned:
                    reads = f"reads the last {self.max_length} tokens of a text, found one of {longest} (said once)"
                    tqdm.write(f"  warning: --reward model:{self.name} {reads}", file=sys.stderr)
                self.has_warned = True
            inputs = inputs.to(self.device)
            scores.append(self.model(**inputs).logits[:, self.logit].float())
        return torch.cat(scores).cpu()


def load_reward(name, *prompt_sets, logit=-1, batch_size=64, device="cpu", trust_remote_code=False):
    """The reward function called `name`: one of `REWARDS`, model:NAME_OR_FOLDER, or FILE.py:function.

    Args:
        prompt_sets: the `Prompts` that it will be called with.
        logit, batch_size, device, trust_remote_code: see `RewardModel`.
    Raises:
        InputError: if there is no such function, or it does not take the columns of the prompts.
    """
    path, _, function = name.rpartition(":")
    if name in REWARDS:
        reward_fn = REWARDS[name]
    elif name.startswith("model:"):
        reward_fn = RewardModel(name.removeprefix("model:"), logit, batch_size, device, trust_remote_code)
        kinds = {type(row["prompt"]) for prompts in prompt_sets for row in prompts.rows}
        require(len(kinds) <= 1, f"--reward {name}", "prompts that are all text or all lists of messages", "both")
        has_template = reward_fn.tokenizer.chat_template is not None
        require(has_template or kinds <= {str}, "--reward", "a chat template, for lists of messages", f"none in {name}")
    elif path.endswith(".py"):
        require(os.path.isfile(path), "--reward", "an existing file", path)
        spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(Path(path).resolve().parent))  # it may import what lies beside it
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise InputError(f"--reward: importing {path} raised {_describe(error)}") from None
        reward_fn = getattr(module, function, None)
        require(callable(reward_fn), "--reward", f"a function {function!r} in {path}", reward_fn)
    else:
        expected = f"one of {', '.join(REWARDS)}, model:NAME or FILE.py:function"
        raise InputError(f"--reward: expected {expected}, found {name!r}")
    for prompts in prompt_sets:
        for row, row_name in zip(prompts.rows, prompts.names):
            is_text = isinstance(row.get("reference", ""), (str, int, float))
            require(
                is_text or name not in REWARDS,
                f"--reward {name} ({row_name})",
                "a text reference",
                row.get("reference"),
            )
        columns = [column for column in prompts.rows[0] if column != "prompt"]
        try:
            inspect.signature(reward_fn).bind([], [], **{column: [] for column in columns})
        except (TypeError, ValueError) as error:
            expected = f"a function (prompts, responses, **columns) that takes the columns {columns}"
            raise InputError(f"--reward ({prompts.names[0]}): expected {expected}, found {name} ({error})") from None
    return reward_fn


def _describe(error):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def score_responses(reward_fn, reward_name, prompts, responses, iteration, clip=0.0):
    """Call the reward function and check what it returns.

    Args:
        prompts: N `Prompts`. responses: N * k texts, the k of one prompt next to each other.
        reward_name, iteration: for messages. clip: scores end at minus and plus this; 0 for no limit.
    Returns:
        scores: (N * k,) fp32 tensor on the CPU.
    Raises:
        InputError: naming reward, iteration and row, if it raises or does not return that many finite numbers.
    """
    samples_per_prompt = len(responses) // len(prompts.rows)
    rows = [row for row in prompts.rows for _ in range(samples_per_prompt)]
    names = [name for name in prompts.names for _ in range(samples_per_prompt)]

    def call(rows, responses):
        columns = {column: [row[column] for row in rows] for column in rows[0] if column != "prompt"}
        return reward_fn([row["prompt"] for row in rows], responses, **columns)

    where = f"--reward {reward_name}, iteration {iteration}"
    try:
        scores = call(rows, responses)
    except (Exception, SystemExit) as error:
        for row, name, response in zip(rows, names, responses):  # find the row to blame
            try:
                call([row], [response])
            except (Exception, SystemExit) as row_error:
                raise InputError(f"{where}, {name}: raised {_describe(row_error)}; response {response!r}") from None
        raise InputError(f"{where}, {names[0]} to {names[-1]}: raised {_describe(error)}") from None
    scores = scores.tolist() if isinstance(scores, (torch.Tensor, np.ndarray)) else scores
    if not isinstance(scores, (list, tuple)) or len(scores) != len(responses):
        found = f"{len(scores)} values" if isinstance(scores, (list, tuple)) else repr(scores)
        raise InputError(f"{where}, {names[0]} to {names[-1]}: expected {len(responses)} scores, found {found}")
    for score, name, response in zip(scores, names, responses):
        if not isinstance(score, numbers.Real) or not abs(score) <= torch.finfo(torch.float32).max:
            raise InputError(f"{where}, {name}: expected a finite number, found {score!r}; response {response!r}")
    scores = torch.tensor([float(score) for score in scores])
    return scores.clamp(-clip, clip) if clip else scores


# ===== What a reader sees =====


def shorten(prompt, length=60):
    """A text, or the last message of a list, on one line of at most `length` characters."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = repr(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def markdown_table(samples):
    """Sample texts as a table for TensorBoard: a list of (row, response, score)."""
    lines = ["|prompt|response|score|reference|", "|-|-|-|-|"]
    for row, response, score in samples:
        cells = [
            shorten(row["prompt"], 400),
            shorten(response, 400),
            f"{score:.3f}",
            shorten(str(row.get("reference", "")), 400),
        ]
        lines.append("|" + "|".join(cell.replace("|", "\\|") for cell in cells) + "|")
    return "\n".join(lines)
