"""Model shapes end to end, the precision of bfloat16, and settings that may only change memory and speed."""

import contextlib
import importlib
import inspect
import json
from types import SimpleNamespace

import common
import reinforce_lm
from reinforce_lm import Args

import pytest
import torch
from helpers import (
    SCRIPTS,
    SHAPES,
    character_tokenizer,
    error_line,
    load_policy,
    recorded_gradients,
    rollout,
    run_main,
    tiny_model,
)
from pretend_gpu import Graph, capture
from test_rollout import ragged_prompts
from test_runs import scalars
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

FULL_ATTENTION = ["gpt2", "llama", "qwen2", "qwen3"]
SHORT = ["--total-episodes", 64, "--batch-size", 32, "--eval-size", 4, "--device", "cpu", "--save-every", 0]
FEW_STEPS = {"reinforce_lm": [], "ppo_lm": ["--update-epochs", 1, "--num-minibatches", 2]}
FEW_STEPS["trpo_lm"] = [*FEW_STEPS["ppo_lm"], "--cg-iters", 3]


def make_model(kind):
    return tiny_model(kind, vocab_size=11, pad_token_id=0)


def gradients(script, folder, *flags):
    """The gradient of each optimizer step of a run."""
    with recorded_gradients(torch.optim.Adam) as steps:
        run_main(importlib.import_module(script), *SHORT, *FEW_STEPS[script], "--output-dir", folder, *flags)
    return steps


TIES = dict(reinforce_lm=True, ppo_lm=False, trpo_lm=True)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("script, tied", TIES.items())
def test_shapes_end_to_end(script, tied, kind, tmp_path, model_folder):
    folder = model_folder(kind, pad_token_id=0, tie_word_embeddings=tied)
    steps = gradients(script, tmp_path / "runs", "--model", folder)
    assert steps and all(step.isfinite().all() for step in steps)
    assert sum(step.norm() > 0 for step in steps) > len(steps) / 2  # all of a minibatch's returns may be 0
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["episodes"] == 64
    before, after = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, summary.parent / "model")]
    (output_before, output_after) = [model.get_output_embeddings().weight for model in (before, after)]
    assert not torch.equal(output_before, output_after)
    assert (after.get_input_embeddings().weight is output_after) == tied


class Recorder(TorchDispatchMode):
    """Records operations on the CPU for a replay, in which every Python number is that of the recording."""

    def __torch_dispatch__(self, operation, types, args=(), settings=None):
        settings = settings or {}
        assert operation._schema.name != "aten::_local_scalar_dense", "asks for a value while a graph is captured"
        Graph.current.remember(operation, args, settings)
        result = operation(*args, **settings)
        outputs = [result] if isinstance(result, torch.Tensor) else list(result or [])
        Graph.current.tape.append((operation, args, settings, outputs))
        return result


@contextlib.contextmanager
def capture_on_the_cpu(graph, capture_error_mode):
    with capture(graph, capture_error_mode), Recorder():
        yield


@pytest.fixture
def cuda_rollout(monkeypatch):
    """Let `common.rollout` do what it does on CUDA, with graphs that are recorded and replayed on the CPU."""
    source = inspect.getsource(common.rollout)
    assert source.count('prompts.device.type == "cuda"') == 1
    namespace = dict(vars(common))
    exec(source.replace('prompts.device.type == "cuda"', "True"), namespace)

    def start():
        monkeypatch.setattr(common, "rollout", namespace["rollout"])
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture_on_the_cpu)
        monkeypatch.setattr(Graph, "num_captures", 0)
        monkeypatch.setattr(Graph, "num_replays", 0)

    return start


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sampled_log_probabilities_are_those_of_full_forwards(device, kind, cuda_rollout):
    """Rows repeat, prompts are ragged, and rows that have ended are dropped; on CUDA graphs are replayed, too."""
    model, (_, ids, mask), sizes = make_model(kind), ragged_prompts(0), []
    end_ids, length = [0, 3] if device == "cpu" else [0], 26
    if device == "cuda":
        cuda_rollout()
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    generator = torch.Generator().manual_seed(0)
    responses, response_mask, logprobs = rollout(model, ids, mask, length, end_ids, 8, generator=generator)
    hook.remove()
    assert sizes[:2] == [4, 32] and sizes[-1] <= 16, "half of the rows have ended early"
    if device == "cuda":
        graphs = (2, 23) if kind in FULL_ATTENTION else (0, 0)
        assert (Graph.num_captures, Graph.num_replays) == graphs
    for i in range(32):
        prompt, response = ids[i // 8][mask[i // 8]], responses[i][response_mask[i]]
        scored = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = scored.gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(logprobs[i][response_mask[i]], expected, rtol=1e-4, atol=1e-4)
        assert not set(response[:-1].tolist()) & set(end_ids)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_cache_of_fixed_size_takes_float32_keys_beside_bfloat16_values(kind, cuda_rollout, model_folder):
    """As rotary embeddings give them under autocast. The growing cache keeps both as they are."""
    model, (_, ids, mask), found = load_policy(model_folder(kind), None, 20), ragged_prompts(0), []
    ids = ids % 11
    for start in (lambda: None, cuda_rollout):
        start()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(rollout(model, ids, mask, 12, [], greedy=True))
    assert Graph.num_replays > 5
    (tokens, _, logprobs), (fixed_tokens, _, fixed_logprobs) = found
    assert torch.equal(fixed_tokens, tokens)
    torch.testing.assert_close(fixed_logprobs, logprobs, rtol=0, atol=0.02)
    layer = common.FixedLayer(3)
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4, dtype=torch.bfloat16))
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_draws_what_multinomial_draws(dtype, model_folder):
    model, prompt = load_policy(model_folder("llama"), None, 8), torch.tensor([[1, 2, 3]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        generator = torch.Generator().manual_seed(7)
        responses, *_ = rollout(model, prompt, prompt.bool(), 1, [], samples_per_prompt=500, generator=generator)
        p = model(prompt).logits[0, -1].log_softmax(-1).exp().expand(500, -1)
    assert torch.equal(responses, p.multinomial(1, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_activation_checkpointing_changes_nothing_but_memory(script, tmp_path, model_folder):
    folder = model_folder("llama", pad_token_id=0, tie_word_embeddings=True)
    plain = gradients(script, tmp_path, "--model", folder)
    checkpointed = gradients(script, tmp_path, "--model", folder, "--activation-checkpointing")
    assert len(plain) == len(checkpointed) > 1
    for step, expected in zip(checkpointed, plain):
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", SHAPES)
def test_checkpointed_layers_keep_less_and_sampling_keeps_its_cache(kind):
    model, (_, ids, mask) = make_model(kind), ragged_prompts(0)
    kept, settings = [], dict(generator=None, greedy=True)
    responses, *_ = rollout(model, ids, mask, 6, [], **settings)

    def count():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            return model(ids, attention_mask=mask.long(), use_cache=False).logits.sum()

    count().backward()
    before, plain = sum(kept), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    args = Args(dtype="bfloat16", activation_checkpointing=True)
    common.prepare(model, ids.device, args)
    with common.autocast(ids.device, args):
        assert not torch.is_autocast_cache_enabled()
    calls = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[1]))
    assert torch.equal(rollout(model, ids, mask, 6, [], **settings)[0], responses)
    assert calls == [5, 1, 1, 1, 1, 1], "a cache is in use"
    hook.remove()
    count().backward()
    assert sum(kept) < 0.6 * before
    for parameter, expected in zip(model.parameters(), plain):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_the_precision_of_the_passes(dtype, script, model_folder):
    """Of sampler, loss and critic, whose results are in float32 all the same."""
    module, dtypes, rows = importlib.import_module(script), [], [{"input_ids": [1, 2]}]
    folder = model_folder("llama")
    policy, tokenizer = load_policy(folder, None, 8), AutoTokenizer.from_pretrained(folder)
    args = module.Args(dtype=str(dtype).removeprefix("torch."), response_length=3)
    policy.model.layers[0].mlp.down_proj.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    *batch, logprobs, _, _ = common.sample(policy, tokenizer, [0], args, rows, 2)
    results = [logprobs, *module.policy_logprobs(policy, *batch, args)]
    if script != "reinforce_lm":
        results.append(module.Critic(policy)(*batch[:2], args))  # whose layers have the hook, copied
    assert set(dtypes) == {dtype} and {result.dtype for result in results} == {torch.float32}


def add_to_logits(model, size=8.0):
    """Add a large number to all logits of a token, another for each: it cancels out, but a float has to hold it."""
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(1)
    head.weight.data += size * torch.randn(head.weight.shape[1], generator=generator)
    return model


LARGE_LOGITS = [("llama", 0, dict(tie_word_embeddings=True)), ("llama", 0, {}), ("llama", 2, {}), ("gemma2", 0, {})]


@pytest.mark.parametrize("kind, lora_rank, settings", LARGE_LOGITS, ids=str)
def test_logits_are_float32_products_in_bfloat16(kind, lora_rank, settings, model_folder):
    """Of sampler, loss, old policy and reference: against the products in float64 of the same hidden states."""
    folder, hidden = model_folder(kind, **settings), []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = Args(model=folder, lora_rank=lora_rank, dtype="bfloat16", response_length=6, temperature=0.8)
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5]}, {"input_ids": [6, 7, 8]}]
    policy = add_to_logits(common.load_policy(args, tokenizer, rows), 2.0 if kind == "gemma2" else 8.0)
    head = policy.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: hidden.append(inputs[0]))
    reference = common.copy_network(policy).requires_grad_(False)
    assert reference.get_output_embeddings() is not head

    def expected(hidden, tokens):  # (..., hidden size), (...) -> (...)
        logits = hidden.detach().double() @ head.weight.detach().double().T
        assert logits.abs().max() > 20
        cap = getattr(policy.config, "final_logit_softcapping", None)
        logits = logits if cap is None else cap * (logits / cap).tanh()
        return (logits / 0.8).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    *batch, sampled, _, _ = common.sample(policy, tokenizer, [], args, rows, samples_per_prompt=2)
    states = torch.cat([hidden[0].repeat_interleave(2, 0), *hidden[1:]], 1)  # (b, R, hidden size)
    tokens, mask = batch[0][:, -6:], batch[2]
    torch.testing.assert_close(sampled.double(), expected(states, tokens), rtol=0, atol=1e-4)
    scores = {"loss": lambda: reinforce_lm.policy_logprobs(policy, *batch, args)[0].detach()}
    for name, network in {"old policy": policy, "reference": reference}.items():
        scores[name] = lambda network=network: reinforce_lm.batched_logprobs(network, batch, [torch.arange(6)], args)
    for name, score in scores.items():
        logprobs = score()
        torch.testing.assert_close(
            logprobs[mask].double(), expected(hidden[-1][0], tokens[mask]), rtol=0, atol=1e-4, msg=name
        )
        assert (logprobs - sampled).abs().mean() < 2e-3  # what else is rounded
    if not lora_rank:  # the reference has a head of its own
        head.weight.data.zero_()
        assert torch.equal(score(), logprobs)


def weighted_run(script, tmp_path, monkeypatch, *flags):
    """One iteration: log-probabilities, advantages when they are whitened and when they are used, and the log."""
    module, seen = importlib.import_module(script), {"used": []}
    sample, whiten, shaped_rewards = common.sample, common.whiten, module.shaped_rewards

    def recording_sample(*inputs, greedy=False, **settings):
        result = sample(*inputs, greedy=greedy, **settings)
        if not greedy:
            seen.update(mask=result[2], sampler=result[3])
        return result

    def recording_rewards(scores, logprobs, ref_logprobs, *rest):
        seen.update(policy=logprobs, reference=ref_logprobs)
        return shaped_rewards(scores, logprobs, ref_logprobs, *rest)

    def recording_whiten(*inputs, **settings):
        seen["whitened"] = whiten(*inputs, **settings)
        return seen["whitened"]

    places = dict(reinforce_lm=("policy_gradient_loss", 1), ppo_lm=("clipped_surrogate", 1))
    name, position = places.get(script, ("surrogate_gradient", 3))  # a function, and which argument advantages are
    update = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *inputs: seen["used"].append(inputs[position]) or update(*inputs))
    monkeypatch.setattr(module, "shaped_rewards", recording_rewards)
    monkeypatch.setattr(common, "sample", recording_sample)
    monkeypatch.setattr(common, "whiten", recording_whiten)
    flags = [*SHORT, *FEW_STEPS[script], *flags, *(["--normalize-advantages"] if script == "reinforce_lm" else [])]
    run_main(module, *flags, "--total-episodes", 32, "--response-length", 12, "--output-dir", tmp_path / "runs")
    (run_dir,) = (tmp_path / "runs").iterdir()
    logged = {tag: values[0][1] for tag, values in scalars(run_dir).items()}
    return SimpleNamespace(**seen, logged=logged)


WEIGHTS = [(script, "bfloat16", 1.0005) for script in SCRIPTS] + [("ppo_lm", "bfloat16", 0), ("ppo_lm", "float32", 1)]


@pytest.mark.parametrize("script, dtype, clip", WEIGHTS)
def test_advantages_are_multiplied_by_importance_weights(script, dtype, clip, tmp_path, model_folder, monkeypatch):
    folder = model_folder("llama")
    add_to_logits(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(folder)
    flags = ["--model", folder, "--dtype", dtype, "--sampler-clip", clip]
    run = weighted_run(script, tmp_path, monkeypatch, *flags)
    assert torch.equal(run.policy, run.reference), "one model at first, in the same micro-batches"
    assert script != "ppo_lm" or run.logged["policy/ratio_first_minibatch"] == 1.0
    assert 0 < run.logged["policy/sampler_gap"] < 5e-3, "with logits in bfloat16 it is 0.02"
    weights = torch.ones_like(run.policy)
    if dtype == "bfloat16" and clip:
        ratio = (run.policy - run.sampler).exp()
        weights = torch.tensor([[min(value, clip) for value in row] for row in ratio.tolist()])
        share = (ratio > clip)[run.mask].float().mean().item()
        assert run.logged["policy/sampler_clipfrac"] == pytest.approx(share) and 0.05 < share < 0.5
    else:
        assert "policy/sampler_clipfrac" not in run.logged
    used, expected = [part.flatten().sort().values for part in (torch.cat(run.used), run.whitened * weights)]
    torch.testing.assert_close(used, expected, rtol=1e-6 if weights.min() < 1 else 0, atol=0)
    assert used.abs().sum() > 0


def test_code_of_a_model_does_not_run_unasked(tmp_path):
    imported, code = tmp_path / "imported", "from transformers import PretrainedConfig, PreTrainedModel\n"
    code += f"open({str(imported)!r}, 'w')\nclass C(PretrainedConfig):\n    model_type = 'mine'\n"
    code += "class M(PreTrainedModel):\n    config_class = C\n"
    (tmp_path / "mine.py").write_text(code)
    names = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoModelForSequenceClassification": "mine.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    tokenizer = character_tokenizer("0123456789")
    for load in (
        lambda: common.load_tokenizer(str(tmp_path), []),
        lambda: load_policy(str(tmp_path), tokenizer, 8, 1),
        lambda: common.load_reward(Args(reward=f"model:{tmp_path}"), torch.device("cpu"), []),
    ):
        with pytest.raises(SystemExit):
            load()
        assert not imported.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_entropy_has_a_graph_only_where_there_is_a_bonus(script, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    policy_logprobs, found = module.policy_logprobs, []

    def recording_logprobs(*inputs):
        logprobs, entropy = policy_logprobs(*inputs)
        found.append((logprobs.requires_grad, entropy.requires_grad))
        return logprobs, entropy

    monkeypatch.setattr(module, "policy_logprobs", recording_logprobs)
    flags = ["--total-episodes", 32, "--kl-ref-coef", 0]
    gradients(script, tmp_path, *flags)
    assert set(found) == {(True, False), (False, False)}
    if script == "ppo_lm":
        found.clear()
        gradients(script, tmp_path, *flags, "--ent-coef", 0.01)
        assert set(found) == {(True, True), (False, False)}


def test_a_model_without_a_cache_of_keys_and_values_is_refused(tmp_path, capsys):
    config = AutoConfig.for_model("mamba", vocab_size=11, hidden_size=16, num_hidden_layers=1, state_size=4)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    character_tokenizer("0123456789").save_pretrained(tmp_path / "mamba")
    with pytest.raises(SystemExit):
        gradients("reinforce_lm", tmp_path, "--model", tmp_path / "mamba")
    assert f"--model: a trial of {tmp_path}/mamba failed" in error_line(capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_diverged_policy_ends_the_run_in_one_line(script, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "shaped_rewards", lambda scores, logprobs, *_: logprobs * float("nan"))
    if script == "trpo_lm":  # a gradient that is not finite moves nothing; its critic's ends the run
        monkeypatch.setattr(common, "whiten", lambda advantages, *_: torch.zeros_like(advantages))
    with pytest.raises(SystemExit) as stop:
        gradients(script, tmp_path)
    assert stop.value.code == 1 and "gradient: expected a finite norm; try a lower learning rate" in error_line(capsys)


def test_weights_are_float32_whatever_the_checkpoint_holds(model_folder):
    folder = model_folder("llama", pad_token_id=0, dtype=torch.bfloat16)
    assert all(
        p.dtype == torch.bfloat16 for p in AutoModelForCausalLM.from_pretrained(folder, dtype="auto").parameters()
    )
    assert all(p.dtype == torch.float32 for p in load_policy(folder, None, 8, seed=1).parameters())


class Heads(TorchDispatchMode):
    """Counts products that give logits one row of a batch at a time, each with a copy of the head in bfloat16."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.counts = vocab_size, {"mm": 0, "bmm": 0}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result, name = operation(*args, **(kwargs or {})), operation.overloadpacket.__name__
        if name in self.counts and result.shape[-1] == self.vocab_size:
            self.counts[name] += 1
        return result


@pytest.mark.parametrize("kind", SHAPES)
def test_a_frozen_head_is_not_copied_for_each_row(kind, model_folder):
    """Of the sampler, which takes the last column of the prompts, and of the reference, which takes some."""
    folder = model_folder(kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = common.copy_network(load_policy(folder, tokenizer, 20)).requires_grad_(False)
    prompts = torch.randint(1, 11, (3, 6))
    sequences, args = torch.randint(1, 11, (3, 10)), Args(dtype="float32", response_length=4)
    mask = torch.ones_like(sequences).bool()
    with Heads(model.config.vocab_size) as heads, torch.no_grad():
        rollout(model, prompts, torch.ones_like(prompts).bool(), 3, [0])
        reinforce_lm.policy_logprobs(model, sequences, mask, mask[:, -4:], args)
    assert heads.counts["mm"] >= 4 and not heads.counts["bmm"]
