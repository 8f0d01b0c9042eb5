"""Two gloo processes on the CPU against one."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS


def start_ranks(world_size, out, runs_dir):
    """Start `world_size` processes of rank_worker.py as torchrun would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for rank in range(world_size):
        environment = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        if world_size > 1:
            environment |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        command = [sys.executable, str(ROOT / "tests" / "rank_worker.py"), str(out), str(runs_dir)]
        yield subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What one process saved, and what each of two did."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [*start_ranks(1, folder / "one", folder / "runs"), *start_ranks(2, folder / "two", folder / "runs")]
    for process in processes:
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output
    return torch.load(folder / "one.0"), [torch.load(folder / f"two.{rank}") for rank in range(2)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_take_the_step_of_one(script, saved):
    one, two = saved[0][script], [rank[script] for rank in saved[1]]
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name]), f"ranks differ in {name}"
    first_update = 2 if script == "ppo_lm" else 1  # the critic's step and the policy's
    for rank in two:
        assert len(rank["gradients"]) == len(one["gradients"]) >= first_update
        for step, expected in zip(rank["gradients"][:first_update], one["gradients"]):
            assert (step - expected).norm() < 1e-5 * expected.norm()
    assert len(one["searches"]) == (2 if script == "trpo_lm" else 0)
    for search, expected in zip(two[0]["searches"], one["searches"], strict=True):
        assert search == pytest.approx(expected, rel=1e-3)


def test_statistics_over_ranks_one_of_which_has_no_token(saved):
    one, two = saved[0]["statistics"], [rank["statistics"] for rank in saved[1]]
    torch.testing.assert_close(one["mean"], torch.tensor(3.0))
    for result in two:
        torch.testing.assert_close(result["mean"], one["mean"])
    torch.testing.assert_close(torch.cat([result["white"] for result in two]), one["white"])
