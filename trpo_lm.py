"""TRPO for language models, in one file. Copy it with common.py into your project.

    python trpo_lm.py                                           # laptop CPU, two minutes: learns to sort digits
    python trpo_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function --response-length 256 --max-kl 0.01 \\
        --cg-damping 0.1 --critic-learning-rate 1e-5 --micro-batch-size 8                # a pretrained model on a GPU
    torchrun --nproc-per-node 8 trpo_lm.py --model DIR ...                                        # and on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, and pays for leaving a frozen reference policy (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)       only with --kl-target

A critic V judges the states, and generalised advantage estimation (Schulman et al. 2016) compares each token with that:

    (3)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                         TD error
    (4)  A_t     = sum_{l >= t} (gamma lambda)^(l-t) delta_l                               GAE, eq. 16 of that paper
    (5)  R_t     = A_t + V(s_t)                                                            what the critic is fitted to

V is 0 behind an end token. A response that is cut at the length limit has not ended: with --truncation terminal the
limit counts as an end, which makes it part of the task; with bootstrap V of the state behind the last token stands in
for the tokens that never came.

TRPO (Schulman et al. 2015) takes one step per batch, as far as a trust region around the old policy allows. With
ratio_t = pi(a_t | s_t) / pi_old(a_t | s_t) and E_t the mean over all response tokens of the batch, on all ranks,

    (6)  maximise L(theta) = E_t[ratio_t A_t] subject to E_t[KL(pi_old(. | s_t) || pi(. | s_t))] <= delta, eq. 14

is solved for a small step s = theta - theta_old by the linear model of L and the quadratic model of the KL, appendix C:

    (7)  g = grad L at theta_old                                                           the policy gradient
    (8)  F = E_t[J_t' (diag p_t - p_t p_t') J_t]                                           Fisher matrix, KL's Hessian
    (9)  (F + d I) x = g,  d = damping * g'Fg / g'g                                        natural gradient, by CG
    (10) s = sqrt(2 delta / x'Fx) x                                                        where the model's KL is delta

J_t is the Jacobian of the logits at token t and p_t their softmax. F has as many entries as the model has parameters,
squared; conjugate gradient (CG) only asks for products F v, and (8) gives them without F: J_t v by forward-mode
differentiation, then one backward pass with (diag p_t - p_t p_t') J_t v. The models are wrong for a large step, so

    (11) the first of s, c s, c^2 s, ... with exact KL <= delta and gain >= a * predicted gain is taken,

where the gain is L(theta) - L(theta_old) and the prediction g's; if there is none, theta_old is put back bit for bit.
The critic lowers its squared error by gradient steps, and is kept near the values V_old from before the update:

    (12) L_V = E_t[1/2 max((V - R_t)^2, (clip(V, V_old - eps_V, V_old + eps_V) - R_t)^2)]  clipped value loss

It is a network of its own, a copy of the policy's layers with a head of zeros, so that V is 0 at first: on a shared
trunk its gradient would move the policy out of the trust region.

Departures from the paper: damping relative to the curvature along g, so that one value serves models of all sizes; a
share of the batch in the products of (9), with x'Fx in (10) from the whole batch; GAE in place of sampled returns; a
delta that falls to 0 over the run, since steps of a fixed size would never settle.
Departures from ppo_lm.py: the distance is a constraint that each step keeps, not a clip or a price, there is no policy
optimizer and no policy learning rate, and one step per batch. The policy's update is in float32 whatever --dtype says,
since bfloat16 blurs the KL by as much as a trust region. E_t divides by the number of tokens, where reinforce_lm.py
divides by the number of responses, and GAE leaves out the gamma^(t-1) that it keeps.

Shapes: B responses of a batch on this rank (b of a micro-batch), P prompt length, R response length, V vocabulary,
D number of parameters; vectors of all parameters are flat.
"""

# ===== Imports (shared by all three scripts) =====
import copy
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from common import all_reduce, flag, make_generator, require


# ===== Arguments (shared by all three scripts) =====
@dataclass
class Args:
    seed: int = 1
    """seed of random weights, prompt order and sampling"""
    device: str = "auto"
    """auto, cpu or cuda; auto takes a GPU if there is one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of forward and backward passes; weights, gradients and optimizer state are always float32"""
    output_dir: str = "runs"
    """folder for the run directories"""
    resume: str = ""
    """run directory to continue from its newest checkpoint; all other flags default to those of that run"""
    save_every: int = 100
    """iterations between checkpoints, of which the newest two are kept; 0 for none"""
    eval_every: int = 100
    """iterations between evaluations on held-out prompts; 0 for only before the first and after the last"""
    eval_size: int = 512
    """held-out prompts; without --eval-dataset they are split off the training rows, at most a tenth of them"""
    model: str = "tiny"
    """folder or hub name of a causal language model; tiny is a GPT-2 of about 100k random parameters"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    activation_checkpointing: bool = False
    """keep only the input of each layer for the backward pass and compute the rest again: less memory, more time"""
    compile: bool = False
    """compile the forward and backward passes of the update with torch.compile"""
    cuda_graph: bool = True
    """sample on CUDA over a cache of fixed size with a captured graph of the pass of one token"""
    dataset: str = "sort"
    """training prompts: sort, FILE.jsonl, or a hub name NAME[@CONFIG][:SPLIT]"""
    eval_dataset: str = ""
    """held-out prompts, named like --dataset; empty to split them off the training rows"""
    prompt_column: str = "prompt"
    """column with the prompt: text, or a list of messages for the chat template"""
    reference_column: str = "reference"
    """column with the reference answer, if there is one"""
    reward: str = "match"
    """match, exact, rouge, bleu, model:NAME (a classifier), or FILE.py:function(prompts, responses, **columns)"""
    reward_logit: int = -1
    """the logit of --reward model:NAME that is the score, counted from 0, or from the end with -1"""
    reward_clip: float = 0.0
    """scores are clipped to between minus and plus this; 0 for no limit"""
    prompt_length: int = 512
    """longest prompt that is accepted, in tokens"""
    response_length: int = 6
    """longest response, in tokens, the end token included"""
    temperature: float = 1.0
    """sampling temperature; the policy that is trained is the one at this temperature"""
    total_episodes: int = 102_400
    """responses to train on, rounded down to whole batches"""
    batch_size: int = 256
    """responses per iteration, over all ranks"""
    samples_per_prompt: int = 4
    """responses to each prompt"""
    micro_batch_size: int = 0
    """responses per forward and backward pass, to bound memory; 0 for all of the rank's at once"""
    rollout_batch_size: int = 0
    """responses sampled at once, to bound memory; 0 for all of the rank's at once"""
    kl_coef: float = 0.02
    """beta, the price of one nat of divergence from the reference policy; 0 keeps no reference in memory"""
    kl_target: float = 0.0
    """nats per response that beta is adapted to; 0 keeps beta fixed"""
    kl_horizon: int = 10_000
    """responses over which beta is adapted"""
    gamma: float = 1.0
    """discount per token"""

    # Algorithm specific arguments
    # ===== Arguments (algorithm) =====
    max_kl: float = 0.1
    """delta, the size of the trust region in nats per token"""
    anneal_max_kl: bool = True
    """let delta fall linearly to 0"""
    cg_iters: int = 10
    """largest number of iterations of conjugate gradient, each of which costs one Fisher-vector product"""
    cg_damping: float = 0.03
    """damping, in units of the curvature along the gradient"""
    cg_tol: float = 0.05
    """length of the residual, in units of the gradient's, at which conjugate gradient ends"""
    fvp_fraction: float = 0.1
    """share of the batch's responses in the Fisher-vector products"""
    backtrack_coeff: float = 0.7
    """c, what a step that fails is multiplied by"""
    backtrack_iters: int = 10
    """steps that are tried"""
    accept_ratio: float = 0.1
    """a, the share of the predicted gain that a step has to reach"""
    critic_learning_rate: float = 1e-3
    """learning rate of the critic's AdamW"""
    anneal_lr: bool = True
    """let the critic's learning rate fall linearly to 0"""
    max_grad_norm: float = 1.0
    """length that the critic's gradients are clipped to"""
    update_epochs: int = 2
    """the critic's passes over each batch"""
    num_minibatches: int = 4
    """minibatches, and so optimizer steps of the critic, per pass"""
    gae_lambda: float = 0.95
    """lambda of GAE: 0 trusts the critic, 1 the sampled return"""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """what follows a response that was cut at the length limit: nothing, or what the critic expects"""
    whiten_advantages: bool = True
    """shift and scale advantages to mean 0 and deviation 1 over the whole batch"""
    value_clip: float = 0.2
    """eps_V, how far an update is rewarded for moving a value to its return, in units of the reward; 0 for no limit"""


# ===== Statistics, log-probabilities, rewards, ranks (shared by all three scripts) =====
def masked_mean(values, mask):
    """Mean of `values` where `mask` is True, over all ranks: two tensors of one shape -> scalar.

    Summed in float64, so that the mean of equal values is that value: a remainder would be taken for an advantage.
    """
    total, count = all_reduce(torch.stack([values.where(mask, 0.0).double().sum(), mask.sum().double()]))
    return (total / count).to(values.dtype)


def masked_variance(values, mask):
    """Population variance of `values` where `mask` is True, over all ranks: two tensors of one shape -> scalar."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values, mask, shift_mean=True):
    """Divide `values` by their deviation over the True entries of `mask`, on all ranks. What the mask leaves out is 0.

    The mean is subtracted too unless `shift_mean` is False.
    """
    shift = masked_mean(values, mask) if shift_mean else 0.0
    return ((values - shift) / (masked_variance(values, mask).sqrt() + 1e-8)).where(mask, 0.0)


def response_logits(model, sequences, attention_mask, args):
    """Logits that `model` has for the responses, divided by the sampling temperature.

    Args:
        sequences, attention_mask: (b, P+R) prompts and responses, and where they are real.
    Returns:
        (b, R, V), for each response token given what stands before it; the prompt's positions get none.
    """
    with torch.autocast(sequences.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        logits = model(
            input_ids=sequences[:, :-1],  # the last token is only predicted
            attention_mask=attention_mask[:, :-1],
            position_ids=common.position_ids(attention_mask)[:, :-1],
            logits_to_keep=args.response_length,
            use_cache=False,
        ).logits
    return logits if args.temperature == 1 else common.full_precision(logits) / args.temperature


def policy_logprobs(model, sequences, attention_mask, args):
    """Log-probabilities and entropies of the responses at the sampling temperature: two (b, P+R) -> two (b, R)."""
    logits = response_logits(model, sequences, attention_mask, args)  # (b, R, V)
    return common.token_statistics(logits, sequences[:, -args.response_length :])


@torch.no_grad()
def batched_logprobs(model, sequences, attention_mask, micro_batch_size, args):
    """`policy_logprobs` of a whole batch, without gradient, by micro-batches: -> (B, R)."""
    batches = zip(sequences.split(micro_batch_size), attention_mask.split(micro_batch_size))
    return torch.cat([policy_logprobs(model, *batch, args)[0] for batch in batches])


def shaped_rewards(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    """Reward of each token: the price of its divergence, and on the last real token the score.

    Args:
        scores: (B,). logprobs, ref_logprobs, response_mask: (B, R).
    Returns:
        rewards: (B, R), 0 after the end of a response.
    """
    rewards = -kl_coef * (logprobs - ref_logprobs).where(response_mask, 0.0)
    last = response_mask.sum(1) - 1  # (B,)
    return rewards.scatter_add(1, last[:, None], scores[:, None])  # (1)


def adapt_kl_coef(kl_coef, kl_ref, num_responses, args):
    """The KL coefficient for the next batch (Ziegler et al. 2019, section 2.2)."""
    if not args.kl_target:
        return kl_coef
    error = min(max(kl_ref / args.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / args.kl_horizon)  # (2)


def mean(values):
    """Mean of `values` over all ranks."""
    return masked_mean(values, torch.ones_like(values, dtype=torch.bool))


def sum_and_clip_gradients(model, max_grad_norm):
    """Sum the gradients of all ranks in place, and clip their length to `max_grad_norm`.

    Losses are divided by counts over all ranks, so no mean is taken.

    Returns:
        Length before clipping.
    Raises:
        InputError: if a gradient is not finite.
    """
    for parameter in model.parameters():
        if parameter.grad is None:  # an expert that no token of this rank went through
            parameter.grad = torch.zeros_like(parameter)
    common.all_reduce_in_place([parameter.grad for parameter in model.parameters()])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    require(norm.isfinite(), f"gradient of the {type(model).__name__}", "a finite one; try a lower rate", norm.item())
    return norm


# ===== Equations (algorithm) =====
def check_algorithm_args(args, per_rank):
    """Raise `InputError` for the first of TRPO's own flags with a value that makes no sense.

    per_rank: responses per batch and rank.
    """
    for name in ("max_kl", "cg_iters", "backtrack_iters", "critic_learning_rate", "max_grad_norm", "num_minibatches"):
        require(getattr(args, name) > 0, flag(name), "a positive number", getattr(args, name))
    for name in ("cg_damping", "cg_tol", "update_epochs", "value_clip"):
        require(getattr(args, name) >= 0, flag(name), "0 or more", getattr(args, name))
    for name in ("backtrack_coeff", "accept_ratio"):
        require(0 < getattr(args, name) < 1, flag(name), "more than 0 and less than 1", getattr(args, name))
    require(0 < args.fvp_fraction <= 1, "--fvp-fraction", "more than 0 and at most 1", args.fvp_fraction)
    require(0 <= args.gae_lambda <= 1, "--gae-lambda", "0 to 1", args.gae_lambda)
    expected = f"at most the {per_rank} responses of a rank"
    require(args.num_minibatches <= per_rank, "--num-minibatches", expected, args.num_minibatches)


class Critic(torch.nn.Module):
    """The policy's layers, copied, with a scalar head that starts at zero."""

    def __init__(self, policy):
        super().__init__()
        require(policy.base_model is not policy, "--model", "layers below a head, for the critic", type(policy))
        self.backbone = copy.deepcopy(policy.base_model)
        self.head = torch.nn.Linear(policy.get_output_embeddings().weight.shape[1], 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, sequences, attention_mask, args):
        """Values of the states before each response token, and of the one behind the last: (b, P+R) -> (b, R+1)."""
        with torch.autocast(sequences.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            hidden = self.backbone(
                input_ids=sequences,
                attention_mask=attention_mask,
                position_ids=common.position_ids(attention_mask),
                use_cache=False,
            ).last_hidden_state[:, -args.response_length - 1 :]  # (b, R+1, hidden size)
        return self.head(hidden.to(self.head.weight.dtype))[..., 0]


@torch.no_grad()
def batched_values(critic, sequences, attention_mask, micro_batch_size, args):
    """The critic's values of a whole batch, without gradient, by micro-batches: -> (B, R+1)."""
    batches = zip(sequences.split(micro_batch_size), attention_mask.split(micro_batch_size))
    return torch.cat([critic(*batch, args) for batch in batches])


def generalized_advantages(rewards, values, response_mask, next_values, gamma, gae_lambda):
    """Generalised advantage estimation from the last token to the first. What the mask leaves out is skipped.

    Args:
        rewards, values, response_mask: (B, R). next_values: (B,), V behind the last token.
    Returns:
        (B, R), 0 where the mask is False.
    """
    advantages, next_advantages = torch.zeros_like(rewards), torch.zeros_like(next_values)  # (B, R), (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]  # (B,) (3)
        advantage = delta + gamma * gae_lambda * next_advantages  # (B,) (4)
        next_advantages = advantage.where(response_mask[:, t], next_advantages)
        next_values = values[:, t].where(response_mask[:, t], next_values)
        advantages[:, t] = advantage.where(response_mask[:, t], 0.0)
    return advantages


def exact_kl(old_logits, new_logits):
    """KL(old || new) of each token over the whole vocabulary: (b, R, V), (b, R, V) -> (b, R)."""
    old, new = common.full_precision(old_logits).log_softmax(-1), common.full_precision(new_logits).log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


forward_ad, sdpa_kernel = torch.autograd.forward_ad, torch.nn.attention.sdpa_kernel
MATH = torch.nn.attention.SDPBackend.MATH


def dot(a, b):
    """Inner product of two (D,) vectors, accumulated in float64 piece by piece."""
    return sum(torch.dot(x.double(), y.double()).item() for x, y in zip(a.split(2**22), b.split(2**22)))


def flatten(policy):
    """The parameters as one (D,) vector, copied."""
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def unflatten(vector, policy):
    """A (D,) vector as a dictionary from parameter names to views of it, in the parameters' shapes."""
    parameters = dict(policy.named_parameters())
    pieces = vector.split([parameter.numel() for parameter in parameters.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces)}


def add_gradient(vector, outputs, output_gradients, policy):
    """Add to a (D,) vector, in place, the gradient of `outputs` with respect to the parameters."""
    parts = torch.autograd.grad(outputs, list(policy.parameters()), output_gradients, materialize_grads=True)
    for total, part in zip(unflatten(vector, policy).values(), parts):
        total += part


@torch.no_grad()
def set_parameters(policy, vector):
    """Copy a (D,) vector into the parameters."""
    for parameter, value in zip(policy.parameters(), unflatten(vector, policy).values()):
        parameter.copy_(value)


def with_parameters(policy, values):
    """The function that `policy` would be with other parameters, given as a dictionary. It is never compiled."""

    def function(**inputs):
        with torch.compiler.set_stance("force_eager"):
            return torch.func.functional_call(policy, values, (), inputs)

    return function


def surrogate_gradient(policy, batch, advantages, num_tokens, micro_batch_size, args):
    """Gradient g of the surrogate at the old policy, where every ratio is 1.

    Args:
        batch: sequences (B, P+R), attention mask (B, P+R) and response mask (B, R).
        advantages: (B, R). num_tokens: response tokens on all ranks.
    Returns:
        g: (D,), over all ranks. logprobs, entropy: (B, R), of the old policy.
    """
    gradient, logprobs, entropy = flatten(policy).zero_(), [], []
    for *inputs, mask, micro_advantages in split_batch(micro_batch_size, *batch, advantages):
        new_logprobs, new_entropy = policy_logprobs(policy, *inputs, args)  # (b, R), (b, R)
        ratio = (new_logprobs - new_logprobs.detach()).exp()  # (b, R), all 1
        surrogate = (ratio * micro_advantages).where(mask, 0.0).sum() / num_tokens
        add_gradient(gradient, surrogate, None, policy)  # (7)
        logprobs.append(new_logprobs.detach())
        entropy.append(new_entropy.detach())
    return all_reduce(gradient), torch.cat(logprobs), torch.cat(entropy)


def split_batch(micro_batch_size, *tensors):
    """Micro-batches of several tensors with the same first dimension."""
    return zip(*[tensor.split(micro_batch_size) for tensor in tensors])


def jacobian_vector_product(policy, vector, inputs, args):
    """Logits and how they change along `vector`: (D,) -> (b, R, V), (b, R, V).

    Forward-mode differentiation: one pass, nothing kept. Fused attention cannot do that, so plain attention is taken.
    """
    with forward_ad.dual_level(), torch.no_grad(), sdpa_kernel(MATH):
        tangents = unflatten(vector, policy)
        duals = {name: forward_ad.make_dual(p.detach(), tangents[name]) for name, p in policy.named_parameters()}
        return forward_ad.unpack_dual(response_logits(with_parameters(policy, duals), *inputs, args))


@torch.compiler.set_stance("force_eager")
def fisher_vector_product(vector, policy, batch, micro_batch_size, args):
    """F v over the response tokens of `batch` on all ranks, in Gauss-Newton form: (D,) -> (D,)."""
    num_tokens = all_reduce(batch[2].sum())
    product = torch.zeros_like(vector)
    for *inputs, mask in split_batch(micro_batch_size, *batch):
        logits, change = jacobian_vector_product(policy, vector, inputs, args)  # (b, R, V), J v
        p = logits.softmax(-1)  # (b, R, V)
        change = p * (change - (p * change).sum(-1, keepdim=True))  # (b, R, V), (diag p - p p') J v
        change = change.where(mask[..., None], 0.0) / num_tokens
        with sdpa_kernel(MATH):  # around the backward pass too, where activation checkpointing runs layers again
            add_gradient(product, response_logits(policy, *inputs, args), change, policy)  # (8)
    return all_reduce(product)


def fisher_quadratic_form(vector, policy, batch, micro_batch_size, args):
    """x'Fx over the response tokens of `batch` on all ranks, without a backward pass: the variance of J x under p."""
    total = torch.zeros((), device=vector.device, dtype=torch.float64)
    for *inputs, mask in split_batch(micro_batch_size, *batch):
        logits, change = jacobian_vector_product(policy, vector, inputs, args)  # (b, R, V)
        p = logits.softmax(-1)  # (b, R, V)
        mean_change = (p * change).sum(-1, keepdim=True)  # (b, R, 1)
        total += (p * (change - mean_change) ** 2).sum(-1).where(mask, 0.0).sum()
    return (all_reduce(total) / all_reduce(batch[2].sum())).item()


def conjugate_gradient(product, g, iters, relative_damping, tol):
    """Solve (F + d I) x = g for x, with d = relative_damping * g'Fg / g'g (Hestenes and Stiefel 1952).

    Starts at x = 0, where the first product is F g, and ends early at a small residual, or when the curvature along the
    next direction is not positive or not finite, with the last x that was good.

    Args:
        product: function v -> F v on (D,) vectors.
    Returns:
        x (D,), d, length of the residual over that of g, iterations done.
    """
    x, residual, direction = torch.zeros_like(g), g.clone(), g.clone()
    start = norm = dot(g, g)
    damping = 0.0
    if not 0 < start < float("inf"):
        return x, 0.0, 0.0, 0
    for iteration in range(iters):
        if not norm > tol**2 * start:
            return x, damping, (norm / start) ** 0.5, iteration
        curved = product(direction)
        curvature = dot(direction, curved)
        if iteration == 0 and 0 < curvature < float("inf"):
            damping = relative_damping * curvature / start
        curvature += damping * dot(direction, direction)
        if not 0 < curvature < float("inf"):
            return x, damping, (norm / start) ** 0.5, iteration
        curved = torch.add(curved, direction, alpha=damping)
        x.add_(direction, alpha=norm / curvature)  # (9)
        residual.sub_(curved, alpha=norm / curvature)
        del curved  # (D,), before the next product makes its own
        old_norm, norm = norm, dot(residual, residual)
        direction.mul_(norm / old_norm).add_(residual)
    return x, damping, (norm / start) ** 0.5, iters


@torch.no_grad()
def surrogate_gain_and_kl(policy, old_parameters, batch, advantages, num_tokens, micro_batch_size, args):
    """What a step did: L(theta) - L(theta_old) and exact E_t[KL(old || new)], over all ranks.

    Logits of the old policy are computed again rather than kept: (B, R, V) is more than many machines hold.
    """
    sums = torch.zeros(2, device=advantages.device, dtype=torch.float64)
    for *inputs, mask, micro_advantages in split_batch(micro_batch_size, *batch, advantages):
        tokens = inputs[0][:, -args.response_length :]  # (b, R)
        old_logits = response_logits(with_parameters(policy, old_parameters), *inputs, args)  # (b, R, V)
        new_logits = response_logits(policy, *inputs, args)  # (b, R, V)
        logratio = (
            common.token_statistics(new_logits, tokens)[0] - common.token_statistics(old_logits, tokens)[0]
        )  # (b, R)
        gain = (logratio.exp() - 1) * micro_advantages  # (b, R)
        kl = exact_kl(old_logits, new_logits)  # (b, R)
        sums += torch.stack([gain.where(mask, 0.0).sum(), kl.where(mask, 0.0).sum()])
    return (all_reduce(sums) / num_tokens).tolist()  # (6)


def line_search(policy, theta, step, predicted_gain, measure, max_kl, args):
    """Move the policy to the first of theta + c^j step that keeps the trust region and improves enough.

    Args:
        theta, step: (D,). predicted_gain: of the full step. max_kl: delta.
        measure: function () -> gain and KL of the policy's current parameters.
    Returns:
        fraction (0 if no step passed, and theta is back, bit for bit), gain, kl, steps tried.
    """
    for tried in range(args.backtrack_iters):
        fraction = args.backtrack_coeff**tried
        set_parameters(policy, theta + fraction * step)
        gain, kl = measure()
        if kl <= max_kl and args.accept_ratio * fraction * predicted_gain <= gain < float("inf"):  # (11)
            return fraction, gain, kl, tried + 1
    set_parameters(policy, theta)
    return 0.0, 0.0, 0.0, args.backtrack_iters


def check_fisher_products(product, theta, generator):
    """Raise `InputError` if products of this architecture fail or are not symmetric, v'Fw = w'Fv."""
    v, w = [torch.randn(theta.shape, generator=generator, device=theta.device) for _ in range(2)]
    try:
        fisher_v, fisher_w = product(v), product(w)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise common.InputError(
            f"--model: its layers have no forward-mode derivative, which TRPO needs ({error})"
        ) from None
    left, right = dot(v, fisher_w), dot(w, fisher_v)
    scale = abs(dot(v, fisher_v) * dot(w, fisher_w)) ** 0.5
    expected = "layers whose Fisher products are symmetric"
    require(abs(left - right) <= 1e-3 * scale, "--model", expected, f"v'Fw = {left:.6g} and w'Fv = {right:.6g}")


def value_loss(new_values, values, returns, value_clip):
    """Squared error of each value, the larger of the plain and the clipped one: (b, R) -> (b, R)."""
    error = (new_values - returns) ** 2
    if value_clip:
        clipped = values + (new_values - values).clamp(-value_clip, value_clip)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error  # (12)


# ===== Main: checks and sizes (shared by all three scripts) =====
def main(args, checkpoint=None):
    start_time = time.time()
    script = Path(__file__).stem
    rank, world_size, device = common.start_ranks(args.device)
    if checkpoint:
        common.check_resume(args, checkpoint, script, world_size)
    common.check_args(args, world_size)
    check_algorithm_args(args, args.batch_size // world_size)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise common.InputError(f"--output-dir: expected a folder that can be written ({error})") from None
    local_batch_size = args.batch_size // world_size  # responses on this rank
    local_prompts = local_batch_size // args.samples_per_prompt
    micro_batch_size = args.micro_batch_size or local_batch_size
    num_iterations = args.total_episodes // args.batch_size

    # ===== Prompts, reward, policy and reference (shared by all three scripts) =====
    tokenizer, train_prompts, eval_prompts = common.load_prompts(
        model=args.model,
        dataset=args.dataset,
        eval_dataset=args.eval_dataset,
        eval_size=args.eval_size,
        prompt_column=args.prompt_column,
        reference_column=args.reference_column,
        prompt_length=args.prompt_length,
        trust_remote_code=args.trust_remote_code,
    )
    score_responses = partial(
        common.score_responses,
        common.load_reward(
            args.reward,
            train_prompts,
            eval_prompts,
            logit=args.reward_logit,
            batch_size=micro_batch_size,
            device=device,
            trust_remote_code=args.trust_remote_code,
        ),
        args.reward,
        clip=args.reward_clip,
    )
    expected = f"a held-out prompt for each of {world_size} ranks"
    require(len(eval_prompts.rows) >= world_size, "--eval-size", expected, len(eval_prompts.rows))
    context_length = max(train_prompts.ids.shape[1], eval_prompts.ids.shape[1]) + args.response_length
    policy = common.load_policy(args.model, tokenizer, context_length, args.seed, args.trust_remote_code).to(device)
    end_ids = common.end_token_ids(tokenizer, policy)
    reference = copy.deepcopy(policy).requires_grad_(False) if args.kl_coef else None
    # Sampling in bfloat16 reads half the memory. The copy follows the policy, whose own weights stay in float32.
    sampler = common.bfloat16_copy(policy) if args.dtype == "bfloat16" else policy
    sample = partial(
        common.rollout,
        sampler,
        response_length=args.response_length,
        end_ids=end_ids,
        rollout_batch_size=args.rollout_batch_size,
        cuda_graph=args.cuda_graph,
    )

    # ===== Critic and its optimizer (algorithm) =====
    critic = Critic(policy).to(device)
    fused = device.type == "cuda"
    critic_optimizer = torch.optim.AdamW(
        critic.parameters(), lr=args.critic_learning_rate, weight_decay=0.0, fused=fused
    )
    # What a checkpoint holds: these and a few numbers.
    trained = {"policy": policy, "critic": critic, "critic_optimizer": critic_optimizer}
    # The update computes its own, in float32. For the KL the sampler's will do, if it is the policy.
    needs_logprobs = reference is not None and sampler is not policy
    float32_args = Args(**{**asdict(args), "dtype": "float32"})  # for the update
    numbers = {"kl_coef": args.kl_coef}

    # ===== Memory and speed, resume, log (shared by all three scripts) =====
    # Only after all copies were made: the layers of a copy would go on calling those that they were copied from.
    for network in [part for part in (reference, *trained.values()) if isinstance(part, torch.nn.Module)]:
        if args.activation_checkpointing:
            common.checkpoint_activations(network)
        if args.compile:
            network.compile()
    first_iteration, earlier_seconds = 1, 0.0
    if checkpoint:
        for name, part in trained.items():
            part.load_state_dict(checkpoint[name])
        if sampler is not policy:
            common.copy_weights(policy, sampler)
        numbers = checkpoint["numbers"]
        first_iteration, earlier_seconds = checkpoint["iteration"] + 1, checkpoint["seconds"]
    run_dir, writer = args.resume, None
    if rank == 0:
        names = [script, Path(args.model).name, Path(args.dataset).stem, args.seed, time.strftime("%Y%m%d-%H%M%S")]
        run_dir = run_dir or f"{args.output_dir}/{'__'.join(map(str, names))}-{os.getpid()}"
        writer = SummaryWriter(run_dir, purge_step=(first_iteration - 1) * args.batch_size + 1 if checkpoint else None)
        flags = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}")
        print(
            f"{script}: {sum(p.numel() for p in policy.parameters()):,} parameters on {world_size} x {device}, "
            f"{len(train_prompts.rows):,} training and {len(eval_prompts.rows):,} held-out prompts, "
            f"{num_iterations:,} iterations of {args.batch_size:,} responses, run directory {run_dir}"
        )
    progress = tqdm(
        total=num_iterations * args.batch_size,
        initial=(first_iteration - 1) * args.batch_size,
        unit=" episodes",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        disable=rank != 0,
    )

    def evaluate(iteration):
        """Greedy responses to the held-out prompts: log scores and sample texts, return the means over all ranks."""
        mine = eval_prompts.select(list(range(rank, len(eval_prompts.rows), world_size)))
        responses, response_mask, _ = sample(mine.ids.to(device), mine.mask.to(device), greedy=True)  # (n, R)
        texts = common.decode(tokenizer, responses, response_mask)
        scores = {"eval/score": score_responses(mine, texts, iteration)}  # (n,)
        if "reference" in mine.rows[0]:
            exact = common.exact_reward(None, texts, [row["reference"] for row in mine.rows])
            scores["eval/exact"] = torch.tensor(exact)
        means = {name: mean(values.to(device)).item() for name, values in scores.items()}
        if rank == 0:
            for name, value in means.items():
                writer.add_scalar(name, value, iteration * args.batch_size)
            samples = list(zip(mine.rows, texts, scores["eval/score"].tolist()))[:8]
            writer.add_text("samples", common.markdown_table(samples), iteration * args.batch_size)
            for row, text, score in samples[:3]:
                tqdm.write(f"  {common.shorten(row['prompt'])} -> {common.shorten(text)}  score {score:.3f}")
        return means

    if first_iteration in (1, num_iterations + 1):  # before the first update, or for a run that had made its last
        results = evaluate(first_iteration - 1)
    for iteration in range(first_iteration, num_iterations + 1):
        # ===== [1/5] Rollout (shared by all three scripts) =====
        iteration_time = time.time()
        start = (iteration - 1) * local_prompts * world_size + rank * local_prompts
        indices = common.prompt_indices(len(train_prompts.rows), start, local_prompts, args.seed)
        batch = train_prompts.select(indices)
        prompts, prompt_mask = batch.ids.to(device), batch.mask.to(device)  # (B/k, P)
        responses, response_mask, sampler_logprobs = sample(  # (B, R)
            prompts,
            prompt_mask,
            samples_per_prompt=args.samples_per_prompt,
            temperature=args.temperature,
            generator=make_generator(device, args.seed, iteration, rank),
        )
        sequences = torch.cat([prompts.repeat_interleave(args.samples_per_prompt, 0), responses], 1)  # (B, P+R)
        attention_mask = torch.cat([prompt_mask.repeat_interleave(args.samples_per_prompt, 0), response_mask], 1)

        # ===== [2/5] Rewards (shared by all three scripts) =====
        rollout_seconds = time.time() - iteration_time
        texts = common.decode(tokenizer, responses, response_mask)
        scores = score_responses(batch, texts, iteration).to(device)  # (B,)
        # A ratio needs log pi_old from the forward pass of the loss. For the KL alone the sampler's will do, if that is
        # the policy: they differ by the rounding of its cache.
        score_sequences = partial(
            batched_logprobs,
            sequences=sequences,
            attention_mask=attention_mask,
            micro_batch_size=micro_batch_size,
            args=args,
        )
        logprobs = score_sequences(policy) if needs_logprobs else sampler_logprobs  # (B, R)
        ref_logprobs = score_sequences(reference) if reference is not None else logprobs  # (B, R)
        rewards = shaped_rewards(scores, logprobs, ref_logprobs, response_mask, numbers["kl_coef"])  # (B, R)
        metrics = {
            "objective/score": mean(scores).item(),
            "objective/return": mean(rewards.sum(1)).item(),
            "objective/response_length": mean(response_mask.sum(1).float()).item(),
            "objective/ended": mean(common.has_ended(responses, end_ids).float()).item(),
        }
        if reference is not None:
            kl_ref = mean((logprobs - ref_logprobs).where(response_mask, 0.0).sum(1)).item()  # nats per response
            metrics |= {"objective/kl_ref": kl_ref, "objective/kl_coef": numbers["kl_coef"]}
            numbers["kl_coef"] = adapt_kl_coef(numbers["kl_coef"], kl_ref, args.batch_size, args)

        # ===== [3/5] Generalised advantages (algorithm) =====
        all_values = batched_values(critic, sequences, attention_mask, micro_batch_size, args)  # (B, R+1)
        values = all_values[:, :-1]  # (B, R)
        bootstraps = ~common.has_ended(responses, end_ids) & (args.truncation == "bootstrap")  # (B,)
        next_values = all_values[:, -1].where(bootstraps, 0.0)  # (B,)
        advantages = generalized_advantages(  # (B, R)
            rewards, values, response_mask, next_values, args.gamma, args.gae_lambda
        )
        returns = advantages + values  # (B, R) (5)
        variance = masked_variance(returns, response_mask)
        explained = 1 - masked_variance(advantages, response_mask) / variance
        metrics["value/explained_variance"] = explained.item() if variance > 1e-8 else 0.0  # all returns are the same
        metrics["value/mean"] = masked_mean(values, response_mask).item()
        if args.whiten_advantages:
            advantages = whiten(advantages, response_mask)

        # ===== [4/5] TRPO update (algorithm) =====
        remaining = 1 - (iteration - 1) / num_iterations  # of the run
        max_kl = args.max_kl * (remaining if args.anneal_max_kl else 1)
        num_tokens = all_reduce(response_mask.sum())
        theta = flatten(policy)  # (D,)
        whole = (sequences, attention_mask, response_mask)
        g, old_logprobs, entropy = surrogate_gradient(  # (D,), (B, R), (B, R)
            policy, whole, advantages, num_tokens, micro_batch_size, float32_args
        )
        generator = make_generator("cpu", args.seed, iteration, rank, args.update_epochs)  # unlike the critic's
        num_rows = max(1, round(args.fvp_fraction * local_batch_size))
        rows = torch.randperm(local_batch_size, generator=generator)[:num_rows].to(device)
        product = partial(
            fisher_vector_product,
            policy=policy,
            batch=[tensor[rows] for tensor in whole],
            micro_batch_size=micro_batch_size,
            args=float32_args,
        )
        if iteration == first_iteration:
            check_fisher_products(product, theta, make_generator(device, args.seed))
        x, damping, residual, cg_iters = conjugate_gradient(product, g, args.cg_iters, args.cg_damping, args.cg_tol)
        curvature = fisher_quadratic_form(x, policy, whole, micro_batch_size, float32_args)
        slope = dot(g, x)
        measure = partial(
            surrogate_gain_and_kl,
            policy,
            unflatten(theta, policy),
            whole,
            advantages,
            num_tokens,
            micro_batch_size,
            float32_args,
        )
        fraction, gain, kl, tried, predicted_gain = 0.0, 0.0, 0.0, 0, 0.0
        if 0 < curvature < float("inf") and 0 < slope < float("inf"):  # a zero or non-finite gradient leaves x at 0
            scale = (2 * max_kl / curvature) ** 0.5  # (10)
            predicted_gain = scale * slope
            fraction, gain, kl, tried = line_search(policy, theta, scale * x, predicted_gain, measure, max_kl, args)
        del theta, g, x, measure  # as large as the policy: gone before the critic's update and the next batch
        if rank == 0 and not fraction:
            why = f"none of {tried} steps passed the line search" if tried else "no usable gradient"
            tqdm.write(f"  iteration {iteration}: policy not updated, {why}")
        metrics |= {
            "policy/entropy": masked_mean(entropy, response_mask).item(),
            "policy/sampler_gap": masked_mean((old_logprobs - sampler_logprobs).abs(), response_mask).item(),
            "trpo/kl": kl,
            "trpo/max_kl": max_kl,
            "trpo/kl_predicted": fraction**2 * max_kl,
            "trpo/surrogate_gain": gain,
            "trpo/surrogate_gain_predicted": fraction * predicted_gain,
            "trpo/cg_residual": residual,
            "trpo/cg_iters": cg_iters,
            "trpo/damping": damping,
            "trpo/step_fraction": fraction,
            "trpo/line_search_steps": tried,
            "trpo/accepted": float(fraction > 0),
        }

        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * (remaining if args.anneal_lr else 1)
        minibatches, losses = [], []
        for epoch in range(args.update_epochs):
            generator = make_generator("cpu", args.seed, iteration, rank, epoch)
            order = torch.randperm(local_batch_size, generator=generator).to(device)
            minibatches.extend(order.tensor_split(args.num_minibatches))
        for minibatch in minibatches:
            num_tokens = all_reduce(response_mask[minibatch].sum())
            total = torch.zeros((), device=device)
            for micro in minibatch.split(micro_batch_size):
                mask = response_mask[micro]  # (b, R)
                new_values = critic(sequences[micro], attention_mask[micro], args)[:, :-1]  # (b, R)
                v_loss = value_loss(new_values, values[micro], returns[micro], args.value_clip)  # (b, R)
                v_loss = v_loss.where(mask, 0.0).sum() / num_tokens
                v_loss.backward()
                total += v_loss.detach()
            sum_and_clip_gradients(critic, args.max_grad_norm)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            losses.append(all_reduce(total))
        if losses:
            metrics["loss/value"] = torch.stack(losses).mean().item()

        # ===== [5/5] Log, evaluate, save (shared by all three scripts) =====
        if sampler is not policy:
            common.copy_weights(policy, sampler)
        episode = iteration * args.batch_size
        seconds = time.time() - iteration_time
        metrics["time/rollout_seconds"] = rollout_seconds
        metrics["time/iteration_seconds"] = seconds
        metrics["time/tokens_per_second"] = metrics["objective/response_length"] * args.batch_size / seconds
        if rank == 0:
            for name, value in metrics.items():
                writer.add_scalar(name, value, episode)
            progress.update(args.batch_size)
            kl = f", KL {metrics['objective/kl_ref']:.2f}" if reference is not None else ""
            speed = metrics["time/tokens_per_second"]
            progress.set_postfix_str(f"score {metrics['objective/score']:.3f}{kl}, {speed:.0f} tokens/s")
        is_last = iteration == num_iterations
        if is_last or (args.eval_every and iteration % args.eval_every == 0):
            results = evaluate(iteration)
        if rank == 0 and args.save_every and (is_last or iteration % args.save_every == 0):
            state = {name: part.state_dict() for name, part in trained.items()}
            state |= {"script": script, "args": asdict(args), "world_size": world_size}
            state |= {"iteration": iteration, "numbers": numbers}
            state["seconds"] = earlier_seconds + time.time() - start_time
            common.save_checkpoint(run_dir, iteration, state)

    # ===== Finish (shared by all three scripts) =====
    progress.close()
    if rank == 0:
        writer.close()
        common.save_model(policy, tokenizer, f"{run_dir}/model")
        summary = {name.replace("eval/", "eval_"): value for name, value in results.items()}
        summary |= {"episodes": num_iterations * args.batch_size, "seconds": earlier_seconds + time.time() - start_time}
        summary |= {"run_dir": run_dir}
        Path(f"{run_dir}/summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print("final", *(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in summary.items()))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with common.one_line_errors():
        main(*common.parse_flags(Args))
