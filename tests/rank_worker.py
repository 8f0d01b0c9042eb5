"""One rank of test_ranks.py: `work(OUT, RUNS_DIR)` runs every script and saves what it saw.

Responses are sampled from a generator that depends on the prompt alone, so that they are the same however prompts are
spread over ranks.
"""

import importlib
import os

import common
import trpo_lm

import torch
from conftest import recorded_gradients, run_main
from torch.distributed.tensor import DTensor

# One minibatch, and all rows in the products: random rows of each rank are other rows than those of the whole batch.
ONE = ["--num-minibatches", 1]
RUNS = {
    "reinforce_lm": [],
    # The first update ends early by the KL of all ranks, 0.0332; by its own, 0.0322, the first of two would go on.
    "ppo_lm": [*ONE, "--update-epochs", 3, "--target-kl", 0.0327],
    "trpo_lm": [*ONE, "--fvp-fraction", 1],
    "ppo_lm penalty": [*ONE, "--surrogate", "kl_penalty", "--truncation", "bootstrap", "--micro-batch-size", 5],
    "trpo_lm lora": [*ONE, "--lora-rank", 2, "--fvp-fraction", 1],
    "trpo_lm half": [*ONE, "--fvp-fraction", 0.5, "--micro-batch-size", 7],
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
    pieces = []
    for name, piece in trpo_lm.unflatten(vector, policy).items():
        parameter = policy.get_parameter(name)
        if isinstance(parameter, DTensor):
            layout = dict(shape=parameter.shape, stride=parameter.stride())
            piece = DTensor.from_local(piece, parameter.device_mesh, parameter.placements, **layout).full_tensor()
        pieces.append(piece.flatten())
    return torch.cat(pieces)


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


def work(out, runs_dir):
    common.rollout = rollout_by_prompt
    common.save_model = lambda *args: None
    torch.distributed.destroy_process_group = lambda: None  # the next script goes on with it
    result = {"statistics": statistics()} | {run: train(run, runs_dir) for run in RUNS}
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
