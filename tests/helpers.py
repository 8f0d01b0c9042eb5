"""Small models, runs and processes that the tests share."""

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import threading
import time
from pathlib import Path

import common

import torch
import tyro
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
SCRIPTS = ["reinforce_lm", "ppo_lm", "trpo_lm"]
NUMBERS = itertools.count()


def error_line(capsys):
    """The line on standard error that tells the user what is wrong."""
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    return line


SIZE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
SIZE |= dict(max_position_embeddings=32, head_dim=8)
SHAPES = {
    "gpt2": dict(n_positions=32, n_embd=16, n_layer=2, n_head=2),
    "llama": SIZE,
    "qwen2": SIZE,
    "qwen3": SIZE,
    "gemma2": SIZE | dict(sliding_window=4, query_pre_attn_scalar=8),  # logits and scores are capped
    "gemma3_text": SIZE | dict(sliding_window=4, query_pre_attn_scalar=8),
}


def character_tokenizer(characters):
    """The tokenizer of --model tiny for texts of these characters."""
    return common.load_tokenizer("tiny", [{"prompt": characters}])


def tiny_model(kind="gpt2", vocab_size=12, dtype=torch.float32, seed=0, pad_token_id=None, **settings):
    """A causal language model with loud random weights, so that its distribution is far from uniform."""
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, **(SHAPES.get(kind, {}) | settings))
    config.bos_token_id = config.eos_token_id = 0
    config.pad_token_id = pad_token_id
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    common.accept_packed_rows(model)
    return model


def run_main(script, *flags):
    """Run a script's main in this process, as its command line would, with TINY's defaults for every model."""
    argv = [str(flag) for flag in flags]
    try:
        if "--resume" in argv:
            return script.main(*common.parse_flags(script.Args, script.TINY, script.ADAPTERS, argv))
        return script.main(tyro.cli(script.Args, args=argv, default=script.Args(**script.TINY)))
    except SystemExit as error:  # as Python does
        print(error, file=sys.stderr)
        raise SystemExit(1) from error


def run_in(folder, script, *flags):
    """`run_main`, given a script or its name, into a folder without runs; returns the run directory."""
    run_main(importlib.import_module(script) if isinstance(script, str) else script, *flags, "--output-dir", folder)
    (run_dir,) = Path(folder).iterdir()
    return run_dir


def reward_file(folder, code):
    """Write code that defines a reward function `fn` to a file, and return it as --reward takes it.

    Each file has its own name, since Python imports a module of one name only once.
    """
    path = Path(folder, f"mine_{next(NUMBERS)}.py")
    path.write_text(code)
    return f"{path}:fn"


def run_with_output(function, args, output, environment):
    """Call `function` in this process, whose output goes to a file."""
    file = open(output, "w", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file  # multiprocessing writes the traceback of an error there
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # the one it had is shared: killed with it, this would block its parent's bars
    function(*args)


def fork(function, *args, output, environment=(), start="fork"):
    """Call `function` in a copy of this process, which saves the seconds of an import; its output goes to a file.

    With `start="forkserver"` it is a copy of a process that has imported the modules and done nothing else.
    """
    multiprocessing.set_forkserver_preload(["pretend_gpu"])
    process = multiprocessing.get_context(start).Process(
        target=run_with_output, args=(function, args, output, environment)
    )
    process.start()
    return process


def fork_ranks(world_size, function, *args, output):
    """`fork` for each of `world_size` ranks, as torchrun would start them; returns the processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in map(str, range(world_size)):
        environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=rank, LOCAL_RANK=rank)
        environment |= dict(WORLD_SIZE=str(world_size))
        processes.append(fork(function, *args, output=f"{output}.{rank}", environment=environment))
    return processes


def finish(processes, outputs, seconds=300):
    """Wait for forked processes; fails with the output of one that did not end well, or not within `seconds`."""
    end, running = time.monotonic() + seconds, dict(zip(processes, outputs, strict=True))
    while running:
        ready = multiprocessing.connection.wait([p.sentinel for p in running], max(0, end - time.monotonic()))
        ended = [process for process in running if process.sentinel in ready]
        for process in ended or running:
            process.join(None if ended else 0)
            if process.exitcode != 0:
                why = f"exit code {process.exitcode}" if ended else f"still running after {seconds} seconds"
                for other in processes:
                    other.kill()  # or pytest would wait for them
                raise AssertionError(f"{why}\n{Path(running[process]).read_text()}")
        running = {process: output for process, output in running.items() if process not in ended}


def load_policy(model, tokenizer, context_length, seed=1):
    """`common.load_policy` for one prompt and response of `context_length` tokens."""
    flags = argparse.Namespace(model=model, seed=seed, response_length=1, lora_rank=0)
    return common.load_policy(flags, tokenizer, [{"input_ids": [0] * (context_length - 1)}])


def rollout(model, prompts, prompt_mask, response_length, end_ids, samples_per_prompt=1, **settings):
    """`common.rollout` with the flags that it reads given by name."""
    flags = dict(response_length=response_length, temperature=1.0, cuda_graph=True)
    flags = {name: settings.pop(name, value) for name, value in flags.items()}
    flags = argparse.Namespace(**flags)
    return common.rollout(model, prompts, prompt_mask, end_ids, flags, samples_per_prompt, **settings)


def flat_gradient(optimizer):
    """The gradient that `optimizer` is about to step with, of all ranks, as one vector in float64."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


@contextlib.contextmanager
def recorded_gradients(optimizer_class, record=flat_gradient):
    """Collect what `record` says of an optimizer before each of its steps: a list."""
    steps, step = [], optimizer_class.step

    def recording_step(self, *args, **settings):
        steps.append(record(self))
        return step(self, *args, **settings)

    optimizer_class.step = recording_step
    try:
        yield steps
    finally:
        optimizer_class.step = step


def flatten(policy):
    """The trained parameters as one (D,) vector, copied."""
    return torch.nn.utils.parameters_to_vector(common.trained_parameters(policy).values()).detach()


def set_parameters(policy, vector):
    """Copy a (D,) vector into the trained parameters."""
    torch.nn.utils.vector_to_parameters(vector, common.trained_parameters(policy).values())
