"""Two gloo processes on the CPU against one."""

import functools
import json
import shutil
import subprocess
import sys

import common
import reinforce_lm

import pytest
import torch
from helpers import ROOT, finish, fork, fork_ranks, run_main
from rank_worker import KINDS, PARTS, RUNS, work, work_on, work_without_runs
from safetensors.torch import load_file
from test_runs import assert_same, samples, scalars


def digits(folder):
    """A data set of 80 prompts with one to nine digits."""
    prompts = [str(10**8 * 7 // (i + 3))[: 1 + i % 9] for i in range(80)]
    rows = [json.dumps(dict(prompt=prompt, reference="".join(sorted(prompt)))) for prompt in prompts]
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What one process saved, and what each of two did."""
    folder = tmp_path_factory.mktemp("ranks")
    data = digits(folder)
    two = fork_ranks(2, work, folder / "two", folder / "two_runs", data, output=folder / "output")
    finish(two, [folder / "output.0", folder / "output.1"])
    finish([fork(work, folder / "one", folder / "one_runs", data, output=folder / "output")], [folder / "output"])
    return torch.load(folder / "one.0"), [torch.load(folder / f"two.{rank}") for rank in range(2)], folder


def assert_close(found, expected, tolerance):
    assert expected.norm() > 1e-3 and (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_take_the_steps_of_one(run, saved):
    """In the second update, too, where the KL to the reference and the values are no longer 0."""
    one, two = saved[0][run], [rank[run] for rank in saved[1]]
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name]), f"ranks differ in {name}"
    assert one["ratios"] == two[0]["ratios"] == [1.0, 1.0] * ("ppo" in run)
    is_half = run == "trpo_lm half"  # other rows are in the products, but each rank has the same step
    assert not is_half or torch.equal(two[0]["natural_steps"][0], two[1]["natural_steps"][0])
    for rank in two:
        assert len(rank["gradients"]) == len(one["gradients"]) >= (4 if "ppo" in run else 2)
        assert len(rank["natural_steps"]) == len(one["natural_steps"]) == 2 * ("trpo" in run)
        for found, expected in list(zip(rank["gradients"], one["gradients"]))[: 3 if is_half else None]:
            assert_close(found, expected, 0.02 if "bfloat16" in run else 2e-5)
        if not is_half:
            for found, expected in zip(rank["natural_steps"], one["natural_steps"]):
                assert_close(found, expected, 2e-5)
            for found, expected in zip(rank["searches"], one["searches"], strict=True):
                assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_log_what_one_logs(run, saved):
    """Metrics of both updates and evaluations, of seven rows; and the samples that rank 0 has, too."""
    one_dir, two_dir = [next((saved[2] / runs / run).iterdir()) for runs in ("one_runs", "two_runs")]
    one, two = scalars(one_dir), scalars(two_dir)
    assert one.keys() == two.keys() and (PARTS[1] not in RUNS[run] or "eval/prompt_length" in one)
    is_half = run == "trpo_lm half"
    for tag in one:
        for i in range(1 if is_half else 2):
            if not tag.startswith("time/") and not (is_half and tag.startswith("trpo/")):
                bound = dict(rel=0.05, abs=0.01) if "bfloat16" in run else dict(rel=1e-3, abs=2e-6)
                assert two[tag][i][1] == pytest.approx(one[tag][i][1], **bound), tag
    assert abs(one["objective/kl_ref"][1][1]) > 1e-4 and len(one["eval/score"]) == 2
    for logged in (one, two):
        tokens = logged["time/tokens_per_second"][0][1] * logged["time/iteration_seconds"][0][1]  # of all ranks
        assert tokens == pytest.approx(32 * logged["objective/response_length"][0][1], rel=1e-3)
    for episode in (0,) if is_half else (0, 32, 64):
        one, two = [[line for line in samples(run) if line["episode"] == episode] for run in (one_dir, two_dir)]
        train, evaluated = [[line for line in one if line["split"] == split] for split in ("train", "eval")]
        assert two == train + evaluated[::2] and len(train) + len(evaluated) in (4, 7, 11)


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
def test_gradients_and_products_of_ranks_are_those_of_one(kind, world_size, seen):
    (one,) = seen[1]
    for rank in seen[world_size]:
        for name, expected in one[kind].items():
            expected, found = map(torch.as_tensor, (expected, rank[kind][name]))
            assert (found - expected).norm() < (1e-4 if name == "product" else 1e-5) * expected.norm(), name


def test_an_expert_of_one_rank_gets_its_gradient_and_one_of_none_zeros(seen):
    for ranks in (seen[2], seen[3]):
        for rank in ranks:
            *used, weight, bias = rank["experts"]
            assert not weight.any() and not bias.any()
            for expert, (weight, bias) in enumerate(zip(used[::2], used[1::2], strict=True)):
                assert torch.equal(weight, torch.full((2, 3), expert + 1.0)) and torch.equal(bias, torch.ones(2))


def test_seed_rank_and_iteration_have_prompts_and_noise_of_their_own(tmp_path, monkeypatch):
    """Two ranks, one after the other in this process, each for three iterations, and another seed."""
    noise, prompts, rollout = [], [], common.rollout

    def recording_rollout(model, ids, *rest):
        *_, generator, _ = rest
        if generator is not None:
            noise.append(generator.initial_seed())
            prompts.append(ids.tolist())
        return rollout(model, ids, *rest)

    monkeypatch.setattr(common, "rollout", recording_rollout)
    monkeypatch.setattr(common, "try_model", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    flags = ["--total-episodes", 96, "--batch-size", 32, "--eval-size", 4, "--save-every", 0, "--eval-every", 0]
    for seed, rank in ((1, 0), (1, 1), (2, 0)):
        monkeypatch.setattr(common, "start_ranks", lambda args, rank=rank: (rank, 2, torch.device("cpu"), args))
        run_main(reinforce_lm, *flags, "--seed", seed, "--output-dir", tmp_path)
    assert len(noise) == 9 and len(set(noise)) == 9
    of_one_seed = [tuple(row) for rows in prompts[:6] for row in rows]
    assert len(set(of_one_seed)) == len(of_one_seed) == 2 * 3 * 4  # ranks x iterations x prompts, within one epoch


@pytest.mark.parametrize(
    "script, flags",
    [
        ("ppo_lm", ["--update-epochs", 2]),
        ("trpo_lm", ["--lora-rank", 2, "--fvp-fraction", 1, "--cg-iters", 3, "--no-anneal-max-kl"]),
    ],
)
def test_a_checkpoint_is_that_of_any_number_of_ranks(script, flags, tmp_path, monkeypatch):
    """Two ranks go on bit for bit with two; one takes the same step as two, and two go on from there."""
    monkeypatch.setattr(common, "save_checkpoint", functools.partial(common.save_checkpoint, keep=9))

    def run(world_size, *flags):
        outputs = [tmp_path / f"output.{rank}" for rank in range(world_size)]
        finish(fork_ranks(world_size, work_on, script, *flags, output=tmp_path / "output"), outputs)

    def resume(world_size, stopped, iteration):
        """Do one more iteration than the checkpoint `iteration` of a run; returns the new run and its checkpoint."""
        run_dir = tmp_path / f"{stopped.name}_{world_size}"
        run_dir.mkdir()
        shutil.copy(stopped / f"checkpoint_{iteration:08d}.pt", run_dir)
        run(world_size, "--resume", run_dir, "--total-episodes", 32 * (iteration + 1))
        return run_dir, common.load_checkpoint(run_dir)

    flags = [*flags, *"--num-minibatches 1 --batch-size 32 --eval-size 4 --save-every 1 --device cpu".split()]
    run(
        2,
        *flags,
        "--no-anneal-lr",
        "--dataset",
        digits(tmp_path),
        "--total-episodes",
        96,
        "--output-dir",
        tmp_path / "runs",
    )
    (whole,) = (tmp_path / "runs").iterdir()
    second, third = [torch.load(whole / f"checkpoint_0000000{i}.pt") for i in (2, 3)]
    _, on_two = resume(2, whole, 1)
    run_dir, on_one = resume(1, whole, 1)
    _, on_two_again = resume(2, run_dir, 2)
    for name in ("weights", "optimizers", "sizes", "digest", "iteration"):
        assert_same(second[name], on_two[name])
    for found, expected in ((on_one, second), (on_two_again, third)):
        assert found.keys() == expected.keys() and found["iteration"] == expected["iteration"]
        assert found["weights"].keys() == expected["weights"].keys()
        for network in found["weights"]:
            found_weights, weights = [checkpoint["weights"][network] for checkpoint in (found, expected)]
            assert found_weights.keys() == weights.keys()
            for key, weight in weights.items():
                torch.testing.assert_close(found_weights[key], weight, rtol=1e-3, atol=1e-4)
    if script == "trpo_lm":
        saved = load_file(whole / "adapter" / "adapter_model.safetensors")
        names = {f"base_model.model.{name.replace('.default', '')}": name for name in third["weights"]["policy"]}
    else:
        saved = load_file(whole / "model" / "model.safetensors")
        names = {name: name for name in third["weights"]["policy"]}
    assert saved.keys() == names.keys()
    assert all(torch.equal(third["weights"]["policy"][names[name]], weight) for name, weight in saved.items())


def reward_file(folder, on_rank_1, first=5):
    """A reward that runs the statement `on_rank_1` there, from its call number `first` on."""
    code = "import os\ncalls = []\ndef score(prompts, responses, **columns):\n    calls.append(1)\n"
    code += f"    if os.environ['RANK'] == '1' and len(calls) >= {first}:\n        {on_rank_1}\n"
    (folder / "mine.py").write_text(code + "    return [0.0] * len(responses)\n")
    return f"{folder}/mine.py:score"


def test_torchrun_ends_when_a_rank_dies_and_its_run_can_be_resumed(tmp_path):
    """As the README says, on two ranks of which rank 0 alone writes."""
    flags = ["--batch-size", 32, "--eval-size", 4, "--eval-every", 0, "--save-every", 1, "--total-episodes", 128]
    flags += ["--reward", reward_file(tmp_path, "os._exit(7)"), "--dataset", digits(tmp_path), "--device", "cpu"]
    flags += ["--output-dir", tmp_path / "runs"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "reinforce_lm.py"]
    for _ in range(3):  # torchrun may stop rank 0, rarely, before that has noticed anything
        result = subprocess.run([*map(str, command + flags)], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode != 0
        assert "exitcode  : 7" in result.stderr, result.stderr
        if "rank      : 1" in result.stderr:
            break
    else:
        pytest.fail(result.stderr)
    assert result.stdout.count("on 2 x cpu") == result.stdout.count("evaluation after 0 episodes") == 1
    *stopped, run_dir = sorted((tmp_path / "runs").iterdir())
    assert (run_dir / "checkpoint_00000001.pt").exists()
    reward_file(tmp_path, "pass")
    ranks = fork_ranks(2, run_main, reinforce_lm, "--resume", run_dir, output=tmp_path / "resumed")
    finish(ranks, [tmp_path / "resumed.0", tmp_path / "resumed.1"])
    assert (tmp_path / "resumed.0").read_text().count("final eval_score") == 1
    assert "final" not in (tmp_path / "resumed.1").read_text()
    assert json.loads((run_dir / "summary.json").read_text())["episodes"] == 128
    outputs = [tmp_path / "whole.0", tmp_path / "whole.1"]
    finish(fork_ranks(2, run_main, reinforce_lm, *flags, output=tmp_path / "whole"), outputs)
    (whole,) = set((tmp_path / "runs").iterdir()) - {run_dir, *stopped}
    assert_same(common.load_checkpoint(whole)["weights"], common.load_checkpoint(run_dir)["weights"])


PARTS_THERE = "return [0.0] * len(responses), {'part': [0.0] * len(responses)}"
WRONG = [
    ("return [0.0]", 3, "expected a list of 16 finite scores, found [0.0]"),
    (PARTS_THERE, 3, "expected the parts of its first call, set(), found {'part'}"),
]


@pytest.mark.parametrize("on_rank_1, first, expected", WRONG, ids=["scores", "parts"])
def test_a_reward_that_fails_on_one_rank_is_one_line_there(on_rank_1, first, expected, tmp_path):
    flags = ["--batch-size", 32, "--eval-size", 4, "--eval-every", 0, "--output-dir", tmp_path / "runs"]
    flags += ["--reward", reward_file(tmp_path, on_rank_1, first), "--device", "cpu"]
    waiting, failing = fork_ranks(2, run_main, reinforce_lm, *flags, output=tmp_path / "output")
    failing.join(120)
    for process in (waiting, failing):  # torchrun does that
        process.kill()
    assert failing.exitcode == 1, "it waits for ever"
    (line,) = [line for line in (tmp_path / "output.1").read_text().splitlines() if line.startswith("error")]
    assert "--reward" in line and expected in line
