"""One rank of test_ranks.py: `work(OUT, RUNS_DIR)` runs every script and saves what it saw.

Responses are sampled from a generator that depends on the prompt alone, so that they are the same however prompts are
spread over ranks.
"""

import ctypes
import gc
import importlib
import os
from pathlib import Path

import common
import ppo_lm
import trpo_lm

import torch
from helpers import SHAPES, recorded_gradients, run_main, tiny_model
from test_shared_prompts import make_batch
from torch.distributed.tensor import DTensor

# One minibatch, and all rows in the products: random rows of each rank are other rows than those of the whole batch.
ONE = ["--num-minibatches", 1]
RUNS = {
    "reinforce_lm": [],
    # The first update ends early by the KL of all ranks, 0.0332; by its own, 0.0322, the first of two would go on.
    "ppo_lm": [*ONE, "--update-epochs", 3, "--target-kl", 0.0327],
    "trpo_lm": [*ONE, "--fvp-fraction", 1, "--cg-iters", 4],
    "ppo_lm penalty": [*ONE, "--surrogate", "kl_penalty", "--truncation", "bootstrap", "--micro-batch-size", 5],
    "ppo_lm bfloat16 lora": [*ONE, "--dtype", "bfloat16", "--lora-rank", 2, "--activation-checkpointing"],
    "trpo_lm lora": [*ONE, "--cg-iters", 4, "--lora-rank", 2, "--fvp-fraction", 1],
    "trpo_lm half": [*ONE, "--cg-iters", 2, "--fvp-fraction", 0.5, "--micro-batch-size", 7],
} | {
    f"reinforce_lm {name}": ["--baseline", name, "--normalize-advantages"] for name in ("none", "mean", "ema", "greedy")
}

sample, load_policy = common.rollout, common.load_policy


def rollout_by_prompt(model, prompts, prompt_mask, *rest, **settings):
    if settings.get("greedy"):
        return sample(model, prompts, prompt_mask, *rest, **settings)
    parts = []
    for prompt, mask in zip(prompts, prompt_mask):
        settings["generator"] = common.make_generator("cpu", *prompt.tolist())
        parts.append(sample(model, prompt[None], mask[None], *rest, **settings))
    return tuple(torch.cat(part) for part in zip(*parts))


def statistics():
    """Masked mean and whitening of rows that are spread over the ranks so that the second has no valid token."""
    rank, world_size, _ = common.start_ranks("cpu")
    values = torch.tensor([[1.0, 2.0, 99.0], [4.0, -7.0, 5.0], [7.0, 7.0, 7.0], [8.0, 8.0, 8.0]])
    mask = torch.tensor([[True, True, False], [True, False, True], [False] * 3, [False] * 3])
    mine = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    mean, white = common.mean(values[mine], mask[mine]), common.whiten(values[mine], mask[mine])
    return {"mean": mean, "white": white}


def gathered(vector, policy):
    """The (D,) vector of which TRPO holds a part on each rank."""
    pieces = trpo_lm.unflatten(vector, policy).items()
    return torch.cat([common.gathered(piece, policy.get_parameter(name)).flatten() for name, piece in pieces])


def train(run, runs_dir):
    """Returns the gradients that were stepped with, the weights, and what TRPO's line search did."""
    name, runs_dir = run.partition(" ")[0], f"{runs_dir}/{run}"
    script, models, searches, natural_steps, divergences = importlib.import_module(name), [], [], [], []
    adapt = script.adapt_kl_coef

    def recording_adapt(kl_coef, kl_ref, num_responses, args):
        divergences.append([kl_ref, num_responses])
        return adapt(kl_coef, kl_ref, num_responses, args)

    script.adapt_kl_coef = recording_adapt
    common.load_policy = lambda *args, **settings: models.append(load_policy(*args, **settings)) or models[-1]
    if name == "trpo_lm":
        search = script.line_search

        def recording_search(policy, theta, step, predicted_gain, *rest):
            result = search(policy, theta, step, predicted_gain, *rest)
            searches.append([predicted_gain, *result])
            natural_steps.append(gathered(step, policy))
            return result

        script.line_search = recording_search
    updates = 1 if " " in run else 2
    flags = [
        "--total-episodes",
        32 * updates,
        "--batch-size",
        32,
        "--response-length",
        12,
        "--eval-size",
        7,
        "--save-every",
        0,
    ]
    flags += ["--response-length", 6] if " " in run else []
    flags += ["--kl-coef", 0.1, "--kl-target", 0.5, "--device", "cpu", "--output-dir", runs_dir, *RUNS[run]]
    with recorded_gradients(torch.optim.AdamW) as steps:
        run_main(script, *flags)
    script.adapt_kl_coef = adapt
    if name == "trpo_lm":
        script.line_search = search
    seen = {"gradients": steps, "searches": searches, "natural steps": natural_steps, "divergences": divergences}
    return seen | {"weights": {name: common.whole(weight).clone() for name, weight in models[0].state_dict().items()}}


KINDS = {"gpt2": {}, "llama": {}, "qwen3": {}, "gemma2": {}, "mixtral": SHAPES["llama"] | dict(num_local_experts=3)}


def passes(kind, rank, world_size):
    """Of rows that are spread over the ranks: gradients, a Fisher-vector product, a refreshed copy; and what is whole.

    With two ranks, the first micro-batch of each has prompts that are worth sharing; the second only on the first rank.
    """
    policy = tiny_model(kind, **KINDS[kind])
    critic = ppo_lm.Critic(policy)
    torch.nn.init.normal_(critic.head.weight)
    args = trpo_lm.Args(dtype="float32", response_length=4, micro_batch_size=4, activation_checkpointing=True)
    copied = common.copy_network(policy, torch.float32)
    networks = [common.prepare(network, torch.device("cpu"), args) for network in (critic, policy)]
    sequences, mask = make_batch([9, 7, 8, 6, 5, 4, 3], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6])
    mine = torch.arange(16).tensor_split(world_size)[rank]
    batch, weights = (sequences[mine], mask[mine], mask[mine, -4:]), torch.linspace(-1, 1, 64).view(16, 4)[mine]
    micro_batches, seen = torch.arange(len(mine)).split(4), {}
    for inds in micro_batches:
        inputs = batch[0][inds], batch[1][inds]
        logprobs, _ = common.policy_logprobs(policy, *inputs, args)
        (logprobs * weights[inds])[batch[2][inds]].sum().backward()
        critic(*inputs, args)[:, :-1][batch[2][inds]].square().sum().backward()
    seen["critic"] = torch.cat([common.whole(p.grad).flatten() for p in critic.parameters()])
    gradient = trpo_lm.take_gradient(policy)
    seen["policy"] = gathered(gradient, policy)
    trpo_lm.set_parameters(policy, trpo_lm.flatten(policy) + 0.1 * gradient / trpo_lm.dot(gradient, gradient) ** 0.5)
    if kind != "mixtral":
        product = trpo_lm.fisher_vector_product(gradient, policy, batch, micro_batches, args)
        seen["product"], seen["curvature"] = gathered(product, policy), trpo_lm.dot(product, gradient)
    with common.whole_weights(copied, policy):
        seen["copy"] = torch.nn.utils.parameters_to_vector(copied.parameters()).detach()
    assert not any(parameter.numel() for parameter in copied.parameters())
    expected = [common.whole(parameter.detach()) for parameter in policy.parameters()]
    assert torch.equal(seen["copy"], torch.nn.utils.parameters_to_vector(expected))
    for network in networks:
        assert all(isinstance(p, DTensor) == (world_size > 1) for p in network.parameters()), "whole after a pass"
        assert len(common.shards(network)) == (3 if world_size > 1 else 1), "two layers and the rest"
    return seen


class Experts(torch.nn.Module):
    """Rank r routes its tokens to expert r, so that the last expert has none."""

    def __init__(self, num_ranks):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(3, 2) for _ in range(num_ranks + 1))

    def forward(self, rank):
        return self.experts[rank](torch.full((3,), rank + 1.0)).sum()


def experts(rank, world_size):
    network = common.prepare(Experts(world_size), torch.device("cpu"), trpo_lm.Args())
    network(rank).backward()
    common.clip_gradients(network, 1e9)
    return [common.whole(parameter.grad) for parameter in network.parameters()]


def memory():
    """Bytes that this process holds more than before, for a model of 20M parameters that has made a step of Adam."""

    def resident():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    ctypes.CDLL(None).mallopt(-3, 2**16)  # tensors have memory of their own, which goes back when they are freed
    before, args = resident(), trpo_lm.Args(dtype="float32", response_length=4)
    policy = tiny_model("gpt2", n_embd=512, n_layer=6)
    policy = common.prepare(policy, torch.device("cpu"), args)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    sequences, mask = make_batch([5, 5], [0, 1])
    common.policy_logprobs(policy, sequences, mask, args)[0].sum().backward()
    optimizer.step()
    return {"bytes": resident() - before, "parameters": sum(p.numel() for p in policy.parameters())}


def work_without_runs(out):
    rank, world_size, _ = common.start_ranks("cpu")
    common.MIN_SAVED_TOKENS = 0
    seen = {"memory": memory()}  # first, as what others free would be taken again
    seen |= {kind: passes(kind, rank, world_size) for kind in (KINDS if world_size < 3 else ["gpt2"])}
    seen["experts"] = experts(rank, world_size)
    torch.save(seen, f"{out}.{rank}")


def work_on(script, *flags):
    """A run whose samples do not depend on the number of ranks."""
    common.rollout = rollout_by_prompt
    run_main(importlib.import_module(script), *flags)


def work(out, runs_dir):
    common.rollout, common.NUM_SORT_PROMPTS = rollout_by_prompt, 2**9
    common.save_model = lambda *args: None
    torch.distributed.destroy_process_group = lambda: None  # the next script goes on with it
    result = {"statistics": statistics()} | {run: train(run, runs_dir) for run in RUNS}
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
