"""Tokenization, rollout, reward, models and ranks: what reinforce_lm.py, ppo_lm.py and trpo_lm.py share.

`args` are a script's flags. Shapes: N prompts, k responses to each, B responses of a batch on this rank, b of those run
at once, P prompt length, R response length, V vocabulary; of a micro-batch, T packed tokens and n response tokens.

Prompts are padded on the left, so that every response starts in the same column. With P = 3 and R = 4, a prompt of two
tokens p and a response of two tokens a and an end token e:

    column              0    1    2    3    4    5    6
    sequences           pad  p1   p2   a1   a2   e    pad      (B, P+R)
    attention_mask      0    1    1    1    1    1    0        (B, P+R)    real tokens
    response_mask                      1    1    1    0        (B, R)      sampled tokens, which are trained
    logits at column              2    3    4                  (n, V)      predict a1, a2, e: one column earlier
    values at column              2    3    4    5    6        (B, R+1)    before a1, a2, e; 6 is for cut responses

The mask ends after the first end token, an action like any other. The rollout makes it; nothing compares ids with the
padding id, which may be the end token's:

>>> responses = torch.tensor([[5, 7, 0, 0], [5, 0, 0, 0], [5, 7, 9, 8]])  # 0 is end token and padding
>>> response_mask = mask_through_first_end(responses, end_ids=[0])
>>> response_mask.int().tolist()  # what follows an end token is out; the last row never ended
[[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
"""

import contextlib
import copy
import importlib
import json
import os
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

# Threads that spin while waiting slow two programs on one machine tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "1800")  # read when torch is imported

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface


# ===== Errors =====
def require(condition, name, expected, found):
    """Exit with one line on standard error unless `condition` holds. name: a flag or a row."""
    if not condition:
        sys.exit(" ".join(f"error: {name}: expected {expected}, found {str(found)[:300]}".split()))


@contextlib.contextmanager
def input_errors(name, kind=Exception):
    """Turn an error inside into one line that begins with `name`, as `require` does."""
    try:
        yield
    except kind as error:
        raise SystemExit(" ".join(f"error: {name}: {type(error).__name__}: {str(error)[-500:]}".split())) from error


# ===== Flags =====
Number = TypeVar("Number", int, float)
Positive = Annotated[Number, ("a positive number", lambda x: 0 < x < torch.inf)]
NonNegative = Annotated[Number, ("0 or more", lambda x: x >= 0)]
UpToOne = Annotated[Number, ("more than 0 and at most 1", lambda x: 0 < x <= 1)]
ZeroToOne = Annotated[Number, ("0 to 1", lambda x: 0 <= x <= 1)]


def parse_flags(args_class, tiny, adapters, argv=None):
    """Parse the command line: -> args, and the checkpoint of --resume, whose flags are the defaults, or None."""
    # Parsed twice: --model, --lora-rank and --resume determine defaults of others.
    about = f"Defaults of --model tiny: {tiny}. Defaults of other models with --lora-rank: {adapters}."
    args, checkpoint = tyro.cli(args_class, args=argv, description=about), None
    values = tiny if args.model == "tiny" else adapters if args.lora_rank else {}
    if args.resume:
        checkpoint = load_checkpoint(args.resume)
        values, known = checkpoint["args"], get_type_hints(args_class)
        require(values.keys() <= known.keys(), "--resume", "a run of this script", args.resume)
    return tyro.cli(args_class, args=argv, default=args_class(**values), description=about), checkpoint


def check_flags(args, world_size):
    """Exit with one line about the first flag whose value makes no sense."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        for expected, holds in getattr(hint, "__metadata__", ()):
            require(holds(getattr(args, name)), f"--{name.replace('_', '-')}", expected, getattr(args, name))
    enough = args.total_episodes >= args.batch_size or not args.total_episodes
    require(enough, "--total-episodes", "at least --batch-size, or 0 to evaluate only", args.total_episodes)
    prompts, rest = divmod(args.batch_size, args.samples_per_prompt * world_size)  # of a rank
    require(not rest, "--batch-size", "a multiple of --samples-per-prompt times ranks", args.batch_size)
    minibatches = getattr(args, "num_minibatches", 1)
    require(minibatches <= prompts, "--num-minibatches", f"at most the {prompts} prompts of a rank", minibatches)


# ===== Runs: ranks, randomness, statistics, files =====
def start_ranks(args):
    """Join torchrun's process group, if any: -> rank, world_size, device, args without automatic values."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    require(on_cuda or args.device != "cuda", "--device", "a CUDA device (or --device cpu)", "none")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_cuda else "cpu"
    if on_cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients can be NaN (pytorch issue 196678)
        torch.backends.cuda.matmul.allow_tf32 = True  # a tenth of the error of bfloat16
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_cuda else "gloo")
    if args.dtype == "auto":  # many CPUs have no bfloat16 products
        args = replace(args, dtype="bfloat16" if on_cuda else "float32")
    args = replace(args, micro_batch_tokens=args.micro_batch_tokens or (4096 if on_cuda else 1024))
    return rank, world_size, torch.device(device), args


def make_generator(device, *key):
    """A torch.Generator seeded by the integers of `key`; final zeros count."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence((*key, len(key))).generate_state(1)[0]))


def prompt_indices(num_rows, start, count, seed):
    """A list of `count` positions, from `start` on in an endless stream of shuffled epochs."""
    epochs = range(start // num_rows, (start + count - 1) // num_rows + 1)
    stream = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in epochs])
    return stream[start % num_rows :][:count].tolist()


def all_reduce(tensor):
    """Return the sum of `tensor` over all ranks; with one rank, `tensor` itself."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def mean(values, mask=None):
    """Mean of `values`, where `mask` is True, over all ranks: -> scalar."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    # In float64 the mean of equal values is exact: Adam would make a full step of rounding error.
    total, count = all_reduce(torch.stack([values.where(mask, 0.0).double().sum(), mask.sum().double()]))
    return (total / count).to(torch.promote_types(values.dtype, torch.float32))  # of booleans, too


def variance(values, mask):
    """Population variance of `values` where `mask` is True, over all ranks: -> scalar."""
    return mean((values - mean(values, mask)) ** 2, mask)


def whiten(values, mask, shift_mean=True):
    """Scale to deviation 1, and shift to mean 0 if `shift_mean`, where `mask` is True; 0 elsewhere."""
    shift = mean(values, mask) if shift_mean else 0.0
    return ((values - shift) / (variance(values, mask).sqrt() + 1e-8)).where(mask, 0.0)


def add_sums(sums, mask, values):
    """Add to the dictionary `sums` the sums of {name: (b, R)} where `mask` (b, R) is True."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.detach().where(mask, 0.0).double().sum()


def means_over_ranks(sums, count):
    """{name: sum of this rank} -> {name: sum over all ranks divided by `count`, a float}."""
    return dict(zip(sums, (all_reduce(torch.stack(list(sums.values()))) / count).tolist()))


def sum_and_clip_gradients(network, max_grad_norm):
    """Sum gradients of all ranks, clip their norm in place, and return the norm before clipping."""
    parameters = trained_parameters(network).values()
    for p in parameters:  # an expert without tokens here has no gradient, but is in the sum
        p.grad = all_reduce(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    require(norm < torch.inf, "gradient", "a finite norm; try a lower learning rate", norm)
    return norm


def trained_parameters(network):
    """{name: parameter}, without frozen ones, such as the base of adapters."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def save_checkpoint(run_dir, iteration, state, keep=2):
    """Write `state` to run_dir/checkpoint_{iteration}.pt and delete all but the newest `keep`."""
    unfinished = Path(run_dir, "checkpoint.tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, Path(run_dir, f"checkpoint_{iteration:08d}.pt"))  # all of it or nothing
    for old in sorted(Path(run_dir).glob("checkpoint_*.pt"))[:-keep]:
        old.unlink()


def load_checkpoint(run_dir):
    """Load the newest checkpoint of `run_dir` onto the CPU."""
    paths = sorted(Path(run_dir).glob("checkpoint_*.pt"))
    require(paths, "--resume", "a run directory with a checkpoint_*.pt file", run_dir)
    return torch.load(paths[-1], map_location="cpu", mmap=True, weights_only=True)


# ===== Models =====
def load_tokenizer(model, rows):
    """The tokenizer of a checkpoint, or for `tiny` one of the characters in `rows`."""
    if model != "tiny":
        with input_errors(f"--model: not `tiny` or a checkpoint with a tokenizer: {model!r}"):
            return transformers.AutoTokenizer.from_pretrained(model)
    characters = sorted({*"".join(f"{row['prompt']}{row.get('reference', '')}" for row in rows)})
    vocabulary = {token: index for index, token in enumerate(["<end>", *characters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))  # unknown characters raise
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def load_policy(args, tokenizer, rows):
    """The model of --model on the CPU in float32; frozen weights of adapted layers in --dtype, except in TRPO.

    It stays in evaluation mode: with dropout the loss would score a policy other than the sampler's.
    """
    context_length = max(len(row["input_ids"]) for row in rows) + args.response_length
    torch.manual_seed(args.seed)
    if args.model == "tiny":
        special = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)  # <end>
        size = dict(vocab_size=len(tokenizer), n_positions=context_length, n_embd=64, n_layer=2, n_head=4)
        config = transformers.GPT2Config(**size, **special, activation_function="gelu_pytorch_tanh")
        policy = transformers.AutoModelForCausalLM.from_config(config)
    else:
        with input_errors(f"--model: could not load {args.model!r}"):
            config = transformers.AutoConfig.from_pretrained(args.model)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or context_length
        require(context_length <= limit, "--response-length", f"at most {limit}, prompt included", context_length)
        policy = load_whole(transformers.AutoModelForCausalLM, args.model, "--model", torch.float32)
    for module in policy.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # or the padding id, perhaps an end token, would get no gradient
    accept_packed_rows(policy)
    head = policy.get_output_embeddings()
    head.forward = types.MethodType(full_precision_product, head)  # deepcopy rebinds it to the copied head
    if args.lora_rank:  # LoRA adapters (Hu et al. 2022) are all that is trained
        import peft

        settings = dict(lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        config = peft.LoraConfig(r=args.lora_rank, base_model_name_or_path=args.model, **settings)
        peft.inject_adapter_in_model(config, policy)
        for name, parameter in policy.named_parameters():
            # Autocast would round the frozen base anyway, but TRPO (max_kl) updates in float32.
            if name.endswith("base_layer.weight") and args.dtype == "bfloat16" and not hasattr(args, "max_kl"):
                parameter.data = parameter.data.bfloat16()
    return policy.eval()


def full_precision_product(head, hidden):
    """Logits as a float32 product (TF32 on a GPU): autocast would round 16.06 to 16."""
    with torch.autocast(hidden.device.type, enabled=False):
        # PyTorch would copy a frozen head for each row if hidden states are not contiguous.
        return type(head).forward(head, hidden.contiguous().to(head.weight.dtype))


def load_whole(auto_class, name, flag, dtype):
    """The model of a checkpoint that has all its weights: missing ones would be random."""
    with input_errors(f"{flag}: could not load {name!r} with {auto_class.__name__}"):
        model, keys = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    require(not keys["missing_keys"], flag, f"all weights in {name!r}", f"none for {sorted(keys['missing_keys'])}")
    lost = [key for key in keys["unexpected_keys"] if not key.startswith(f"{model.base_model_prefix}.")]
    require(not lost, flag, f"{auto_class.__name__} in {name!r}", f"another head: {sorted(lost)}")
    return model


def copy_network(network):
    """A deep copy that shares frozen parameters, the base of adapters: the memo marks them as copied."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters() if not p.requires_grad})


def prepare(network, device, args):
    """Move a network to the device; with --activation-checkpointing its layers keep only their input."""
    for layer in network.modules():
        if args.activation_checkpointing and isinstance(layer, GradientCheckpointingLayer):
            keep_input = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            layer.forward = partial(keep_input, layer.forward)
    return network.to(device)


def save_model(policy, tokenizer, args, run_dir):
    """Write policy and tokenizer to RUN_DIR/model, or adapters, for `peft`, to RUN_DIR/adapter."""
    if args.lora_rank:
        import peft
        from safetensors.torch import save_file

        policy.peft_config["default"].save_pretrained(f"{run_dir}/adapter")
        adapters = {f"base_model.model.{name}": p for name, p in peft.get_peft_model_state_dict(policy).items()}
        save_file(adapters, f"{run_dir}/adapter/adapter_model.safetensors")
    else:
        policy.save_pretrained(f"{run_dir}/model")
        tokenizer.save_pretrained(f"{run_dir}/model")


# ===== Passes over a micro-batch: real tokens in one row, prompts once =====
def position_ids(attention_mask):
    """Positions of real tokens, from 0 on after the left padding: (B, L) mask -> (B, L) integers."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def micro_batches_of(groups, attention_mask, args):
    """Split rows into micro-batches of at most --micro-batch-tokens, or of one row: (prompts, k) -> a list of (b,).

    groups: row indices of each prompt's k responses. A prompt counts once, as `pack` runs it once, plus an eighth of
    it for each response, as attention copies its keys and values.
    """
    prompts, responses = [m.sum(1) for m in attention_mask.tensor_split([-args.response_length], 1)]  # (B,), tokens
    counts, total = [], torch.inf  # inf: the first row opens a micro-batch
    for prompt, *lengths in torch.cat([prompts[groups[:, :1]], responses[groups]], 1).tolist():
        total += prompt
        for length in lengths:
            cost = length + prompt // 8
            total += cost
            if total > args.micro_batch_tokens:
                counts.append(0)
                total = prompt + cost
            counts[-1] += 1
    return groups.flatten().split(counts)


def shuffled_minibatches(attention_mask, args, *key):
    """One pass over the batch, prompts shuffled by `key`: minibatches, which are lists of micro-batches."""
    indices = torch.arange(len(attention_mask), device=attention_mask.device)  # (B,)
    groups = indices.view(-1, args.samples_per_prompt)  # (B/k, k)
    order = torch.randperm(len(groups), generator=make_generator("cpu", *key)).to(groups.device)
    return [micro_batches_of(part, attention_mask, args) for part in groups[order].tensor_split(args.num_minibatches)]


def pack(sequences, attention_mask, response_length):
    """Put the real tokens of b rows into one row of T, a prompt once for neighbors that begin with it.

    >>> sequences = torch.tensor([[0, 5, 6, 7, 8], [0, 5, 6, 9, 0]])  # two responses to one prompt, P = 3 and R = 2
    >>> attention_mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    >>> inputs, places = pack(sequences, attention_mask, response_length=2)
    >>> inputs["input_ids"].tolist(), places.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 0, 1, 2, 3], [0, 0, 1, 4, 4]])

    Returns:
        inputs: keyword arguments for a network. A token sees those before it in its own sequence alone.
        places: (b, P+R), where in the packed row each token is; of padding, any place.
    """
    length = sequences.shape[1] - response_length  # P
    prompts = sequences[:, :length].where(attention_mask[:, :length], -1)  # (b, P)
    is_new = torch.ones_like(attention_mask[:, 0])  # (b,), rows with another prompt than the row before
    is_new[1:] = (prompts[1:] != prompts[:-1]).any(1)
    is_packed = attention_mask.clone()  # (b, P+R), the T tokens that are run
    is_packed[:, :length] &= is_new[:, None]
    places = (is_packed.flatten().cumsum(0) - 1).clamp(min=0).view_as(sequences)  # (b, P+R)
    places[:, :length] = places[is_new, :length][is_new.cumsum(0) - 1]  # those of the row that runs the prompt
    blocks, slots, count = [], [], is_packed.sum()
    # Attention alone is padded: rows with up to 32, 64 ... packed tokens, with or without a prompt, are a block.
    kinds = 2 * is_packed.sum(1).clamp(min=32).log2().ceil() + is_new  # (b,)
    for kind in kinds[is_packed.any(1)].unique():
        rows = (kinds == kind).nonzero()[:, 0]
        mask, run, place = [x[rows] for x in (attention_mask, is_packed, places)]
        queries, keys = [x.any(0).nonzero()[:, 0] for x in (run, mask)]  # (q,), (l,), columns
        distances = queries[:, None] - keys  # (q, l), in tokens: rows have no gaps
        is_hidden = (distances < 0) | ~mask[:, None, None, keys]  # (rows, 1, q, l)
        bias = torch.where(is_hidden, -1e30, 0.0)  # -inf makes padding NaN
        blocks.append((place[:, queries], place[:, keys], distances, bias))
        slots.append(place.where(run, count)[:, queries].flatten())  # places of the block's outputs; T: none
    order = torch.cat(slots).argsort()[:count]  # (T,), index of each place in the blocks' outputs
    inputs = {"input_ids": sequences[is_packed][None], "position_ids": position_ids(attention_mask)[is_packed][None]}
    # The mask is not read: its four dimensions keep transformers from making one of (T, T).
    inputs |= {"attention_mask": torch.zeros(1, 1, 1, 1, device=places.device), "packed": (blocks, order)}
    return inputs | {"use_cache": False}, places


def accept_packed_rows(model):
    """Wrap a model's attention function; transformers passes it the unknown keyword `packed`."""
    own, kind = model.config._attn_implementation, model.config.model_type
    name = f"packed_{own}_{kind}"
    eager = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)  # in no table
    attend = ALL_ATTENTION_FUNCTIONS.get(own, eager)
    AttentionInterface.register(name, partial(packed_attention, attend))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation(name)


def packed_attention(attend, module, query, key, value, attention_mask, packed=None, sliding_window=None, **settings):
    """Call `attend`, an attention function of transformers, on each block of a packed row: (1, heads, T, d) each."""
    if packed is None:
        return attend(module, query, key, value, attention_mask, sliding_window=sliding_window, **settings)

    def take(tensor, at):  # (1, heads, T, d), (rows, l) -> (rows, heads, l, d); the gradient of [0] is a copy
        return tensor.squeeze(0).transpose(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)

    (blocks, order), outputs = packed, []
    for places, key_places, distances, bias in blocks:  # (rows, q), (rows, l), (q, l), (rows, 1, q, l)
        if sliding_window:
            bias = bias.masked_fill(distances >= sliding_window, -1e30)
        inputs = take(query, places), take(key, key_places), take(value, key_places), bias.to(query.dtype)
        outputs.append(attend(module, *inputs, **settings)[0].flatten(0, 1))  # (rows q, heads, d)
    return torch.cat(outputs).index_select(0, order)[None], None


def autocast(device, args):
    """A context for passes in the precision of --dtype."""
    # With --activation-checkpointing each layer rounds its weights again: the cache would hold them all.
    settings = dict(enabled=args.dtype == "bfloat16", cache_enabled=not args.activation_checkpointing)
    return torch.autocast(device.type, torch.bfloat16, **settings)


def response_logits(model, sequences, attention_mask, response_mask, args):
    """Logits, at temperature 1, that predict the n tokens of the response mask, row after row.

    (b, P+R), (b, P+R), (b, R) -> (n, V). model: a network, or a function called like one.
    """
    is_run = attention_mask[:, :-1] & attention_mask[:, 1:]  # (b, P+R-1): last tokens predict nothing
    inputs, places = pack(sequences[:, :-1], is_run, args.response_length - 1)
    inputs["logits_to_keep"] = places[:, -args.response_length :][response_mask]  # (n,), from the prompt's last on
    with autocast(sequences.device, args):
        return model(**inputs).logits.squeeze(0)


@torch.no_grad()
def in_micro_batches(function, micro_batches, *tensors):
    """Call `function` without gradient on the rows of each micro-batch, each row once: (B, ...) -> (B, ...)."""
    results = torch.cat([function(*[x[rows] for x in tensors]) for rows in micro_batches])
    return results[torch.cat(micro_batches).argsort()]


# ===== Prompts: rows are dictionaries of `prompt`, `input_ids` and other columns =====
PAD_ID = 0  # may be any id, the end token's too: masks decide which tokens are real
NUM_SORT_PROMPTS = 2**15


def load_rows(dataset, flag, args):
    """Rows with `prompt` and other columns, of sort, FILE.jsonl, or a hub name NAME[@CONFIG][:SPLIT]."""
    if dataset == "sort":  # five digits; the reference is the same digits in order
        digits = np.random.default_rng(0).permutation(100_000)[:NUM_SORT_PROMPTS]
        return [{"prompt": f"{i:05d}", "reference": "".join(sorted(f"{i:05d}"))} for i in digits]
    is_file, rows, columns = dataset.endswith((".jsonl", ".json")), [], None
    needed = {args.prompt_column} | ({args.reference_column} - {"reference"})  # the default one is optional
    with input_errors(f"{flag}: not sort, FILE.jsonl, or a hub name (pip install datasets): {dataset!r}"):
        if is_file:
            lines = Path(dataset).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        else:
            from datasets import load_dataset

            path, _, split = dataset.partition(":")
            lines = load_dataset(*path.split("@"), split=split or "train")
    for number, line in enumerate(lines, 1):
        where = f"{flag} {dataset} row {number}"
        with input_errors(f"{where}: expected a JSON object, found {str(line)[:40]!r}"):
            row = {**json.loads(line)} if is_file else dict(line)
        columns = columns or set(row)
        require(needed <= set(row), where, f"{sorted(needed)} (--prompt-column, --reference-column)", sorted(row))
        require(set(row) == columns, where, f"the columns of row 1, {sorted(columns)}", sorted(row))
        values = [row.pop(name) for name in (args.prompt_column, args.reference_column) if name in row]
        rows.append(row | dict(zip(("prompt", "reference"), values)))
        kind, prompt = type(rows[0]["prompt"]), values[0]
        is_prompt = prompt and kind in (str, list) and type(prompt) is kind
        require(is_prompt, where, "a prompt, text in all rows or lists of messages", repr(prompt))
    return rows


def encode_prompts(tokenizer, rows, prompt_length):
    """Add `input_ids` to the rows. Lists of messages go through the tokenizer's chat template."""
    prompts = [row["prompt"] for row in rows]
    if isinstance(prompts[0], str):
        with input_errors("--model: its tokenizer has to know the prompts"):
            ids = tokenizer(prompts).input_ids
            is_special = tokenizer(prompts[0], return_special_tokens_mask=True).special_tokens_mask
            num_closing = is_special[::-1].index(0)  # [SEP] or the like: no response could follow
        ids = [tokens[: len(tokens) - num_closing] for tokens in ids]
    else:
        ids = []
        for number, chat in enumerate(prompts, 1):
            with input_errors(f"--model: its chat template has to fit the messages of row {number}"):
                begun = chat[-1]["role"] == "assistant"  # an answer that has begun is continued
                settings = dict(add_generation_prompt=not begun, continue_final_message=begun, return_dict=False)
                ids.append(tokenizer.apply_chat_template(chat, **settings))
    for number, (row, tokens) in enumerate(zip(rows, ids), 1):
        has_two = len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id  # the text's and the tokenizer's
        row["input_ids"] = tokens = tokens[1:] if has_two else tokens
        where = f"--prompt-length, row {number} ({str(row['prompt'])[:60]})"
        require(0 < len(tokens) <= prompt_length, where, f"1 to {prompt_length} tokens", len(tokens))


def load_prompts(args, world_size):
    """The tokenizer of --model, training rows, and held-out rows, split off the former unless given."""
    only_held_out = args.eval_dataset and args.model != "tiny" and not args.total_episodes
    rows = [] if only_held_out else load_rows(args.dataset, "--dataset", args)
    held_out = load_rows(args.eval_dataset, "--eval-dataset", args)[: args.eval_size] if args.eval_dataset else []
    tokenizer = load_tokenizer(args.model, rows + held_out)
    encode_prompts(tokenizer, rows + held_out, args.prompt_length)
    if not held_out:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]  # for any --seed
        held_out = rows[: max(world_size, min(args.eval_size, len(rows) // 10))]
        seen = {json.dumps(row["prompt"]) for row in held_out}
        rows = [row for row in rows if json.dumps(row["prompt"]) not in seen]  # prompts may repeat
        require(rows, "--dataset", "a training prompt that is not held out (or --eval-dataset)", "none")
    require(len(held_out) >= world_size, "--eval-dataset", "a row for each rank", f"{len(held_out)} rows")
    return tokenizer, rows, held_out


# ===== Rollout =====
def mask_through_first_end(responses, end_ids):
    """(B, R) ids -> (B, R) booleans: True up to and including the first end token."""
    is_end = torch.isin(responses, torch.tensor(end_ids, device=responses.device))
    return is_end.cumsum(1) - is_end.long() == 0


def sample(policy, tokenizer, end_ids, args, rows, samples_per_prompt=1, generator=None, greedy=False):
    """Responses of the current policy to N rows with prompts, k = samples_per_prompt to each, side by side.

    All sampling goes through here. Another engine, such as vLLM, must return the same, from the current weights.
    If it rounds differently, use --dtype bfloat16 and --sampler-clip (in float32 nothing corrects its rounding)
    and relax `try_model`. Tokens are from softmax(logits / temperature), or the argmax if `greedy`.
    Returns:
        sequences, attention_mask: (N k, P+R) each, prompts padded on the left, responses on the right.
        response_mask: (N k, R), True for sampled tokens, the end token too; the last, of at least one, gets the score.
            A tool's output would be in attention_mask alone.
        logprobs: (N k, R), log-probabilities under the sampled distribution, 0 outside the mask.
        texts: N k, what the responses add to their prompts. For the reward alone: they may encode to other tokens.
        facts: lists of N k, `ended` (False if cut at the length limit) and `num_tokens`.
    """
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    ids = pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left").to(policy.device)  # (N, P)
    ids, mask = ids.where(ids >= 0, PAD_ID), ids >= 0  # (N, P), (N, P)
    at_once = max(1, args.rollout_tokens // (ids.shape[1] + args.response_length) // samples_per_prompt)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):  # rounds weights once
        pieces = zip(ids.split(at_once), mask.split(at_once))
        results = [rollout(policy, *some, end_ids, args, samples_per_prompt, generator, greedy) for some in pieces]
    responses, response_mask, logprobs = map(torch.cat, zip(*results))  # (N k, R) each
    sequences = torch.cat([ids.repeat_interleave(samples_per_prompt, 0), responses], 1)
    attention_mask = torch.cat([mask.repeat_interleave(samples_per_prompt, 0), response_mask], 1)
    lengths = response_mask.sum(1).tolist()
    tokens = [row[:length] for row, length in zip(responses.tolist(), lengths)]
    facts = {"ended": [row[-1] in end_ids for row in tokens], "num_tokens": lengths}
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True)
    # Decoded alone, a response may lose its first space; decoded with it, a prompt may change.
    prompts, k = [row["input_ids"] for row in rows], samples_per_prompt
    starts, wholes = decode(prompts), decode([prompts[i // k] + row for i, row in enumerate(tokens)])
    triples = zip((starts[i // k] for i in range(len(tokens))), wholes, tokens)
    texts = [whole.removeprefix(p) if whole.startswith(p) else decode([row])[0] for p, whole, row in triples]
    return sequences, attention_mask, response_mask, logprobs, texts, facts


class FixedLayer(StaticLayer):
    """A cache of fixed size. Keys (float32 after rotary embeddings) are rounded like values."""

    def update(self, keys, values, *others, **settings):
        return super().update(keys.to(values.dtype), values, *others, **settings)


@torch.no_grad()
def rollout(model, prompts, prompt_mask, end_ids, args, samples_per_prompt=1, generator=None, greedy=False):
    """Sample responses token by token to (N, P) left-padded prompts, which run once for all samples.

    Settings of generation_config.json, such as top-k, are not used: they change the distribution.
    Returns ids, their mask and their log-probabilities, (b, R) each.

    On CUDA the cache has its final size: each pass of one token is the same work, captured as a graph and replayed, as
    launching its kernels takes longer than running them.
    """
    device, on_cuda = prompts.device, prompts.device.type == "cuda"
    cache, graph = DynamicCache(config=model.config), None
    # Sliding windows count positions outside tensors, where no graph sees them move.
    fixed_size = on_cuda and args.cuda_graph and {*map(type, cache.layers)} == {DynamicLayer}
    if fixed_size:
        cache = Cache([FixedLayer(prompts.shape[1] + args.response_length) for _ in cache.layers])

    def forward(tokens, positions, mask):  # -> logits of the next token, (N, V), later (a, V)
        settings = dict(position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return model(tokens, attention_mask=mask, **settings).logits[:, -1]

    responses = torch.full((len(prompts) * samples_per_prompt, args.response_length), PAD_ID, device=device)  # (b, R)
    logprobs = torch.zeros_like(responses, dtype=torch.float32)  # (b, R)
    end_tensor = torch.tensor(end_ids, device=device)
    mask = torch.nn.functional.pad(prompt_mask, (0, args.response_length), value=True).long()  # (N, P+R)
    positions = position_ids(prompt_mask)  # (N, P)
    length = prompts.shape[1]
    logits = forward(prompts, positions, mask if fixed_size else mask[:, :length])  # (N, V)
    repeated = torch.arange(len(prompts), device=device).repeat_interleave(samples_per_prompt)  # (b,)
    cache.reorder_cache(repeated)  # each prompt's keys and values, once for each of its samples
    logits, mask, positions = logits[repeated], mask[repeated], positions[repeated, -1:]  # (b, V), (b, P+R), (b, 1)
    active = torch.arange(len(responses), device=device)  # (a,), rows that are still run
    ended = torch.zeros_like(active, dtype=torch.bool)  # (a,)
    inputs = torch.zeros_like(positions)  # (a, 1)
    for t in range(args.response_length):
        step_logprobs = (logits / args.temperature).log_softmax(-1)  # (a, V)
        if greedy:
            tokens = step_logprobs.argmax(-1, keepdim=True)  # (a, 1)
        else:  # exponential race (Gumbel-max trick): argmax p_i / q_i is i with probability p_i
            noise = torch.empty_like(step_logprobs).exponential_(generator=generator)  # (a, V)
            tokens = (step_logprobs.exp() / noise).argmax(-1, keepdim=True)  # (a, 1)
        responses[active, t] = tokens[:, 0]
        logprobs[active, t] = step_logprobs.gather(1, tokens)[:, 0]
        ended |= (tokens == end_tensor).any(1)  # `isin` may wait for the GPU
        if t + 1 == args.response_length:
            break
        inputs.copy_(tokens)
        if not on_cuda or t % 16 == 15:  # counting waits for the GPU
            going_on = (~ended).nonzero()[:, 0]
            if not len(going_on):
                break
            if len(going_on) <= len(active) / 2:  # until then ended rows run on, unused
                cache.reorder_cache(going_on)
                kept = [x[going_on] for x in (active, ended, inputs, positions, mask)]
                active, ended, inputs, positions, mask = kept
                graph = None
        positions += 1
        if graph:
            graph.replay()  # reads inputs, positions and mask, and writes to logits
            continue
        used = mask if fixed_size else mask[:, : length + t + 1]  # causality hides unused columns
        logits = forward(inputs, positions, used)
        if fixed_size and t + 8 < args.response_length:  # pays after three replays; rows may end
            graph, computed = torch.cuda.CUDAGraph(), logits
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
                logits = forward(inputs, positions, used)  # recorded, not run: replays write here
            logits.copy_(computed)
    require(logprobs.isfinite().all(), "--model", "finite logits; try a lower learning rate", "NaN or infinity")
    response_mask = mask_through_first_end(responses, end_ids)  # (b, R)
    return responses.where(response_mask, PAD_ID), response_mask, logprobs.where(response_mask, 0.0)


@torch.no_grad()
def try_model(policy, tokenizer, end_ids, args, policy_logprobs, rows):
    """Refuse a model if padding, the cache or an unknown token would silently change its results.

    Two samples of up to four tokens follow the longest prompt, two half of it. Sampler and loss must give the
    log-probabilities of the plain model, in float32, or with adapters in --dtype.
    """
    longest = max((row["input_ids"] for row in rows), key=len)
    largest = max(*end_ids, *[max(row["input_ids"]) for row in rows])
    require(largest < len(policy.get_input_embeddings().weight), "--model", "an embedding of each token", largest)
    args, gaps = replace(args, response_length=min(4, args.response_length)), []
    args = args if args.lora_rank else replace(args, dtype="float32")
    with input_errors(f"--model: a trial of {args.model} failed"):
        prompts = [{"input_ids": longest}, {"input_ids": longest[: len(longest) // 2 + 1]}]
        *batch, sampled, _, _ = sample(policy, tokenizer, end_ids, args, prompts, 2, make_generator(policy.device, 0))
        results = torch.stack([sampled, policy_logprobs(policy, *batch, args)[0]], 1)  # (4, 2, R)
        for tokens, real, mask, logprobs in zip(*batch, results):
            with autocast(tokens.device, args):
                logits = policy(tokens[real][None, :-1]).logits[0]  # (L-1, V)
            plain = (logits / args.temperature).log_softmax(-1).gather(1, tokens[real][1:, None])[:, 0]
            gaps.append((plain[real.cumsum(0)[-len(mask) :][mask] - 2] - logprobs[:, mask]).abs().max().item())
    expected = "the log-probabilities of the plain model, from sampler and loss"
    require(np.max(gaps) < (0.2 if args.dtype == "bfloat16" else 0.05), "--model", expected, f"differences of {gaps}")


# ===== Reward: fn(prompts, responses, **columns, **facts) -> one float each =====
def match_reward(prompts, responses, reference, **columns):
    """Share of the reference's characters in place in the response; equal length counts as one more."""
    pairs = [(response, str(t)) for response, t in zip(responses, reference)]
    return [(sum(a == b for a, b in zip(r, t)) + (len(r) == len(t))) / (len(t) + 1) for r, t in pairs]


def exact_reward(prompts, responses, reference, **columns):
    """1 if response and reference are equal, ignoring surrounding whitespace, else 0."""
    return [float(r.strip() == str(t).strip()) for r, t in zip(responses, reference)]


def rouge_reward(prompts, responses, reference, **columns):
    """ROUGE-L F1 (Lin 2004), from 0 to 1, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(str(t), response)["rougeL"].fmeasure for response, t in zip(responses, reference)]


def bleu_reward(prompts, responses, reference, **columns):
    """Sentence BLEU (Papineni et al. 2002) with sacrebleu's exponential smoothing, from 0 to 1."""
    from sacrebleu import sentence_bleu

    return [sentence_bleu(response, [str(t)]).score / 100 for response, t in zip(responses, reference)]


REWARDS = {"match": match_reward, "exact": exact_reward, "rouge": rouge_reward, "bleu": bleu_reward}


def reward_model(name, args, device):
    """A reward function: one logit of a sequence classifier, for prompt and response as one text.

    Messages become text by its own chat template. Long texts are cut on the left.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_whole(transformers.AutoModelForSequenceClassification, name, "--reward", dtype).to(device).eval()
    # Padded on the right, as positions count from the first token.
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left", padding_side="right")
    # A decoder is scored at its last token other than padding, perhaps an end token.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.bos_token or tokenizer.eos_token
    config = model.config.get_text_config()
    config.pad_token_id = tokenizer.pad_token_id
    positions = (getattr(config, "max_position_embeddings", None) or 2**30) - 2  # RoBERTa's begin at 2
    settings = dict(truncation=True, max_length=min(positions, tokenizer.model_max_length), return_tensors="pt")

    @torch.no_grad()
    def reward_fn(prompts, responses, **columns):
        is_text, scores = isinstance(prompts[0], str), []
        if is_text:
            texts = [prompt + response for prompt, response in zip(prompts, responses)]
        else:
            chats = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(prompts, responses)]
            for chat in chats:
                if chat[-2]["role"] == "assistant":  # an answer that had begun
                    chat[-1]["content"] = chat.pop(-2)["content"] + chat[-1]["content"]
            texts = tokenizer.apply_chat_template(chats, tokenize=False)  # special tokens included
        for start in range(0, len(texts), 32):  # texts at once
            inputs = tokenizer(texts[start : start + 32], **settings, padding=True, add_special_tokens=is_text)
            scores.append(model(**inputs.to(device)).logits[:, args.reward_logit].float())
        return torch.cat(scores)

    return reward_fn


def load_reward(args, device, rows):
    """Load --reward and try it on the first row: -> `score_responses` for rows, responses and facts."""
    name = args.reward
    path, _, function = name.rpartition(":")
    if name in REWARDS:
        reward_fn = REWARDS[name]
        for row in rows:
            is_text = isinstance(row.get("reference"), (str, int, float)) and row["reference"] == row["reference"]
            require(is_text, f"--reward {name}", "a text reference in each row", row)  # NaN is none
    elif name.startswith("model:"):
        reward_fn = reward_model(name.removeprefix("model:"), args, device)
    else:
        expected = f"one of {', '.join(REWARDS)}, model:NAME or FILE.py:function"
        require(path.endswith(".py") and os.path.isfile(path), "--reward", expected, name)
        sys.path.insert(0, str(Path(path).resolve().parent))  # for what it imports, too
        with input_errors(f"--reward {name}: must not call exit", SystemExit):
            module = importlib.import_module(Path(path).stem)
        reward_fn = getattr(module, function, None)
        require(callable(reward_fn), "--reward", f"a function {function!r} in {path}", module)
    _, parts = score_responses(reward_fn, args, None, rows[:1], [""], {"ended": [True], "num_tokens": [1]})  # a trial
    return partial(score_responses, reward_fn, args, set(parts))


def score_responses(reward_fn, args, part_names, rows, responses, facts):
    """Call the reward function and check what it returns: scores, and parts if any.

    Args:
        part_names: the names that parts have to have, or None for any.
        rows: N rows of a data set. responses: N k texts, the k of a prompt side by side.
        facts: lists with an entry for each response, which the function gets, too.
    Returns (N k,) tensors on the CPU: the scores, and a dictionary of parts.
    """
    rows = [row for row in rows for _ in range(len(responses) // len(rows))]
    columns = {name: [copy.deepcopy(row[name]) for row in rows] for name in rows[0] if name != "input_ids"}
    name = f"--reward {args.reward}"
    with input_errors(f"{name}: must not call exit", SystemExit):  # other errors keep their traceback
        returned = reward_fn(columns.pop("prompt"), list(responses), **columns, **facts)
    scores, parts = returned if isinstance(returned, tuple) and isinstance(returned[-1], dict) else (returned, {})
    require(part_names in (None, set(parts)), name, f"the parts of its first call, {part_names}", set(parts))
    tensors = {}
    for part, values in [*sorted(parts.items()), ("scores", scores)]:
        with input_errors(f"{name}: expected numbers, found {str(values)[:300]}"):
            tensors[part] = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        is_valid = tensors[part].shape == (len(responses),) and tensors[part].isfinite().all()
        require(is_valid, name, f"a list of {len(responses)} finite {part}", values)
    return tensors.pop("scores"), tensors
