"""PPO for language models, in one file. Copy it with common.py into your project.

    python ppo_lm.py                                            # laptop CPU, two minutes: learns to sort digits
    python ppo_lm.py --model DIR --dataset FILE.jsonl --reward FILE.py:function                   # a pretrained model
    torchrun --nproc-per-node 8 ppo_lm.py --model DIR ...                                         # on eight GPUs

Generating text is a Markov decision process. The state s_t is the prompt and the tokens so far, the action a_t is the
next token, the policy pi is the language model, and an end token is an action like any other. A response a_1 ... a_T
earns one score, on its last token, less a penalty for leaving pi_ref, a frozen copy of pi (Ziegler et al. 2019):

    (1)  r_t  = score * [t = T] - beta * (log pi(a_t | s_t) - log pi_ref(a_t | s_t))       KL-shaped reward
    (2)  beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * min(batch / horizon, 1)) with --kl-ref-target

PPO (Schulman et al. 2017) samples a batch with the policy pi_old and takes several gradient steps on it. A critic V
predicts the return of a state. The advantage of a token says how much better it turned out than that: tokens with a
positive advantage become more likely. Advantages come from generalized advantage estimation (Schulman et al. 2016):

    (3)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                         TD error
    (4)  A_t     = sum_{l >= t} (gamma lambda)^(l-t) delta_l                               GAE, eq. 16 of that paper
    (5)  R_t     = A_t + V(s_t)                                                            what the critic is fitted to

After an end token V counts as 0. A response cut at the length limit has not ended: with --truncation terminal the
limit counts as an end, which makes it part of the task; with bootstrap V(s_{T+1}) stands in for the tokens that
never came. With ratio_t = pi(a_t | s_t) / pi_old(a_t | s_t), every gradient step raises one of

    (6)  L = E_t[min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps_high) A_t)]               clipped surrogate
    (7)  L = E_t[ratio_t A_t - c (ratio_t - 1 - log ratio_t)]                              penalized surrogate

(eq. 7 and 8 of the paper), to which --ent-coef adds E_t[entropy of pi(. | s_t)]. (6) removes the incentive to move a
ratio beyond its clip range. (7) penalizes KL(pi_old || pi). Tokens are samples from pi_old, under which E[ratio] =
sum_a pi(a) = 1 for any pi, so that E[ratio - 1 - log ratio] = E[log pi_old - log pi]: the penalty has the value
of that KL, and its gradient. After each batch c is adapted to the KL that the update caused (section 4 of the paper):

    (8)  c <- c / 2 if KL < target / 1.5, else 2 c if KL > 1.5 target, else c

The critic minimizes its squared error; with --value-clip, the larger of that and the error of the value clipped to
within eps_V of V_old, the value before the update:

    (9)  L_V = E_t[1/2 max((V - R_t)^2, (clip(V, V_old - eps_V, V_old + eps_V) - R_t)^2)]  clipped value loss

E_t is the mean over all response tokens of a minibatch, on all ranks. The critic is a network of its own: a copy of the
policy's layers with a head of zeros, so that V is 0 at first. On a shared trunk its error, which is large while it has
learned nothing, would move the policy, and the weight between the two losses would be one more thing to tune.

Departures from the paper: clipped gradients, advantages whitened over the batch, --clip-coef-high, clipped values (9),
an optional stop by --target-kl, in (7) a sampled KL in place of the exact one; in bfloat16, where passes that sample
round differently from those that train, --sampler-clip C multiplies A_t by the weight min(pi_old / pi_sampler, C).
Departures from reinforce_lm.py: a critic; several steps per batch, before which log pi_old is computed; and, as most
code does, E_t divides by the number of tokens, where that script divides by the number of responses and keeps the
factor gamma^(t-1), which GAE drops. Departure from trpo_lm.py: a clip or a penalty in place of the constraint.

Shapes: B responses of a batch on this rank (b of a micro-batch), P prompt length, R response length, V vocabulary.
common.py begins with a drawing of how prompts, responses, masks, logits and values align.
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
    """end the steps on a batch early when the KL to the old policy, in nats per token, exceeds this; 0 disables"""
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
TINY = dict(dtype="float32", total_episodes=102_400, batch_size=256, response_length=6, eval_size=512)
TINY |= dict(micro_batch_tokens=4096, save_every=100, eval_every=100, kl_ref_coef=0.02, learning_rate=1e-3)
TINY |= dict(critic_learning_rate=1e-3, update_epochs=2, value_clip=0.2)
# Adapters on a pretrained model take about ten times the rates of full training (Schulman et al. 2025).
ADAPTERS = dict(learning_rate=3e-5, critic_learning_rate=1e-4)


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


def clipped_surrogate(ratio, advantages, clip_coef, clip_coef_high):
    """PPO's clipped surrogate of each token, to be maximized: (b, R) -> (b, R)."""
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef_high) * advantages)  # (6)


def adapt_penalty(penalty_coef, kl, target):
    """The coefficient of the KL penalty for the next batch, given the KL in nats per token that the last one caused."""
    return penalty_coef / 2 if kl < target / 1.5 else penalty_coef * 2 if kl > target * 1.5 else penalty_coef  # (8)


def value_loss(new_values, values, value_targets, value_clip):
    """Squared error of each value, the larger of the plain and the clipped one: (b, R) -> (b, R)."""
    error = (new_values - value_targets) ** 2
    if value_clip:
        clipped = values + (new_values - values).clamp(-value_clip, value_clip)
        error = torch.max(error, (clipped - value_targets) ** 2)
    return 0.5 * error  # (9)


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

    # ===== Critic and optimizers (algorithm) =====
    critic = common.prepare(Critic(policy), device, args)
    policy = common.prepare(policy, device, args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)  # [4/5] resets both rates
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_learning_rate, fused=True)
    # What a checkpoint holds, and what goes from one iteration to the next.
    networks, optimizers = {"policy": policy, "critic": critic}, {"policy": optimizer, "critic": critic_optimizer}
    state = SimpleNamespace(kl_ref_coef=args.kl_ref_coef, penalty_coef=args.penalty_coef)

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
        # log pi_old comes from the loss's own function, on the micro-batches of the first epoch, since in bfloat16 a
        # row's rounding error depends on the rows around it. So the first ratio is 1, exactly on a CPU.
        keys = [(args.seed, iteration, rank, epoch) for epoch in range(args.update_epochs)]
        epochs = [common.shuffled_minibatches(attention_mask, args, *key) for key in keys]
        micro_batches = [indices for minibatch in epochs[0] for indices in minibatch]
        logprobs = batched_logprobs(policy, batch, micro_batches, args)  # (B, R)

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

        # ===== [4/5] PPO update (algorithm) =====
        annealed = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * annealed
        critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * annealed
        clip_coef_high = args.clip_coef_high or args.clip_coef
        steps = []  # metrics of each optimizer step
        for minibatch in [minibatch for epoch in epochs for minibatch in epoch]:  # a list of micro-batches
            # Response tokens of the minibatch on all ranks, whose gradients are summed before the step.
            num_tokens, sums = all_reduce(response_mask[torch.cat(minibatch)].sum()), {}
            for indices in minibatch:
                *inputs, mask = [tensor[indices] for tensor in batch]  # (b, P+R), (b, P+R), (b, R)
                new_values = critic(*inputs, args)[:, :-1]  # (b, R)
                v_loss = value_loss(new_values, values[indices], value_targets[indices], args.value_clip)  # (b, R)
                (v_loss.where(mask, 0.0).sum() / num_tokens).backward()
                new_logprobs, entropy = policy_logprobs(policy, *inputs, mask, args, args.ent_coef > 0)  # (b, R) each
                logratio = (new_logprobs - logprobs[indices]).where(mask, 0.0)  # (b, R)
                ratio = logratio.exp()  # (b, R)
                sampled_kl = ratio - 1 - logratio  # (b, R)
                if args.surrogate == "clip":
                    surrogate = clipped_surrogate(ratio, advantages[indices], args.clip_coef, clip_coef_high)  # (b, R)
                else:
                    surrogate = ratio * advantages[indices] - state.penalty_coef * sampled_kl  # (b, R) (7)
                loss = -(surrogate + args.ent_coef * entropy)  # (b, R)
                (loss.where(mask, 0.0).sum() / num_tokens).backward()
                token_metrics = {"loss/policy": -surrogate, "loss/value": v_loss, "policy/entropy": entropy}
                common.add_sums(sums, mask, token_metrics | {"ratio": ratio, "kl_before_step": sampled_kl})
            step = common.means_over_ranks(sums, num_tokens)
            if args.target_kl and steps and step["kl_before_step"] > args.target_kl:
                optimizer.zero_grad()  # of the step that is not taken
                critic_optimizer.zero_grad()
                break
            step["policy/grad_norm"] = common.sum_and_clip_gradients(policy, args.max_grad_norm)
            common.sum_and_clip_gradients(critic, args.max_grad_norm)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(step)
        averaged = ("loss/policy", "loss/value", "policy/entropy", "policy/grad_norm")
        metrics |= {name: sum(step[name] for step in steps) / len(steps) for name in averaged}
        new_logprobs = batched_logprobs(policy, batch, micro_batches, args)  # (B, R), after the update
        logratio = (new_logprobs - logprobs).where(response_mask, 0.0)  # (B, R)
        ratio = logratio.exp()  # (B, R)
        metrics |= {
            "policy/approx_kl": common.mean(ratio - 1 - logratio, response_mask).item(),
            "policy/ratio_first_minibatch": steps[0]["ratio"],
            "policy/sampler_gap": common.mean((logprobs - sampler_logprobs).abs(), response_mask).item(),
            "policy/update_epochs_done": len(steps) / args.num_minibatches,
            "policy/learning_rate": optimizer.param_groups[0]["lr"],
        }
        if args.surrogate == "clip":
            is_clipped = torch.where(advantages > 0, ratio > 1 + clip_coef_high, ratio < 1 - args.clip_coef)  # (B, R)
            metrics["policy/clipfrac"] = common.mean(is_clipped, response_mask).item()
        else:
            metrics["policy/penalty_coef"] = state.penalty_coef
            state.penalty_coef = adapt_penalty(state.penalty_coef, metrics["policy/approx_kl"], args.penalty_target)

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
