"""Adapters: what is trained, shared and saved, and TRPO in their space."""

import importlib
import shutil
import tempfile

import common
import trpo_lm

import peft
import pytest
import torch
from helpers import SCRIPTS, SHAPES, run_in, run_main, tiny_model
from safetensors.torch import load_file
from test_runs import FAST, assert_same, assert_same_checkpoints, scalars
from transformers import AutoModelForCausalLM

SHORT = ["--total-episodes", 64, "--batch-size", 32, "--eval-size", 4, "--device", "cpu", "--lora-rank", 2]
SHORT += ["--micro-batch-tokens", 160]  # several passes
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
EXPERTS = SHAPES["llama"] | dict(num_local_experts=4)


def with_adapters(kind, rank=2, **settings):
    """A model with adapters that have an effect."""
    folder = tempfile.mkdtemp()
    tiny_model(kind, **settings).save_pretrained(folder)
    args = trpo_lm.Args(model=folder, lora_rank=rank, dtype="float32", response_length=1)
    model = common.load_policy(args, None, [{"input_ids": [1]}])
    shutil.rmtree(folder)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("rank", [2, 64])
def test_alpha_is_32_whatever_the_rank(rank):
    """The change of a layer is 32 / rank times B A."""
    layer = with_adapters("llama", rank).model.layers[0].mlp.down_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), 32 / rank * product)


def ragged_batch():
    """Sequences (8, 6+3), attention mask and response mask: four responses of 1 to 3 tokens to each of two prompts."""
    generator = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(12, (2, 6), generator=generator), torch.randint(12, (8, 3), generator=generator)
    sequences, mask = torch.cat([prompts.repeat_interleave(4, 0), responses], 1), torch.ones(8, 9, dtype=torch.bool)
    mask[:4, :2] = False  # the first prompt has four tokens
    for i in range(8):
        mask[i, 7 + i % 3 :] = False
    return sequences, mask, mask[:, -3:]


def plain_logits(model, batch, parameters=None):
    """Of the tokens of the response mask (n, V), from one pass of all columns."""
    sequences, attention_mask, response_mask = batch
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    inputs = dict(input_ids=sequences, attention_mask=attention_mask, position_ids=positions)
    logits = torch.func.functional_call(model, parameters or {}, kwargs=inputs).logits
    return logits[:, -response_mask.shape[1] - 1 : -1][response_mask]


def trained_names(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_base_is_shared_and_stays_what_it_was(script, dtype, tmp_path, model_folder, monkeypatch):
    """By policy, sampler, reference and critic; only adapters have gradients, optimizer states and checkpoints."""
    networks, optimizers, samplers = [], [], []
    prepare, rollout, init = common.prepare, common.rollout, torch.optim.Adam.__init__
    monkeypatch.setattr(common, "prepare", lambda *a, **k: networks.append(prepare(*a, **k)) or networks[-1])
    monkeypatch.setattr(common, "rollout", lambda model, *a, **k: samplers.append(model) or rollout(model, *a, **k))
    monkeypatch.setattr(torch.optim.Adam, "__init__", lambda s, *a, **k: optimizers.append(s) or init(s, *a, **k))
    folder = model_folder("llama")
    flags = [*SHORT, "--model", folder, "--dtype", dtype, *FAST[script]]
    run_dir = run_in(tmp_path / "runs", script, *flags)
    reference, *critics, policy = networks
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert len(critics) == (script != "reinforce_lm") and all(sampler is policy for sampler in samplers)
    assert not trained_names(reference)
    if dtype == "float32" or script == "trpo_lm":
        assert torch.equal(reference(IDS).logits, base(IDS).logits)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = [network.model(IDS).last_hidden_state for network in (base, reference, policy)]
    assert torch.equal(hidden[0], hidden[1]), "the same as from a base in float32"
    assert not torch.equal(hidden[1], hidden[2])
    frozen = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    held = {p.dtype for name, p in frozen.items() if "base_layer" in name}
    assert held == {torch.bfloat16 if dtype == "bfloat16" and script != "trpo_lm" else torch.float32}
    assert all(reference.get_parameter(name) is p and p.grad is None for name, p in frozen.items())
    checkpoint = common.load_checkpoint(run_dir)
    assert checkpoint["weights"]["policy"].keys() == trained_names(policy)
    for critic in critics:
        shared = {name.replace("backbone.", "model."): p for name, p in critic.named_parameters()}
        assert all(shared[name] is p for name, p in frozen.items() if name in shared)
        assert not any(shared[name] is p for name, p in policy.named_parameters() if p.requires_grad and name in shared)
        trained = trained_names(critic)
        assert checkpoint["weights"]["critic"].keys() == trained
        assert {name for name in trained if "lora" not in name} == {"head.weight", "head.bias"} < trained
    assert len(optimizers) == {"reinforce_lm": 1, "ppo_lm": 2, "trpo_lm": 1}[script]
    for optimizer in optimizers:
        assert {id(p) for p in optimizer.state} <= {id(p) for n in networks for p in n.parameters() if p.requires_grad}
    saved = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    expected = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert len(saved) == len(expected) == 2 * 7 * 2 and not (run_dir / "model").exists()
    for name, weight in saved.items():
        name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(weight, expected[name])


CASES = [("reinforce_lm", kind, "float32") for kind in [*SHAPES, "mixtral"]]
CASES += [("reinforce_lm", "mixtral", "bfloat16"), ("ppo_lm", "gpt2", "float32"), ("trpo_lm", "gemma2", "float32")]


@pytest.mark.parametrize("script, kind, dtype", CASES)
def test_runs_and_what_they_save(script, kind, dtype, tmp_path, model_folder, monkeypatch, capsys):
    """The adapters load with peft, on the base that they name, and can be merged into it."""
    policies, load = [], common.load_policy
    monkeypatch.setattr(common, "load_policy", lambda *args: policies.append(load(*args)) or policies[-1])
    folder = model_folder(kind, **(EXPERTS if kind == "mixtral" else {}))
    flags = [*SHORT, "--model", folder, "--dtype", dtype, "--activation-checkpointing", *FAST[script]]
    run_dir = run_in(tmp_path / "runs", script, *flags)
    base = AutoModelForCausalLM.from_pretrained(folder)
    frozen, trained = base.num_parameters(), load_file(run_dir / "adapter" / "adapter_model.safetensors")
    size = sum(weight.numel() for weight in trained.values())
    about = f"{script}: {size:,} of {size + frozen:,} parameters trained, {dtype} on 1 x cpu, "
    assert capsys.readouterr().out.startswith(about)
    assert common.load_checkpoint(run_dir)["weights"]["policy"].keys() == trained_names(policies[0])
    before = base(IDS).logits
    after = peft.PeftModel.from_pretrained(base, run_dir / "adapter")(IDS).logits
    assert (after - before).abs().max() > 1e-3
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(run_dir / "adapter").merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, after, rtol=1e-4, atol=1e-4)
    if dtype == "float32":
        torch.testing.assert_close(policies[0](IDS).logits, after, rtol=1e-4, atol=1e-4)
    if script == "trpo_lm":  # B = 0 at first, where only B has a gradient
        logged = scalars(run_dir)
        assert logged["trpo/accepted"][0][1] == 1.0
        for (_, kl), (_, limit) in zip(logged["trpo/kl"], logged["trpo/max_kl"]):
            assert kl <= limit


def test_adapters_depend_on_the_seed_alone(tmp_path, model_folder):
    folder, found = model_folder("llama"), []
    for i, seed in enumerate((1, 1, 2)):
        flags = [*SHORT, "--model", folder, "--total-episodes", 32, "--learning-rate", 1e-30, "--seed", seed]
        run_dir = run_in(tmp_path / f"run_{i}", "reinforce_lm", *flags)
        weights = load_file(run_dir / "adapter" / "adapter_model.safetensors")
        found.append({name: weight for name, weight in weights.items() if "lora_A" in name})
    assert len(found[0]) == 2 * 7
    assert_same(found[0], found[1])
    assert not any(torch.equal(weight, found[2][name]) for name, weight in found[0].items())


@pytest.mark.parametrize("script, dtype", list(zip(SCRIPTS, ["bfloat16", "float32", "float32"])))
def test_a_resumed_run_is_the_run_that_was_never_stopped(script, dtype, tmp_path):
    module, flags = importlib.import_module(script), [*SHORT, "--dtype", dtype, "--no-anneal-lr", *FAST[script]]
    flags += ["--no-anneal-max-kl"] if script == "trpo_lm" else []
    stopped = run_in(tmp_path / "stopped", module, *flags, "--total-episodes", 32)
    run_main(module, "--resume", stopped, "--total-episodes", 64, "--lora-rank", 2)
    whole = run_in(tmp_path / "whole", module, *flags)
    assert_same_checkpoints(whole, stopped)
    saved = [load_file(run_dir / "adapter" / "adapter_model.safetensors") for run_dir in (whole, stopped)]
    assert_same(*saved)


def test_fisher_products_are_those_of_the_dense_matrix_in_the_space_of_the_adapters():
    model = with_adapters("gpt2", rank=1, n_layer=1).double()
    args = trpo_lm.Args(dtype="float32", response_length=3, samples_per_prompt=4, micro_batch_tokens=20)
    batch = _, attention_mask, _ = ragged_batch()
    parameters = {name: p.detach() for name, p in common.trained_parameters(model).items()}
    assert all("lora" in name for name in parameters)

    with trpo_lm.plain_attention():
        jacobian = torch.func.jacrev(lambda parameters: plain_logits(model, batch, parameters))(parameters)
    jacobian = torch.cat([part.flatten(2) for part in jacobian.values()], 2)  # (T, V, D)
    p = plain_logits(model, batch).softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    fisher = torch.einsum("tvd,tvw,twe->de", jacobian, middle, jacobian) / len(p)
    vector = torch.randn(fisher.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    micro_batches = common.micro_batches_of(torch.arange(8).view(2, 4), attention_mask, args)
    assert len(micro_batches) > 1
    product = trpo_lm.fisher_vector_product(vector, model, batch, micro_batches, args)
    torch.testing.assert_close(product, fisher @ vector, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompts_are_shared_with_adapters_too(kind):
    model, args = with_adapters(kind), trpo_lm.Args(dtype="float32", response_length=3)
    batch = sequences, attention_mask, response_mask = ragged_batch()
    counts, seen = [], model.get_input_embeddings().register_forward_hook(lambda _, x, __: counts.append(x[0].numel()))
    logprobs, _ = trpo_lm.policy_logprobs(model, *batch, args)
    seen.remove()
    real = attention_mask[::4, :-3].sum() + response_mask.sum()  # each of the two prompts once
    assert counts == [real - len(response_mask)], "not of responses the last"
    logits = plain_logits(model, batch)
    tokens = sequences[:, -3:][response_mask]
    found = []
    for values in (logprobs[response_mask], logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]):
        (values * torch.arange(len(values))).sum().backward()
        found.append([values, *[p.grad.clone() for p in common.trained_parameters(model).values()]])
        model.zero_grad()
    for shared, plain in zip(*found, strict=True):
        assert (shared - plain).norm() <= 1e-4 * plain.norm() + 1e-6
