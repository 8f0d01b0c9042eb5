"""Two gloo processes on the CPU against one."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS


def run_ranks(world_size, out, *command):
    """Start `world_size` processes of rank_worker.py as torchrun would; return what each of them saved."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        if world_size > 1:
            environment |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        arguments = [
            sys.executable,
            str(ROOT / "tests" / "rank_worker.py"),
            command[0],
            str(out),
            *map(str, command[1:]),
        ]
        processes.append(
            subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in processes:
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output
    return [torch.load(f"{out}.{rank}") for rank in range(world_size)]


# One minibatch, and all rows in the products: random rows of each rank are other rows than those of the whole batch.
WHOLE_BATCH = {
    "reinforce_lm": [],
    "ppo_lm": ["--num-minibatches", 1],
    "trpo_lm": ["--num-minibatches", 1, "--fvp-fraction", 1],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_take_the_step_of_one(script, tmp_path):
    flags = ["--total-episodes", 64, "--batch-size", 32, "--response-length", 12, "--eval-size", 4, "--save-every", 0]
    flags += ["--kl-coef", 0.1, "--kl-target", 0.5, "--output-dir", tmp_path, *WHOLE_BATCH[script]]
    (one,) = run_ranks(1, tmp_path / "one", script, *flags)
    two = run_ranks(2, tmp_path / "two", script, *flags)
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name]), f"ranks differ in {name}"
    first_update = 2 if script == "ppo_lm" else 1  # the critic's step and the policy's
    for rank in two:
        for step, expected in zip(rank["gradients"][:first_update], one["gradients"][:first_update], strict=True):
            assert (step - expected).norm() < 1e-5 * expected.norm()
    for logged, expected in zip(two[0]["trpo"], one["trpo"], strict=True):
        assert logged == pytest.approx(expected, rel=1e-3)


def test_statistics_over_ranks_one_of_which_has_no_token(tmp_path):
    (one,) = run_ranks(1, tmp_path / "one", "statistics")
    two = run_ranks(2, tmp_path / "two", "statistics")
    torch.testing.assert_close(one["mean"], torch.tensor(3.0))
    for result in two:
        torch.testing.assert_close(result["mean"], one["mean"])
    torch.testing.assert_close(torch.cat([result["white"] for result in two]), one["white"])
