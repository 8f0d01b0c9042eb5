"""TRPO for language models, in one file. Copy it with common.py into your project.

    python trpo_lm.py                                           # laptop CPU, three minutes: learns to sort digits
    python trpo_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function                  # a pretrained model
    torchrun --nproc-per-node 8 trpo_lm.py --model DIR ...                                        # on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, less a penalty for leaving pi_ref, a frozen copy of pi (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * min(batch / horizon, 1)) with --kl-ref-target

A critic V predicts the return of a state. The advantage of a token says how much better it turned out than that: tokens
with a positive advantage become more likely. Generalized advantage estimation (Schulman et al. 2016) computes it:

    (3)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                         TD error
    (4)  A_t     = sum_{l >= t} (gamma lambda)^(l-t) delta_l                               GAE, eq. 16 of that paper
    (5)  R_t     = A_t + V(s_t)                                                            what the critic is fitted to

After an end token V counts as 0. A response cut at the length limit has not ended: with --truncation terminal the
limit counts as an end, which makes it part of the task; with bootstrap V(s_{T+1}) stands in.

TRPO (Schulman et al. 2015) takes one step per batch, as far as a trust region around the old policy allows. With
ratio_t = pi(a_t | s_t) / pi_old(a_t | s_t) and E_t the mean over all response tokens of the batch, on all ranks,

    (6)  maximize L(theta) = E_t[ratio_t A_t] subject to E_t[KL(pi_old(. | s_t) || pi(. | s_t))] <= delta, eq. 14

is solved for a small step s = theta - theta_old by the linear model of L and the quadratic model of the KL, appendix C:

    (7)  g = grad L at theta_old                                                           the policy gradient
    (8)  F = E_t[J_t' (diag p_t - p_t p_t') J_t]                                           Fisher matrix, KL's Hessian
    (9)  (F + d I) x = g,  d = damping * g'Fg / g'g                                        natural gradient, by CG
    (10) s = sqrt(2 delta / x'Fx) x                                                        where the model's KL is delta

J_t is the Jacobian of the logits at token t and p_t their softmax. F has as many entries as the model has parameters,
squared; conjugate gradient (CG) only asks for products F v, and (8) gives them without F: J_t v by forward-mode
differentiation, then one backward pass with (diag p_t - p_t p_t') J_t v. The models are wrong for a large step, so

    (11) the first of s, c s, c^2 s, ... with exact KL <= delta and gain >= a * predicted gain is taken,

where the gain is L(theta) - L(theta_old), predicted to be g's; if there is none, theta_old is put back bit for bit.
The critic lowers its squared error by gradient steps, and is kept near the values V_old from before the update:

    (12) L_V = E_t[1/2 max((V - R_t)^2, (clip(V, V_old - eps_V, V_old + eps_V) - R_t)^2)]  clipped value loss

It is a network of its own, a copy of the policy's layers with a head of zeros, so that V is 0 at first: on a shared
trunk its gradient would move the policy out of the trust region.

Departures from the paper: damping relative to the curvature along g, so that one value serves models of all sizes; a
fraction of the batch in the products of (9), with x'Fx in (10) from the whole batch; GAE in place of sampled returns; a
delta that falls to 0 over the run, since steps of a fixed size would never settle; and in bfloat16, where passes that
sample round differently, --sampler-clip C multiplies A_t by the weight min(pi_old / pi_sampler, C).
Departures from ppo_lm.py: the distance is a constraint that each step keeps, not a clip or a penalty; there is one step
per batch, no policy optimizer and no policy learning rate. The policy's update is in float32 (TF32 on a GPU) whatever
--dtype says, since the rounding error of bfloat16 in the KL can be as large as delta. E_t divides by the number of
tokens, where reinforce_lm.py divides by the number of responses and keeps the gamma^(t-1) that GAE drops.

Shapes: B responses of a batch on this rank (b of a micro-batch), P prompt length, R response length, V vocabulary,
D number of trained parameters. common.py begins with a drawing of how prompts, responses and values align.
"""

# ===== Imports (shared by all three scripts) =====
import functools
import json
import os
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import common
from common import NonNegative, Positive, UpToOne, ZeroToOne, all_reduce, make_generator

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ===== Arguments (shared by all three scripts) =====
@dataclass
class Args:
    model: str = "tiny"
    """folder or hub name of a causal language model; tiny is a GPT-2 of about 100k random parameters"""
    lora_rank: NonNegative[int] = 0
    """rank of LoRA adapters (alpha 32) on all linear layers but the head (pip install peft); 0 trains all weights"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of passes: auto is bfloat16 on a GPU, float32 on a CPU; trained weights and logits are in float32"""
    activation_checkpointing: bool = False
    """keep only the input of each layer for the backward pass and recompute the rest: less memory, more time"""
    cuda_graph: bool = True
    """on CUDA, sample with a cache of fixed size and, where it pays, a CUDA graph of the one-token pass"""
    dataset: str = "sort"
    """training prompts: sort, FILE.jsonl, or a hub name NAME[@CONFIG][:SPLIT]"""
    eval_dataset: str = ""
    """held-out prompts, given like --dataset; empty to split them off the training rows"""
    eval_size: Positive[int] = 256
    """number of held-out prompts; without --eval-dataset at most a tenth of the training rows"""
    prompt_column: str = "prompt"
    """column with the prompt: text, or a list of messages for the chat template"""
    reference_column: str = "reference"
    """column with the reference answer, if there is one"""
    prompt_length: Positive[int] = 512
    """longest prompt that is accepted, in tokens"""
    reward: str = "match"
    """match, exact, rouge, bleu, model:NAME, or FILE.py:function(prompts, responses, num_tokens, ended, **columns)"""
    reward_logit: int = -1
    """with model:NAME, the classifier's logit that is the score, counted from 0, or from the end with -1"""
    total_episodes: NonNegative[int] = 10_240
    """responses to train on, rounded down to whole batches; 0 only evaluates the model"""
    batch_size: Positive[int] = 128
    """responses per iteration, over all ranks"""
    samples_per_prompt: Positive[int] = 4
    """responses to each prompt"""
    response_length: Positive[int] = 128
    """longest response, in tokens, the end token included"""
    temperature: Positive[float] = 1.0
    """sampling temperature; the policy that is trained is the one at this temperature"""
    sampler_clip: NonNegative[float] = 0.0
    """with bfloat16 a bound, such as 2, on importance weights that correct rounding in sampling; 0 for none"""
    micro_batch_tokens: NonNegative[int] = 0
    """tokens per forward and backward pass, which bound its memory; 0 is 1,024 on a CPU, 4,096 on a GPU"""
    rollout_tokens: Positive[int] = 262_144
    """tokens of the prompts and longest responses that are sampled at once; bounds memory"""
    output_dir: str = "runs"
    """folder for the run directories"""
    resume: str = ""
    """run directory to continue from its newest checkpoint; all other flags default to those of that run"""
    save_every: NonNegative[int] = 10
    """iterations between checkpoints, of which the newest two are kept; 0 for none"""
    eval_every: NonNegative[int] = 10
    """iterations between evaluations on held-out prompts; 0 for only before the first and after the last"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one"""
    seed: NonNegative[int] = 1
    """seed of random weights, prompt order and sampling"""
    kl_ref_coef: NonNegative[float] = 0.05
    """beta, weight of the KL penalty to the reference policy; 0 keeps no reference in memory"""
    kl_ref_target: NonNegative[float] = 0.0
    """target for the KL to the reference, in nats per response; beta is adapted to reach it; 0 keeps beta fixed"""
    kl_ref_horizon: Positive[int] = 10_000
    """responses in which beta changes by at most about 20%"""
    gamma: UpToOne[float] = 1.0
    """discount per token"""

    # ===== Arguments (algorithm) =====
    max_kl: Positive[float] = 0.005
    """delta, the size of the trust region in nats per token"""
    anneal_max_kl: bool = True
    """let delta fall linearly to 0"""
    cg_iters: Positive[int] = 10
    """maximum number of iterations of conjugate gradient, each of which costs one Fisher-vector product"""
    cg_damping: NonNegative[float] = 0.1
    """damping, in units of the curvature along the gradient"""
    cg_tol: NonNegative[float] = 0.05
    """norm of the residual, relative to the gradient's, at which conjugate gradient ends"""
    fvp_fraction: UpToOne[float] = 0.1
    """fraction of the batch's responses in the Fisher-vector products"""
    backtrack_coeff: UpToOne[float] = 0.7
    """c, factor by which a rejected step is shortened"""
    backtrack_iters: Positive[int] = 10
    """maximum number of steps that are tried"""
    accept_ratio: UpToOne[float] = 0.1
    """a, fraction of the predicted gain that a step has to reach"""
    critic_learning_rate: Positive[float] = 1e-5
    """learning rate of the critic's Adam"""
    anneal_lr: bool = True
    """let the critic's learning rate fall linearly to 0"""
    max_grad_norm: Positive[float] = 1.0
    """maximum gradient norm of the critic"""
    update_epochs: Positive[int] = 1
    """the critic's passes over each batch"""
    num_minibatches: Positive[int] = 4
    """minibatches, and so optimizer steps of the critic, per pass"""
    gae_lambda: ZeroToOne[float] = 0.95
    """lambda of GAE: 0 trusts the critic, 1 the sampled return"""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """what follows a response that was cut at the length limit: nothing, or what the critic expects"""
    whiten_advantages: bool = True
    """shift and scale advantages to mean 0 and standard deviation 1 over the whole batch"""
    value_clip: NonNegative[float] = 0.0
    """eps_V, clip range of the value, in units of the score; 0 for no limit"""


# The defaults above are for a pretrained model. --model tiny, which has random weights to train, has these instead.
TINY = dict(dtype="float32", total_episodes=102_400, batch_size=256, response_length=6, eval_size=512)
TINY |= dict(micro_batch_tokens=4096, save_every=100, eval_every=100, kl_ref_coef=0.02, max_kl=0.1)
TINY |= dict(cg_damping=0.03, critic_learning_rate=1e-3, update_epochs=2, value_clip=0.2)
# Adapters on a pretrained model take about ten times the rates of full training (Schulman et al. 2025).
ADAPTERS = dict(critic_learning_rate=1e-4)


# ===== Log-probabilities (shared by all three scripts) =====
def token_statistics(logits, tokens, temperature, entropy_gradient=False):
    """Log pi of each token, and the entropy of pi there: (n, V), (n,) -> (n,), (n,)."""
    log_pi = (logits / temperature).log_softmax(-1)  # (n, V), kept for the backward pass in place of the logits
    logprobs = log_pi.gather(1, tokens[:, None])[:, 0]
    log_pi = log_pi if entropy_gradient else log_pi.detach()  # without a bonus, pi is not kept for the backward pass
    return logprobs, -(log_pi.exp() * log_pi).sum(1)


def policy_logprobs(model, sequences, attention_mask, response_mask, args, entropy_gradient=False):
    """Log pi of each response token, and the entropy of pi there: (b, P+R) twice, (b, R) -> (b, R), (b, R).

    The first ratio pi / pi_old is 1 if both come from the same micro-batches. An entropy bonus has no effect without
    `entropy_gradient`, which keeps more for the backward pass.
    """
    logits = common.response_logits(model, sequences, attention_mask, response_mask, args)  # (n, V)
    tokens = sequences[:, -args.response_length :][response_mask]  # (n,), row after row
    size = max(1, (2**21 if logits.is_cpu else 2**30) // logits.shape[1])  # pieces fit a CPU's cache
    pieces = zip(logits.split(size), tokens.split(size))
    results = [token_statistics(*piece, args.temperature, entropy_gradient) for piece in pieces]
    zeros = torch.zeros_like(response_mask, dtype=logits.dtype)  # (b, R), outside the mask
    return [zeros.masked_scatter(response_mask, torch.cat(values)) for values in zip(*results)]


def batched_logprobs(model, batch, micro_batches, args):
    """Log pi of each response token of a whole batch, without gradient: -> (B, R)."""
    return common.in_micro_batches(lambda *inputs: policy_logprobs(model, *inputs, args)[0], micro_batches, *batch)


# ===== KL-shaped rewards (shared by all three scripts) =====
def shaped_rewards(scores, logprobs, ref_logprobs, response_mask, kl_ref_coef):
    """Reward of each token: its KL penalty, and on the last sampled token the score.

    Args:
        scores: (B,). logprobs, ref_logprobs, response_mask: (B, R).
    Returns:
        rewards: (B, R), 0 after the end of a response.
    """
    rewards = -kl_ref_coef * (logprobs - ref_logprobs).where(response_mask, 0.0)
    last = response_mask.shape[1] - 1 - response_mask.flip(1).int().argmax(1)  # (B,), the last True
    return rewards.scatter_add(1, last[:, None], scores[:, None])  # (1)


def adapt_kl_ref_coef(kl_ref_coef, kl_ref, num_responses, args):
    """The KL coefficient for the next batch (Ziegler et al. 2019, section 2.2)."""
    if not args.kl_ref_target:
        return kl_ref_coef
    error = min(max(kl_ref / args.kl_ref_target - 1, -0.2), 0.2)
    return kl_ref_coef * (1 + error * min(num_responses / args.kl_ref_horizon, 1))  # (2)


# ===== Critic, equations (algorithm) =====
class Critic(torch.nn.Module):
    """The policy's layers, copied, with a scalar head that starts at zero."""

    def __init__(self, policy):
        super().__init__()
        common.require(policy.base_model is not policy, "--model", "layers below a head, for the critic", type(policy))
        self.backbone = common.copy_network(policy.base_model)
        self.head = torch.nn.Linear(policy.get_output_embeddings().weight.shape[1], 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, sequences, attention_mask, args):
        """Values of states before each of R columns and after the last: (b, P+R) -> (b, R+1); arbitrary in padding."""
        inputs, places = common.pack(sequences, attention_mask, args.response_length)
        with common.autocast(sequences.device, args):
            hidden = self.backbone(**inputs).last_hidden_state.squeeze(0)  # (T, hidden size)
        values = self.head(hidden.to(self.head.weight.dtype))[:, 0]  # (T,)
        return values[places[:, -args.response_length - 1 :]]


def generalized_advantages(rewards, values, response_mask, next_values, gamma, gae_lambda):
    """Generalized advantage estimation from the last token to the first. Masked tokens are skipped.

    A response of three tokens and an end token, with room for one more, and gamma = lambda = 1/2:

    >>> mask    = torch.tensor([[True, True, True, True, False]])
    >>> rewards = torch.tensor([[0.0, 0.0, -0.5, 1.0, 0.0]])  # a KL penalty on the third token, the score on the end
    >>> values  = torch.tensor([[0.5, 0.5, 0.5, 1.0, 9.0]])  # V of the state before each token; 9 stands for anything
    >>> # delta = 0 + 0.5/2 - 0.5, 0 + 0.5/2 - 0.5, -0.5 + 1/2 - 0.5, 1 + 0/2 - 1 = -0.25, -0.25, -0.5, 0
    >>> generalized_advantages(rewards, values, mask, torch.tensor([0.0]), 0.5, 0.5).tolist()  # A = delta + next A / 4
    [[-0.34375, -0.375, -0.5, 0.0, 0.0]]

    Args:
        rewards, values, response_mask: (B, R). next_values: (B,), V after the last token.
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


def value_loss(new_values, values, value_targets, value_clip):
    """Squared error of each value, the larger of the plain and the clipped one: (b, R) -> (b, R)."""
    error = (new_values - value_targets) ** 2
    if value_clip:
        clipped = values + (new_values - values).clamp(-value_clip, value_clip)
        error = torch.max(error, (clipped - value_targets) ** 2)
    return 0.5 * error  # (12)


def dot(a, b):
    """Inner product of two (D,) vectors: pieces in their own precision, added up in float64."""
    size = 2**16 if a.device.type == "cpu" else 2**24  # bounds rounding error on a CPU, launches on a GPU
    pieces = [torch.dot(x, y) for x, y in zip(a.split(size), b.split(size))]
    return torch.stack(pieces).double().sum().item()


def unflatten(vector, policy):
    """A (D,) vector as {name: view of it in the parameter's shape}."""
    parameters = common.trained_parameters(policy)
    pieces = vector.split([parameter.numel() for parameter in parameters.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces)}


def with_parameters(policy, parameters):
    """The policy as a function, with {name: tensor} in place of its own parameters of these names."""
    return lambda **inputs: torch.func.functional_call(policy, parameters, kwargs=inputs)


def take_gradient(policy, out=None):
    """The gradient of all backward passes and ranks as one (D,) vector, in `out` if given; gradients are reset."""
    parameters = common.trained_parameters(policy).values()  # an expert that got no token has no gradient
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    vector = torch.cat([gradient.flatten() for gradient in gradients], out=out)
    policy.zero_grad()
    return all_reduce(vector)


def plain_attention():
    """A context without fused attention, which has no forward-mode derivative."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def surrogate_gradient(policy, batch, micro_batches, advantages, sampler_logprobs, num_tokens, args):
    """Gradient g (D,) of the surrogate at the old policy, where every ratio is 1, on all ranks; and two metrics.

    batch: sequences (B, P+R), attention mask (B, P+R) and response mask (B, R). advantages, sampler_logprobs: (B, R).
    micro_batches: tensors of row indices. num_tokens: response tokens on all ranks.
    """
    sums = {}
    for indices in micro_batches:
        *inputs, mask = [tensor[indices] for tensor in batch]  # (b, P+R), (b, P+R), (b, R)
        new_logprobs, entropy = policy_logprobs(policy, *inputs, mask, args)  # (b, R), (b, R)
        ratio = (new_logprobs - new_logprobs.detach()).exp()  # (b, R), all 1
        ((ratio * advantages[indices]).where(mask, 0.0).sum() / num_tokens).backward()
        gap = (new_logprobs - sampler_logprobs[indices]).abs()  # (b, R)
        common.add_sums(sums, mask, {"policy/entropy": entropy, "policy/sampler_gap": gap})
    return take_gradient(policy), common.means_over_ranks(sums, num_tokens)  # (7)


@torch.no_grad()
def jacobian_vector_product(policy, vector, inputs, args):
    """Logits / temperature, and how they change along `vector`, in forward mode: (D,) -> (n, V), (n, V)."""
    forward_ad, parameters = torch.autograd.forward_ad, common.trained_parameters(policy)
    with forward_ad.dual_level(), plain_attention():
        tangents = unflatten(vector, policy).items()
        duals = {name: forward_ad.make_dual(parameters[name].detach(), tangent) for name, tangent in tangents}
        logits = common.response_logits(with_parameters(policy, duals), *inputs, args)
        return [part / args.temperature for part in forward_ad.unpack_dual(logits)]  # division of duals is slow


def fisher_vector_product(vector, policy, batch, micro_batches, args, out=None):
    """F v over the response tokens of the micro-batches on all ranks, in Gauss-Newton form: (D,) -> (D,).

    out: (D,), overwritten with the result if given: new memory for each product is slow on a CPU.
    """
    num_tokens = all_reduce(sum(batch[2][indices].sum() for indices in micro_batches))
    for indices in micro_batches:
        inputs = [tensor[indices] for tensor in batch]
        logits, change = jacobian_vector_product(policy, vector, inputs, args)  # (n, V), J v
        p = logits.softmax(-1)  # (n, V)
        change = p * (change - (p * change).sum(-1, keepdim=True)) / num_tokens  # (n, V), (diag p - p p') J v
        del logits, p  # as large as what the pass below keeps
        with plain_attention():  # also for the backward pass, where activation checkpointing reruns layers
            (common.response_logits(policy, *inputs, args) / args.temperature).backward(change)
    return take_gradient(policy, out)  # (8)


def fisher_quadratic_form(vector, policy, batch, micro_batches, num_tokens, args):
    """x'Fx over the response tokens on all ranks, without a backward pass: the variance of J x under p."""
    total = 0.0
    for indices in micro_batches:
        inputs = [tensor[indices] for tensor in batch]
        logits, change = jacobian_vector_product(policy, vector, inputs, args)  # (n, V)
        p = logits.softmax(-1)  # (n, V)
        mean_change = (p * change).sum(-1, keepdim=True)  # (n, 1)
        total += (p * (change - mean_change) ** 2).sum(-1).double().sum()
    return (all_reduce(total) / num_tokens).item()


def conjugate_gradient(product, g, iters, relative_damping, tol):
    """Solve (F + d I) x = g for x, with d = relative_damping * g'Fg / g'g (Hestenes and Stiefel 1952).

    Starts at x = 0, where the first product is F g. Ends at a small residual, or, with the last good x, when
    the curvature along the next direction is not positive or not finite. product: function v -> F v on (D,) vectors,
    whose result is overwritten and may reuse its memory.
    Returns x (D,), d, norm of the residual relative to that of g, iterations done.
    """
    x, residual, direction = torch.zeros_like(g), g.clone(), g.clone()
    g_squared = residual_squared = dot(g, g)
    damping, iteration = 0.0, 0
    while iteration < iters and residual_squared > tol**2 * g_squared:  # False for NaN and infinity, too
        curved = product(direction)
        curvature = dot(direction, curved)
        if iteration == 0:
            damping = relative_damping * curvature / g_squared
        curvature += damping * dot(direction, direction)
        if not 0 < curvature < torch.inf:
            break
        curved.add_(direction, alpha=damping)
        x.add_(direction, alpha=residual_squared / curvature)  # (9)
        residual.sub_(curved, alpha=residual_squared / curvature)
        previous, residual_squared = residual_squared, dot(residual, residual)
        torch.add(residual, direction, alpha=residual_squared / previous, out=direction)
        iteration += 1
    relative_residual = (residual_squared / g_squared) ** 0.5 if 0 < g_squared < torch.inf else 0.0
    return x, damping, relative_residual, iteration


def exact_kl(old_logits, new_logits, temperature):
    """KL(old || new) of each token over the whole vocabulary: (n, V), (n, V) -> (n,)."""
    old, new = [(logits / temperature).log_softmax(-1) for logits in (old_logits, new_logits)]  # (n, V) each
    return (old.exp() * (old - new)).sum(-1)


@torch.no_grad()
def surrogate_gain_and_kl(policy, theta, batch, micro_batches, advantages, num_tokens, args):
    """What a step from `theta` did: L(theta) - L(theta_old) and exact E_t[KL(old || new)], over all ranks.

    Logits of the old policy are computed again rather than kept: (B, R, V) is more than many machines hold.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=theta.device)
    old_policy = with_parameters(policy, unflatten(theta, policy))
    for indices in micro_batches:
        inputs = sequences, _, mask = [tensor[indices] for tensor in batch]
        tokens = sequences[:, -args.response_length :][mask]  # (n,)
        old_logits = common.response_logits(old_policy, *inputs, args)  # (n, V)
        new_logits = common.response_logits(policy, *inputs, args)  # (n, V)
        new, old = [token_statistics(logits, tokens, args.temperature)[0] for logits in (new_logits, old_logits)]
        gain = ((new - old).exp() - 1) * advantages[indices][mask]  # (n,)
        kl = exact_kl(old_logits, new_logits, args.temperature)  # (n,)
        sums += torch.stack([gain.double().sum(), kl.double().sum()])
    return tuple((all_reduce(sums) / num_tokens).tolist())  # (6)


def line_search(policy, theta, step, predicted_gain, gain_and_kl, max_kl, args):
    """Move the policy to the first of theta + c^j step that keeps the trust region and improves enough.

    theta, step: (D,). predicted_gain: of the full step. gain_and_kl: function () -> gain and KL of the current policy.
    Returns fraction (0 if no step passed, and theta is back, bit for bit), gain, kl, steps tried.
    """
    parameters = common.trained_parameters(policy).values()
    max_tries = args.backtrack_iters if 0 < predicted_gain < torch.inf else 0  # a zero or NaN gradient has no step
    for tried in range(max_tries):
        fraction = args.backtrack_coeff**tried
        torch.nn.utils.vector_to_parameters(torch.add(theta, step, alpha=fraction), parameters)
        gain, kl = gain_and_kl()
        if kl <= max_kl and args.accept_ratio * fraction * predicted_gain <= gain < torch.inf:  # (11)
            return fraction, gain, kl, tried + 1
    torch.nn.utils.vector_to_parameters(theta, parameters)
    return 0.0, 0.0, 0.0, max_tries


# ===== Main: data, reward and models (shared by all three scripts) =====
def main(args, checkpoint=None):
    start_time, script = time.time(), Path(__file__).stem
    rank, world_size, device, args = common.start_ranks(args)
    common.check_flags(args, world_size)
    local_batch_size = args.batch_size // world_size  # responses on this rank
    num_iterations = args.total_episodes // args.batch_size
    tokenizer, train_rows, eval_rows = common.load_prompts(args, world_size)
    score_responses = common.load_reward(args, device, train_rows + eval_rows)
    policy = common.load_policy(args, tokenizer, train_rows + eval_rows)
    configured = policy.generation_config.eos_token_id  # one, several or none
    end_ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    end_ids = sorted(end_ids - {None})
    common.require(end_ids, "--model", "an end token in the tokenizer or the generation config", None)
    reference = None  # or a copy, which shares frozen weights, not adapters
    if args.kl_ref_coef:
        reference = common.prepare(common.copy_network(policy).requires_grad_(False), device, args)

    # ===== Critic and its optimizer (algorithm) =====
    critic = common.prepare(Critic(policy), device, args)
    policy = common.prepare(policy, device, args)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_learning_rate, fused=True)
    networks, optimizers = {"policy": policy, "critic": critic}, {"critic": critic_optimizer}  # what a checkpoint holds
    state = SimpleNamespace(kl_ref_coef=args.kl_ref_coef)  # and what goes from one iteration to the next
    float32_args = Args(**asdict(args) | {"dtype": "float32"})  # for the policy's update

    # ===== Resume, run directory, sampling, evaluation (shared by all three scripts) =====
    sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    digest = zlib.crc32(json.dumps([train_rows, eval_rows], default=str).encode())
    first_iteration = 1
    if checkpoint:  # compared by content: paths may have changed
        same = checkpoint["sizes"] == sizes and (checkpoint["digest"] == digest or not num_iterations)
        common.require(same, "--resume", "the model, --lora-rank and rows that this run began with", "others")
        for name, network in networks.items():
            network.load_state_dict(checkpoint["weights"][name], strict=False)  # without frozen ones
        for name, its_optimizer in optimizers.items():
            its_optimizer.load_state_dict(checkpoint["optimizers"][name])
        first_iteration, state = checkpoint["iteration"] + 1, SimpleNamespace(**checkpoint["state"])
        start_time -= state.seconds if num_iterations else 0
    if rank == 0:
        name = f"{script}__{Path(args.model).name}__{Path(args.dataset).stem}__{args.seed}"
        run_dir = f"{Path(args.output_dir).expanduser()}/{name}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        run_dir = args.resume if checkpoint and num_iterations else run_dir
        # What a resumed run had logged after its checkpoint is dropped.
        writer = SummaryWriter(run_dir, purge_step=(first_iteration - 1) * args.batch_size + 1 if checkpoint else None)
        writer.add_text("args", "\n".join(f"    {name} = {value!r}" for name, value in asdict(args).items()))
        about = f"{sum(size for size, is_trained in sizes if is_trained):,} of {sum(size for size, _ in sizes):,}"
        about += f" parameters trained, {args.dtype} on {world_size} x {device}, {len(train_rows):,} training and"
        about += f" {len(eval_rows):,} held-out prompts, {num_iterations:,} x {args.batch_size:,} responses"
        print(f"{script}: {about}, run directory {run_dir}")

    sample = functools.partial(common.sample, policy, tokenizer, end_ids, args)

    def log_samples(split, episode, rows, texts, scores, parts):
        """Append to samples.jsonl each row's prompt with a response, its score and parts."""
        with open(f"{run_dir}/samples.jsonl", "a") as file:
            for i, (row, text) in enumerate(zip(rows, texts)):
                line = dict(split=split, episode=episode, prompt=row["prompt"], response=text, score=scores[i].item())
                print(json.dumps(line | {name: values[i].item() for name, values in parts.items()}), file=file)

    def evaluate(episode):
        """Mean scores of greedy responses to the held-out prompts, over all ranks; they are logged and shown."""
        rows = eval_rows[rank::world_size]  # this rank's
        *_, texts, facts = sample(rows, greedy=True)
        scores, parts = score_responses(rows, texts, facts)  # (n,)
        results = {f"eval/{name}": values for name, values in parts.items()} | {"eval/score": scores}
        if args.reward in ("match", "exact"):  # elsewhere responses are not meant to equal the reference
            results["eval/exact"] = torch.tensor(common.exact_reward(None, texts, [row["reference"] for row in rows]))
        means = {name: common.mean(values.to(device)).item() for name, values in results.items()}
        if rank == 0:
            log_samples("eval", episode, rows, texts, scores, parts)
            triples = zip(scores.tolist(), rows[:8], texts)
            lines = [f"    {score:.3f}  {row['prompt']!r} -> {text!r}" for score, row, text in triples]
            writer.add_text("samples", "\n".join(lines), episode)  # indented: as code
            for name, value in means.items():
                writer.add_scalar(name, value, episode)
            figures = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            lines = [*[line[:300] for line in lines[:3]], f"evaluation after {episode:,} episodes: {figures}"]
            tqdm.write("\n".join(lines))
        return means

    if not checkpoint:
        common.try_model(policy, tokenizer, end_ids, args, policy_logprobs, train_rows + eval_rows)
    if not checkpoint or not num_iterations:
        state.before = state.after = evaluate((first_iteration - 1) * args.batch_size)
    done, left = first_iteration - 1, range(first_iteration, num_iterations + 1)  # iterations
    progress = tqdm(left, script, num_iterations, initial=done, disable=rank > 0 or not left)
    for iteration in progress:
        # ===== [1/5] Rollout (shared by all three scripts) =====
        iteration_start = time.time()
        num_prompts = local_batch_size // args.samples_per_prompt
        start = ((iteration - 1) * world_size + rank) * num_prompts
        prompt_rows = [train_rows[i] for i in common.prompt_indices(len(train_rows), start, num_prompts, args.seed)]
        generator = make_generator(device, args.seed, iteration, rank)
        *batch, sampler_logprobs, texts, facts = sample(prompt_rows, args.samples_per_prompt, generator=generator)
        sequences, attention_mask, response_mask = batch  # (B, P+R), (B, P+R), (B, R), as is sampler_logprobs
        rollout_seconds = time.time() - iteration_start

        # ===== Old log-probabilities (algorithm) =====
        groups = torch.arange(local_batch_size, device=device).view(-1, args.samples_per_prompt)  # (B/k, k)
        micro_batches = common.micro_batches_of(groups, attention_mask, args)
        # The update computes its own in float32. For the KL the sampler's will do where it is the policy itself.
        logprobs = sampler_logprobs  # (B, R)
        if args.dtype == "bfloat16":
            logprobs = batched_logprobs(policy, batch, micro_batches, args)

        # ===== [2/5] Rewards, importance weights (shared by all three scripts) =====
        scores, parts = score_responses(prompt_rows, texts, facts)  # (B,)
        scores, ended = scores.to(device), torch.tensor(facts["ended"], device=device)  # (B,), (B,)
        ref_logprobs = logprobs  # (B, R)
        if reference is not None:
            ref_logprobs = batched_logprobs(reference, batch, micro_batches, args)
        rewards = shaped_rewards(scores, logprobs, ref_logprobs, response_mask, state.kl_ref_coef)  # (B, R)
        metrics = {
            "objective/score": common.mean(scores).item(),
            "objective/return": common.mean(rewards.sum(1)).item(),
            "objective/response_length": common.mean(response_mask.sum(1).float()).item(),
            "objective/ended": common.mean(ended).item(),
        } | {f"reward/{name}": common.mean(values.to(device)).item() for name, values in parts.items()}
        if reference is not None:
            kl_ref = common.mean((logprobs - ref_logprobs).where(response_mask, 0.0).sum(1)).item()
            metrics |= {"objective/kl_ref": kl_ref, "objective/kl_ref_coef": state.kl_ref_coef}
            state.kl_ref_coef = adapt_kl_ref_coef(state.kl_ref_coef, kl_ref, args.batch_size, args)
        importance_weights = torch.ones_like(logprobs)  # (B, R)
        if args.dtype == "bfloat16" and args.sampler_clip:
            importance_weights = (logprobs - sampler_logprobs).exp().clamp(max=args.sampler_clip)
            is_clipped = importance_weights == args.sampler_clip  # (B, R)
            metrics["policy/sampler_clipfrac"] = common.mean(is_clipped, response_mask).item()

        # ===== [3/5] Generalized advantages (algorithm) =====
        all_values = common.in_micro_batches(lambda *x: critic(*x, args), micro_batches, *batch[:2])  # (B, R+1)
        values = all_values[:, :-1]  # (B, R), also of padding, which GAE skips
        is_cut = ~ended & (args.truncation == "bootstrap")  # (B,)
        value_after = all_values[:, -1].where(is_cut, 0.0)  # (B,), as cut rows fill all R columns
        advantages = generalized_advantages(  # (B, R)
            rewards, values, response_mask, value_after, args.gamma, args.gae_lambda
        )
        value_targets = advantages + values  # (B, R) (5), with the advantages before they are whitened
        variance = common.variance(value_targets, response_mask)
        explained = 1 - common.variance(advantages, response_mask) / variance  # advantages = value_targets - values
        metrics["value/explained_variance"] = explained.item() if variance > 1e-8 else 0.0  # 0 if all targets are equal
        metrics["value/mean"] = common.mean(values, response_mask).item()
        if args.whiten_advantages:
            advantages = common.whiten(advantages, response_mask)
        advantages = advantages * importance_weights  # (B, R)

        # ===== [4/5] TRPO update (algorithm) =====
        remaining = 1 - (iteration - 1) / num_iterations  # of the run
        max_kl = args.max_kl * (remaining if args.anneal_max_kl else 1)
        num_tokens = all_reduce(response_mask.sum())
        theta = torch.nn.utils.parameters_to_vector(common.trained_parameters(policy).values()).detach()  # (D,)
        g, means = surrogate_gradient(  # (D,)
            policy, batch, micro_batches, advantages, sampler_logprobs, num_tokens, float32_args
        )
        key = args.seed, iteration, rank, args.update_epochs  # unlike the critic's
        subset = torch.randperm(local_batch_size, generator=make_generator("cpu", *key)).to(device)  # of many prompts
        subset = subset[: max(1, round(args.fvp_fraction * local_batch_size))]
        few = common.micro_batches_of(subset[:, None], attention_mask, args)
        out = torch.empty_like(g)  # (D,), for all products
        product = functools.partial(
            fisher_vector_product, policy=policy, batch=batch, micro_batches=few, args=float32_args, out=out
        )
        x, damping, residual, cg_iters = conjugate_gradient(  # (D,)
            product, g, args.cg_iters, args.cg_damping, args.cg_tol
        )
        del product, out  # as large as the policy: freed before the passes below
        curvature = fisher_quadratic_form(x, policy, batch, micro_batches, num_tokens, float32_args)
        scale = (2 * max_kl / curvature) ** 0.5 if 0 < curvature < torch.inf else 0.0  # (10)
        predicted_gain = scale * dot(g, x)
        gain_and_kl = functools.partial(
            surrogate_gain_and_kl, policy, theta, batch, micro_batches, advantages, num_tokens, float32_args
        )
        fraction, gain, kl, tried = line_search(policy, theta, x.mul_(scale), predicted_gain, gain_and_kl, max_kl, args)
        del theta, g, x, gain_and_kl  # as large as the policy: freed before the critic's update and the next batch
        if rank == 0 and not fraction:
            tqdm.write(f"iteration {iteration}: policy not updated, {tried} steps failed the line search")
        metrics |= means | {
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
        losses = []
        for epoch in range(args.update_epochs):
            for minibatch in common.shuffled_minibatches(attention_mask, args, args.seed, iteration, rank, epoch):
                num_tokens, sums = all_reduce(response_mask[torch.cat(minibatch)].sum()), {}
                for indices in minibatch:
                    *inputs, mask = [tensor[indices] for tensor in batch]  # (b, P+R), (b, P+R), (b, R)
                    new_values = critic(*inputs, args)[:, :-1]  # (b, R)
                    v_loss = value_loss(new_values, values[indices], value_targets[indices], args.value_clip)  # (b, R)
                    (v_loss.where(mask, 0.0).sum() / num_tokens).backward()
                    common.add_sums(sums, mask, {"loss/value": v_loss})
                common.sum_and_clip_gradients(critic, args.max_grad_norm)
                critic_optimizer.step()
                critic_optimizer.zero_grad()
                losses.append(common.means_over_ranks(sums, num_tokens)["loss/value"])
        metrics["loss/value"] = sum(losses) / len(losses)

        # ===== [5/5] Log, evaluate, save (shared by all three scripts) =====
        done, episode, seconds = iteration, iteration * args.batch_size, time.time() - iteration_start
        tokens_per_second = metrics["objective/response_length"] * args.batch_size / seconds
        metrics |= {"time/rollout_seconds": rollout_seconds, "time/iteration_seconds": seconds}
        metrics |= {"time/tokens_per_second": tokens_per_second}
        if rank == 0:
            for name, value in metrics.items():
                writer.add_scalar(name, value, episode)
            log_samples("train", episode, prompt_rows[:1] * args.samples_per_prompt, texts, scores, parts)
            shown = ("objective/score", "objective/kl_ref", "time/tokens_per_second")
            progress.set_postfix({name.split("/")[1]: metrics[name] for name in shown if name in metrics})
        is_last = iteration == num_iterations
        if is_last or (args.eval_every and iteration % args.eval_every == 0):
            state.after = evaluate(episode)
        if rank == 0 and args.save_every and (is_last or iteration % args.save_every == 0):
            state.seconds = time.time() - start_time
            kept = {"args": asdict(args), "sizes": sizes, "digest": digest, "iteration": iteration}
            kept |= {"weights": {name: common.trained_parameters(network) for name, network in networks.items()}}
            kept |= {"optimizers": {name: its.state_dict() for name, its in optimizers.items()}, "state": vars(state)}
            common.save_checkpoint(run_dir, iteration, kept)

    # ===== Finish (shared by all three scripts) =====
    if rank == 0:
        writer.close()
        summary = {f"{name}_before".replace("/", "_"): value for name, value in state.before.items() if num_iterations}
        summary |= {name.replace("/", "_"): value for name, value in state.after.items()}
        summary |= {"episodes": done * args.batch_size, "seconds": time.time() - start_time, "run_dir": run_dir}
        Path(run_dir, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if num_iterations:
            common.save_model(policy, tokenizer, args, run_dir)
        print("final", *[f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in summary.items()])
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*common.parse_flags(Args, TINY, ADAPTERS))
