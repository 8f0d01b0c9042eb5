"""What the scripts do on a GPU, on a CPU: pretend_gpu.py is a device that refuses tensors of the CPU and has graphs."""

import importlib
import re

import common

import pytest
import torch
from helpers import ROOT, finish, fork
from pretend_gpu import run_on_it
from test_runs import scalars

SIZES = ["--batch-size", 16, "--micro-batch-size", 8, "--rollout-batch-size", 8]
SIZES += ["--response-length", 24, "--eval-size", 4, "--temperature", 0.8, "--device", "pretend"]
GREEDY = ["--baseline", "greedy", "--kl-target", 3]
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


def test_cudnn_attention_is_off_and_tf32_is_on():
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    common.start_ranks("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.matmul.allow_tf32


def test_the_gpu_benchmark_measures_all_it_promises(monkeypatch, capsys):
    """On the CPU, with a tiny model; the parts that start other processes or compile are left out."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    throughput = importlib.import_module("throughput")
    parts = ("card", "correctness", "rollout", "update")
    sizes = dict(shape="tiny", device="cpu", gpu_prompts=1, gpu_length=8, rounds=1)
    throughput.main(throughput.Args(sections=("gpu",), gpu_parts=parts, **sizes))
    output = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|", output, re.M))
    assert "failed" not in output and "not finite | none" in output
    exact = [
        f"{name}, {precision}, against the CPU"
        for name in ("gradient", "Fisher product")
        for precision in ("float32", "TF32")
    ]
    assert all(float(rows[name]) < 1e-6 for name in exact)
    assert float(rows["w'Fv - v'Fw, float32, relative to v'Fv"]) < 1e-5
    assert float(rows["sampler gap in nats, bfloat16, without a CUDA graph"]) < 0.01
    for name in (
        "copy, read and written",
        "`common.rollout`, ragged",
        "`generate`, static cache",
        "padded",
        "--lora-rank 8",
    ):
        assert re.match(r"[\d.,]+", rows[name])
