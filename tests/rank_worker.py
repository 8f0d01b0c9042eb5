"""One rank of test_ranks.py: `work(OUT, RUNS_DIR, DATASET)` runs every script and saves what it saw.

Responses are sampled from a generator that depends on the prompt alone, so that they are the same however prompts are
spread over ranks.
"""

import copy
import importlib
import os

import common
import ppo_lm
import trpo_lm

import peft  # noqa: F401  here and in the next line, once and not in each process
import torch
import torch._decomp.decompositions_for_jvp
from helpers import SHAPES, flatten, run_main, set_parameters, tiny_model
from test_packed_rows import make_batch

# One minibatch, and all rows in the products: random rows of each rank are other rows than those of the whole batch.
ONE, SMALL = ["--num-minibatches", 1], ["--micro-batch-tokens", 80]
PARTS = ["--reward", f"{__file__}:reward_with_parts"]
RUNS = {
    "reinforce_lm": SMALL,
    "reinforce_lm mean": ["--baseline", "mean", "--normalize-advantages"],
    "reinforce_lm ema": ["--baseline", "ema"],
    "reinforce_lm greedy": ["--baseline", "greedy", *PARTS],
    # The first update ends early by the KL of all ranks, 0.0359; by its own, 0.0351, the first of two would go on.
    "ppo_lm": [*ONE, "--update-epochs", 3, "--target-kl", 0.0355],
    "ppo_lm penalty": [*ONE, "--surrogate", "kl_penalty", "--truncation", "bootstrap", *SMALL, *PARTS],
    "ppo_lm bfloat16 lora": [*ONE, "--dtype", "bfloat16", "--lora-rank", 2, "--activation-checkpointing"],
    "trpo_lm": [*ONE, "--fvp-fraction", 1, "--cg-iters", 4, *SMALL],
    "trpo_lm lora": [*ONE, "--cg-iters", 4, "--lora-rank", 2, "--fvp-fraction", 1],
    "trpo_lm half": [*ONE, "--cg-iters", 2, "--fvp-fraction", 0.5, *SMALL, *PARTS],
}

sample, load_policy, sum_and_clip_gradients = common.rollout, common.load_policy, common.sum_and_clip_gradients
add_scalar = ppo_lm.SummaryWriter.add_scalar


def reward_with_parts(prompts, responses, **columns):
    scores = common.match_reward(prompts, responses, **columns)
    return scores, {"prompt_length": list(map(len, prompts)), "length": list(map(len, responses))}


def rollout_by_prompt(model, prompts, prompt_mask, *rest):
    *rest, _, greedy = rest
    if greedy:
        return sample(model, prompts, prompt_mask, *rest, greedy=True)
    parts = []
    for prompt, mask in zip(prompts, prompt_mask):
        generator = common.make_generator("cpu", *prompt[mask].tolist())
        parts.append(sample(model, prompt[None], mask[None], *rest, generator=generator))
    return tuple(torch.cat(part) for part in zip(*parts))


def statistics():
    """Masked mean and whitening of rows that are spread over the ranks so that the second has no valid token."""
    rank, world_size, *_ = common.start_ranks(ppo_lm.Args(device="cpu"))
    values = torch.tensor([[1.0, 2.0, 99.0], [4.0, -7.0, 5.0], [7.0, 7.0, 7.0], [8.0, 8.0, 8.0]])
    mask = torch.tensor([[True, True, False], [True, False, True], [False] * 3, [False] * 3])
    mine = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    mean, white = common.mean(values[mine], mask[mine]), common.whiten(values[mine], mask[mine])
    return {"mean": mean, "white": white}


def whole_gradient(network):
    """The gradient of all ranks as one vector in float64."""
    trained = [p for p in network.parameters() if p.requires_grad]
    gradients = [common.all_reduce(torch.zeros_like(p) if p.grad is None else p.grad) for p in trained]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def train(run, runs_dir, dataset):
    """Returns the gradients before they are clipped, the weights, and what TRPO's line search did.

    And PPO's mean ratios of the first minibatches, in float64: they are 1 if each ratio is.
    """
    script, models, gradients, searches, natural_steps = importlib.import_module(run.split()[0]), [], [], [], []
    ratios = []

    def recording_scalar(writer, name, value, step):
        ratios.extend([value] if name == "policy/ratio_first_minibatch" else [])
        add_scalar(writer, name, value, step)

    def recording_clip(network, max_grad_norm):
        gradients.append(whole_gradient(network))
        return sum_and_clip_gradients(network, max_grad_norm)

    def recording_gradient(*args):
        result = surrogate_gradient(*args)
        gradients.append(result[0].double())
        return result

    def recording_search(policy, theta, step, predicted_gain, *rest):
        result = line_search(policy, theta, step, predicted_gain, *rest)
        searches.append([predicted_gain, *result])
        natural_steps.append(step.clone())
        return result

    common.load_policy = lambda *args, **settings: models.append(load_policy(*args, **settings)) or models[-1]
    common.sum_and_clip_gradients, script.SummaryWriter.add_scalar = recording_clip, recording_scalar
    surrogate_gradient, line_search = trpo_lm.surrogate_gradient, trpo_lm.line_search
    trpo_lm.surrogate_gradient, trpo_lm.line_search = recording_gradient, recording_search
    flags = ["--total-episodes", 64, "--batch-size", 32, "--response-length", 6, "--eval-size", 7, "--save-every", 0]
    flags += ["--kl-ref-coef", 0.1, "--kl-ref-target", 0.5, "--kl-ref-horizon", 64, "--dataset", dataset]
    run_main(script, *flags, "--device", "cpu", "--output-dir", f"{runs_dir}/{run}", *RUNS[run])
    trpo_lm.surrogate_gradient, trpo_lm.line_search = surrogate_gradient, line_search
    weights = {name: weight.clone() for name, weight in models[0].state_dict().items()}
    return dict(gradients=gradients, searches=searches, natural_steps=natural_steps, weights=weights, ratios=ratios)


KINDS = {"gpt2": {}, "qwen3": {}, "gemma2": {}, "mixtral": SHAPES["llama"] | dict(num_local_experts=3)}


def passes(kind, rank, world_size):
    """Of rows that are spread over the ranks: gradients and a Fisher-vector product.

    With two ranks, the first micro-batch of each has prompts that are worth sharing; the second only on the first rank.
    """
    policy = tiny_model(kind, **KINDS[kind])
    critic = ppo_lm.Critic(policy)
    torch.nn.init.normal_(critic.head.weight)
    args = trpo_lm.Args(dtype="float32", response_length=4, activation_checkpointing=True)
    policies = policy, copy.deepcopy(policy)  # of PPO and of TRPO
    for network in (critic, *policies):
        common.prepare(network, torch.device("cpu"), args)
    sequences, mask = make_batch([9, 7, 8, 6, 5, 4, 3], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6])
    mine = torch.arange(16).tensor_split(world_size)[rank]
    batch, weights = (sequences[mine], mask[mine], mask[mine, -4:]), torch.linspace(-1, 1, 64).view(16, 4)[mine]
    micro_batches, num_tokens, seen = torch.arange(len(mine)).split(4), mask[:, -4:].sum(), {}
    for rows in micro_batches:
        *inputs, response_mask = [tensor[rows] for tensor in batch]
        logprobs, _ = ppo_lm.policy_logprobs(policy, *inputs, response_mask, args)
        (logprobs * weights[rows]).sum().backward()
        critic(*inputs, args)[:, :-1][response_mask].square().sum().backward()
    seen["critic"], seen["policy"] = whole_gradient(critic), whole_gradient(policy)
    policy = policies[1]
    g, means = trpo_lm.surrogate_gradient(policy, batch, micro_batches, weights, weights, num_tokens, args)
    seen |= {"surrogate": g, "entropy": means["policy/entropy"]}
    set_parameters(policy, flatten(policy) + 0.1 * g / g.norm())
    if kind != "mixtral":
        product = trpo_lm.fisher_vector_product(g, policy, batch, micro_batches, args)
        quadratic = trpo_lm.fisher_quadratic_form(g, policy, batch, micro_batches, num_tokens, args)
        seen |= {"product": product, "curvature": trpo_lm.dot(product, g), "quadratic": quadratic}
    return seen


class Experts(torch.nn.Module):
    """Rank r routes its tokens to expert r, so that the last expert has none."""

    def __init__(self, num_ranks):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(3, 2) for _ in range(num_ranks + 1))

    def forward(self, rank):
        return self.experts[rank](torch.full((3,), rank + 1.0)).sum()


def experts(rank):
    network = common.prepare(Experts(torch.distributed.get_world_size()), torch.device("cpu"), trpo_lm.Args())
    network(rank).backward()
    common.sum_and_clip_gradients(network, 1e9)
    return [parameter.grad for parameter in network.parameters()]


def work_without_runs(out):
    rank, world_size, *_ = common.start_ranks(ppo_lm.Args(device="cpu"))
    seen = {kind: passes(kind, rank, world_size) for kind in (KINDS if world_size < 3 else ["gpt2"])}
    seen |= {"experts": experts(rank)} if world_size > 1 else {}
    torch.save(seen, f"{out}.{rank}")


def work_on(script, *flags):
    """A run whose samples do not depend on the number of ranks."""
    common.rollout = rollout_by_prompt
    run_main(importlib.import_module(script), *flags)


def work(out, runs_dir, dataset):
    common.rollout, common.save_model = rollout_by_prompt, lambda *args: None
    torch.distributed.destroy_process_group = lambda: None  # the next script goes on with it
    result = {"statistics": statistics()} | {run: train(run, runs_dir, dataset) for run in RUNS}
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
