"""REINFORCE for language models, in one file. Copy it with common.py into your project.

    python reinforce_lm.py                                      # laptop CPU, a minute: learns to sort digits
    python reinforce_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function --response-length 256 \\
        --learning-rate 1e-6 --dtype bfloat16 --micro-batch-size 16                      # a pretrained model on a GPU
    torchrun --nproc-per-node 8 reinforce_lm.py --model DIR ...                                   # and on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, and pays for leaving a frozen reference policy (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)       only with --kl-target

REINFORCE (Williams 1992) climbs the expected discounted return by sampling its gradient:

    (3)  J(theta)      = E[sum_t gamma^(t-1) r_t]                                          objective
    (4)  grad J(theta) = E[sum_t grad log pi(a_t | s_t) gamma^(t-1) G_t]                   policy-gradient theorem
    (5)  G_t           = sum_{l >= t} gamma^(l-t) r_l                                      reward-to-go
    (6)  A_it          = gamma^(t-1) G_it - b_i                                            advantage in response i
    (7)  g             = 1/B sum_i sum_t grad log pi(a_it | s_it) A_it                     Monte-Carlo estimate of (4)

(4) is Sutton et al. 2000. That r_t itself depends on theta adds nothing: E[grad log pi] is 0. (7) is a mean over the B
responses of a batch and a sum over the tokens of each; divided by the length, which is random, it would be the gradient
of something else. The baseline b_i lowers the variance, and leaves the expectation alone as long as it does not depend
on response i. With G_i1 the return of the whole response i:

    (8)   none           b_i = 0
    (9)   mean           b_i = mean of G_j1 over the batch; i itself is in it, so the expectation is (1 - 1/B) grad J
    (10)  ema            b_i = moving average of (9) over the batches before this one
    (11)  leave_one_out  b_i = mean of G_j1 over the other responses j to i's prompt (Kool et al. 2019)
    (12)  greedy         b_i = score of the greedy response to i's prompt (self-critical training, Rennie et al. 2017)

For language models (11) is RLOO (Ahmadian et al. 2024). Departures from the papers: AdamW with clipped gradients takes
the place of plain gradient ascent, and advantages may be divided by their deviation over the batch, which changes the
length of g and not its direction. Departures from ppo_lm.py and trpo_lm.py: one gradient step per batch, no critic, and
gamma^(t-1) stays in (4), where most code drops it.

Shapes: B responses of a batch, in the code those of this rank (b of a micro-batch), P prompt length, R response length,
V vocabulary.
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
    learning_rate: float = 2e-3
    """learning rate of AdamW"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    max_grad_norm: float = 1.0
    """length that gradients are clipped to"""
    baseline: Literal["none", "mean", "ema", "leave_one_out", "greedy"] = "leave_one_out"
    """baseline that is subtracted from the returns"""
    ema_decay: float = 0.9
    """share of the old value in the moving average of --baseline ema"""
    normalize_advantages: bool = False
    """divide advantages by their standard deviation over the whole batch"""


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
    """Raise `InputError` for the first of REINFORCE's own flags with a value that makes no sense.

    per_rank: responses per batch and rank.
    """
    for name in ("learning_rate", "max_grad_norm"):
        require(getattr(args, name) > 0, flag(name), "a positive number", getattr(args, name))
    require(0 <= args.ema_decay < 1, "--ema-decay", "at least 0 and less than 1", args.ema_decay)
    if args.baseline == "leave_one_out":
        expected = "at least 2 for --baseline leave_one_out"
        require(args.samples_per_prompt > 1, "--samples-per-prompt", expected, args.samples_per_prompt)


def discounted_returns(rewards, gamma):
    """Discounted reward-to-go as (4) needs it, gamma^(t-1) G_t = sum_{l >= t} gamma^(l-1) r_l: (B, R) -> (B, R)."""
    discounts = gamma ** torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)  # (R,)
    return (discounts * rewards).flip(1).cumsum(1).flip(1)  # (5)


def compute_baseline(kind, returns, samples_per_prompt, ema, greedy_scores):
    """The baseline b of each response.

    Args:
        kind: "none", "mean", "ema", "leave_one_out" or "greedy".
        returns: (B,) returns G_1 of whole responses; those of one prompt stand next to each other.
        ema: moving average of earlier batches' mean returns. greedy_scores: (B,), for "greedy".
    Returns:
        (B,)
    """
    if kind == "mean":
        return mean(returns).expand_as(returns)  # (9)
    if kind == "ema":
        return torch.full_like(returns, ema)  # (10)
    if kind == "leave_one_out":
        groups = returns.double().view(-1, samples_per_prompt)  # (N, k), in which equal returns leave no remainder
        others = (groups.sum(1, keepdim=True) - groups) / (samples_per_prompt - 1)  # (N, k)
        return others.view(-1).to(returns.dtype)  # (11)
    if kind == "greedy":
        return greedy_scores  # (12)
    return torch.zeros_like(returns)  # (8)


def policy_gradient_loss(new_logprobs, advantages, response_mask, num_responses):
    """The scalar whose gradient is -g: a sum over tokens, divided by the number of responses on all ranks.

    Args:
        new_logprobs, advantages, response_mask: (b, R).
    """
    return -(advantages * new_logprobs).where(response_mask, 0.0).sum() / num_responses  # (7)


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

    # ===== Optimizer (algorithm) =====
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=device.type == "cuda"
    )
    # What a checkpoint holds: these and a few numbers.
    trained = {"policy": policy, "optimizer": optimizer}
    # One step per batch needs no ratio, and for the KL the sampler's log-probabilities will do, if it is the policy.
    needs_logprobs = reference is not None and sampler is not policy
    numbers = {"kl_coef": args.kl_coef, "ema_baseline": 0.0}

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

        # ===== [3/5] Returns and baseline (algorithm) =====
        returns = discounted_returns(rewards, args.gamma)  # (B, R)
        greedy_scores = None
        if args.baseline == "greedy":
            greedy_responses, greedy_mask, _ = sample(prompts, prompt_mask, greedy=True)  # (B/k, R)
            greedy_scores = score_responses(batch, common.decode(tokenizer, greedy_responses, greedy_mask), iteration)
            greedy_scores = greedy_scores.to(device).repeat_interleave(args.samples_per_prompt)  # (B,)
        baseline = compute_baseline(  # (B,)
            args.baseline, returns[:, 0], args.samples_per_prompt, numbers["ema_baseline"], greedy_scores
        )
        advantages = (returns - baseline[:, None]).where(response_mask, 0.0)  # (B, R) (6)
        metrics["objective/J"] = mean(returns[:, 0]).item()  # (3)
        metrics["objective/baseline"] = mean(baseline).item()
        decay = args.ema_decay if iteration > 1 else 0.0
        numbers["ema_baseline"] = decay * numbers["ema_baseline"] + (1 - decay) * metrics["objective/J"]
        if args.normalize_advantages:
            advantages = whiten(advantages, response_mask, shift_mean=False)

        # ===== [4/5] REINFORCE update (algorithm) =====
        learning_rate = args.learning_rate * (1 - (iteration - 1) / num_iterations if args.anneal_lr else 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        losses, entropies, new_logprobs = [], [], []
        for micro in torch.arange(local_batch_size, device=device).split(micro_batch_size):
            micro_logprobs, entropy = policy_logprobs(policy, sequences[micro], attention_mask[micro], args)  # (b, R)
            loss = policy_gradient_loss(micro_logprobs, advantages[micro], response_mask[micro], args.batch_size)
            loss.backward()  # (4): backpropagation turns log pi into grad log pi
            losses.append(loss.detach())
            entropies.append(entropy.detach())
            new_logprobs.append(micro_logprobs.detach())
        grad_norm = sum_and_clip_gradients(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {
            "loss/policy": all_reduce(torch.stack(losses).sum()).item(),
            "policy/entropy": masked_mean(torch.cat(entropies), response_mask).item(),
            "policy/sampler_gap": masked_mean((torch.cat(new_logprobs) - sampler_logprobs).abs(), response_mask).item(),
            "policy/grad_norm": grad_norm.item(),
            "policy/learning_rate": learning_rate,
        }

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
