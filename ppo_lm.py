"""PPO for language models, in one file. Copy it with common.py into your project.

    python ppo_lm.py                                            # laptop CPU, two minutes: learns to sort digits
    python ppo_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function                   # a pretrained model
    torchrun --nproc-per-node 8 ppo_lm.py --model DIR ...                                         # on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, less a penalty for leaving a frozen reference policy (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)       only with --kl-target

PPO (Schulman et al. 2017) samples a batch with the policy pi_old and takes several gradient steps on it. A critic V
predicts the return of a state. The advantage of a token says how much better it turned out than that: tokens with a
positive advantage become more likely. Advantages come from generalized advantage estimation (Schulman et al. 2016):

    (3)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                         TD error
    (4)  A_t     = sum_{l >= t} (gamma lambda)^(l-t) delta_l                               GAE, eq. 16 of that paper
    (5)  R_t     = A_t + V(s_t)                                                            what the critic is fitted to

V is 0 after an end token. A response that is cut at the length limit has not ended: with --truncation terminal the
limit counts as an end, which makes it part of the task; with bootstrap V of the state after the last token stands in
for the tokens that never came. With ratio_t = pi(a_t | s_t) / pi_old(a_t | s_t), every gradient step raises one of

    (6)  L = E_t[min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps_high) A_t)]               clipped surrogate
    (7)  L = E_t[ratio_t A_t - c (ratio_t - 1 - log ratio_t)]                              penalized surrogate

(eq. 7 and 8 of the paper), to which --ent-coef adds E_t[entropy of pi(. | s_t)]. (6) removes the incentive to move a
ratio beyond its clip range. (7) penalizes KL(pi_old || pi). Tokens are samples of pi_old, under which E[ratio] =
sum_a pi(a) = 1 whatever theta is, so that E[ratio - 1 - log ratio] = E[log pi_old - log pi]: the penalty has the value
of that KL, and its gradient. After each batch c is adapted to the KL that the update caused (section 4 of the paper):

    (8)  c <- c / 2 if KL < target / 1.5, else 2 c if KL > 1.5 target, else c

The critic minimizes the squared error, with --value-clip also that of values kept near V_old, from before the update:

    (9)  L_V = E_t[1/2 max((V - R_t)^2, (clip(V, V_old - eps_V, V_old + eps_V) - R_t)^2)]  clipped value loss

E_t is the mean over all response tokens of a minibatch, on all ranks. The critic is a network of its own: a copy of the
policy's layers with a head of zeros, so that V is 0 at first. On a shared trunk its error, which is large while it has
learned nothing, would move the policy, and the weight between the two losses would be one more thing to tune.

Departures from the paper: clipped gradients, advantages whitened over the batch, --clip-coef-high, clipped
values (9), an optional stop by --target-kl, and in (7) a sampled KL in place of the exact one. Departures from
reinforce_lm.py: a critic, and several steps per batch, which is why log pi_old has to be remembered; and, as most code
does, E_t divides by the number of tokens, where that script divides by the number of responses. GAE leaves out its
gamma^(t-1), as the papers do. Departure from trpo_lm.py: the trust region is a clip or a penalty, not a constraint.

Shapes: B responses of a batch on this rank (b of a micro-batch), P prompt length, R response length, V vocabulary.
common.py begins with a drawing of how prompts, responses, masks, logits and values are aligned.
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
    learning_rate: Positive[float] = 3e-6
    """learning rate of the policy's Adam"""
    critic_learning_rate: Positive[float] = 1e-5
    """learning rate of the critic's Adam"""
    anneal_lr: bool = True
    """let both learning rates fall linearly to 0"""
    max_grad_norm: Positive[float] = 1.0
    """maximum gradient norm, of policy and critic each"""
    update_epochs: Positive[int] = 1
    """passes over each batch"""
    num_minibatches: Positive[int] = 4
    """minibatches, and so optimizer steps, per pass"""
    surrogate: Literal["clip", "kl_penalty"] = "clip"
    """clipped surrogate (6) or penalized surrogate (7)"""
    clip_coef: UpToOne[float] = 0.2
    """eps, clip range of the ratio"""
    clip_coef_high: NonNegative[float] = 0.0
    """eps_high, clip range above 1 if it is to differ from --clip-coef; 0 for the same"""
    penalty_coef: Positive[float] = 1.0
    """c at the start, weight of the KL to the old policy, for --surrogate kl_penalty"""
    penalty_target: Positive[float] = 0.01
    """target for the KL to the old policy, in nats per token, for --surrogate kl_penalty"""
    target_kl: NonNegative[float] = 0.0
    """stop the epochs early when the KL to the old policy, in nats per token, exceeds this; 0 disables"""
    ent_coef: NonNegative[float] = 0.0
    """weight of the entropy bonus"""
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
TINY |= dict(response_length=6, eval_size=512, save_every=100, eval_every=100, kl_coef=0.02, learning_rate=1e-3)
TINY |= dict(critic_learning_rate=1e-3, update_epochs=2, value_clip=0.2)


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


def clipped_surrogate(ratio, advantages, clip_coef, clip_coef_high):
    """PPO's clipped surrogate of each token, to be maximized: (b, R) -> (b, R)."""
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef_high) * advantages)  # (6)


def adapt_penalty(penalty_coef, kl, target):
    """The coefficient of the KL penalty for the next batch, given the KL in nats per token that the last one caused."""
    return penalty_coef / 2 if kl < target / 1.5 else penalty_coef * 2 if kl > target * 1.5 else penalty_coef  # (8)


def value_loss(new_values, values, returns, value_clip):
    """Squared error of each value, the larger of the plain and the clipped one: (b, R) -> (b, R)."""
    error = (new_values - returns) ** 2
    if value_clip:
        clipped = values + (new_values - values).clamp(-value_clip, value_clip)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error  # (9)


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

    # ===== Critic and optimizers (algorithm) =====
    critic = common.prepare(Critic(policy), device, args)
    policy = common.prepare(policy, device, args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    critic_optimizer = torch.optim.AdamW(
        critic.parameters(), lr=args.critic_learning_rate, weight_decay=0.0, fused=True
    )
    # What a checkpoint holds, and what goes from one iteration to the next.
    trained = {"policy": (policy, optimizer), "critic": (critic, critic_optimizer)}
    carried = {"kl_coef": args.kl_coef, "penalty_coef": args.penalty_coef}

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
        key = args.seed, iteration, rank
        epochs = [common.shuffled_minibatches(response_mask, args, *key, epoch) for epoch in range(args.update_epochs)]
        # log pi_old comes from the loss's own function and the micro-batches of the update's first pass, so that
        # the first ratio is exactly 1, in bfloat16 too, where a row's rounding error depends on the rows around it.
        micro_batches = [inds for minibatch in epochs[0] for inds in minibatch]
        logprobs = common.batched_logprobs(policy, *batch, micro_batches, args)  # (B, R)

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

        # ===== [4/5] PPO update (algorithm) =====
        annealed = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * annealed
        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * annealed
        clip_coef_high = args.clip_coef_high or args.clip_coef
        steps = []  # the metrics of each
        for minibatch in [minibatch for epoch in epochs for minibatch in epoch]:  # one loop, so that `break` ends all
            num_tokens, sums = all_reduce(response_mask[torch.cat(minibatch)].sum()), {}
            for inds in minibatch:
                mask, inputs = response_mask[inds], (sequences[inds], attention_mask[inds])  # (b, R), (b, P+R) each
                new_values = critic(*inputs, args)[:, :-1]  # (b, R)
                v_loss = value_loss(new_values, values[inds], returns[inds], args.value_clip)  # (b, R)
                (v_loss.where(mask, 0.0).sum() / num_tokens).backward()
                new_logprobs, entropy = common.policy_logprobs(policy, *inputs, args)  # (b, R), (b, R)
                entropy = entropy if args.ent_coef else entropy.detach()  # its graph is freed before the backward pass
                logratio = (new_logprobs - logprobs[inds]).where(mask, 0.0)  # (b, R)
                ratio = logratio.exp()  # (b, R)
                sampled_kl = ratio - 1 - logratio  # (b, R)
                if args.surrogate == "clip":
                    surrogate = clipped_surrogate(ratio, advantages[inds], args.clip_coef, clip_coef_high)  # (b, R)
                else:
                    surrogate = ratio * advantages[inds] - carried["penalty_coef"] * sampled_kl  # (b, R) (7)
                loss = -(surrogate + args.ent_coef * entropy)  # (b, R)
                (loss.where(mask, 0.0).sum() / num_tokens).backward()
                metrics_of_tokens = {"loss/policy": -surrogate, "loss/value": v_loss, "policy/entropy": entropy}
                metrics_of_tokens |= {"policy/approx_kl": sampled_kl, "policy/ratio_distance": (ratio - 1).abs()}
                common.add_sums(sums, mask, metrics_of_tokens)
            step = common.means_over_ranks(sums, num_tokens)
            if args.target_kl and steps and step["policy/approx_kl"] > args.target_kl:
                optimizer.zero_grad()
                critic_optimizer.zero_grad()
                break
            step["policy/grad_norm"] = common.clip_gradients(policy, args.max_grad_norm)
            common.clip_gradients(critic, args.max_grad_norm)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(step)
        metrics |= {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        new_logprobs = common.batched_logprobs(policy, *batch, micro_batches, args)  # (B, R), after the update
        logratio = (new_logprobs - logprobs).where(response_mask, 0.0)  # (B, R)
        ratio = logratio.exp()  # (B, R)
        metrics |= {
            "policy/approx_kl": common.mean(ratio - 1 - logratio, response_mask).item(),  # not the mean over steps
            "policy/ratio_first_minibatch": 1 + steps[0]["policy/ratio_distance"],
            "policy/sampler_gap": common.mean((logprobs - sampler_logprobs).abs(), response_mask).item(),
            "policy/update_epochs_done": len(steps) / args.num_minibatches,
            "policy/learning_rate": optimizer.param_groups[0]["lr"],
        }
        if args.surrogate == "clip":
            is_clipped = torch.where(advantages > 0, ratio > 1 + clip_coef_high, ratio < 1 - args.clip_coef)  # (B, R)
            metrics["policy/clipfrac"] = common.mean(is_clipped.float(), response_mask).item()
        else:
            metrics["policy/penalty_coef"] = carried["penalty_coef"]
            carried["penalty_coef"] = adapt_penalty(
                carried["penalty_coef"], metrics["policy/approx_kl"], args.penalty_target
            )

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
