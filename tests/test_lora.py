"""Adapters: what is trained, shared, saved and merged, and TRPO in their space."""

import importlib
import sys

import common
import trpo_lm

import peft
import pytest
import torch
from helpers import SCRIPTS, SHAPES, error_line, run_main, tiny_model
from test_runs import assert_same, scalars
from test_shared_prompts import ROWS, make_batch, plain_inputs
from transformers import AutoModelForCausalLM

SHORT = ["--total-episodes", 64, "--batch-size", 32, "--eval-size", 4, "--device", "cpu", "--save-every", 1]
SHORT += ["--lora-rank", 2, "--micro-batch-size", 16]
KINDS = ["gpt2", "gemma2"]
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])


def with_adapters(kind, rank=2, dtype="float32", **settings):
    """A model with adapters that have an effect."""
    model, args = tiny_model(kind, **settings), trpo_lm.Args(lora_rank=rank, dtype=dtype)
    common.add_adapters(model, args)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(settings.get("dtype", torch.float32)) if dtype == "float32" else model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_base_is_shared_and_stays_what_it_was(script, dtype, tmp_path, model_folder, monkeypatch):
    """Policy, reference, critic and, in bfloat16, the sampler; only adapters have gradients and optimizer states."""
    networks, optimizers, samplers = [], [], []
    prepare, copied, init = common.prepare, common.copy_network, torch.optim.AdamW.__init__

    def recording_copy(network, dtype=None):
        copy = copied(network, dtype)
        samplers.extend([copy] if dtype else [])
        return copy

    monkeypatch.setattr(common, "prepare", lambda *args: networks.append(prepare(*args)) or networks[-1])
    monkeypatch.setattr(common, "copy_network", recording_copy)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda s, *a, **k: optimizers.append(s) or init(s, *a, **k))
    folder = model_folder("llama")
    run_main(
        importlib.import_module(script), *SHORT, "--model", folder, "--dtype", dtype, "--output-dir", tmp_path / "runs"
    )
    reference, *critics, policy = networks
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in reference.parameters() if p.requires_grad) == 0
    if dtype == "float32" or script == "trpo_lm":
        assert torch.equal(reference(IDS).logits, base(IDS).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference(IDS).logits, base(IDS).logits), "the same as from a base in float32"
        assert not torch.equal(policy(IDS).logits, reference(IDS).logits)
    frozen = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    held = {p.dtype for name, p in frozen.items() if "base_layer" in name}
    assert held == {torch.bfloat16 if dtype == "bfloat16" and script != "trpo_lm" else torch.float32}
    assert all(reference.get_parameter(name) is p and p.grad is None for name, p in frozen.items())
    for critic in critics:
        shared = {name.replace("backbone.", "model."): p for name, p in critic.named_parameters()}
        assert all(shared[name] is p for name, p in frozen.items() if name in shared)
        assert not any(shared[name] is p for name, p in policy.named_parameters() if p.requires_grad and name in shared)
        assert sum(p.requires_grad for p in critic.parameters()) > 2
    assert len(samplers) == (dtype == "bfloat16")
    for sampler in samplers:
        assert all(sampler.get_parameter(name) is p for name, p in frozen.items() if p.dtype == torch.bfloat16)
        assert all(torch.equal(sampler.get_parameter(name), p.bfloat16()) for name, p in frozen.items())
        assert not any(p.numel() for name, p in sampler.named_parameters() if name not in frozen)
    for optimizer in optimizers:
        assert {id(p) for p in optimizer.state} <= {id(p) for n in networks for p in n.parameters() if p.requires_grad}
    (run_dir,) = (tmp_path / "runs").iterdir()
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    for name, layer in common.adapted_layers(policy).items():  # the saved base has not been rounded
        expected = base.get_submodule(name).weight + layer.get_delta_weight("default")
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=1e-6, atol=1e-6)
    assert set(common.load_checkpoint(run_dir)["policy"]["weights"]) == {
        n for n, p in policy.named_parameters() if p.requires_grad
    }


CASES = [("reinforce_lm", kind) for kind in SHAPES] + [(script, kind) for script in SCRIPTS[1:] for kind in KINDS]


@pytest.mark.parametrize("script, kind", CASES)
def test_runs_and_what_they_save(script, kind, tmp_path, model_folder, monkeypatch):
    """The merged model is that of the adapters, in plain transformers; the adapters load with peft."""
    policies, load = [], common.load_policy
    monkeypatch.setattr(common, "load_policy", lambda *args: policies.append(load(*args)) or policies[-1])
    folder = model_folder(kind)
    flags = [*SHORT, "--model", folder, "--activation-checkpointing", "--output-dir", tmp_path / "runs"]
    run_main(importlib.import_module(script), *flags)
    (run_dir,) = (tmp_path / "runs").iterdir()
    merged, base = [AutoModelForCausalLM.from_pretrained(path) for path in (run_dir / "model", folder)]
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run_dir / "adapter")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    trained = policies[0](IDS).logits
    torch.testing.assert_close(merged(IDS).logits, trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted(IDS).logits, trained, rtol=1e-4, atol=1e-4)
    assert (base(IDS).logits - trained).abs().max() > 1e-3
    if script == "trpo_lm":  # B = 0 at first, where only B has a gradient
        logged = scalars(run_dir)
        assert logged["trpo/accepted"][0][1] == 1.0
        for (_, kl), (_, limit) in zip(logged["trpo/kl"], logged["trpo/max_kl"]):
            assert kl <= limit


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(script, tmp_path):
    module, flags = importlib.import_module(script), [*SHORT, "--dtype", "bfloat16", "--no-anneal-lr"]
    flags += ["--no-anneal-max-kl", "--cg-iters", 3] if script == "trpo_lm" else []
    run_main(module, *flags, "--output-dir", tmp_path / "a")
    (stopped,) = (tmp_path / "a").iterdir()
    run_main(module, "--resume", stopped, "--total-episodes", 128)
    run_main(module, *flags, "--total-episodes", 128, "--output-dir", tmp_path / "b")
    (whole,) = (tmp_path / "b").iterdir()
    found, expected = map(common.load_checkpoint, (stopped, whole))
    for part in expected.keys() - {"args", "carried", "script", "iteration", "world_size", "data"}:
        assert_same(expected[part], found[part])
    assert found["carried"] == expected["carried"] and found["iteration"] == expected["iteration"] == 4


def test_fisher_products_are_those_of_the_dense_matrix_in_the_space_of_the_adapters():
    model = with_adapters("gpt2", dtype="float32").double()
    args = trpo_lm.Args(dtype="float32", response_length=4, samples_per_prompt=4, micro_batch_size=5)
    sequences, mask = make_batch(*ROWS["shuffled"])
    batch = sequences, mask, mask[:, -4:]
    parameters = {name: p.detach() for name, p in common.trained_parameters(model).items()}
    assert all("lora" in name for name in parameters)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)

    def logits(parameters):
        inputs = dict(attention_mask=mask, position_ids=positions)
        return torch.func.functional_call(model, parameters, (sequences,), inputs).logits[:, -5:-1][batch[2]]  # (T, V)

    jacobian = torch.func.jacrev(logits)(parameters)
    jacobian = torch.cat([part.flatten(2) for part in jacobian.values()], 2)  # (T, V, D)
    p = logits(parameters).softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    fisher = torch.einsum("tvd,tvw,twe->de", jacobian, middle, jacobian) / len(p)
    vector = torch.randn(fisher.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    micro_batches = common.micro_batches_of(torch.arange(len(mask)), batch[2], args)
    product = trpo_lm.fisher_vector_product(vector, model, batch, micro_batches, args)
    torch.testing.assert_close(product, fisher @ vector, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompts_are_shared_with_adapters_too(kind, monkeypatch):
    monkeypatch.setattr(common, "MIN_SAVED_TOKENS", 0)
    model, args = with_adapters(kind), trpo_lm.Args(dtype="float32", response_length=4)
    sequences, mask = make_batch(*ROWS["together"])
    found = []
    for inputs in (common.share_prompts, plain_inputs):
        monkeypatch.setattr(common, "share_prompts", inputs)
        logprobs, _ = common.policy_logprobs(model, sequences, mask, args)
        logprobs.where(mask[:, -4:], 0.0).sum().backward()
        found.append([p.grad.clone() for p in common.trained_parameters(model).values()])
        model.zero_grad()
    for shared, plain in zip(*found, strict=True):
        assert (shared - plain).norm() <= 1e-4 * plain.norm() + 1e-6


def test_learning_rates_are_ten_times_those_of_full_training():
    for script in map(importlib.import_module, SCRIPTS):
        full, adapters, given = [
            common.parse_flags(script.Args, script.TINY, ["--model", "x", *flags])[0]
            for flags in ([], ["--lora-rank", "8"], ["--lora-rank", "8", "--seed", "4"])
        ]
        for name, value in vars(full).items():
            expected = 10 * value if name.endswith("learning_rate") else value
            assert name == "lora_rank" or getattr(adapters, name) == pytest.approx(expected)
        assert given.seed == 4
    flags = ["--lora-rank", "8", "--learning-rate", "1e-3"]
    assert common.parse_flags(script.Args, script.TINY, ["--model", "x", *flags[:2]])[0].lora_rank == 8
    assert common.parse_flags(*[importlib.import_module("ppo_lm").Args, {}, flags])[0].learning_rate == 1e-3


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as stop:
        run_main(trpo_lm, *SHORT, "--output-dir", tmp_path)
    assert stop.value.code == 2 and "error: --lora-rank (pip install peft)" in error_line(capsys)
