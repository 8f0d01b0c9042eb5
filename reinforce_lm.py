"""REINFORCE for language models, in one file. Copy it with common.py into your project.

    python reinforce_lm.py                                      # laptop CPU, half a minute: learns to sort digits
    python reinforce_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function             # a pretrained model
    torchrun --nproc-per-node 8 reinforce_lm.py --model DIR ...                                   # on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, less a penalty for leaving a frozen reference policy (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)       only with --kl-target

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

For language models (11) is RLOO (Ahmadian et al. 2024). Departures from the papers: Adam with clipped gradients takes
the place of plain gradient ascent, and advantages may be divided by their standard deviation over the batch, which
changes the norm of g but not its direction. Departures from ppo_lm.py and trpo_lm.py: one gradient step per batch, no
critic, and gamma^(t-1) stays in (4), where most code drops it.

Shapes: B responses of a batch, in the code those of this rank (b of a micro-batch), P prompt length, R response length,
V vocabulary. common.py begins with a drawing of how prompts, responses, masks and logits are aligned.
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
TINY = dict(dtype="float32", total_episodes=102_400, batch_size=256, micro_batch_size=256, rollout_batch_size=512)
TINY |= dict(response_length=6, eval_size=512, save_every=100, eval_every=100, kl_coef=0.02, learning_rate=2e-3)


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
def discounted_returns(rewards, gamma):
    """Discounted reward-to-go as (4) needs it, gamma^(t-1) G_t = sum_{l >= t} gamma^(l-1) r_l: (B, R) -> (B, R)."""
    discounts = gamma ** torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)  # (R,)
    return (discounts * rewards).flip(1).cumsum(1).flip(1)  # (5)


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

    # ===== Optimizer (algorithm) =====
    is_single_sample = args.baseline == "leave_one_out" and args.samples_per_prompt == 1
    common.require(not is_single_sample, "--samples-per-prompt", "at least 2 for --baseline leave_one_out", 1)
    policy = common.prepare(policy, device, args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    trained = {"policy": (policy, optimizer)}  # what a checkpoint holds
    carried = {"kl_coef": args.kl_coef, "ema_baseline": None}  # and what goes from one iteration to the next

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
        # One step per batch needs no ratio. For the KL the sampler's will do where it is the policy itself.
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

        # ===== [3/5] Returns and baseline (algorithm) =====
        returns = discounted_returns(rewards, args.gamma)  # (B, R)
        greedy_scores = None
        if args.baseline == "greedy":
            *_, texts, facts = sample(prompts, greedy=True)
            greedy_scores, _ = common.score_responses(reward_fn, args, prompts.rows, texts, facts)  # (B/k,)
            greedy_scores = greedy_scores.to(device).repeat_interleave(args.samples_per_prompt)  # (B,)
        ema = carried["ema_baseline"]
        baseline = compute_baseline(  # (B,)
            args.baseline, returns[:, 0], args.samples_per_prompt, ema or 0.0, greedy_scores
        )
        advantages = (returns - baseline[:, None]).where(response_mask, 0.0)  # (B, R) (6)
        metrics["objective/J"] = J = common.mean(returns[:, 0]).item()  # (3)
        metrics["objective/baseline"] = common.mean(baseline).item()
        carried["ema_baseline"] = J if ema is None else args.ema_decay * ema + (1 - args.ema_decay) * J
        if args.normalize_advantages:
            advantages = common.whiten(advantages, response_mask, shift_mean=False)

        # ===== [4/5] REINFORCE update (algorithm) =====
        learning_rate = args.learning_rate * (1 - (iteration - 1) / num_iterations if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        num_tokens, sums, losses = all_reduce(response_mask.sum()), {}, []
        for inds in micro_batches:
            mask = response_mask[inds]  # (b, R)
            inputs = sequences[inds], attention_mask[inds]  # (b, P+R), (b, P+R)
            new_logprobs, entropy = common.policy_logprobs(policy, *inputs, args)  # (b, R), (b, R)
            entropy = entropy.detach()  # logged only: its graph is freed before the backward pass
            loss = policy_gradient_loss(new_logprobs, advantages[inds], mask, args.batch_size)
            loss.backward()  # (4): backpropagation turns log pi into grad log pi
            losses.append(loss.detach())
            gap = (new_logprobs - sampler_logprobs[inds]).abs()  # (b, R)
            common.add_sums(sums, mask, {"policy/entropy": entropy, "policy/sampler_gap": gap})
        metrics |= common.means_over_ranks(sums, num_tokens)
        metrics["loss/policy"] = all_reduce(sum(losses)).item()
        metrics["policy/grad_norm"] = common.clip_gradients(policy, args.max_grad_norm)
        metrics["policy/learning_rate"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

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
