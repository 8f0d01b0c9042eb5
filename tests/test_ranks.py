"""Two gloo processes on the CPU against one."""

import json
import shutil
import subprocess
import sys
import time

import common
import reinforce_lm

import pytest
import torch
from helpers import ROOT, finish, fork, fork_ranks, run_main
from rank_worker import KINDS, RUNS, work, work_on, work_without_runs
from safetensors.torch import load_file
from test_runs import assert_same, scalars, texts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What one process saved, and what each of two did."""
    folder = tmp_path_factory.mktemp("ranks")
    two = fork_ranks(2, work, folder / "two", folder / "two_runs", output=folder / "output")
    finish(two, [folder / "output.0", folder / "output.1"])
    finish([fork(work, folder / "one", folder / "one_runs", output=folder / "output")], [folder / "output"])
    return torch.load(folder / "one.0"), [torch.load(folder / f"two.{rank}") for rank in range(2)], folder


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_take_the_step_of_one(run, saved):
    script, one, two = run.partition(" ")[0], saved[0][run], [rank[run] for rank in saved[1]]
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name]), f"ranks differ in {name}"
    first_update = 2 if script == "ppo_lm" else 1  # the critic's step and the policy's
    for rank in two:
        assert len(rank["gradients"]) == len(one["gradients"]) >= first_update
        for step, expected in zip(rank["gradients"][:first_update], one["gradients"]):
            assert (step - expected).norm() < (0.02 if "bfloat16" in run else 1e-5) * expected.norm()
    for rank in two:  # what beta is adapted to, before the first step and after it
        for found, expected in zip(rank["divergences"], one["divergences"], strict=True):
            assert found == pytest.approx(expected, rel=0.02, abs=1e-5)
    assert len(one["searches"]) == len(one["natural steps"]) == (script == "trpo_lm") + (run == "trpo_lm")
    if run == "trpo_lm half":  # other rows are in the products; but each rank has the same step
        assert torch.equal(two[0]["natural steps"][0], two[1]["natural steps"][0])
        return
    for step, expected in zip(two[0]["natural steps"][:1], one["natural steps"]):
        assert (step - expected).norm() < 1e-5 * expected.norm()
    for search, expected in zip(two[0]["searches"], one["searches"], strict=True):
        assert search == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_log_what_one_logs(run, saved):
    """Of the first update all metrics, and every evaluation, of seven rows; and samples that one rank has, too."""
    dirs = [next((saved[2] / runs / run).iterdir()) for runs in ("one_runs", "two_runs")]
    one, two = map(scalars, dirs)
    assert one.keys() == two.keys() and len(one["eval/score"]) == 2  # before and after
    for tag in one:
        found, expected = two[tag][0][1], one[tag][0][1]
        if not tag.startswith("time/") and not (run == "trpo_lm half" and tag.startswith("trpo/")):
            bound = dict(rel=0.05, abs=0.01) if "bfloat16" in run else dict(rel=1e-3, abs=2e-5)
            assert found == pytest.approx(expected, **bound), tag
    assert two.get("policy/ratio_first_minibatch", [(32, 1.0)])[0][1] == 1.0
    for logged in (one, two):  # tokens of all ranks
        tokens = logged["time/tokens_per_second"][0][1] * logged["time/iteration_seconds"][0][1]
        assert tokens == pytest.approx(32 * logged["objective/response_length"][0][1], rel=1e-3)
    one, two = [texts(run_dir)[0] for run_dir in dirs]
    assert len(one) == 7 and two == one[::2], "rank 0 shows the rows that it has"


def test_statistics_over_ranks_one_of_which_has_no_token(saved):
    one, two = saved[0]["statistics"], [rank["statistics"] for rank in saved[1]]
    torch.testing.assert_close(one["mean"], torch.tensor(3.0))
    for result in two:
        torch.testing.assert_close(result["mean"], one["mean"])
    torch.testing.assert_close(torch.cat([result["white"] for result in two]), one["white"])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What one, two and three processes saw without training: {world_size: [of each rank]}."""
    folder, seen = tmp_path_factory.mktemp("passes"), {}
    for world_size in (1, 2, 3):
        output = folder / f"output{world_size}"
        ranks = fork_ranks(world_size, work_without_runs, folder / f"{world_size}", output=output)
        finish(ranks, [f"{output}.{rank}" for rank in range(world_size)])
        seen[world_size] = [torch.load(folder / f"{world_size}.{rank}") for rank in range(world_size)]
    return seen


@pytest.mark.parametrize("kind, world_size", [*((kind, 2) for kind in KINDS), ("gpt2", 3)])
def test_gradients_products_and_copies_of_ranks_are_those_of_one(kind, world_size, seen):
    (one,) = seen[1]
    for rank in seen[world_size]:
        for name, expected in one[kind].items():
            expected, found = map(torch.as_tensor, (expected, rank[kind][name]))
            assert (found - expected).norm() < (1e-4 if name == "product" else 1e-5) * expected.norm(), name


def test_an_expert_of_one_rank_gets_its_gradient_and_one_of_none_zeros(seen):
    for ranks in seen.values():
        for rank in ranks:
            *used, weight, bias = rank["experts"]
            assert not weight.any() and not bias.any()
            for expert, (weight, bias) in enumerate(zip(used[::2], used[1::2], strict=True)):
                assert torch.equal(weight, torch.full((2, 3), expert + 1.0)) and torch.equal(bias, torch.ones(2))


def test_the_memory_of_a_rank_falls_with_their_number(seen):
    """Weights, gradients and two moments, 16 bytes for each parameter on one rank."""
    of = {world_size: max(rank["memory"]["bytes"] for rank in ranks) for world_size, ranks in seen.items()}
    parameters = seen[1][0]["memory"]["parameters"]
    assert of[1] > 15 * parameters and of[2] < 0.6 * of[1] and of[3] < 0.45 * of[1], of


def test_seed_rank_and_iteration_have_prompts_and_noise_of_their_own(tmp_path, monkeypatch):
    """Two ranks, one after the other in this process, each for three iterations, and another seed."""
    noise, prompts, rollout = [], [], common.rollout

    def recording_rollout(model, ids, *rest, generator=None, **settings):
        if generator is not None:
            noise.append(generator.initial_seed())
            prompts.append(ids.tolist())
        return rollout(model, ids, *rest, generator=generator, **settings)

    monkeypatch.setattr(common, "rollout", recording_rollout)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    flags = ["--total-episodes", 96, "--batch-size", 32, "--eval-size", 4, "--save-every", 0, "--eval-every", 0]
    for seed, rank in ((1, 0), (1, 1), (2, 0)):
        monkeypatch.setattr(common, "start_ranks", lambda device, rank=rank: (rank, 2, torch.device("cpu")))
        run_main(reinforce_lm, *flags, "--seed", seed, "--output-dir", tmp_path)
    assert len(noise) == 9 and len(set(noise)) == 9
    of_one_seed = [tuple(row) for rows in prompts[:6] for row in rows]
    assert len(set(of_one_seed)) == len(of_one_seed) == 2 * 3 * 4  # ranks x iterations x prompts, within one epoch


@pytest.mark.parametrize(
    "script, flags",
    [("ppo_lm", ["--update-epochs", 2]), ("trpo_lm", ["--lora-rank", 2, "--fvp-fraction", 1, "--cg-iters", 3])],
)
def test_a_checkpoint_is_that_of_any_number_of_ranks(script, flags, tmp_path):
    """A run of two ranks goes on bit for bit with two; with one it takes the same step, and the reverse."""

    def run(world_size, *flags):
        outputs = [tmp_path / f"output.{rank}" for rank in range(world_size)]
        finish(fork_ranks(world_size, work_on, script, *flags, output=tmp_path / "output"), outputs)
        return [output.read_text() for output in outputs]

    flags = [*flags, *"--num-minibatches 1 --batch-size 32 --eval-size 4 --save-every 1 --device cpu".split()]
    flags += ["--total-episodes", 64]
    last = {}
    for before in (2, 1):
        run(before, *flags, "--output-dir", tmp_path / str(before))
        (whole,) = (tmp_path / str(before)).iterdir()
        last[before] = common.load_checkpoint(whole)
        for after in (2, 1) if before == 2 else (2,):
            stopped = shutil.copytree(whole, tmp_path / f"{before}_{after}")
            (stopped / "checkpoint_00000002.pt").unlink()
            output = run(after, "--resume", stopped)
            noted = [f"{before} ranks before, {after} now" in text for text in output]
            assert noted == [before != after, False][:after]
            found = common.load_checkpoint(stopped)
            for name, expected in last[before].items():
                if before == after and name not in ("args", "carried"):
                    assert_same(expected, found[name])
                elif isinstance(expected, dict) and "weights" in expected:
                    for key, weight in expected["weights"].items():
                        torch.testing.assert_close(found[name]["weights"][key], weight, rtol=1e-3, atol=1e-4)
        saved = load_file(whole / "model" / "model.safetensors")
        weights = last[before]["policy"]["weights"]
        assert all(torch.equal(weights[name], weight) for name, weight in saved.items() if name in weights)
        assert script == "trpo_lm" or saved.keys() <= weights.keys()


def reward_file(tmp_path, death):
    """A reward that runs the statement `death` on rank 1, at its fifth call."""
    code = "import os\ncalls = []\ndef score(prompts, responses, **columns):\n    calls.append(1)\n"
    code += (
        f"    if os.environ['RANK'] == '1' and len(calls) == 5:\n        {death}\n    return [0.0] * len(responses)\n"
    )
    (tmp_path / "mine.py").write_text(code)
    return f"{tmp_path}/mine.py:score"


def test_torchrun_ends_when_a_rank_dies_and_its_run_can_be_resumed(tmp_path, monkeypatch):
    """As the README says, on two ranks of which rank 0 alone writes. The others end within a minute."""
    flags = ["--batch-size", 32, "--eval-size", 4, "--eval-every", 0, "--save-every", 1, "--total-episodes", 128]
    flags += ["--reward", reward_file(tmp_path, "os._exit(7)"), "--device", "cpu", "--output-dir", tmp_path / "runs"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "reinforce_lm.py"]
    for _ in range(3):  # torchrun may stop rank 0, rarely, before that has noticed anything
        start = time.time()
        result = subprocess.run([*map(str, command + flags)], cwd=ROOT, capture_output=True, text=True, timeout=150)
        assert result.returncode != 0 and time.time() - start < 60
        assert "exitcode  : 7" in result.stderr, result.stderr
        if "rank      : 1" in result.stderr:
            break
    else:
        pytest.fail(result.stderr)
    assert result.stdout.count("on 2 x cpu") == result.stdout.count("evaluation after 0 episodes") == 1
    *stopped, run_dir = sorted((tmp_path / "runs").iterdir())
    assert (run_dir / "checkpoint_00000001.pt").exists()
    reward_file(tmp_path, "pass")
    monkeypatch.setattr(common, "NUM_SORT_PROMPTS", 2**15)  # as in torchrun's processes
    ranks = fork_ranks(2, run_main, reinforce_lm, "--resume", run_dir, output=tmp_path / "resumed")
    finish(ranks, [tmp_path / "resumed.0", tmp_path / "resumed.1"])
    assert (tmp_path / "resumed.0").read_text().count("final eval_score") == 1
    assert "final" not in (tmp_path / "resumed.1").read_text()
    assert json.loads((run_dir / "summary.json").read_text())["episodes"] == 128
    outputs = [tmp_path / "whole.0", tmp_path / "whole.1"]
    finish(fork_ranks(2, run_main, reinforce_lm, *flags, output=tmp_path / "whole"), outputs)
    (whole,) = set((tmp_path / "runs").iterdir()) - {run_dir, *stopped}
    assert_same(common.load_checkpoint(whole)["policy"], common.load_checkpoint(run_dir)["policy"])


def test_a_reward_that_fails_on_one_rank_is_one_line_there(tmp_path):
    flags = ["--batch-size", 32, "--eval-size", 4, "--eval-every", 0, "--output-dir", tmp_path / "runs"]
    flags += ["--reward", reward_file(tmp_path, "return [None]"), "--device", "cpu"]
    waiting, failing = fork_ranks(2, run_main, reinforce_lm, *flags, output=tmp_path / "output")
    failing.join(60)
    waiting.kill()  # torchrun does that
    (line,) = [line for line in (tmp_path / "output.1").read_text().splitlines() if line.startswith("error")]
    assert failing.exitcode == 2 and "--reward" in line and "expected a list of 16 scores" in line
