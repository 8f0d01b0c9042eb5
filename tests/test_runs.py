"""Whole runs, as a user starts them: the copy contract, learning, resuming, and what a run leaves behind."""

import copy
import importlib
import json
import os
import runpy
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import common
import reinforce_lm
import trpo_lm

import pytest
import torch
from helpers import (
    ROOT,
    SCRIPTS,
    character_tokenizer,
    error_line,
    finish,
    fork,
    load_policy,
    recorded_gradients,
    reward_file,
    run_in,
    run_main,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

SHORT = ["--batch-size", 32, "--eval-size", 4, "--device", "cpu"]
FEW = ["--total-episodes", 64, *SHORT]
FAST = {"reinforce_lm": [], "ppo_lm": ["--update-epochs", 1], "trpo_lm": ["--update-epochs", 1, "--cg-iters", 2]}


def final_line(output):
    """The line that a run ends with, as a dictionary of strings."""
    (line,) = [line for line in output.splitlines() if line.startswith("final ")]
    return dict(pair.split("=", 1) for pair in line.split()[1:])


def scalars(run_dir):
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def texts(run_dir, tag="samples"):
    """The lines of each text of TensorBoard: of the samples of each evaluation, or of the flags."""
    events = EventAccumulator(str(run_dir)).Reload()
    return [event.tensor_proto.string_val[0].decode().splitlines() for event in events.Tensors(f"{tag}/text_summary")]


def samples(run_dir):
    return [json.loads(line) for line in Path(run_dir, "samples.jsonl").read_text().splitlines()]


def summary(run_dir):
    return json.loads(Path(run_dir, "summary.json").read_text())


def assert_same(expected, found):
    """Bit for bit, through nested dictionaries and lists."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found)
    elif isinstance(expected, (dict, list, tuple)):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        assert len(expected) == len(found)
        for key in keys:
            assert_same(expected[key], found[key])
    else:
        assert expected == found


def assert_same_checkpoints(*run_dirs):
    """Of two runs, but for what tells apart one that was stopped: its flags, and its seconds."""
    expected, found = [common.load_checkpoint(run_dir) for run_dir in run_dirs]
    for checkpoint in (expected, found):
        del checkpoint["args"], checkpoint["state"]["seconds"]
    assert_same(expected, found)


def error_of(capsys, script, *flags):
    """The one line with which a run ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(script, *flags)
    assert stop.value.code == 1
    return error_line(capsys)


def run_alone(script, flags):
    """Run a script as the main program in the current folder, with the modules of that folder."""
    del sys.modules["common"]
    sys.path[:] = [os.getcwd(), *(path for path in sys.path if not path.startswith(str(ROOT)))]
    importlib.import_module("common").NUM_SORT_PROMPTS = 2**9  # which are quicker to make
    assert sys.modules["common"].__file__.startswith(os.getcwd())
    sys.argv = [f"{script}.py", *map(str, flags)]
    runpy.run_path(f"{script}.py", run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_and_common_run_alone_in_an_empty_folder(script, tmp_path, monkeypatch):
    for name in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--total-episodes", 96, "--batch-size", 32, "--eval-every", 2, "--eval-size", 16, *FAST[script]]
    finish([fork(run_alone, script, flags, output="output")], ["output"])
    output = Path("output").read_text()
    final = final_line(output)
    names = ["eval_score_before", "eval_exact_before", "eval_score", "eval_exact"]
    assert list(final) == [*names, "episodes", "seconds", "run_dir"] and final["episodes"] == "96"
    run_dir = tmp_path / final["run_dir"]
    numbers = summary(run_dir)
    for key, value in final.items():
        assert value == (f"{numbers[key]:.3f}" if isinstance(numbers[key], float) else str(numbers[key]))
    assert run_dir.parent.name == "runs" and run_dir.name.startswith(f"{script}__tiny__sort__1__")
    logged = scalars(run_dir)
    assert [step for step, _ in logged["eval/score"]] == [0, 64, 96]
    assert [step for step, _ in logged["objective/score"]] == [32, 64, 96]
    assert logged["eval/score"][0][1] == pytest.approx(numbers["eval_score_before"])
    assert logged["eval/score"][-1][1] == pytest.approx(numbers["eval_score"])
    assert " -> " in output and output.count("evaluation after ") == 3
    progress = output.replace("\r", "\n").splitlines()
    (last,) = {line.split("[")[0] for line in progress if line.startswith(f"{script}: 100%")}
    assert "3/3" in last and all(f"{name}=" in output for name in ("score", "kl_ref", "tokens_per_second"))
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    trained = common.load_checkpoint(run_dir)["weights"]["policy"]
    assert_same(trained, dict(model.named_parameters()))
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert tokenizer.decode(tokenizer("31415").input_ids) == "31415"
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {f"{script}.py", "common.py", "runs", "output"}


# ----- Flags -----


def parsed(script, *flags):
    return common.parse_flags(script.Args, script.TINY, script.ADAPTERS, [str(flag) for flag in flags])[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_depend_on_the_model_and_the_adapters_and_a_flag_that_is_given_counts(script):
    script = importlib.import_module(script)
    rates = {name: value for name, value in asdict(script.Args()).items() if name.endswith("learning_rate")}
    assert {name: pytest.approx(10 * value) for name, value in rates.items()} == script.ADAPTERS
    assert parsed(script) == script.Args(**script.TINY)
    assert parsed(script, "--lora-rank", 8) == script.Args(**script.TINY, lora_rank=8)
    assert parsed(script, "--model", "x") == script.Args(model="x")
    adapted = ["--model", "x", "--lora-rank", 8]
    assert parsed(script, *adapted, "--seed", 4) == script.Args(model="x", lora_rank=8, seed=4, **script.ADAPTERS)
    for name, value in rates.items():  # also where it is the default of another case
        given = parsed(script, *adapted, f"--{name.replace('_', '-')}", value)
        assert given == script.Args(**{"model": "x", "lora_rank": 8, **script.ADAPTERS, name: value})


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_has_its_own_flags_and_those_that_are_given(script, tmp_path):
    script = importlib.import_module(script)
    flags = ["--model", "x", "--lora-rank", 2, "--seed", 4, "--no-anneal-lr"]
    own = parsed(script, *flags, "--critic-learning-rate" if script is trpo_lm else "--learning-rate", 0.01)
    torch.save({"args": asdict(own)}, tmp_path / "checkpoint_00000001.pt")
    own = replace(own, resume=str(tmp_path))
    assert parsed(script, "--resume", tmp_path) == parsed(script, "--resume", tmp_path, *flags) == own
    assert parsed(script, "--resume", tmp_path, "--model", "tiny", "--seed", 1) == replace(own, model="tiny", seed=1)


def test_the_first_line_says_what_is_trained_in_which_precision_on_a_cpu_float32(tmp_path, capsys):
    run_dir = run_in(tmp_path, reinforce_lm, *FEW, "--dtype", "auto")
    first, *_ = capsys.readouterr().out.splitlines()
    size = sum(weight.numel() for weight in load_file(run_dir / "model" / "model.safetensors").values())
    assert first.startswith(f"reinforce_lm: {size:,} of {size:,} parameters trained, float32 on 1 x cpu, 508 training")
    assert first.endswith(f" and 4 held-out prompts, 2 x 32 responses, run directory {run_dir}")
    gap = [value for _, value in scalars(run_dir)["policy/sampler_gap"]]
    assert max(gap) < 1e-6, "in bfloat16 it is a thousand times as large"


# ----- What is logged -----


def test_flags_and_samples_are_in_tensorboard(tmp_path):
    run_dir = run_in(tmp_path, reinforce_lm, *FEW, "--eval-size", 16)
    evaluations = texts(run_dir)
    assert len(evaluations) == 2 and all(len(lines) == 8 for lines in evaluations)
    lines = [line for line in samples(run_dir) if line["split"] == "eval"]
    expected = [f"    {line['score']:.3f}  {line['prompt']!r} -> {line['response']!r}" for line in lines]
    assert evaluations == [expected[:8], expected[16:24]], "as code, whatever is in them"
    (flags,) = texts(run_dir, "args")
    kept = common.load_checkpoint(run_dir)["args"]
    assert flags == [f"    {name} = {value!r}" for name, value in kept.items()] and "    batch_size = 32" in flags


REWARD = """
calls = []

def fn(prompts, responses, ended, num_tokens, **columns):
    calls.append((responses, ended, num_tokens))
    return [float(p) + len(r) for p, r in zip(prompts, responses)], {"read": [int("1" + r) for r in responses]}
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_samples_and_facts_are_those_of_their_prompt_and_response(script, tmp_path):
    reward = reward_file(tmp_path, REWARD)
    flags = [*FEW, *FAST[script], *(["--baseline", "greedy"] if script == "reinforce_lm" else [])]
    run_dir = run_in(tmp_path / "runs", script, *flags, "--reward", reward)
    lines = samples(run_dir)
    where = [(line["split"], line["episode"]) for line in lines]
    assert where == [("eval", 0)] * 4 + [("train", 32)] * 4 + [("train", 64)] * 4 + [("eval", 64)] * 4
    for line in lines:
        assert line["score"] == float(line["prompt"]) + len(line["response"])
        assert line["read"] == int("1" + line["response"])
    prompts = [line["prompt"] for line in lines]
    assert len(set(prompts[:4])) == 4 and prompts[:4] == prompts[12:]
    assert len(set(prompts[4:8])) == len(set(prompts[8:12])) == 1 and len(set(prompts)) == 6
    calls = sys.modules[Path(reward.split(":")[0]).stem].calls
    batches = [32, 8, 32, 8] if script == "reinforce_lm" else [32, 32]
    assert [len(responses) for responses, _, _ in calls] == [1, 4, *batches, 4]
    for responses, ended, num_tokens in calls:
        assert len(ended) == len(responses)
        assert num_tokens == [len(text) + end for text, end in zip(responses, ended, strict=True)]
    assert {end for _, ended, _ in calls[2:3] for end in ended} == {True, False}


def test_parts_of_a_reward_are_logged(tmp_path):
    code = "def fn(prompts, responses, num_tokens, **columns):\n"
    code += "    return [0.0] * len(responses), {'n': num_tokens}\n"
    logged = scalars(run_in(tmp_path / "runs", reinforce_lm, *FEW, "--reward", reward_file(tmp_path, code)))
    assert logged["reward/n"] == logged["objective/response_length"] and len(logged["eval/n"]) == 2


def test_logged_numbers_are_those_of_the_batch(tmp_path, monkeypatch):
    """Score, KL, length and the share that ended, recomputed from what the rollout and the reward returned."""
    seen = {}
    rollout, score, shaped = common.rollout, common.score_responses, reinforce_lm.shaped_rewards

    def recording_rollout(*args):
        result = rollout(*args)
        *_, samples_per_prompt, _, greedy = args
        if samples_per_prompt > 1:
            assert not greedy
            seen["responses"], _, _ = result
        return result

    def recording_score(*args):
        scores, parts = score(*args)
        seen["scores"] = scores if len(scores) == 32 else seen.get("scores")
        return scores, parts

    def recording_shaped(scores, logprobs, ref_logprobs, response_mask, kl_ref_coef):
        seen["gap"], seen["kl_ref_coef"] = logprobs - ref_logprobs, kl_ref_coef
        return shaped(scores, logprobs, ref_logprobs, response_mask, kl_ref_coef)

    def recording_logprobs(*args, policy_logprobs=reinforce_lm.policy_logprobs):
        logprobs, entropy = policy_logprobs(*args)
        seen["entropy"] = entropy[args[3]]  # of tokens; the last pass of an iteration is that of the loss
        return logprobs, entropy

    monkeypatch.setattr(reinforce_lm, "policy_logprobs", recording_logprobs)
    monkeypatch.setattr(common, "rollout", recording_rollout)
    monkeypatch.setattr(common, "score_responses", recording_score)
    monkeypatch.setattr(reinforce_lm, "shaped_rewards", recording_shaped)
    flags = ["--total-episodes", 160, "--response-length", 9, "--kl-ref-coef", 0.05, "--kl-ref-target", 0.5]
    flags += ["--kl-ref-horizon", 400, "--baseline", "ema", "--ema-decay", 0.75]
    run_dir = run_in(tmp_path, reinforce_lm, *SHORT, *flags)
    values = {tag: [value for _, value in steps] for tag, steps in scalars(run_dir).items()}
    first, last = [{tag: steps[i] for tag, steps in values.items()} for i in (0, -1)]
    lengths, kl, scores, ended = [], [], [], []
    for i in range(32):
        tokens = seen["responses"][i].tolist()
        length = tokens.index(0) + 1 if 0 in tokens else 9
        lengths.append(length)
        ended.append(0 in tokens)
        kl.append(seen["gap"][i, :length].sum().item())
        scores.append(seen["scores"][i].item())
    assert len(set(lengths)) > 1
    assert last["objective/response_length"] == pytest.approx(sum(lengths) / 32)
    assert last["objective/ended"] == pytest.approx(sum(ended) / 32)
    assert last["objective/score"] == pytest.approx(sum(scores) / 32, rel=1e-5)
    assert last["objective/kl_ref"] == pytest.approx(sum(kl) / 32, rel=1e-4)
    betas = values["objective/kl_ref_coef"]
    assert betas[-1] == pytest.approx(seen["kl_ref_coef"], rel=1e-5) and betas[0] == pytest.approx(0.05)
    assert last["objective/return"] == pytest.approx((sum(scores) - betas[-1] * sum(kl)) / 32, rel=1e-4)
    for i in range(4):
        change = 1 + max(-0.2, min(values["objective/kl_ref"][i] / 0.5 - 1, 0.2)) * 32 / 400
        assert betas[i + 1] == pytest.approx(betas[i] * change, rel=1e-4)
    average = values["objective/J"][0]
    for earlier, now in zip(values["objective/J"][1:], values["objective/baseline"][1:]):
        assert now == pytest.approx(average, rel=1e-4)  # of the batches before this one
        average = 0.75 * average + 0.25 * earlier
    assert abs(first["objective/kl_ref"]) < 1e-4 < last["objective/kl_ref"]  # the policy starts as its reference
    assert len(seen["entropy"]) == sum(lengths), "one micro-batch"
    assert last["policy/entropy"] == pytest.approx(seen["entropy"].sum().item() / sum(lengths), rel=1e-4)
    assert last["policy/sampler_gap"] < 1e-5


def test_a_padding_token_that_is_sampled_is_a_token_like_any_other(tmp_path, model_folder):
    folder = model_folder()
    tokenizer = common.load_tokenizer(folder, [])
    tokenizer.pad_token = "5"
    tokenizer.save_pretrained(folder)
    run_dir = run_in(tmp_path / "runs", reinforce_lm, *FEW, "--model", folder, "--eval-every", 0)
    assert max(gap for _, gap in scalars(run_dir)["policy/sampler_gap"]) < 1e-5


# ----- Updates -----


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_are_clipped_and_logged_before(script, tmp_path):
    flags = [*SHORT, *FAST[script], "--total-episodes", 32, "--save-every", 0]
    with recorded_gradients(torch.optim.Adam) as steps:
        run_dir = run_in(tmp_path, script, *flags, "--max-grad-norm", 1e-3)
    assert max(step.norm() for step in steps) == pytest.approx(1e-3, rel=1e-3)
    assert script == "trpo_lm" or scalars(run_dir)["policy/grad_norm"][0][1] > 0.01


def test_trpo_updates_in_float32_whatever_the_precision_of_the_rest(tmp_path, monkeypatch):
    seen, stage, load = {"trial": set(), "update": set(), "rest": set()}, ["rest"], common.load_policy

    def watched(*args):
        policy = load(*args)
        layer = policy.transformer.h[0].mlp.c_fc
        layer.register_forward_hook(lambda _, __, hidden: seen[stage[0]].add(hidden.dtype))
        return policy

    def in_stage(name, function):
        def call(*args, **settings):
            stage[0] = name
            result = function(*args, **settings)
            stage[0] = "rest"
            return result

        return call

    monkeypatch.setattr(common, "load_policy", watched)
    for name in ("surrogate_gradient", "fisher_vector_product", "fisher_quadratic_form", "surrogate_gain_and_kl"):
        monkeypatch.setattr(trpo_lm, name, in_stage("update", getattr(trpo_lm, name)))
    monkeypatch.setattr(common, "try_model", in_stage("trial", common.try_model))
    run_in(tmp_path, trpo_lm, *SHORT, "--total-episodes", 32, "--dtype", "bfloat16")
    assert seen == {"trial": {torch.float32}, "update": {torch.float32}, "rest": {torch.bfloat16}}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("annealed", [True, False], ids=["annealed", "constant"])
def test_learning_rates_fall_linearly_or_stay_and_no_weight_decays(script, annealed, tmp_path):
    flags = {"reinforce_lm": ["--learning-rate", 4e-3], "trpo_lm": ["--critic-learning-rate", 8e-3]}
    flags["ppo_lm"] = flags["reinforce_lm"] + flags["trpo_lm"]
    others = [*FAST[script], *([] if annealed else ["--no-anneal-lr"])]

    def rates(optimizer):
        assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
        return {group["lr"] for group in optimizer.param_groups}

    with recorded_gradients(torch.optim.Adam, rates) as steps:
        run_dir = run_in(tmp_path, script, *SHORT, "--total-episodes", 64, *flags[script], *others)
    shares = [1.0, 0.5 if annealed else 1.0]
    if script != "trpo_lm":
        logged = [value for _, value in scalars(run_dir)["policy/learning_rate"]]
        assert logged == pytest.approx([4e-3 * share for share in shares])
    per_iteration = len(steps) // 2
    for i, share in enumerate(shares):
        found = set().union(*steps[i * per_iteration : (i + 1) * per_iteration])
        assert sorted(found) == pytest.approx([rate * share for rate in flags[script][1::2]])


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_reward_moves_no_weight(script, tmp_path):
    """Not even weight decay: every gradient is exactly 0."""
    reward = reward_file(tmp_path, "def fn(prompts, responses, **columns):\n    return [0.0] * len(responses)\n")
    run_dir = run_in(tmp_path / "runs", script, *FEW, *FAST[script], "--kl-ref-coef", 0, "--reward", reward)
    trained = common.load_checkpoint(run_dir)
    fresh = load_policy("tiny", character_tokenizer("0123456789"), 11, seed=1)
    assert_same(dict(fresh.named_parameters()), trained["weights"]["policy"])
    if script != "reinforce_lm":
        critic = {f"backbone.{name}": weight for name, weight in fresh.base_model.named_parameters()}
        critic |= {"head.weight": torch.zeros(1, 64), "head.bias": torch.zeros(1)}
        assert_same(critic, trained["weights"]["critic"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_in_bfloat16_the_policy_starts_as_its_reference_and_ratios_at_one(script, tmp_path):
    """Both log-probabilities come from one forward pass; those of the sampler are other numbers."""
    flags = ["--dtype", "bfloat16", "--total-episodes", 32, *SHORT, "--save-every", 0, "--response-length", 12]
    flags += FAST[script]
    flags += ["--num-minibatches", 1] if script == "ppo_lm" else []
    for kl_ref_coef in (0.1, 0):
        run_dir = run_in(tmp_path / str(kl_ref_coef), script, *flags, "--kl-ref-coef", kl_ref_coef)
        logged = {tag: values[0][1] for tag, values in scalars(run_dir).items()}
        assert logged["policy/sampler_gap"] > 1e-5
        if kl_ref_coef:
            assert abs(logged["objective/kl_ref"]) < 1e-6
        if script == "ppo_lm":
            assert logged["policy/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_in_bfloat16_responses_come_from_the_latest_weights(script, tmp_path, monkeypatch):
    """In every rollout, evaluations and those of a resumed run included. Weights and optimizer stay in float32."""
    module, policies, weights = importlib.import_module(script), [], []
    load, rollout = common.load_policy, common.rollout

    def checking_rollout(model, *args):
        *rest, generator, greedy = args
        assert model is policies[-1] and all(weight.dtype == torch.float32 for weight in model.parameters())
        weights.append(model.get_input_embeddings().weight[0, 0].item())
        drawn = torch.Generator().set_state(generator.get_state()) if generator else None
        result = rollout(model, *args)
        assert_same(rollout(copy.deepcopy(model), *rest, drawn, greedy), result)
        return result

    monkeypatch.setattr(common, "load_policy", lambda *args: policies.append(load(*args)) or policies[-1])
    monkeypatch.setattr(common, "rollout", checking_rollout)
    flags = ["--dtype", "bfloat16", "--response-length", 12, "--save-every", 1, "--no-anneal-lr", *FAST[script]]
    flags += ["--no-anneal-max-kl"] if script == "trpo_lm" else []
    run_dir = run_in(tmp_path, module, *FEW, *flags)
    run_main(module, "--resume", run_dir, "--total-episodes", 96)
    assert len(set(weights)) == 4, "before the first iteration, and after each of three"
    checkpoint = common.load_checkpoint(run_dir)
    assert all(weight.dtype == torch.float32 for weight in checkpoint["weights"]["policy"].values())
    assert 0 < max(value for _, value in scalars(run_dir)["policy/sampler_gap"]) < 0.2


@pytest.mark.parametrize("script", ["ppo_lm", "trpo_lm"])
def test_minibatches_differ_between_epochs_iterations_and_seeds(script, tmp_path, monkeypatch):
    seen, shuffled = [], common.shuffled_minibatches

    def recording(*args):
        minibatches = shuffled(*args)
        seen.append(tuple(frozenset(torch.cat(minibatch).tolist()) for minibatch in minibatches))
        return minibatches

    monkeypatch.setattr(common, "shuffled_minibatches", recording)
    flags = ["--total-episodes", 96, *SHORT, *FAST[script], "--update-epochs", 2, "--kl-ref-coef", 0]
    for seed in (1, 2):
        run_in(tmp_path / str(seed), script, *flags, "--seed", seed)
    assert len(seen) == len(set(seen)) == 2 * 3 * 2
    assert all(sorted(row for minibatch in epoch for row in minibatch) == list(range(32)) for epoch in seen)


@pytest.mark.parametrize("script", ["ppo_lm", "trpo_lm"])
def test_end_tokens_of_a_prompt_end_no_response(script, tmp_path, monkeypatch):
    dataset, module, after_end = tmp_path / "turns.jsonl", importlib.import_module(script), []
    rows = [{"prompt": f"{i:02d}<end>{i:02d}", "reference": str(i)} for i in range(100)]  # as chat templates have them
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    advantages = module.generalized_advantages

    def recording_advantages(rewards, values, response_mask, next_values, *rest):
        after_end.append(next_values)
        return advantages(rewards, values, response_mask, next_values, *rest)

    monkeypatch.setattr(module, "generalized_advantages", recording_advantages)
    flags = ["--dataset", dataset, "--response-length", 4, "--truncation", "bootstrap"]
    run_dir = run_in(tmp_path / "runs", module, *FEW, *FAST[script], *flags)
    ended = scalars(run_dir)["objective/ended"][-1][1]
    assert 0 < ended < 1 and (after_end[-1] == 0).float().mean().item() == pytest.approx(ended)


def test_a_nearly_deterministic_policy_is_trained_by_trpo(tmp_path, capsys):
    run_in(tmp_path, trpo_lm, *FEW, "--temperature", 0.01)
    assert final_line(capsys.readouterr().out)["episodes"] == "64"


# ----- Learning -----


def test_it_learns(tmp_path):
    """The task `sort`, by the script that is quickest; test_optimum.py is harder, and for all three."""
    flags = ["--total-episodes", 256 * 25, "--eval-every", 0, "--save-every", 0, "--eval-size", 100]
    logged = scalars(run_in(tmp_path, reinforce_lm, *flags))
    before, after = logged["eval/score"][0][1], logged["eval/score"][-1][1]
    assert before < 0.4 and after > before + 0.1
    assert logged["objective/score"][-1][1] > logged["objective/score"][0][1] + 0.1


def test_any_checkpoint_with_real_text_and_own_reward(tmp_path):
    """A byte-pair tokenizer and a checkpoint made here, JSONL with prompts of many lengths, a reward in a file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        f"the film about {thing} is {word}" for thing in ("love", "war and peace", "a dog") for word in ("dull", "fun")
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(texts * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    folder = tmp_path / "checkpoint"
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer), seed=3).save_pretrained(folder)
    rows = [{"text": text.rsplit(" ", 1)[0] + " " * i, "wanted": text[0]} for i, text in enumerate(texts * 2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "def fn(prompts, texts, wanted, **_):\n    return [float(r.count(w)) for r, w in zip(texts, wanted)]\n"
    flags = ["--model", folder, "--dataset", tmp_path / "data.jsonl", "--prompt-column", "text"]
    flags += ["--reward", reward_file(tmp_path, code), "--response-length", 8, "--total-episodes", 64 * 30]
    flags += ["--batch-size", 64, "--learning-rate", 1e-2, "--kl-ref-coef", 0.01, "--eval-every", 0]
    run_dir = run_in(tmp_path / "runs", reinforce_lm, *flags)
    logged = scalars(run_dir)
    assert set(summary(run_dir)) == {"eval_score_before", "eval_score", "episodes", "seconds", "run_dir"}
    start = sum(value for _, value in logged["objective/score"][:3]) / 3
    assert sum(value for _, value in logged["objective/score"][-3:]) / 3 > start + 0.5
    assert max(value for _, value in logged["policy/sampler_gap"]) < 1e-4
    reloaded = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert reloaded.config.model_type == "llama" and Path(run_dir / "model" / "tokenizer.json").exists()


# ----- Checkpoints and resuming -----


def kill_process(module, flags):
    """Start a run as a process of its own and kill it after its first checkpoint."""
    process = fork(run_main, module, *flags, output=os.devnull)
    deadline = time.time() + 120
    while not list(Path(flags[-1]).glob("*/checkpoint_*.pt")) and time.time() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_is_the_run_that_was_never_stopped(script, tmp_path, monkeypatch):
    num_iterations = 16 if script == "reinforce_lm" else 4  # enough for it to be killed before the last
    flags = ["--total-episodes", 32 * num_iterations, *SHORT, "--save-every", 2, "--eval-every", 3]
    flags += ["--kl-ref-target", 0.5, *FAST[script], *(["--surrogate", "kl_penalty"] if script == "ppo_lm" else [])]
    module, stopped = importlib.import_module(script), [*flags, "--output-dir", tmp_path / "stopped"]
    if script == "reinforce_lm":
        kill_process(module, stopped)
    else:  # an end at any other place is one to the checkpoint, too
        shaped, calls = module.shaped_rewards, []
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(module, "shaped_rewards", lambda *args: calls.append(1 / (3 - len(calls))) or shaped(*args))
            run_main(module, *stopped)
    whole = run_in(tmp_path / "whole", module, *flags)
    (run_dir,) = (tmp_path / "stopped").iterdir()
    stopped_at = common.load_checkpoint(run_dir)["iteration"]
    assert 2 <= stopped_at < num_iterations and not (run_dir / "summary.json").exists()
    run_main(module, "--resume", run_dir)
    for name in ("eval_score_before", "eval_score", "eval_exact", "episodes"):
        assert summary(run_dir)[name] == summary(whole)[name]
    assert summary(run_dir)["run_dir"] == str(run_dir)
    assert_same_checkpoints(whole, run_dir)
    logged = scalars(run_dir)
    for tag, values in scalars(whole).items():
        if not tag.startswith("time/"):
            assert sorted(logged[tag]) == values, tag  # files of one second are read in any order


def test_a_resumed_run_logs_each_episode_once(tmp_path):
    """Also those that the run before had logged after its last checkpoint."""
    run_dir = run_in(tmp_path, reinforce_lm, *SHORT, "--total-episodes", 160, "--save-every", 3)
    (run_dir / "checkpoint_00000005.pt").unlink()
    (events,) = run_dir.glob("events*")
    events.rename(events.with_name("events.out.tfevents.1"))  # read in the order of the seconds in their names
    run_main(reinforce_lm, "--resume", run_dir)
    assert [step for step, _ in scalars(run_dir)["objective/score"]] == [32, 64, 96, 128, 160]


def test_a_resumed_run_goes_on_with_other_flags_and_counts_all_its_seconds(tmp_path):
    run_dir = run_in(tmp_path, reinforce_lm, *FEW, "--no-anneal-lr")
    before = common.load_checkpoint(run_dir)
    assert 0 < before["state"]["seconds"] < summary(run_dir)["seconds"]
    before["state"]["seconds"] += 1e6
    common.save_checkpoint(run_dir, 2, before)
    given = dict(learning_rate=5e-4, total_episodes=96, eval_every=1, micro_batch_tokens=128)
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    run_main(reinforce_lm, "--resume", run_dir, *flags)
    after = common.load_checkpoint(run_dir)
    assert after["iteration"] == 3 and after["args"] == before["args"] | given | {"resume": str(run_dir)}
    assert sorted(scalars(run_dir)["policy/learning_rate"])[-1] == (96, pytest.approx(5e-4))
    assert before["state"]["seconds"] < after["state"]["seconds"] < summary(run_dir)["seconds"] < 1e6 + 1000


def test_a_checkpoint_has_the_evaluation_of_its_iteration(tmp_path):
    run_dir = run_in(tmp_path, reinforce_lm, *FEW, "--learning-rate", 0.05, "--eval-size", 50)
    first = summary(run_dir)
    run_main(reinforce_lm, "--resume", run_dir)
    assert first["eval_score_before"] != first["eval_score"]
    assert summary(run_dir) | {"seconds": first["seconds"]} == first


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_checkpoint_is_evaluated_with_the_settings_of_its_run_which_stays_as_it_is(tmp_path):
    write_rows(tmp_path / "data.jsonl", [{"question": f"{i:02d}", "answer": f"{i}" * 5} for i in range(60)])
    flags = ["--dataset", tmp_path / "data.jsonl", "--prompt-column", "question", "--reference-column", "answer"]
    run_dir = run_in(tmp_path / "runs", reinforce_lm, *FEW, *flags, "--response-length", 9, "--learning-rate", 0.05)
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    run_main(reinforce_lm, "--resume", run_dir, "--total-episodes", 0, "--output-dir", tmp_path / "evaluations")
    assert files == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    (evaluation,) = (tmp_path / "evaluations").iterdir()
    assert samples(evaluation) == samples(run_dir)[-4:] != samples(run_dir)[:4]
    first, again = summary(run_dir), summary(evaluation)
    assert again["episodes"] == 64 and again["run_dir"] == str(evaluation)
    assert again["eval_score"] == first["eval_score"] != first["eval_score_before"] and "eval_score_before" not in again
    assert not list(evaluation.glob("checkpoint*")) and not (evaluation / "model").exists()


def test_seconds_are_those_of_the_run_or_of_an_evaluation_alone(tmp_path):
    run_dir = run_in(tmp_path / "runs", reinforce_lm, *FEW)
    (path,) = run_dir.glob("checkpoint*")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state"]["seconds"] = 1e6
    torch.save(checkpoint, path)
    evaluation = run_in(tmp_path / "evaluations", reinforce_lm, "--resume", run_dir, "--total-episodes", 0)
    assert 0 < summary(evaluation)["seconds"] < 1e5
    run_main(reinforce_lm, "--resume", run_dir)
    assert summary(run_dir)["seconds"] > 1e6


@pytest.mark.parametrize("other", ["ppo_lm", "trpo_lm"])
def test_a_run_of_another_script_is_refused(other, tmp_path):
    run_dir, other = run_in(tmp_path, reinforce_lm, *FEW), importlib.import_module(other)
    with pytest.raises(SystemExit, match="--resume: expected a run of this script, found "):
        common.parse_flags(other.Args, other.TINY, other.ADAPTERS, ["--resume", str(run_dir)])


def test_what_a_run_reads_may_move_but_not_change(tmp_path, model_folder, capsys):
    rows = [{"prompt": f"{i:02d}", "reference": "1"} for i in range(40)]
    write_rows(tmp_path / "data.jsonl", rows)
    write_rows(tmp_path / "eval.jsonl", rows[:9])
    reward = reward_file(tmp_path, "def fn(prompts, responses, **columns):\n    return [0.5] * len(responses)\n")
    old = {"--model": Path(model_folder()), "--reward": Path(reward.removesuffix(":fn"))}
    old |= {"--dataset": tmp_path / "data.jsonl", "--eval-dataset": tmp_path / "eval.jsonl"}
    given = [part for name, path in old.items() for part in (name, reward if name == "--reward" else path)]
    old["--resume"] = run_in(tmp_path / "runs", reinforce_lm, *FEW, *given)
    (tmp_path / "moved").mkdir()
    moved = {name: path.rename(tmp_path / "moved" / path.name) for name, path in old.items()}
    flags = [part for name, path in moved.items() for part in (name, f"{path}:fn" if name == "--reward" else path)]
    run_main(reinforce_lm, *flags, "--total-episodes", 96)
    assert common.load_checkpoint(moved["--resume"])["iteration"] == 3 and not old["--resume"].exists()

    expected = "error: --resume: expected the model, --lora-rank and rows that this run began with, found others"
    flags += ["--total-episodes", 128]
    assert error_of(capsys, reinforce_lm, *flags, "--lora-rank", 2) == expected
    assert error_of(capsys, reinforce_lm, *flags, "--model", model_folder(n_embd=8)) == expected
    for name in ("--dataset", "--eval-dataset"):
        text = moved[name].read_text()
        write_rows(moved[name], rows[1:] + rows[:1])
        assert error_of(capsys, reinforce_lm, *flags) == expected
        moved[name].write_text(text)
    run_main(reinforce_lm, *flags)
    assert common.load_checkpoint(moved["--resume"])["iteration"] == 4


def test_the_schedule_of_checkpoints(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(common, "save_checkpoint", lambda run_dir, iteration, state: saved.append(iteration))
    for every in (2, 5, 0):
        run_in(tmp_path / str(every), reinforce_lm, *SHORT, "--total-episodes", 160, "--save-every", every)
    assert saved == [2, 4, 5, 5]


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    torch_save = torch.save

    def full_at_the_second(state, path):
        if state["iteration"] == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        torch_save(state, path)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        run_in(tmp_path, reinforce_lm, *SHORT, "--total-episodes", 96, "--save-every", 1)
    monkeypatch.setattr(torch, "save", torch_save)
    (run_dir,) = tmp_path.iterdir()
    assert common.load_checkpoint(run_dir)["iteration"] == 1
    run_main(reinforce_lm, "--resume", run_dir)
    assert [path.name for path in sorted(run_dir.glob("checkpoint*"))] == [f"checkpoint_0000000{i}.pt" for i in (2, 3)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_that_are_no_number_stop_the_run_in_one_line_and_the_last_checkpoint_stays(
    script, tmp_path, monkeypatch, capsys
):
    policies, load, save = [], common.load_policy, common.save_checkpoint

    def break_after_saving(*args):
        save(*args)
        policies[-1].get_input_embeddings().weight.data[3] = torch.nan

    monkeypatch.setattr(common, "load_policy", lambda *args: policies.append(load(*args)) or policies[-1])
    monkeypatch.setattr(common, "save_checkpoint", break_after_saving)
    flags = [*FEW, *FAST[script], "--save-every", 1, "--output-dir", tmp_path]
    error = error_of(capsys, importlib.import_module(script), *flags)
    assert error == "error: --model: expected finite logits; try a lower learning rate, found NaN or infinity"
    (run_dir,) = tmp_path.iterdir()
    checkpoint = common.load_checkpoint(run_dir)
    assert checkpoint["iteration"] == 1
    assert all(weight.isfinite().all() for weight in checkpoint["weights"]["policy"].values())


def test_broken_reward_stops_the_run_in_one_line(tmp_path, capsys):
    code = "calls = []\ndef fn(prompts, responses, **columns):\n    calls.append(1)\n"
    code += "    return [float('nan') if len(calls) > 3 else 0.5] * len(responses)\n"
    reward = reward_file(tmp_path, code)
    error = error_of(capsys, reinforce_lm, *FEW, "--reward", reward, "--output-dir", tmp_path / "runs")
    assert error.startswith(f"error: --reward {reward}: expected a list of 32 finite scores, found [nan, nan")


# ----- Models and data -----


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_saved_is_the_float32_policy(script, tmp_path):
    run_dir = run_in(tmp_path, script, *FEW, *FAST[script], "--dtype", "bfloat16")
    saved = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype="auto")
    trained = common.load_checkpoint(run_dir)["weights"]["policy"]
    assert_same(trained, dict(saved.named_parameters()))
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in trained.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_is_evaluated_on_other_prompts_without_training(script, tmp_path, model_folder, capsys, monkeypatch):
    asked, sample = [], common.sample
    rows = [{"prompt": f"{i}{i}", "reference": str(i)} for i in range(10)]
    write_rows(tmp_path / "eval.jsonl", rows)
    code = "def fn(prompts, responses, reference, ended, **_):\n"
    code += "    return [float(r) for r in reference], {'end': [float(e) for e in ended]}\n"

    def recording_sample(*args, greedy=False, **settings):
        asked.extend([row["prompt"] for row in args[4]] if greedy else [])
        return sample(*args, greedy=greedy, **settings)

    monkeypatch.setattr(common, "sample", recording_sample)
    flags = ["--model", model_folder(), "--eval-dataset", tmp_path / "eval.jsonl", "--total-episodes", 0]
    flags += ["--eval-size", 7, "--reward", reward_file(tmp_path, code), "--dataset", "not-there.jsonl"]
    run_dir = run_in(tmp_path / "runs", script, *flags)
    assert asked == [row["prompt"] for row in rows[:7]] == [line["prompt"] for line in samples(run_dir)]
    final = final_line(capsys.readouterr().out)
    assert final["eval_score"] == "3.000" and "eval_score_before" not in final and final["episodes"] == "0"
    assert set(scalars(run_dir)) == {"eval/score", "eval/end"}
    assert not (run_dir / "model").exists()


def test_held_out_prompts_may_be_longer_than_all_others(tmp_path):
    write_rows(tmp_path / "data.jsonl", [{"prompt": "12", "reference": "1"}] * 9)
    write_rows(tmp_path / "eval.jsonl", [{"prompt": "1" * 30, "reference": "1"}])
    files = ["--dataset", tmp_path / "data.jsonl", "--eval-dataset", tmp_path / "eval.jsonl"]
    run_dir = run_in(tmp_path / "runs", reinforce_lm, *SHORT, "--total-episodes", 32, *files)
    assert {(line["split"], line["prompt"]) for line in samples(run_dir)} == {("eval", "1" * 30), ("train", "12")}


def test_models_that_do_not_fit_are_refused(tmp_path, model_folder, capsys):
    folder = Path(model_folder("llama", tie_word_embeddings=False))
    flags = [*FEW, "--model", folder, "--output-dir", tmp_path / "runs"]
    weights = load_file(folder / "model.safetensors")
    character_tokenizer("0123456789a").save_pretrained(folder)
    write_rows(tmp_path / "data.jsonl", [{"prompt": character, "reference": ""} for character in "0123456789a"])
    error = error_of(capsys, reinforce_lm, *flags, "--dataset", tmp_path / "data.jsonl")
    assert error == "error: --model: expected an embedding of each token, found 11"
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "all weights in " in (error := error_of(capsys, reinforce_lm, *flags)) and "lm_head" in error
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "--model: not `tiny` or a checkpoint with a tokenizer" in error_of(capsys, reinforce_lm, *flags)
