"""What the scripts do on a GPU, on a CPU: pretend_gpu.py is a device that refuses tensors of the CPU and has graphs."""

import importlib
import re

import common
from reinforce_lm import Args

import pytest
import torch
from helpers import ROOT, finish, fork
from pretend_gpu import run_on_it
from test_runs import scalars

SIZES = ["--batch-size", 16, "--micro-batch-tokens", 240, "--rollout-tokens", 240]
SIZES += ["--response-length", 24, "--eval-size", 4, "--temperature", 0.8, "--device", "pretend"]
GREEDY = ["--baseline", "greedy", "--kl-ref-target", 3]
PENALTY = ["--surrogate", "kl_penalty", "--activation-checkpointing"]
CASES = [  # script, model, flags, largest gap
    ("reinforce_lm", "gpt2", ["--total-episodes", 32, *GREEDY, "--response-length", 22], 1e-5),
    ("ppo_lm", "qwen3", ["--total-episodes", 16, "--dtype", "bfloat16", "--target-kl", 0.01, *PENALTY], 0.1),
    (
        "trpo_lm",
        "qwen2",
        ["--total-episodes", 16, "--truncation", "bootstrap", "--fvp-fraction", 0.5, "--cg-iters", 3],
        1e-5,
    ),
]


@pytest.mark.parametrize("script, kind, flags, largest_gap", CASES)
def test_the_whole_loop_on_a_pretend_gpu(script, kind, flags, largest_gap, model_folder, tmp_path):
    flags = [*SIZES, *flags, "--model", model_folder(kind), "--output-dir", tmp_path / "runs"]
    output = tmp_path / "output"
    finish([fork(run_on_it, script, flags, output=output, start="forkserver")], [output])
    captures, replays = map(int, re.search(r"(\d+) captures, (\d+) replays", output.read_text()).groups())
    updates = flags[flags.index("--total-episodes") + 1] // 16
    if script == "reinforce_lm":
        assert captures == 3 * updates + 2, "rollouts, greedy rollouts and evaluations: none for the last 6 tokens"
    else:
        assert captures > 2 * updates + 2, "more than rollouts and evaluations: rows were dropped"
    assert replays > 15 * captures / 2, "most graphs serve many tokens"
    (run_dir,) = (tmp_path / "runs").iterdir()
    gaps = [gap for _, gap in scalars(run_dir)["policy/sampler_gap"]]
    assert len(gaps) == updates and max(gaps) < largest_gap, "replayed passes give the log-probabilities of the loss"


def test_on_a_gpu_cudnn_attention_is_off_tf32_is_on_and_passes_are_in_bfloat16(monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    *_, device, args = common.start_ranks(Args())
    assert device.type == "cpu" and args.dtype == "float32" and torch.backends.cuda.cudnn_sdp_enabled()
    assert args.micro_batch_tokens == 1024 and common.start_ranks(Args(micro_batch_tokens=7))[3].micro_batch_tokens == 7
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        *_, device, args = common.start_ranks(Args())
        assert device.type == "cuda" and args.dtype == "bfloat16" and args.micro_batch_tokens == 4096
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.matmul.allow_tf32
        assert common.start_ranks(Args(dtype="float32"))[3].dtype == "float32"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.matmul.allow_tf32 = False


def test_the_gpu_benchmark_measures_all_it_promises(monkeypatch, capsys):
    """On the CPU, with a tiny model; nothing is compiled, and the parts that run scripts are left out."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.throughput, "reset_peak", lambda device: None)  # collecting garbage takes most of the time
    monkeypatch.setattr(gpu.throughput, "run_case", lambda tree, case: gpu.throughput.measure(case))  # in this process
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    gpu.main(gpu.Args(parts=("card", "correctness", "steps", "rollout", "update"), small=True))
    output = capsys.readouterr().out
    assert "failed" not in output
    rows = {name: cells.split(" | ") for name, cells in re.findall(r"^\| (.*?) \| (.+) \|$", output, re.M)}
    gradient, fisher_product, equal_tokens, _ = map(float, rows["float32"])
    assert gradient < 1e-6 and fisher_product < 1e-6 and equal_tokens == 1, "the CPU against the CPU"
    assert 1e-4 < float(rows["bfloat16"][0]) < 0.05
    for change in ("pass, one mask", "pass, one mask, compiled layers"):
        assert float(rows[change][5]) < 0.005, "another way to the same logits"
    updates = [float(cells[5]) for name, cells in rows.items() if "micro-batch" in name]  # those of float32
    assert len(updates) == 2 and len(set(updates)) == 1 and updates[0] > 0, "all have one gradient"
    assert {"ragged", "ragged, 8 times as many, all at once", "sampling, compiled"} <= set(rows)
