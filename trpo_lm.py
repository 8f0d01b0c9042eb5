"""TRPO for language models, in one file. Copy it with common.py into your project.

    python trpo_lm.py                                           # laptop CPU, three minutes: learns to sort digits
    python trpo_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function                  # a pretrained model
    torchrun --nproc-per-node 8 trpo_lm.py --model DIR ...                                        # on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, less a penalty for leaving a frozen reference policy (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)       only with --kl-target

A critic V predicts the return of a state. The advantage of a token says how much better it turned out than that: tokens
with a positive advantage become more likely. Generalized advantage estimation (Schulman et al. 2016) computes it:

    (3)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                         TD error
    (4)  A_t     = sum_{l >= t} (gamma lambda)^(l-t) delta_l                               GAE, eq. 16 of that paper
    (5)  R_t     = A_t + V(s_t)                                                            what the critic is fitted to

V is 0 after an end token. A response that is cut at the length limit has not ended: with --truncation terminal the
limit counts as an end, which makes it part of the task; with bootstrap V of the state after the last token stands in.

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
delta that falls to 0 over the run, since steps of a fixed size would never settle.
Departures from ppo_lm.py: the distance is a constraint that each step keeps, not a clip or a penalty; there is one step
per batch, no policy optimizer and no policy learning rate. The policy's update is in float32 (TF32 on a GPU) whatever
--dtype says, since the rounding error of bfloat16 in the KL can be as large as delta. E_t divides by the number of
tokens, where reinforce_lm.py divides by the number of responses, and GAE leaves out the gamma^(t-1) that it keeps.

Shapes: B responses of a batch on this rank (b of a micro-batch), P prompt length, R response length, V vocabulary,
D number of trained parameters, with several ranks of those in this rank's shards. common.py begins with a drawing of
how prompts, responses and values are aligned.
"""

# ===== Imports (shared by all three scripts) =====
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import common
from common import NonNegative, Positive, UpToOne, ZeroToOne, all_reduce, make_generator

import torch
import torch.distributed as dist


# ===== Arguments (shared by all three scripts) =====
@dataclass
class Args:
    model: str = "tiny"
    """folder or hub name of a causal language model; tiny is a GPT-2 of about 100k random parameters"""
    lora_rank: NonNegative[int] = 0
    """rank of LoRA adapters on all linear layers but the head (pip install peft), at ten times the rates; 0 for none"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """precision of passes, float32 with TF32 on a GPU; trained weights, gradients, optimizer state stay in float32"""
    activation_checkpointing: bool = False
    """keep only the input of each layer for the backward pass and recompute the rest: less memory, more time"""
    compile: bool = False
    """compile the layers with torch.compile, except in sampling and TRPO's products; takes a minute or more at first"""
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
    """match, exact, rouge, bleu, model:NAME (a classifier), or FILE.py:function(prompts, responses, **columns)"""
    reward_logit: int = -1
    """the logit of --reward model:NAME that is the score, counted from 0, or from the end with -1"""
    reward_clip: NonNegative[float] = 0.0
    """scores are clipped to plus and minus this; 0 for no limit"""
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
    micro_batch_size: Positive[int] = 8
    """responses per forward and backward pass; bounds memory and changes nothing else but the speed"""
    rollout_batch_size: Positive[int] = 256
    """responses sampled at once, at least those of one prompt; bounds memory"""
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
    kl_coef: NonNegative[float] = 0.05
    """beta, weight of the KL penalty to the reference policy; 0 keeps no reference in memory"""
    kl_target: NonNegative[float] = 0.0
    """target for the KL to the reference, in nats per response; beta is adapted to reach it; 0 keeps beta fixed"""
    kl_horizon: Positive[int] = 10_000
    """responses over which beta is adapted"""
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
TINY = dict(dtype="float32", total_episodes=102_400, batch_size=256, micro_batch_size=256, rollout_batch_size=512)
TINY |= dict(response_length=6, eval_size=512, save_every=100, eval_every=100, kl_coef=0.02, max_kl=0.1)
TINY |= dict(cg_damping=0.03, critic_learning_rate=1e-3, update_epochs=2, value_clip=0.2)


# ===== KL-shaped rewards (shared by all three scripts) =====
def shaped_rewards(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    """Reward of each token: its KL penalty, and on the last real token the score.

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


# ===== Equations (algorithm) =====
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
        """Values of the states before each response token, and of the one after the last: (b, P+R) -> (b, R+1)."""
        sequences, attention_mask, length = common.trim(sequences, attention_mask, args.response_length)  # (b, p+r)
        with common.autocast(sequences.device, args):
            inputs = common.share_prompts(self.backbone, sequences, attention_mask, length + 1)  # runs prompts
            hidden = self.backbone(**inputs).last_hidden_state[:, -length - 1 :]  # (b, r+1, hidden size)
        values = self.head(hidden.to(self.head.weight.dtype))[..., 0]  # (b, r+1)
        return torch.nn.functional.pad(values, (0, args.response_length - length))


def generalized_advantages(rewards, values, response_mask, next_values, gamma, gae_lambda):
    """Generalized advantage estimation from the last token to the first. What the mask leaves out is skipped.

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


def value_loss(new_values, values, returns, value_clip):
    """Squared error of each value, the larger of the plain and the clipped one: (b, R) -> (b, R)."""
    error = (new_values - returns) ** 2
    if value_clip:
        clipped = values + (new_values - values).clamp(-value_clip, value_clip)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error  # (12)


def dot(a, b):
    """Inner product of two (D,) vectors: pieces in their own precision, added up in float64 over all ranks."""
    size = 2**16 if a.device.type == "cpu" else 2**24  # bounds a CPU's rounding error; a launch each on a GPU
    pieces = [torch.dot(x, y) for x, y in zip(a.split(size), b.split(size))]
    return all_reduce(torch.stack(pieces).double().sum()).item()


def flatten(policy):
    """The trained parameters as one (D,) vector, copied."""
    parameters = common.trained_parameters(policy).values()
    return torch.cat([common.local(parameter.detach()).flatten() for parameter in parameters])


def unflatten(vector, policy):
    """A (D,) vector as a dictionary from parameter names to views of it, in the parameters' shapes."""
    parameters = {name: common.local(parameter) for name, parameter in common.trained_parameters(policy).items()}
    pieces = vector.split([parameter.numel() for parameter in parameters.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces)}


@torch.no_grad()
def set_parameters(policy, vector):
    """Copy a (D,) vector into the parameters."""
    for name, value in unflatten(vector, policy).items():
        common.local(policy.get_parameter(name)).copy_(value)


def take_gradient(policy, out=None):
    """The gradient that the backward passes added up, of all ranks, as one (D,) vector, `out` if given; it is reset."""
    gradients = [common.local(p.grad).flatten() for p in common.parameters_with_gradients(policy)]
    vector = torch.cat(gradients, out=out)
    policy.zero_grad()
    return vector


def plain_attention():
    """A context without fused attention, which has no forward-mode derivative."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def surrogate_gradient(policy, batch, micro_batches, advantages, sampler_logprobs, num_tokens, args):
    """Gradient g (D,) of the surrogate at the old policy, where every ratio is 1, on all ranks; and two metrics.

    batch: sequences (B, P+R), attention mask (B, P+R) and response mask (B, R). advantages, sampler_logprobs: (B, R).
    micro_batches: tensors of row indices. num_tokens: response tokens on all ranks.
    """
    sums = {}
    for inds in micro_batches:
        *inputs, mask = [tensor[inds] for tensor in batch]
        new_logprobs, entropy = common.policy_logprobs(policy, *inputs, args)  # (b, R), (b, R)
        entropy = entropy.detach()  # logged only: its graph is freed before the backward pass
        ratio = (new_logprobs - new_logprobs.detach()).exp()  # (b, R), all 1
        ((ratio * advantages[inds]).where(mask, 0.0).sum() / num_tokens).backward()
        gap = (new_logprobs - sampler_logprobs[inds]).abs()  # (b, R)
        common.add_sums(sums, mask, {"policy/entropy": entropy, "policy/sampler_gap": gap})
    return take_gradient(policy), common.means_over_ranks(sums, num_tokens)  # (7)


def jacobian_vector_product(policy, vector, inputs, args):
    """Logits and how they change along `vector`, by forward-mode differentiation: (D,) -> (b, r, V), (b, r, V)."""
    forward_ad, tangents = torch.autograd.forward_ad, unflatten(vector, policy)
    with forward_ad.dual_level(), torch.no_grad(), plain_attention(), common.blame("--model: no forward mode"):
        with common.replaced_parameters(policy, tangents, forward_ad.make_dual):
            return forward_ad.unpack_dual(common.response_logits(policy, *inputs, args) / args.temperature)


@torch.compiler.set_stance("force_eager")
def fisher_vector_product(vector, policy, batch, micro_batches, args, out=None):
    """F v over the response tokens of the micro-batches on all ranks, in Gauss-Newton form: (D,) -> (D,).

    out: (D,), written over with the result if given: on a CPU, getting new memory for each product takes long.
    """
    num_tokens = all_reduce(sum(batch[2][inds].sum() for inds in micro_batches))
    for inds in micro_batches:
        *inputs, mask = [tensor[inds] for tensor in batch]
        logits, change = jacobian_vector_product(policy, vector, inputs, args)  # (b, r, V), J v
        p = logits.softmax(-1)  # (b, r, V)
        change = p * (change - (p * change).sum(-1, keepdim=True))  # (b, r, V), (diag p - p p') J v
        change = change.where(mask[:, : p.shape[1], None], 0.0) / num_tokens
        del logits, p  # as large as what the pass below keeps
        with plain_attention():  # around the backward pass too, where activation checkpointing runs layers again
            (common.response_logits(policy, *inputs, args) / args.temperature).backward(change)
    return take_gradient(policy, out)  # (8)


def fisher_quadratic_form(vector, policy, batch, micro_batches, num_tokens, args):
    """x'Fx over the response tokens on all ranks, without a backward pass: the variance of J x under p."""
    sums = {}
    for inds in micro_batches:
        *inputs, mask = [tensor[inds] for tensor in batch]
        logits, change = jacobian_vector_product(policy, vector, inputs, args)  # (b, r, V)
        p = logits.softmax(-1)  # (b, r, V)
        mean_change = (p * change).sum(-1, keepdim=True)  # (b, r, 1)
        common.add_sums(sums, mask, {"x'Fx": (p * (change - mean_change) ** 2).sum(-1)})
    return common.means_over_ranks(sums, num_tokens)["x'Fx"]


def conjugate_gradient(product, g, iters, relative_damping, tol):
    """Solve (F + d I) x = g for x, with d = relative_damping * g'Fg / g'g (Hestenes and Stiefel 1952).

    Starts at x = 0, where the first product is F g. Ends at a small residual, or, with the last x that was good, when
    the curvature along the next direction is not positive or not finite. product: function v -> F v on (D,) vectors,
    whose result is written over and may be the same memory each time.
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
    """KL(old || new) of each token over the whole vocabulary: (b, r, V), (b, r, V) -> (b, r)."""
    old, new = [common.tempered_log_softmax(logits, temperature) for logits in (old_logits, new_logits)]
    return (old.exp() * (old - new)).sum(-1)


@torch.no_grad()
def surrogate_gain_and_kl(policy, theta, batch, micro_batches, advantages, num_tokens, args):
    """What a step from `theta` did: L(theta) - L(theta_old) and exact E_t[KL(old || new)], over all ranks.

    Logits of the old policy are computed again rather than kept: (B, R, V) is more than many machines hold.
    """
    sums, old_parameters = {}, unflatten(theta, policy)
    for inds in micro_batches:
        *inputs, mask = [tensor[inds] for tensor in batch]
        tokens = inputs[0][:, -args.response_length :]  # (b, R)
        with common.replaced_parameters(policy, old_parameters, lambda new, old: old):
            old_logits = common.response_logits(policy, *inputs, args)  # (b, r, V)
        new_logits = common.response_logits(policy, *inputs, args)  # (b, r, V)
        new_logprobs, old_logprobs = [
            common.token_statistics(z, tokens, args.temperature)[0] for z in (new_logits, old_logits)
        ]  # (b, R)
        gain = ((new_logprobs - old_logprobs).exp() - 1) * advantages[inds]  # (b, R)
        common.add_sums(sums, mask, {"gain": gain, "kl": exact_kl(old_logits, new_logits, args.temperature)})
    return tuple(common.means_over_ranks(sums, num_tokens).values())  # (6)


def line_search(policy, theta, step, predicted_gain, gain_and_kl, max_kl, args):
    """Move the policy to the first of theta + c^j step that keeps the trust region and improves enough.

    theta, step: (D,). predicted_gain: of the full step. gain_and_kl: function () -> gain and KL of the current policy.
    Returns fraction (0 if no step passed, and theta is back, bit for bit), gain, kl, steps tried.
    """
    max_tries = args.backtrack_iters if 0 < predicted_gain < torch.inf else 0  # a zero or NaN gradient has no step
    for tried in range(max_tries):
        fraction = args.backtrack_coeff**tried
        set_parameters(policy, torch.add(theta, step, alpha=fraction))
        gain, kl = gain_and_kl()
        if kl <= max_kl and args.accept_ratio * fraction * predicted_gain <= gain < torch.inf:  # (11)
            return fraction, gain, kl, tried + 1
    set_parameters(policy, theta)
    return 0.0, 0.0, 0.0, max_tries


# ===== Main: data, reward and models (shared by all three scripts) =====
def main(args, checkpoint=None):
    start_time, script = time.time(), Path(__file__).stem
    rank, world_size, device = common.start_ranks(args.device)
    common.check_flags(args, script, world_size, checkpoint)
    local_batch_size = args.batch_size // world_size  # responses on this rank
    num_iterations = args.total_episodes // args.batch_size
    tokenizer, train_prompts, eval_prompts = common.load_prompts(args, checkpoint)
    reward_fn = common.load_reward(args, device, train_prompts.rows + eval_prompts.rows)
    expected = f"a held-out prompt for each of the {world_size} ranks"
    common.require(len(eval_prompts.rows) >= world_size, "--eval-size", expected, len(eval_prompts.rows))
    policy = common.load_policy(args, tokenizer, train_prompts.ids + eval_prompts.ids)
    end_ids = common.end_token_ids(tokenizer, policy)
    # Sampling in bfloat16 reads half the memory, and with several ranks, over which the policy is spread, each samples
    # with a whole copy.
    sampler, reference = policy, None
    if args.dtype == "bfloat16" or world_size > 1:
        sampler = common.copy_network(policy, getattr(torch, args.dtype)).requires_grad_(False).to(device)
    if args.kl_coef:
        reference = common.prepare(common.copy_network(policy).requires_grad_(False), device, args)

    # ===== Critic and its optimizer (algorithm) =====
    critic = common.prepare(Critic(policy), device, args)
    policy = common.prepare(policy, device, args)
    critic_optimizer = torch.optim.AdamW(
        critic.parameters(), lr=args.critic_learning_rate, weight_decay=0.0, fused=True
    )
    trained = {"policy": (policy,), "critic": (critic, critic_optimizer)}  # what a checkpoint holds
    carried = {"kl_coef": args.kl_coef}  # and what goes from one iteration to the next
    float32_args = Args(**asdict(args) | {"dtype": "float32"})  # for the policy's update

    # ===== Resume, run directory, sampling, evaluation (shared by all three scripts) =====
    origin = {"script": script, "args": asdict(args), "world_size": world_size}  # what a resumed run is compared with
    origin["data"] = common.digest(train_prompts, eval_prompts)
    first_iteration = 1
    if checkpoint:
        for name, parts in trained.items():
            common.restore_state(checkpoint[name], *parts)
        first_iteration, carried = checkpoint["iteration"] + 1, checkpoint["carried"]
    if rank == 0:
        run_dir, writer = common.start_run(script, args, (first_iteration - 1) * args.batch_size)
        sizes = f"{sum(p.numel() for p in policy.parameters()):,} parameters on {world_size} x {device}"
        sizes += f", {len(train_prompts.rows):,} training and {len(eval_prompts.rows):,} held-out prompts"
        common.show(f"{script}: {sizes}, {num_iterations:,} x {args.batch_size:,} responses, run directory {run_dir}")

    def sample(prompts, samples_per_prompt=1, **settings):
        """Responses of the current policy to n `Prompts`.

        Returns:
            sequences, attention_mask (n k, P+R), sampler's log-probabilities (n k, R), n k texts, and facts about them.
        """
        ids, mask = prompts.padded(device)  # (n, P)
        with common.whole_weights(sampler, policy):  # the sampler gets the current weights
            responses, response_mask, logprobs = common.rollout(  # (n k, R)
                sampler, ids, mask, end_ids, args, samples_per_prompt, **settings
            )
        sequences = torch.cat([ids.repeat_interleave(samples_per_prompt, 0), responses], 1)
        attention_mask = torch.cat([mask.repeat_interleave(samples_per_prompt, 0), response_mask], 1)
        facts = {"ended": common.has_ended(responses, end_ids).tolist(), "num_tokens": response_mask.sum(1).tolist()}
        return sequences, attention_mask, logprobs, common.decode(tokenizer, responses, response_mask), facts

    def evaluate(episode):
        """Mean scores of greedy responses to the held-out prompts, over all ranks; they are logged and shown."""
        prompts = eval_prompts.select(range(rank, len(eval_prompts.rows), world_size))  # this rank's
        *_, texts, facts = sample(prompts, greedy=True)
        scores, parts = common.score_responses(reward_fn, args, prompts.rows, texts, facts)  # (n,)
        scores = {"eval/score": scores} | {f"eval/{name}": values for name, values in parts.items()}
        if args.reward in ("match", "exact"):  # elsewhere responses are not meant to equal the reference
            scores["eval/exact"] = torch.tensor(
                common.exact_reward(None, texts, [row["reference"] for row in prompts.rows])
            )
        means = {name: common.mean(values.to(device)).item() for name, values in scores.items()}
        if rank == 0:
            common.log_evaluation(writer, episode, means, prompts.rows, texts, scores["eval/score"])
        return means

    if not checkpoint:
        carried["before"] = carried["after"] = evaluate(0)
    for iteration in range(first_iteration, num_iterations + 1):
        # ===== [1/5] Rollout (shared by all three scripts) =====
        iteration_start = time.time()
        num_prompts = local_batch_size // args.samples_per_prompt
        start = ((iteration - 1) * world_size + rank) * num_prompts
        prompts = train_prompts.select(common.prompt_indices(len(train_prompts.rows), start, num_prompts, args.seed))
        generator = make_generator(device, args.seed, iteration, rank)
        sequences, attention_mask, sampler_logprobs, texts, facts = sample(  # (B, P+R), (B, P+R), (B, R)
            prompts, args.samples_per_prompt, generator=generator
        )
        response_mask = attention_mask[:, -args.response_length :]  # (B, R)
        rollout_seconds = time.time() - iteration_start

        # ===== Log-probabilities (algorithm) =====
        batch = sequences, attention_mask  # (B, P+R), (B, P+R)
        micro_batches = common.micro_batches_of(torch.arange(local_batch_size, device=device), response_mask, args)
        # The update computes its own in float32. For the KL the sampler's will do where it is the policy itself.
        logprobs = sampler_logprobs  # (B, R)
        if args.dtype == "bfloat16" and reference is not None:
            logprobs = common.batched_logprobs(policy, *batch, micro_batches, args)

        # ===== [2/5] Rewards (shared by all three scripts) =====
        scores, parts = common.score_responses(reward_fn, args, prompts.rows, texts, facts)  # (B,)
        scores, ended = scores.to(device), torch.tensor(facts["ended"], device=device)  # (B,), (B,)
        ref_logprobs = logprobs  # (B, R)
        if reference is not None:
            ref_logprobs = common.batched_logprobs(reference, *batch, micro_batches, args)
        rewards = shaped_rewards(scores, logprobs, ref_logprobs, response_mask, carried["kl_coef"])  # (B, R)
        metrics = {
            "objective/score": common.mean(scores).item(),
            "objective/return": common.mean(rewards.sum(1)).item(),
            "objective/response_length": common.mean(response_mask.sum(1).float()).item(),
            "objective/ended": common.mean(ended.float()).item(),
        } | {f"reward/{name}": common.mean(values.to(device)).item() for name, values in parts.items()}
        if reference is not None:
            kl_ref = common.mean((logprobs - ref_logprobs).where(response_mask, 0.0).sum(1)).item()
            metrics |= {"objective/kl_ref": kl_ref, "objective/kl_coef": carried["kl_coef"]}
            carried["kl_coef"] = adapt_kl_coef(carried["kl_coef"], kl_ref, args.batch_size, args)

        # ===== [3/5] Generalized advantages (algorithm) =====
        all_values = common.in_micro_batches(lambda *rows: critic(*rows, args), micro_batches, *batch)  # (B, R+1)
        values = all_values[:, :-1]  # (B, R)
        bootstraps = ~ended & (args.truncation == "bootstrap")  # (B,)
        next_values = all_values[:, -1].where(bootstraps, 0.0)  # (B,): a response that was cut has R tokens
        advantages = generalized_advantages(  # (B, R)
            rewards, values, response_mask, next_values, args.gamma, args.gae_lambda
        )
        returns = advantages + values  # (B, R) (5), with the advantages before they are whitened
        variance = common.variance(returns, response_mask)
        explained = 1 - common.variance(advantages, response_mask) / variance  # advantages = returns - values
        metrics["value/explained_variance"] = explained.item() if variance > 1e-8 else 0.0  # 0 if all returns are equal
        metrics["value/mean"] = common.mean(values, response_mask).item()
        if args.whiten_advantages:
            advantages = common.whiten(advantages, response_mask)

        # ===== [4/5] TRPO update (algorithm) =====
        remaining = 1 - (iteration - 1) / num_iterations  # of the run
        max_kl = args.max_kl * (remaining if args.anneal_max_kl else 1)
        num_tokens = all_reduce(response_mask.sum())
        theta, data = flatten(policy), (sequences, attention_mask, response_mask)  # (D,)
        g, means = surrogate_gradient(  # (D,)
            policy, data, micro_batches, advantages, sampler_logprobs, num_tokens, float32_args
        )
        key = args.seed, iteration, rank, args.update_epochs  # unlike the critic's
        rows = torch.randperm(local_batch_size, generator=make_generator("cpu", *key)).to(device)  # of many prompts
        rows = rows[: max(1, round(args.fvp_fraction * local_batch_size))]
        product = torch.empty_like(g)  # (D,), written over by each product
        subset = policy, data, common.micro_batches_of(rows, response_mask, args), float32_args, product
        x, damping, residual, cg_iters = conjugate_gradient(  # (D,)
            lambda v, i=subset: fisher_vector_product(v, *i), g, args.cg_iters, args.cg_damping, args.cg_tol
        )
        del product, subset  # as large as the policy: freed before the passes below
        curvature = fisher_quadratic_form(x, policy, data, micro_batches, num_tokens, float32_args)
        scale = (2 * max_kl / curvature) ** 0.5 if 0 < curvature < torch.inf else 0.0  # (10)
        predicted_gain = scale * dot(g, x)
        whole = policy, theta, data, micro_batches, advantages, num_tokens, float32_args
        fraction, gain, kl, tried = line_search(
            policy, theta, x.mul_(scale), predicted_gain, lambda i=whole: surrogate_gain_and_kl(*i), max_kl, args
        )
        del theta, g, x, whole  # as large as the policy: freed before the critic's update and the next batch
        if rank == 0 and not fraction:
            why = f"none of {tried} steps passed the line search" if tried else "no usable gradient"
            common.show(f"iteration {iteration}: policy not updated, {why}")
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
            for minibatch in common.shuffled_minibatches(response_mask, args, args.seed, iteration, rank, epoch):
                num_tokens, sums = all_reduce(response_mask[torch.cat(minibatch)].sum()), {}
                for inds in minibatch:
                    new_values = critic(sequences[inds], attention_mask[inds], args)[:, :-1]  # (b, R)
                    v_loss = value_loss(new_values, values[inds], returns[inds], args.value_clip)  # (b, R)
                    (v_loss.where(response_mask[inds], 0.0).sum() / num_tokens).backward()
                    common.add_sums(sums, response_mask[inds], {"loss/value": v_loss})
                common.clip_gradients(critic, args.max_grad_norm)
                critic_optimizer.step()
                critic_optimizer.zero_grad()
                losses.append(common.means_over_ranks(sums, num_tokens)["loss/value"])
        metrics["loss/value"] = sum(losses) / len(losses)

        # ===== [5/5] Log, evaluate, save (shared by all three scripts) =====
        episode, seconds = iteration * args.batch_size, time.time() - iteration_start
        tokens_per_second = metrics["objective/response_length"] * args.batch_size / seconds
        metrics |= {"time/rollout_seconds": rollout_seconds, "time/iteration_seconds": seconds}
        metrics |= {"time/tokens_per_second": tokens_per_second}
        if rank == 0:
            for name, value in metrics.items():
                writer.add_scalar(name, value, episode)
            common.show_progress(iteration, num_iterations, metrics)
        is_last = iteration == num_iterations
        if is_last or (args.eval_every and iteration % args.eval_every == 0):
            carried["after"] = evaluate(episode)
        if args.save_every and (is_last or iteration % args.save_every == 0):
            state = {name: common.gather_state(*parts) for name, parts in trained.items()}
            if rank == 0:
                state |= origin | {"iteration": iteration, "carried": carried}
                common.save_checkpoint(run_dir, iteration, state)
            del state  # as large as all that is trained

    # ===== Finish (shared by all three scripts) =====
    weights = common.gather_state(policy)["weights"] if num_iterations else None
    if rank == 0:
        writer.close()
        if weights:
            common.save_model(args, tokenizer, train_prompts.ids + eval_prompts.ids, weights, f"{run_dir}/model")
        facts = {"episodes": num_iterations * args.batch_size, "seconds": time.time() - start_time, "run_dir": run_dir}
        common.show_summary(run_dir, carried["before"], carried["after"], facts)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with common.one_line_errors():
        main(*common.parse_flags(Args, TINY))
