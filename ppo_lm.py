"""PPO for language models, in one file. Copy it with common.py into your project.

    python ppo_lm.py                                            # laptop CPU, two minutes: learns to sort digits
    python ppo_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function --response-length 256 \\
        --learning-rate 1e-6 --critic-learning-rate 1e-5 --dtype bfloat16 --micro-batch-size 16       # a GPU
    torchrun --nproc-per-node 8 ppo_lm.py --model DIR ...                                         # and on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, and pays for leaving a frozen reference policy (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)       only with --kl-target

PPO (Schulman et al. 2017) samples a batch with the policy pi_old and takes several gradient steps on it. A critic V
judges the states, and generalised advantage estimation (Schulman et al. 2016) compares each token with that judgement:

    (3)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                         TD error
    (4)  A_t     = sum_{l >= t} (gamma lambda)^(l-t) delta_l                               GAE, eq. 16 of that paper
    (5)  R_t     = A_t + V(s_t)                                                            what the critic is fitted to

V is 0 behind an end token. A response that is cut at the length limit has not ended: with --truncation terminal the
limit counts as an end, which makes it part of the task; with bootstrap V of the state behind the last token stands in
for the tokens that never came. With ratio_t = pi(a_t | s_t) / pi_old(a_t | s_t), every gradient step raises one of

    (6)  L = E_t[min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps_high) A_t)]               clipped surrogate, eq. 7
    (7)  L = E_t[ratio_t A_t - c KL(pi_old(. | s_t) || pi(. | s_t))]                       penalised surrogate, eq. 8

to which --ent-coef adds E_t[entropy of pi(. | s_t)], eq. 9. (6) ends the gain where a ratio leaves the range around 1.
(7) prices the exact divergence, over the whole vocabulary, with a coefficient that follows what the update before has
caused (section 4 of the paper):

    (8)  c <- c / 2 if KL < target / 1.5, else 2 c if KL > 1.5 target, else c

while the critic lowers the squared error, and is kept near the values V_old from before the update:

    (9)  L_V = E_t[1/2 max((V - R_t)^2, (clip(V, V_old - eps_V, V_old + eps_V) - R_t)^2)]  clipped value loss

E_t is the mean over all response tokens of a minibatch, on all ranks. The critic is a network of its own: a copy of the
policy's layers with a head of zeros, so that V is 0 at first. On a shared trunk its error, which is large
while it knows nothing, would move the policy, and the weight between the two losses would be one more thing to tune.

Departures from the paper: AdamW with clipped gradients, advantages whitened over the batch, --clip-coef-high, clipped
values (9), and an optional stop by --target-kl; all but AdamW are flags. Departures from reinforce_lm.py: a critic, and
several steps per batch, which is why log pi_old has to be remembered; and, as most code does, E_t divides by the number
of tokens, where (7) there divides by the number of responses. GAE leaves out the gamma^(t-1) of that script, as the
papers do. Departure from trpo_lm.py: the trust region is a clip or a penalty, not a constraint.

Shapes: B responses of a batch on this rank (b of a micro-batch), P prompt length, R response length, V vocabulary.
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
    learning_rate: float = 1e-3
    """learning rate of the policy's AdamW"""
    critic_learning_rate: float = 1e-3
    """learning rate of the critic's AdamW"""
    anneal_lr: bool = True
    """let both learning rates fall linearly to 0"""
    max_grad_norm: float = 1.0
    """length that gradients are clipped to, the policy's and the critic's each"""
    update_epochs: int = 2
    """passes over each batch"""
    num_minibatches: int = 4
    """minibatches, and so optimizer steps, per pass"""
    surrogate: Literal["clip", "kl_penalty"] = "clip"
    """clipped surrogate (6) or penalised surrogate (7)"""
    clip_coef: float = 0.2
    """eps, how far a ratio is rewarded for leaving 1"""
    clip_coef_high: float = 0.0
    """eps_high, how far above 1 a ratio is rewarded, if it is to differ from --clip-coef; 0 for the same"""
    penalty_coef: float = 1.0
    """c, the price of one nat per token of divergence from the old policy at the start, for --surrogate kl_penalty"""
    penalty_target: float = 0.01
    """nats per token that c is adapted to"""
    target_kl: float = 0.0
    """stop before a minibatch with more nats per token from the old policy (not --kl-target); 0 never stops"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    gae_lambda: float = 0.95
    """lambda of GAE: 0 trusts the critic, 1 the sampled return"""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """what follows a response that was cut at the length limit: nothing, or what the critic expects"""
    whiten_advantages: bool = True
    """shift and scale advantages to mean 0 and deviation 1 over the whole batch"""
    value_clip: float = 0.2
    """eps_V, how far an update is rewarded for moving a value to its return, in units of the reward; 0 for no limit"""
    critic_warmup_iterations: int = 0
    """iterations at the start that train the critic alone"""


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
    """Raise `InputError` for the first of PPO's own flags with a value that makes no sense.

    per_rank: responses per batch and rank.
    """
    for name in ("learning_rate", "critic_learning_rate", "max_grad_norm", "update_epochs", "num_minibatches"):
        require(getattr(args, name) > 0, flag(name), "a positive number", getattr(args, name))
    for name in ("penalty_coef", "penalty_target"):
        require(getattr(args, name) > 0, flag(name), "a positive number", getattr(args, name))
    for name in ("clip_coef_high", "target_kl", "ent_coef", "value_clip", "critic_warmup_iterations"):
        require(getattr(args, name) >= 0, flag(name), "0 or more", getattr(args, name))
    require(0 < args.clip_coef < 1, "--clip-coef", "more than 0 and less than 1", args.clip_coef)
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


def clipped_surrogate(ratio, advantages, clip_coef, clip_coef_high):
    """PPO's clipped surrogate of each token, to be maximised: (b, R) -> (b, R)."""
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef_high) * advantages)  # (6)


def exact_kl(old_logits, new_logits):
    """KL(old || new) of each token over the whole vocabulary: (b, R, V), (b, R, V) -> (b, R)."""
    old, new = common.full_precision(old_logits).log_softmax(-1), common.full_precision(new_logits).log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


@torch.no_grad()
def batched_kl(old_policy, policy, sequences, attention_mask, micro_batch_size, args):
    """`exact_kl` of a whole batch, without gradient, by micro-batches: -> (B, R)."""
    batches = zip(sequences.split(micro_batch_size), attention_mask.split(micro_batch_size))
    return torch.cat(
        [exact_kl(response_logits(old_policy, *b, args), response_logits(policy, *b, args)) for b in batches]
    )


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

    # ===== Critic and optimizers (algorithm) =====
    critic = Critic(policy).to(device)
    old_policy = copy.deepcopy(policy).requires_grad_(False) if args.surrogate == "kl_penalty" else None
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=fused)
    critic_optimizer = torch.optim.AdamW(
        critic.parameters(), lr=args.critic_learning_rate, weight_decay=0.0, fused=fused
    )
    # What a checkpoint holds: these and a few numbers.
    trained = {"policy": policy, "optimizer": optimizer, "critic": critic, "critic_optimizer": critic_optimizer}
    needs_logprobs = True  # for the ratio
    numbers = {"kl_coef": args.kl_coef, "penalty_coef": args.penalty_coef}

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

        # ===== [4/5] PPO update (algorithm) =====
        annealed = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = args.learning_rate * annealed
        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * annealed
        updates_policy = iteration > args.critic_warmup_iterations
        if old_policy is not None:
            common.copy_weights(policy, old_policy)
        clip_coef_high = args.clip_coef_high or args.clip_coef
        history, minibatches = [], []
        for epoch in range(args.update_epochs):
            generator = make_generator("cpu", args.seed, iteration, rank, epoch)
            order = torch.randperm(local_batch_size, generator=generator).to(device)
            minibatches.extend(order.tensor_split(args.num_minibatches))
        for minibatch in minibatches:
            num_tokens = all_reduce(response_mask[minibatch].sum())
            sums = torch.zeros(5, device=device)
            for micro in minibatch.split(micro_batch_size):
                mask = response_mask[micro]  # (b, R)
                new_values = critic(sequences[micro], attention_mask[micro], args)[:, :-1]  # (b, R)
                v_loss = value_loss(new_values, values[micro], returns[micro], args.value_clip)  # (b, R)
                (v_loss.where(mask, 0.0).sum() / num_tokens).backward()
                logits = response_logits(policy, sequences[micro], attention_mask[micro], args)  # (b, R, V)
                new_logprobs, entropy = common.token_statistics(logits, responses[micro])  # (b, R), (b, R)
                logratio = (new_logprobs - logprobs[micro]).where(mask, 0.0)  # (b, R)
                ratio = logratio.exp()  # (b, R)
                if args.surrogate == "clip":
                    surrogate = clipped_surrogate(ratio, advantages[micro], args.clip_coef, clip_coef_high)  # (b, R)
                else:
                    with torch.no_grad():
                        old_logits = response_logits(old_policy, sequences[micro], attention_mask[micro], args)
                    kl = exact_kl(old_logits, logits)  # (b, R)
                    surrogate = ratio * advantages[micro] - numbers["penalty_coef"] * kl  # (b, R) (7)
                loss = -(surrogate + args.ent_coef * entropy).where(mask, 0.0).sum() / num_tokens
                if updates_policy:
                    loss.backward()
                per_token = [-surrogate, v_loss, entropy, ratio - 1 - logratio, (ratio - 1).abs()]
                sums += torch.stack([x.detach().where(mask, 0.0).sum() for x in per_token])
                del logits  # (b, R, V), before the next micro-batch makes its own
            means = all_reduce(sums) / num_tokens
            approx_kl = means[3]
            if history and args.target_kl and approx_kl > args.target_kl:
                optimizer.zero_grad()
                critic_optimizer.zero_grad()
                break
            sum_and_clip_gradients(critic, args.max_grad_norm)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            grad_norm = torch.zeros((), device=device)
            if updates_policy:
                grad_norm = sum_and_clip_gradients(policy, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            history.append(torch.cat([means, grad_norm[None]]))
        policy_loss, critic_loss, mean_entropy, _, _, mean_grad_norm = torch.stack(history).mean(0).tolist()
        ratio_distance = history[0][4].item()  # in the first minibatch
        logratio = (score_sequences(policy) - logprobs).where(response_mask, 0.0)  # (B, R), after the update
        ratio = logratio.exp()  # (B, R)
        metrics |= {
            "loss/policy": policy_loss,
            "loss/value": critic_loss,
            "policy/entropy": mean_entropy,
            "policy/grad_norm": mean_grad_norm,
            "policy/ratio_first_minibatch": 1 + ratio_distance,
            "policy/approx_kl": masked_mean(ratio - 1 - logratio, response_mask).item(),
            "policy/sampler_gap": masked_mean((logprobs - sampler_logprobs).abs(), response_mask).item(),
            "policy/update_epochs_done": len(history) / args.num_minibatches,
            "policy/learning_rate": optimizer.param_groups[0]["lr"],
        }
        if args.surrogate == "clip":
            is_clipped = torch.where(advantages > 0, ratio > 1 + clip_coef_high, ratio < 1 - args.clip_coef)  # (B, R)
            metrics["policy/clipfrac"] = masked_mean(is_clipped.float(), response_mask).item()
        else:
            kl = batched_kl(old_policy, policy, sequences, attention_mask, micro_batch_size, args)  # (B, R)
            metrics["policy/kl"] = masked_mean(kl, response_mask).item()
            metrics["policy/penalty_coef"] = numbers["penalty_coef"]
            if updates_policy:
                numbers["penalty_coef"] = adapt_penalty(
                    numbers["penalty_coef"], metrics["policy/kl"], args.penalty_target
                )

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
