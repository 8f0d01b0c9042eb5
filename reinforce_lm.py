"""REINFORCE for language models, in one file. Copy it with common.py into your project.

    python reinforce_lm.py                                      # laptop CPU, half a minute: learns to sort digits
    python reinforce_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function             # a pretrained model
    torchrun --nproc-per-node 8 reinforce_lm.py --model DIR ...                                   # on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, less a penalty for leaving pi_ref, a frozen copy of pi (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * min(batch / horizon, 1)) with --kl-ref-target

REINFORCE (Williams 1992) climbs the expected discounted return by sampling its gradient:

    (3)  J(theta)      = E[sum_t gamma^(t-1) r_t]                                          objective
    (4)  grad J(theta) = E[sum_t grad log pi(a_t | s_t) gamma^(t-1) G_t]                   policy-gradient theorem
    (5)  G_t           = sum_{l >= t} gamma^(l-t) r_l                                      reward-to-go
    (6)  A_it          = gamma^(t-1) G_it - b_i                                            advantage in response i
    (7)  g             = 1/B sum_i sum_t grad log pi(a_it | s_it) A_it                     Monte-Carlo estimate of (4)

(4) is Sutton et al. 2000. The advantage says how much better a response turned out than expected: its tokens become
more likely if it is positive, less likely if it is negative. Probabilities sum to 1 whatever theta is, so that
E[grad log pi] = sum_a pi(a) grad pi(a) / pi(a) = grad sum_a pi(a) = 0: a baseline b that does not depend on the action
leaves the expectation unchanged and can lower the variance. For the same reason the dependence of r_t on theta adds
nothing. (7) is a mean over the B responses of a batch and a sum over the tokens of each; divided by the length, which
is random, it would be the gradient of something else. With G_i1 the return of the whole response i, the baselines are:

    (8)   none           b_i = 0
    (9)   mean           b_i = mean of G_j1 over the batch; i itself is in it, so the expectation is (1 - 1/B) grad J
    (10)  ema            b_i = moving average of (9) over the batches before this one
    (11)  leave_one_out  b_i = mean of G_j1 over the other responses j to i's prompt (Kool et al. 2019)
    (12)  greedy         b_i = score of the greedy response to i's prompt (self-critical training, Rennie et al. 2017)

For language models (11) is RLOO (Ahmadian et al. 2024). Departures from the papers: Adam with clipped gradients
replaces plain gradient ascent; advantages may be divided by their standard deviation over the batch, which changes
the norm of g, not its direction; and in bfloat16, where passes that sample round differently from those that train,
--sampler-clip C multiplies A by the importance weight min(pi / pi_sampler, C). Departures from ppo_lm.py and
trpo_lm.py: one gradient step per batch, no critic, and gamma^(t-1) stays in (4), where most code drops it.

Shapes: B responses of a batch, in code those of this rank (b of a micro-batch), P prompt length, R response length,
V vocabulary. common.py begins with a drawing of how masks and logits align.
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
    learning_rate: Positive[float] = 5e-6
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    max_grad_norm: Positive[float] = 1.0
    """maximum gradient norm"""
    baseline: Literal["none", "mean", "ema", "leave_one_out", "greedy"] = "leave_one_out"
    """baseline that is subtracted from the returns"""
    ema_decay: ZeroToOne[float] = 0.9
    """weight of the old value in the moving average of --baseline ema"""
    normalize_advantages: bool = False
    """divide advantages by their standard deviation over the whole batch"""


# The defaults above are for a pretrained model. --model tiny, which has random weights to train, has these instead.
TINY = dict(dtype="float32", total_episodes=102_400, batch_size=256, response_length=6, eval_size=512)
TINY |= dict(micro_batch_tokens=4096, save_every=100, eval_every=100, kl_ref_coef=0.02, learning_rate=2e-3)
# Adapters on a pretrained model take about ten times the rates of full training (Schulman et al. 2025).
ADAPTERS = dict(learning_rate=5e-5)


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


# ===== Equations (algorithm) =====
def discounted_returns(rewards, response_mask, gamma):
    """Discounted reward-to-go as (4) needs it, gamma^(t-1) G_t = sum_{l >= t} gamma^(l-1) r_l: (B, R) -> (B, R)."""
    t = response_mask.cumsum(1).to(rewards.dtype)  # (B, R)
    return (gamma ** (t - 1) * rewards).flip(1).cumsum(1).flip(1)  # (5)


def compute_baseline(kind, returns, samples_per_prompt, ema, greedy_scores):
    """The baseline b of each response.

    Args:
        kind: "none", "mean", "ema", "leave_one_out" or "greedy".
        returns: (B,) returns G_1 of whole responses; those to one prompt are next to each other.
        ema: moving average of earlier batches' mean returns. greedy_scores: (B,), for "greedy".
    Returns:
        (B,)
    """
    if kind == "mean":
        return common.mean(returns).expand_as(returns)  # (9)
    if kind == "ema":
        return torch.full_like(returns, ema)  # (10)
    if kind == "leave_one_out":
        groups = returns.double().view(-1, samples_per_prompt)  # (N, k), in float64, or equal returns would differ
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

    # ===== Optimizer (algorithm) =====
    is_single_sample = args.baseline == "leave_one_out" and args.samples_per_prompt == 1
    common.require(not is_single_sample, "--samples-per-prompt", "at least 2 for --baseline leave_one_out", 1)
    policy = common.prepare(policy, device, args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)  # see [4/5]
    networks, optimizers = {"policy": policy}, {"policy": optimizer}  # what a checkpoint holds
    state = SimpleNamespace(kl_ref_coef=args.kl_ref_coef, ema_baseline=None)  # and what goes to the next iteration

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
        # One step per batch needs no ratio. For the KL the sampler's will do where it is the policy itself.
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

        # ===== [3/5] Returns and baseline (algorithm) =====
        returns = discounted_returns(rewards, response_mask, args.gamma)  # (B, R)
        greedy_scores = None
        if args.baseline == "greedy":
            *_, greedy_texts, greedy_facts = sample(prompt_rows, greedy=True)
            greedy_scores, _ = score_responses(prompt_rows, greedy_texts, greedy_facts)  # (B/k,)
            greedy_scores = greedy_scores.to(device).repeat_interleave(args.samples_per_prompt)  # (B,)
        ema = state.ema_baseline or 0.0
        baseline = compute_baseline(args.baseline, returns[:, 0], args.samples_per_prompt, ema, greedy_scores)  # (B,)
        advantages = (returns - baseline[:, None]).where(response_mask, 0.0)  # (B, R) (6)
        J = common.mean(returns[:, 0]).item()  # (3)
        metrics |= {"objective/J": J, "objective/baseline": common.mean(baseline).item()}
        state.ema_baseline = J if state.ema_baseline is None else args.ema_decay * ema + (1 - args.ema_decay) * J
        if args.normalize_advantages:
            advantages = common.whiten(advantages, response_mask, shift_mean=False)
        advantages = advantages * importance_weights  # (B, R)

        # ===== [4/5] REINFORCE update (algorithm) =====
        learning_rate = args.learning_rate * (1 - (iteration - 1) / num_iterations if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        num_tokens, sums, losses = all_reduce(response_mask.sum()), {}, []
        for indices in micro_batches:
            *inputs, mask = [tensor[indices] for tensor in batch]  # (b, P+R), (b, P+R), (b, R)
            new_logprobs, entropy = policy_logprobs(policy, *inputs, mask, args)  # (b, R), (b, R)
            loss = policy_gradient_loss(new_logprobs, advantages[indices], mask, args.batch_size)
            loss.backward()  # (4): backpropagation turns log pi into grad log pi
            losses.append(loss.detach())
            gap = (new_logprobs - sampler_logprobs[indices]).abs()  # (b, R)
            common.add_sums(sums, mask, {"policy/entropy": entropy, "policy/sampler_gap": gap})
        metrics |= common.means_over_ranks(sums, num_tokens)
        metrics["loss/policy"] = all_reduce(sum(losses)).item()
        metrics["policy/grad_norm"] = common.sum_and_clip_gradients(policy, args.max_grad_norm)
        metrics["policy/learning_rate"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

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
