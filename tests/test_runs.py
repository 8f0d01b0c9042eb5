"""Whole runs, as a user starts them: the copy contract, learning, resuming, and what a run leaves behind."""

import dataclasses
import importlib
import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import common
import reinforce_lm
import trpo_lm

import pytest
import torch
from helpers import ROOT, SCRIPTS, error_line, finish, fork, load_policy, recorded_gradients, run_main, tiny_model
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from tensorboard.plugins.hparams import plugin_data_pb2
from transformers import AutoModelForCausalLM, AutoTokenizer


def final_line(output):
    """The last line of a run as a dictionary of strings."""
    last = output.strip().splitlines()[-1]
    assert last.startswith("final ")
    return dict(pair.split("=", 1) for pair in last.split()[1:])


def scalars(run_dir):
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run_alone(script, flags):
    """Run a script as the main program in the current folder, with the modules of that folder."""
    sys.modules.pop("common")
    sys.path[:] = [os.getcwd(), *(path for path in sys.path if not path.startswith(str(ROOT)))]
    sys.argv = [f"{script}.py", *map(str, flags)]
    runpy.run_path(f"{script}.py", run_name="__main__")


def texts(run_dir):
    """The lines of samples of each evaluation."""
    events = EventAccumulator(str(run_dir)).Reload()
    return [event.tensor_proto.string_val[0].decode().splitlines() for event in events.Tensors("samples/text_summary")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_and_common_run_alone_in_an_empty_folder(script, tmp_path, monkeypatch):
    for name in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--total-episodes", 96, "--batch-size", 32, "--eval-every", 2, "--eval-size", 16]
    finish([fork(run_alone, script, flags, output="output")], ["output"])
    output = Path("output").read_text()
    final = final_line(output)
    names = ["eval_score_before", "eval_exact_before", "eval_score", "eval_exact"]
    assert list(final) == [*names, "episodes", "seconds", "run_dir"]
    run_dir = tmp_path / final["run_dir"]
    summary = json.loads((run_dir / "summary.json").read_text())
    for key, value in final.items():
        assert value == (f"{summary[key]:.3f}" if isinstance(summary[key], float) else str(summary[key]))
    assert (
        final["episodes"] == "96"
        and run_dir.parent.name == "runs"
        and run_dir.name.startswith(f"{script}__tiny__sort__1__")
    )
    logged = scalars(run_dir)
    assert [step for step, _ in logged["eval/score"]] == [0, 64, 96]
    assert logged["eval/score"][-1][1] == pytest.approx(summary["eval_score"])
    assert [step for step, _ in logged["objective/score"]] == [32, 64, 96]
    assert logged["eval/score"][0][1] == pytest.approx(summary["eval_score_before"])
    assert " -> " in output and output.count("evaluation after ") == 3
    lines = [line for line in output.splitlines() if line.startswith("iteration ")]  # one for each update
    assert len(lines) == 3 and all("score" in line and "KL" in line and "tokens/s" in line for line in lines)
    args = json.loads((run_dir / "args.json").read_text())
    assert args["total_episodes"] == 96 and args["response_length"] == 6
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    trained = common.load_checkpoint(run_dir)["policy"]["weights"]
    assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())
    assert tokenizer.decode(tokenizer("31415").input_ids) == "31415"
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {f"{script}.py", "common.py", "runs", "output"}


def test_texts_and_hyperparameters_are_in_tensorboard(tmp_path):
    run_main(reinforce_lm, "--total-episodes", 32, "--batch-size", 32, "--eval-size", 16, "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = events.Tags()["tensors"]
    text = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags}
    samples = text["samples/text_summary"].splitlines()
    assert len(samples) == 8 and all(line.startswith("    '") for line in samples), "as code, whatever is in them"
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    hparams = plugin_data_pb2.HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    assert hparams["batch_size"].number_value == 32 and hparams["model"].string_value == "tiny"


def test_logged_numbers_are_those_of_the_batch(tmp_path, monkeypatch):
    """Score, KL, length and the share that ended, recomputed from what the rollout and the reward returned."""
    seen = {}
    rollout, score, shaped = common.rollout, common.score_responses, reinforce_lm.shaped_rewards

    def recording_rollout(*args, **settings):
        samples_per_prompt = args[-1]
        assert settings.get("greedy", False) == (samples_per_prompt == 1), "evaluations, and nothing else, are greedy"
        result = rollout(*args, **settings)
        if samples_per_prompt > 1:
            seen["responses"], seen["mask"], _ = result
        return result

    def recording_score(*args):
        scores, parts = score(*args)
        seen["scores"] = scores if len(scores) == 32 else seen.get("scores")
        return scores, parts

    def recording_shaped(scores, logprobs, ref_logprobs, response_mask, kl_coef):
        seen["gap"], seen["kl_coef"] = logprobs - ref_logprobs, kl_coef
        return shaped(scores, logprobs, ref_logprobs, response_mask, kl_coef)

    def recording_logprobs(*args, policy_logprobs=common.policy_logprobs):
        logprobs, entropy = policy_logprobs(*args)
        seen["entropy"] = entropy[args[2][:, -9:]]  # of tokens; the last pass of an iteration is that of the loss
        return logprobs, entropy

    monkeypatch.setattr(common, "policy_logprobs", recording_logprobs)
    monkeypatch.setattr(common, "rollout", recording_rollout)
    monkeypatch.setattr(common, "score_responses", recording_score)
    monkeypatch.setattr(reinforce_lm, "shaped_rewards", recording_shaped)
    flags = ["--total-episodes", 160, "--batch-size", 32, "--response-length", 9, "--eval-size", 4, "--kl-coef", 0.05]
    flags += ["--kl-target", 0.5, "--kl-horizon", 400, "--baseline", "ema", "--ema-decay", 0.75]
    run_main(reinforce_lm, *flags, "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
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
    beta = last["objective/kl_coef"]
    assert beta == pytest.approx(seen["kl_coef"], rel=1e-5) and values["objective/kl_coef"][0] == pytest.approx(0.05)
    assert last["objective/return"] == pytest.approx((sum(scores) - beta * sum(kl)) / 32, rel=1e-4)
    for i in range(4):
        change = 1 + max(-0.2, min(values["objective/kl_ref"][i] / 0.5 - 1, 0.2)) * 32 / 400
        assert values["objective/kl_coef"][i + 1] == pytest.approx(values["objective/kl_coef"][i] * change, rel=1e-4)
    average = values["objective/J"][0]
    for earlier, now in zip(values["objective/J"][1:], values["objective/baseline"][1:]):
        assert now == pytest.approx(average, rel=1e-4)  # of the batches before this one
        average = 0.75 * average + 0.25 * earlier
    assert abs(first["objective/kl_ref"]) < 1e-4 < last["objective/kl_ref"]  # the policy starts as its reference
    assert last["policy/entropy"] == pytest.approx(seen["entropy"].sum().item() / sum(lengths), rel=1e-4)
    assert last["policy/sampler_gap"] < 1e-5


def test_a_padding_token_that_is_sampled_is_a_token_like_any_other(tmp_path, model_folder):
    folder = model_folder()
    tokenizer = common.load_tokenizer(folder, [])
    tokenizer.pad_token = "5"
    tokenizer.save_pretrained(folder)
    flags = ["--model", folder, "--total-episodes", 64, "--batch-size", 32, "--eval-size", 4, "--eval-every", 0]
    run_main(reinforce_lm, *flags, "--output-dir", tmp_path / "runs")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert max(gap for _, gap in scalars(run_dir)["policy/sampler_gap"]) < 1e-5


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_are_clipped_and_logged_before(script, tmp_path):
    flags = ["--total-episodes", 32, "--batch-size", 32, "--eval-size", 4, "--save-every", 0, "--device", "cpu"]
    with recorded_gradients(torch.optim.AdamW) as steps:
        run_main(importlib.import_module(script), *flags, "--max-grad-norm", 1e-3, "--output-dir", tmp_path)
    assert max(step.norm() for step in steps) == pytest.approx(1e-3, rel=1e-3)
    (run_dir,) = tmp_path.iterdir()
    assert script == "trpo_lm" or scalars(run_dir)["policy/grad_norm"][0][1] > 0.01


def test_trpo_updates_in_float32_whatever_the_precision_of_the_rest(tmp_path, monkeypatch):
    seen, response_logits = [], common.response_logits

    def recording_logits(*args):
        logits = response_logits(*args)
        seen.append(logits.dtype)
        return logits

    monkeypatch.setattr(common, "response_logits", recording_logits)
    flags = ["--total-episodes", 32, "--batch-size", 32, "--eval-size", 4, "--dtype", "bfloat16", "--kl-coef", 0]
    run_main(trpo_lm, *flags, "--output-dir", tmp_path)
    assert set(seen) == {torch.float32}  # without a reference all logits are those of the update


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("annealed", [True, False], ids=["annealed", "constant"])
def test_learning_rates_fall_linearly_or_stay_and_no_weight_decays(script, annealed, tmp_path):
    flags = {"reinforce_lm": ["--learning-rate", 4e-3], "trpo_lm": ["--critic-learning-rate", 8e-3]}
    flags["ppo_lm"] = flags["reinforce_lm"] + flags["trpo_lm"]
    sizes = ["--total-episodes", 128, "--batch-size", 32, "--eval-size", 4, "--output-dir", tmp_path]

    def rates(optimizer):
        assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
        return {group["lr"] for group in optimizer.param_groups}

    with recorded_gradients(torch.optim.AdamW, rates) as steps:
        run_main(importlib.import_module(script), *flags[script], *sizes, *([] if annealed else ["--no-anneal-lr"]))
    if script != "trpo_lm":
        (run_dir,) = tmp_path.iterdir()
        logged = [value for _, value in scalars(run_dir)["policy/learning_rate"]]
        assert logged == pytest.approx([4e-3 * (1 - i / 4 if annealed else 1) for i in range(4)])
    per_iteration = len(steps) // 4
    for i in range(4):
        found = set().union(*steps[i * per_iteration : (i + 1) * per_iteration])
        share = 1 - i / 4 if annealed else 1.0
        assert sorted(found) == pytest.approx([rate * share for rate in flags[script][1::2]])


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_reward_moves_no_weight(script, tmp_path):
    """Not even weight decay: every gradient is exactly 0."""
    (tmp_path / "mine.py").write_text("def fn(prompts, responses, **columns):\n    return [0.0] * len(responses)\n")
    flags = ["--total-episodes", 96, "--batch-size", 32, "--eval-size", 4, "--kl-coef", 0, "--device", "cpu"]
    run_main(
        importlib.import_module(script), *flags, "--reward", f"{tmp_path}/mine.py:fn", "--output-dir", tmp_path / "runs"
    )
    (run_dir,) = (tmp_path / "runs").iterdir()
    trained = common.load_checkpoint(run_dir)
    fresh = load_policy("tiny", common.character_tokenizer("0123456789"), 11, seed=1)
    for name, weight in fresh.state_dict().items():
        assert torch.equal(trained["policy"]["weights"][name], weight), name
    for name, weight in fresh.base_model.state_dict().items() if "critic" in trained else []:
        assert torch.equal(trained["critic"]["weights"][f"backbone.{name}"], weight), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_in_bfloat16_the_policy_starts_as_its_reference_and_ratios_at_one(script, tmp_path):
    """Both log-probabilities come from one forward pass; those of the bfloat16 sampler are other numbers."""
    flags = ["--dtype", "bfloat16", "--total-episodes", 32, "--batch-size", 32, "--eval-size", 4, "--save-every", 0]
    flags += ["--response-length", 12, *(["--num-minibatches", 1] if script == "ppo_lm" else [])]
    for kl_coef in (0.1, 0):
        folder = tmp_path / str(kl_coef)
        run_main(importlib.import_module(script), *flags, "--kl-coef", kl_coef, "--output-dir", folder)
        (run_dir,) = folder.iterdir()
        logged = {tag: values[0][1] for tag, values in scalars(run_dir).items()}
        assert logged["policy/sampler_gap"] > 1e-5
        if kl_coef:
            assert abs(logged["objective/kl_ref"]) < 1e-6
        if script == "ppo_lm":
            assert logged["policy/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-6)


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
    flags = ["--dataset", dataset, "--response-length", 4, "--truncation", "bootstrap", "--total-episodes", 64]
    run_main(module, *flags, "--batch-size", 32, "--eval-size", 4, "--output-dir", tmp_path / "runs")
    (run_dir,) = (tmp_path / "runs").iterdir()
    ended = scalars(run_dir)["objective/ended"][-1][1]
    assert 0 < ended < 1 and (after_end[-1] == 0).float().mean().item() == pytest.approx(ended)


def kill_process(module, flags):
    """Start a run as a process of its own and kill it after its first checkpoint."""
    process = fork(run_main, module, *flags, output=os.devnull)
    deadline = time.time() + 120
    while not list(Path(flags[-1]).glob("*/checkpoint_*.pt")) and time.time() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_is_the_run_that_was_never_stopped(script, tmp_path, capsys, monkeypatch):
    num_iterations = 10 if script == "reinforce_lm" else 6  # enough for it to be killed before the last
    flags = ["--total-episodes", 32 * num_iterations, "--batch-size", 32, "--save-every", 3, "--eval-every", 5]
    flags += ["--eval-size", 16, "--kl-target", 0.5, *(["--surrogate", "kl_penalty"] if script == "ppo_lm" else [])]
    module, stopped = importlib.import_module(script), [*flags, "--output-dir", tmp_path / "stopped"]
    if script == "reinforce_lm":
        kill_process(module, stopped)
    else:  # an end at any other place is one to the checkpoint, too
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
            patch.setattr(common, "show_progress", lambda i, *_: exec("raise RuntimeError('stop')") if i == 5 else None)
            run_main(module, *stopped)
    run_main(module, *flags, "--output-dir", tmp_path / "whole")
    whole = final_line(capsys.readouterr().out)
    (run_dir,) = (tmp_path / "stopped").iterdir()
    stopped_at = common.load_checkpoint(run_dir)["iteration"]
    assert 3 <= stopped_at < num_iterations and not (run_dir / "summary.json").exists()
    run_main(module, "--resume", run_dir)
    resumed = final_line(capsys.readouterr().out)
    assert resumed["run_dir"] == str(run_dir)
    for name in ("eval_score_before", "eval_score", "eval_exact"):
        assert resumed[name] == whole[name]
    expected, found = common.load_checkpoint(whole["run_dir"]), common.load_checkpoint(run_dir)
    assert found["iteration"] == expected["iteration"] == num_iterations and found["carried"] == expected["carried"]
    for part in expected:
        if part not in ("args", "iteration", "carried", "script"):
            assert_same(expected[part], found[part])
    for tag, values in scalars(whole["run_dir"]).items():
        if not tag.startswith("time/"):
            assert sorted(scalars(run_dir)[tag]) == values, tag  # files of one second are read in any order


@pytest.mark.parametrize("script", SCRIPTS)
def test_bfloat16_sampler_follows_the_policy(script, tmp_path, monkeypatch):
    """Every rollout, evaluations included, is sampled from the latest weights; they and the optimizer stay in fp32."""
    module, policies, gaps = importlib.import_module(script), [], []
    real_load_policy, rollout = common.load_policy, common.rollout

    def checking_rollout(model, *args, **settings):
        for parameter, copied in zip(policies[-1].parameters(), model.parameters()):
            assert parameter.dtype == torch.float32 and copied.dtype == torch.bfloat16
            gaps.append((parameter.bfloat16() - copied).abs().max().item())
        return rollout(model, *args, **settings)

    monkeypatch.setattr(common, "load_policy", lambda *args: policies.append(real_load_policy(*args)) or policies[-1])
    monkeypatch.setattr(common, "rollout", checking_rollout)
    flags = ["--dtype", "bfloat16", "--batch-size", 32, "--eval-size", 4, "--save-every", 1]
    flags += ["--no-anneal-lr", *(["--no-anneal-max-kl", "--cg-iters", 3] if script == "trpo_lm" else [])]
    run_main(module, *flags, "--total-episodes", 64, "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    run_main(module, "--resume", run_dir, "--total-episodes", 96)
    assert len(gaps) > 100 and max(gaps) == 0.0
    checkpoint = common.load_checkpoint(run_dir)
    assert all(weight.dtype == torch.float32 for weight in checkpoint["policy"]["weights"].values())
    logged = scalars(run_dir)
    assert 0 < max(value for _, value in logged["policy/sampler_gap"]) < 0.2


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


def test_a_resumed_run_logs_each_episode_once(tmp_path):
    """Also those that the run before had logged after its last checkpoint."""
    flags = ["--total-episodes", 160, "--batch-size", 32, "--eval-size", 4, "--save-every", 3, "--device", "cpu"]
    run_main(reinforce_lm, *flags, "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    (run_dir / "checkpoint_00000005.pt").unlink()
    time.sleep(1)  # TensorBoard reads files in the order of the second in their names
    run_main(reinforce_lm, "--resume", run_dir)
    assert [step for step, _ in scalars(run_dir)["objective/score"]] == [32, 64, 96, 128, 160]


def test_what_a_resumed_run_may_change(tmp_path, capsys):
    short = ["--total-episodes", 64, "--batch-size", 32, "--eval-size", 4, "--output-dir", tmp_path]
    run_main(reinforce_lm, *short, "--no-anneal-lr")
    (run_dir,) = tmp_path.iterdir()
    capsys.readouterr()

    def error_of(*flags):
        with pytest.raises(SystemExit) as stop:
            run_main(reinforce_lm, "--resume", run_dir, *flags)
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "--learning-rate: expected 0.002 as in" in error_of("--learning-rate", "5e-4")
    assert "--seed" in error_of("--seed", 2) and "--reward" in error_of("--reward", "exact")
    run_main(reinforce_lm, "--resume", run_dir, "--total-episodes", 96, "--eval-every", 1, "--micro-batch-size", 8)
    assert common.load_checkpoint(run_dir)["iteration"] == 3
    capsys.readouterr()
    run_main(reinforce_lm, "--resume", run_dir)  # a run that had ended is evaluated and saved again
    assert final_line(capsys.readouterr().out)["episodes"] == "96"
    assert "--total-episodes: expected at least 96, already done" in error_of("--total-episodes", 64)
    assert "--batch-size: expected 32 as in" in error_of("--batch-size", 48)
    path = sorted(run_dir.glob("checkpoint_*.pt"))[-1]
    torch.save(torch.load(path) | {"world_size": 2}, path)
    run_main(reinforce_lm, "--resume", run_dir)
    assert "--resume: 2 ranks before, 1 now" in capsys.readouterr().err
    torch.save(torch.load(path) | {"script": "other_lm"}, path)
    assert "--resume: expected script 'other_lm', as in" in error_of()


def test_control_c_ends_in_one_line(tmp_path):
    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        run_main(reinforce_lm, "--device", "cpu", "--output-dir", tmp_path / "runs")

    output = tmp_path / "output"
    process, deadline = fork(run, output=output), time.time() + 60
    while not (output.exists() and "iteration 1/" in output.read_text()) and time.time() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130 and "Traceback" not in output.read_text()
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert output.read_text().splitlines()[-1] == f"stopped; --resume {run_dir} goes on from the last checkpoint"


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    torch_save = torch.save

    def full_at_the_second(state, file):
        if state["iteration"] == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        torch_save(state, file)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    flags = ["--total-episodes", 96, "--batch-size", 32, "--eval-size", 4, "--save-every", 1, "--output-dir", tmp_path]
    with pytest.raises(SystemExit) as stop:
        run_main(reinforce_lm, *flags)
    (run_dir,) = tmp_path.iterdir()
    error = error_line(capsys)
    assert stop.value.code == 2 and error.startswith(f"error: writing {run_dir}/checkpoint_00000002.pt: OSError: ")
    monkeypatch.setattr(torch, "save", torch_save)
    assert common.load_checkpoint(run_dir)["iteration"] == 1
    run_main(reinforce_lm, "--resume", run_dir)
    assert common.load_checkpoint(run_dir)["iteration"] == 3


def test_broken_reward_stops_the_run_in_one_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "calls = []\n"
        "def fn(prompts, responses, **columns):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 3 else 0.5] * len(responses)\n"
    )
    flags = ["--total-episodes", 96, "--batch-size", 32, "--eval-size", 4, "--output-dir", tmp_path / "runs"]
    with pytest.raises(SystemExit) as stop:
        run_main(reinforce_lm, *flags, "--reward", f"{tmp_path}/mine.py:fn")
    error = error_line(capsys)
    assert stop.value.code == 2
    assert error.startswith(f"error: --reward {tmp_path}/mine.py:fn, prompt ")
    assert "expected finite scores, found nan" in error


def test_it_learns(tmp_path):
    """The task `sort`, by the script that is quickest; test_optimum.py is harder, and for all three."""
    run_main(reinforce_lm, "--total-episodes", 256 * 40, "--eval-every", 0, "--save-every", 0, "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    logged = scalars(run_dir)
    before, after = logged["eval/score"][0][1], logged["eval/score"][-1][1]
    assert before < 0.4 and after > before + 0.1
    assert logged["objective/score"][-1][1] > logged["objective/score"][0][1] + 0.1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_checkpoint_with_real_text_and_own_reward(kind, tmp_path):
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
    tiny_model(kind, vocab_size=len(tokenizer), seed=3).save_pretrained(folder)
    rows = [{"text": text.rsplit(" ", 1)[0] + " " * i, "wanted": text[0]} for i, text in enumerate(texts * 2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "def fn(prompts, responses, wanted):\n    return [float(r.count(w)) for r, w in zip(responses, wanted)]\n"
    )
    flags = ["--model", folder, "--dataset", tmp_path / "data.jsonl", "--prompt-column", "text", "--reward"]
    flags += [f"{tmp_path}/mine.py:fn", "--response-length", 8, "--total-episodes", 64 * 30, "--batch-size", 64]
    flags += ["--learning-rate", 1e-2, "--kl-coef", 0.01, "--eval-every", 0, "--output-dir", tmp_path / "runs"]
    run_main(reinforce_lm, *flags)
    (run_dir,) = (tmp_path / "runs").iterdir()
    logged = scalars(run_dir)
    assert set(json.loads((run_dir / "summary.json").read_text())) == {
        *("eval_score_before", "eval_score", "episodes", "seconds", "run_dir")
    }
    start = sum(value for _, value in logged["objective/score"][:3]) / 3
    assert sum(value for _, value in logged["objective/score"][-3:]) / 3 > start + 0.5
    assert max(value for _, value in logged["policy/sampler_gap"]) < 1e-4
    reloaded = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert reloaded.config.model_type == kind and Path(run_dir / "model" / "tokenizer.json").exists()


FEW = ["--total-episodes", 64, "--batch-size", 32, "--eval-size", 4, "--device", "cpu"]


def test_held_out_prompts_may_be_longer_than_all_others(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "12", "reference": "1"}\n' * 9)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "%s", "reference": "1"}\n' % ("1" * 30))
    files = ["--dataset", tmp_path / "data.jsonl", "--eval-dataset", tmp_path / "eval.jsonl"]
    run_main(reinforce_lm, *FEW, "--total-episodes", 32, *files, "--output-dir", tmp_path / "runs")


def test_a_checkpoint_has_the_evaluation_of_its_iteration(tmp_path, capsys):
    flags = ["--learning-rate", 0.05, "--eval-size", 50, "--output-dir", tmp_path]
    run_main(reinforce_lm, *FEW, *flags)
    first = final_line(capsys.readouterr().out)
    (run_dir,) = tmp_path.iterdir()
    run_main(reinforce_lm, "--resume", run_dir)
    assert first["eval_score_before"] != first["eval_score"] == final_line(capsys.readouterr().out)["eval_score"]


def error_of(capsys, script, *flags):
    """The one line with which a run ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(script, *flags)
    assert stop.value.code == 2
    return error_line(capsys)


def test_which_flags_a_resumed_run_may_change():
    allowed = "resume device save_every eval_every micro_batch_size rollout_batch_size total_episodes"
    allowed += " activation_checkpointing compile cuda_graph"
    for script in map(importlib.import_module, SCRIPTS):
        args = script.Args(**script.TINY)
        checkpoint = {"script": "it", "world_size": 1, "iteration": 0, "args": vars(args)}
        common.check_flags(args, "it", 1, checkpoint)
        for field in dataclasses.fields(args):
            other = {**checkpoint, "args": vars(args) | {field.name: "another"}}
            if field.name in allowed.split():
                common.check_flags(args, "it", 1, other)
            else:
                with pytest.raises(common.InputError, match=f"{common.flag(field.name)}: expected 'another' as in"):
                    common.check_flags(args, "it", 1, other)


def test_a_run_directory_has_one_writer(tmp_path):
    run_main(reinforce_lm, *FEW, "--output-dir", tmp_path / "runs")
    (run_dir,) = (tmp_path / "runs").iterdir()
    before = scalars(run_dir)
    args = reinforce_lm.Args(resume=str(run_dir))
    run_dir_again, writer = common.start_run("reinforce_lm", args, 64)  # this process goes on with it
    output = tmp_path / "output"
    other = fork(run_main, reinforce_lm, "--resume", run_dir, "--total-episodes", 96, output=output)
    other.join(60)
    assert other.exitcode == 2 and f"could not lock {run_dir}" in output.read_text()
    assert len(list(run_dir.glob("events*"))) == 2, "of this process, and none of the one that was refused"
    writer.close()
    assert run_dir_again == str(run_dir) and scalars(run_dir)["eval/score"] == before["eval/score"]


def test_a_resumed_run_wants_the_data_it_began_with(tmp_path, capsys):
    rows = [json.dumps({"prompt": f"{i:02d}", "reference": "1"}) for i in range(40)]
    files = [tmp_path / "data.jsonl", tmp_path / "eval.jsonl"]
    for file in files:
        file.write_text("\n".join(rows))
    flags = ["--dataset", files[0], "--eval-dataset", files[1], "--output-dir", tmp_path / "runs"]
    run_main(reinforce_lm, *FEW, *flags)
    (run_dir,) = (tmp_path / "runs").iterdir()
    for file in files:
        file.write_text("\n".join(rows[1:] + rows[:1]))
        error = error_of(capsys, reinforce_lm, "--resume", run_dir, "--total-episodes", 96)
        assert "--dataset, --eval-dataset: expected the prompts that" in error and "data.jsonl" in error
        file.write_text("\n".join(rows))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_is_evaluated_on_other_prompts_without_training(script, tmp_path, model_folder, capsys, monkeypatch):
    folder, asked = model_folder(), []
    rows = [{"prompt": f"{i}{i}", "reference": str(i)} for i in range(10)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "def fn(prompts, responses, reference, ended):\n"
        "    return [float(r) for r in reference], {'end': [float(e) for e in ended]}\n"
    )
    rollout = common.rollout

    def recording_rollout(model, ids, *rest, **settings):
        asked.extend(ids.tolist())
        return rollout(model, ids, *rest, **settings)

    monkeypatch.setattr(common, "rollout", recording_rollout)
    flags = ["--model", folder, "--eval-dataset", tmp_path / "eval.jsonl", "--total-episodes", 0, "--eval-size", 7]
    flags += ["--reward", f"{tmp_path}/mine.py:fn", "--output-dir", tmp_path / "runs", "--device", "cpu"]
    run_main(importlib.import_module(script), *flags)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert asked == tokenizer([row["prompt"] for row in rows[:7]]).input_ids
    final = final_line(capsys.readouterr().out)
    assert final["eval_score"] == final["eval_score_before"] == "3.000" and final["episodes"] == "0"
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert list(scalars(run_dir)) == ["eval/score", "eval/end"]
    assert not (run_dir / "model").exists()


def test_parts_of_a_reward_are_logged(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def fn(prompts, responses, num_tokens, **columns):\n    return [0.0] * len(responses), {'n': num_tokens}\n"
    )
    run_main(reinforce_lm, *FEW, "--reward", f"{tmp_path}/mine.py:fn", "--output-dir", tmp_path / "runs")
    (run_dir,) = (tmp_path / "runs").iterdir()
    logged = scalars(run_dir)
    assert logged["reward/n"] == logged["objective/response_length"] and len(logged["eval/n"]) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_saved_is_the_float32_policy(script, tmp_path):
    run_main(importlib.import_module(script), *FEW, "--dtype", "bfloat16", "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    trained = common.load_checkpoint(run_dir)["policy"]["weights"]
    saved = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype="auto").state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in saved.items())
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())


def test_models_that_do_not_fit_are_refused(tmp_path, model_folder, capsys):
    folder = Path(model_folder("llama", tie_word_embeddings=False))
    flags = [*FEW, "--model", folder, "--output-dir", tmp_path / "runs"]
    weights = load_file(folder / "model.safetensors")
    common.character_tokenizer("0123456789a").save_pretrained(folder)
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{c}", "reference": ""}}\n' for c in "0123456789a"))
    error = error_of(capsys, reinforce_lm, *flags, "--dataset", tmp_path / "data.jsonl")
    assert "--model: expected a tokenizer of the 11 ids that the model has, found 'id 11 in a prompt'" in error
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "all weights of the model" in (error := error_of(capsys, reinforce_lm, *flags)) and "lm_head" in error
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "--model: expected `tiny` or a checkpoint with a tokenizer" in error_of(capsys, reinforce_lm, *flags)


def test_a_saved_model_is_whole_or_not_there(tmp_path, model_folder):
    folder, tokenizer = model_folder(), common.character_tokenizer("01")
    args, weights = reinforce_lm.Args(model=folder), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    args.response_length = 2

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    for old in (False, True):
        with pytest.raises(common.InputError, match="No space left"):
            common.save_model(args, Broken(), [[1]], weights, tmp_path / "model")
        assert (tmp_path / "model").exists() == old
        common.save_model(args, tokenizer, [[1]], weights, tmp_path / "model")
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("model")) == ["model"]


def test_a_disk_that_is_full_for_tensorboard_is_one_line(tmp_path, monkeypatch, capsys):
    write, calls = LocalFileSystem._write, []

    def full(self, filename, *rest):
        calls.append(filename)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        write(self, filename, *rest)

    monkeypatch.setattr(LocalFileSystem, "_write", full)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    with pytest.raises(SystemExit):
        run_main(reinforce_lm, *FEW[2:], "--total-episodes", 3200, "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("iteration ")]
    assert lines == [f"error: [Errno 28] No space left on device ({run_dir})"]


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(common, "rollout", full)
    error = error_of(capsys, reinforce_lm, *FEW, "--output-dir", tmp_path)
    assert "--micro-batch-size" in error and "Tried to allocate 2 GiB" in error


def test_the_schedule_of_checkpoints(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(common, "save_checkpoint", lambda run_dir, iteration, state: saved.append(iteration))
    for every in (2, 5, 0):
        run_main(reinforce_lm, *FEW[2:], "--total-episodes", 160, "--save-every", every, "--output-dir", tmp_path)
    assert saved == [2, 4, 5, 5]


def test_a_nearly_deterministic_policy_is_trained_by_trpo(tmp_path, capsys):
    run_main(trpo_lm, *FEW, "--temperature", 0.01, "--output-dir", tmp_path)
    assert final_line(capsys.readouterr().out)["episodes"] == "64"


def test_a_resumed_run_says_whose_code_it_runs(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def fn(prompts, responses, reference):\n    return [0.0] * len(responses)\n")
    run_main(reinforce_lm, *FEW, "--reward", f"{tmp_path}/mine.py:fn", "--output-dir", tmp_path / "runs")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "runs code" not in capsys.readouterr().err
    run_main(reinforce_lm, "--resume", run_dir)
    assert f"--resume runs code: --reward {tmp_path}/mine.py:fn" in capsys.readouterr().err
