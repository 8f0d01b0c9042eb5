"""One rank of test_ranks.py: `python rank_worker.py SCRIPT OUT FLAGS...` or `python rank_worker.py statistics OUT`.

Responses are sampled from a generator that depends on the prompt alone, so that they are the same however prompts are
spread over ranks. Saves the gradients that were stepped with and the weights that came out.
"""

import importlib
import os
import sys

import torch
from conftest import recorded_gradients, run_main

import common

sample = common.rollout


def rollout_by_prompt(model, prompts, prompt_mask, **settings):
    parts = []
    for prompt, mask in zip(prompts, prompt_mask):
        settings["generator"] = common.make_generator("cpu", *prompt.tolist())
        parts.append(sample(model, prompt[None], mask[None], **settings))
    return tuple(torch.cat(part) for part in zip(*parts))


def statistics(script):
    """Masked mean and whitening of rows that are spread over the ranks so that the second has no valid token."""
    rank, world_size, _ = common.start_ranks("cpu")
    values = torch.tensor([[1.0, 2.0, 99.0], [4.0, -7.0, 5.0], [7.0, 7.0, 7.0], [8.0, 8.0, 8.0]])
    mask = torch.tensor([[True, True, False], [True, False, True], [False] * 3, [False] * 3])
    mine = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    return {"mean": script.masked_mean(values[mine], mask[mine]), "white": script.whiten(values[mine], mask[mine])}


if __name__ == "__main__":
    what, out, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "statistics":
        result = statistics(importlib.import_module("reinforce_lm"))
    else:
        common.rollout = rollout_by_prompt
        models = []
        load_policy = common.load_policy
        common.load_policy = lambda *args, **settings: models.append(load_policy(*args, **settings)) or models[-1]
        script, searches = importlib.import_module(what), []
        if what == "trpo_lm":  # the step's length, its predicted gain, and what the line search made of them
            search = script.line_search

            def recording_search(policy, theta, step, predicted_gain, *rest):
                result = search(policy, theta, step, predicted_gain, *rest)
                searches.append([step.norm().item(), predicted_gain, *result])
                return result

            script.line_search = recording_search
        with recorded_gradients(torch.optim.AdamW) as steps:
            run_main(script, "--device", "cpu", *flags)
        result = {"gradients": steps, "weights": models[0].state_dict(), "trpo": searches}
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
