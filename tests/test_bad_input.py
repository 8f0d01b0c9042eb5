"""Bad input is one line on standard error that names the flag or the row, exit code 2, before any training."""

import json
import subprocess
import sys

import common
import ppo_lm
import reinforce_lm
import trpo_lm

import pytest
import torch
from helpers import ROOT, run_main

GOOD_ROW = {"prompt": "ab", "reference": "ba"}


def message_of(capsys, monkeypatch, *flags, script=reinforce_lm):
    """The one line that a bad command prints. Fails if a single response is sampled before."""
    monkeypatch.setattr(common, "rollout", lambda *_, **__: pytest.fail("sampled before the check"))
    with pytest.raises(SystemExit) as stop:
        run_main(script, "--device", "cpu", *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    if "For full helptext" not in error:  # from tyro, about what does not parse
        assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--dataset", "nowhere.jsonl"], ["--dataset", "nowhere.jsonl"]),
        (["--dataset", "no-such-set"], ["--dataset", "sort", "datasets", "no-such-set"]),
        (["--reward", "no-such-reward"], ["--reward", "match, exact, rouge, bleu", "no-such-reward"]),
        (["--reward", "missing.py:fn"], ["--reward", "an existing FILE.py", "missing.py"]),
        (["--model", "/no/such/model"], ["--model", "/no/such/model"]),
        (["--baseline", "critic"], ["--baseline", "leave_one_out", "critic"]),
        (["--batchsize", "8"], ["--batchsize"]),
        (["--seed", "x"], ["--seed", "'x'"]),
        (["--dtype", "float16"], ["--dtype", "bfloat16", "float16"]),
        (["--batch-size", "30"], ["--batch-size", "a multiple of 4 (--samples-per-prompt times ranks)", "30"]),
        (["--batch-size", "0"], ["--batch-size", "a positive number", "0"]),
        (["--micro-batch-size", "0"], ["--micro-batch-size", "a positive number", "0"]),
        (["--rollout-batch-size", "-1"], ["--rollout-batch-size", "a positive number", "-1"]),
        (["--samples-per-prompt", "1"], ["--samples-per-prompt", "leave_one_out", "1"]),
        (["--samples-per-prompt", "0"], ["--samples-per-prompt", "a positive number", "0"]),
        (["--total-episodes", "100"], ["--total-episodes", "--batch-size", "100"]),
        (["--response-length", "0"], ["--response-length", "a positive number", "0"]),
        (["--prompt-length", "-1"], ["--prompt-length", "a positive number", "-1"]),
        (["--prompt-length", "4"], ["--prompt-length", "row 1", "1 to 4 tokens", "5"]),
        (["--temperature", "0"], ["--temperature", "a positive number", "0"]),
        (["--temperature", "nan"], ["--temperature", "a finite number", "nan"]),
        (["--learning-rate", "0"], ["--learning-rate", "a positive number", "0"]),
        (["--learning-rate", "-1e-3"], ["--learning-rate", "a positive number", "-0.001"]),
        (["--learning-rate", "inf"], ["--learning-rate", "a finite number", "inf"]),
        (["--max-grad-norm", "0"], ["--max-grad-norm", "a positive number", "0"]),
        (["--seed", "9" * 20], ["--seed", "63 bits"]),
        (["--ema-decay", "1.1"], ["--ema-decay", "0 to 1", "1.1"]),
        (["--gamma", "1.5"], ["--gamma", "at most 1", "1.5"]),
        (["--kl-coef", "-0.1"], ["--kl-coef", "0 or more", "-0.1"]),
        (["--kl-coef", "0", "--kl-target", "6"], ["--kl-target", "--kl-coef", "0"]),
        (["--eval-size", "0"], ["--eval-size", "a positive number", "0"]),
        (["--seed", "-1"], ["--seed", "0 or more", "-1"]),
        (["--kl-target", "6", "--kl-horizon", "51"], ["--kl-horizon", "at least 52", "51"]),
        (["--output-dir", "/dev/null/runs"], ["--output-dir"]),
        (["--device", "tpu"], ["--device", "auto", "tpu"]),
    ],
)
def test_bad_flags(flags, parts, capsys, monkeypatch):
    error = message_of(capsys, monkeypatch, *flags)
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    "script, flags, part",
    [
        (ppo_lm, ["--clip-coef", "0"], "--clip-coef: expected more than 0 and at most 1, found 0.0"),
        (ppo_lm, ["--clip-coef", "1.5"], "--clip-coef: expected more than 0 and at most 1, found 1.5"),
        (ppo_lm, ["--update-epochs", "0"], "--update-epochs: expected a positive number, found 0"),
        (ppo_lm, ["--num-minibatches", "257"], "--num-minibatches: expected at most the 256 responses of a rank"),
        (ppo_lm, ["--gae-lambda", "1.5"], "--gae-lambda: expected 0 to 1, found 1.5"),
        (ppo_lm, ["--target-kl", "-1"], "--target-kl: expected 0 or more, found -1.0"),
        (ppo_lm, ["--penalty-target", "0"], "--penalty-target: expected a positive number, found 0.0"),
        (ppo_lm, ["--critic-learning-rate", "0"], "--critic-learning-rate: expected a positive number, found 0.0"),
        (ppo_lm, ["--surrogate", "square"], "--surrogate"),
        (trpo_lm, ["--max-kl", "0"], "--max-kl: expected a positive number, found 0.0"),
        (trpo_lm, ["--cg-iters", "0"], "--cg-iters: expected a positive number, found 0"),
        (trpo_lm, ["--cg-damping", "-0.1"], "--cg-damping: expected 0 or more, found -0.1"),
        (trpo_lm, ["--backtrack-coeff", "2"], "--backtrack-coeff: expected more than 0 and at most 1, found 2.0"),
        (trpo_lm, ["--backtrack-coeff", "0"], "--backtrack-coeff: expected more than 0 and at most 1, found 0.0"),
        (trpo_lm, ["--fvp-fraction", "0"], "--fvp-fraction: expected more than 0 and at most 1, found 0.0"),
        (trpo_lm, ["--fvp-fraction", "1.5"], "--fvp-fraction: expected more than 0 and at most 1, found 1.5"),
        (trpo_lm, ["--accept-ratio", "0"], "--accept-ratio: expected more than 0 and at most 1, found 0.0"),
        (trpo_lm, ["--truncation", "maybe"], "--truncation"),
    ],
)
def test_bad_flags_of_one_script(script, flags, part, capsys, monkeypatch):
    assert part in message_of(capsys, monkeypatch, *flags, script=script)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys, monkeypatch):
    assert "--device" in message_of(capsys, monkeypatch, "--device", "cuda")


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text, flags, parts",
    [
        ("", [], ["--dataset", "row 1", "a JSON object"]),
        (lines(GOOD_ROW, "{broken"), [], ["--dataset", "row 2", "{broken"]),
        (
            lines(GOOD_ROW, r'{"prompt": "half an emoji \ud83d", "reference": ""}'),
            [],
            ["--dataset", "row 2", "surrogates"],
        ),
        (lines(GOOD_ROW, '{"prompt": "a", "reference": ' + "9" * 5000 + "}"), [], ["--dataset", "row 2", "digits"]),
        (lines(GOOD_ROW, "[1]"), [], ["--dataset", "row 2", "a JSON object"]),
        (json.dumps([GOOD_ROW] * 1000), [], ["--dataset", "row 1", "a JSON object"]),
        (lines(GOOD_ROW, {"reference": "b"}), [], ["--prompt-column", "row 2", "'prompt'"]),
        (lines(GOOD_ROW, {"prompt": "b"}), [], ["--reference-column", "row 2", "'reference'"]),
        (lines(GOOD_ROW, GOOD_ROW | {"more": 1}), [], ["row 2", "more"]),
        (lines(GOOD_ROW, {"prompt": "b", "reference": None}), [], ["--reward match ('b')", "None"]),
        (lines({"prompt": "a", "q": ""}), ["--prompt-column", "q"], ["row 1", "not empty"]),
        (lines(GOOD_ROW), ["--prompt-column", "question"], ["--prompt-column", "row 1", "'question'"]),
        (lines(GOOD_ROW), ["--reference-column", "answer"], ["--reference-column", "row 1", "'answer'"]),
        (lines(GOOD_ROW, GOOD_ROW | {"prompt": ""}), [], ["row 2", "not empty"]),
        (lines(GOOD_ROW, GOOD_ROW | {"prompt": []}), [], ["row 2", "not empty"]),
        (lines(GOOD_ROW, GOOD_ROW | {"prompt": 5}), [], ["row 2", "text or a list of messages", "5"]),
        (lines(GOOD_ROW, GOOD_ROW | {"prompt": ["a"]}), [], ["row 2", "text or a list of messages"]),
        (lines(*[GOOD_ROW] * 20), [], ["--dataset", "held out"]),
        (lines({"prompt": "a"}, {"prompt": "b"}), [], ["--reward", "reference"]),
        (
            lines(GOOD_ROW, {"prompt": "abab", "reference": "b"}),
            ["--prompt-length", 3],
            ["row 2", "1 to 3 tokens", "4"],
        ),
        (
            lines(GOOD_ROW, {"prompt": "ab" * 151, "reference": "b"}),  # not tokenized
            ["--prompt-length", 3],
            ["row 2", "at most 300 characters", "302"],
        ),
    ],
)
def test_bad_data(text, flags, parts, tmp_path, capsys, monkeypatch):
    (tmp_path / "data.jsonl").write_text(text)
    error = message_of(capsys, monkeypatch, "--dataset", tmp_path / "data.jsonl", *flags)
    for part in parts:
        assert part in error


def test_bad_held_out_data(tmp_path, capsys, monkeypatch):
    (tmp_path / "data.jsonl").write_text(lines(GOOD_ROW, "{broken"))
    error = message_of(capsys, monkeypatch, "--eval-dataset", tmp_path / "data.jsonl")
    assert "--eval-dataset" in error and "row 2" in error
    (tmp_path / "data.jsonl").write_text(lines(GOOD_ROW))
    (tmp_path / "eval.jsonl").write_text(lines({"prompt": "1"}))
    files = ["--dataset", tmp_path / "data.jsonl", "--eval-dataset", tmp_path / "eval.jsonl"]
    assert "--reward match ('1'): expected a text reference" in message_of(capsys, monkeypatch, *files)


def test_what_ranks_have_too_little_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "start_ranks", lambda device: (0, 2, torch.device("cpu")))
    flags = ["--batch-size", 16, "--total-episodes", 16, "--output-dir", tmp_path]
    error = message_of(capsys, monkeypatch, *flags, "--num-minibatches", 9, script=ppo_lm)
    assert "--num-minibatches: expected at most the 8 responses of a rank, found 9" in error
    error = message_of(capsys, monkeypatch, *flags, "--eval-size", 1)
    assert "--eval-size: expected a held-out prompt for each of the 2 ranks, found 1" in error


@pytest.mark.parametrize(
    "code, parts",
    [
        ("fn = 3", ["--reward", "a function 'fn'"]),
        ("def other(): pass", ["--reward", "a function 'fn'"]),
        ("1 / 0", ["--reward", "ZeroDivisionError", "mine.py:1"]),
        ("raise SystemExit", ["--reward", "SystemExit", "mine.py:1"]),
        ("def fn(prompts, responses): pass", ["--reward", "reference"]),
        ("def fn(prompts, responses, level, **columns): pass", ["--reward", "level"]),
    ],
)
def test_bad_reward_files(code, parts, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(code)
    error = message_of(capsys, monkeypatch, "--reward", f"{tmp_path}/mine.py:fn")
    for part in parts:
        assert part in error


def test_context_that_is_too_short(model_folder, capsys, monkeypatch):
    folder = model_folder()
    capsys.readouterr()
    error = message_of(capsys, monkeypatch, "--model", folder, "--response-length", 30)
    assert "--response-length" in error and "32 positions" in error and "35" in error


def test_resume_from_a_folder_without_a_checkpoint(tmp_path, capsys, monkeypatch):
    assert "--resume: expected a run directory" in message_of(capsys, monkeypatch, "--resume", tmp_path)
    (tmp_path / "checkpoint_00000001.pt").write_bytes(b"not a checkpoint")
    assert "--resume: could not read" in message_of(capsys, monkeypatch, "--resume", tmp_path)
    (tmp_path / "checkpoint_00000002.pt").write_bytes(b"nor this")
    error = message_of(capsys, monkeypatch, "--resume", tmp_path)
    assert f"could not read {tmp_path}/checkpoint_00000002.pt" in error


def test_a_real_process_ends_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "reinforce_lm.py", "--reward", "nothing", "--output-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: --reward")
    assert result.stdout == ""
