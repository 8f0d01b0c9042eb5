"""Model shapes end to end, and the settings that may only change memory and speed: caches, checkpointing, compile."""

import functools
import importlib
import json
import sys
import weakref

import common
from reinforce_lm import Args

import pytest
import torch
from helpers import SCRIPTS, SHAPES, error_line, load_policy, recorded_gradients, rollout, run_main, tiny_model
from test_rollout import ragged_prompts
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, masking_utils

FULL_ATTENTION = ["gpt2", "llama", "qwen2", "qwen3"]
SHORT = ["--total-episodes", 64, "--batch-size", 32, "--eval-size", 4, "--device", "cpu", "--save-every", 0]


def make_model(kind):
    return tiny_model(kind, vocab_size=11, pad_token_id=0)


TIES = [(script, kind, True) for script in SCRIPTS for kind in SHAPES] + [("ppo_lm", kind, False) for kind in SHAPES]


@pytest.mark.parametrize("script, kind, tied", TIES)
def test_shapes_end_to_end(script, kind, tied, tmp_path, model_folder):
    folder = model_folder(kind, pad_token_id=0, tie_word_embeddings=tied)
    with recorded_gradients(torch.optim.AdamW) as steps:
        run_main(importlib.import_module(script), *SHORT, "--model", folder, "--output-dir", tmp_path / "runs")
    assert steps and all(step.isfinite().all() for step in steps)
    assert sum(step.norm() > 0 for step in steps) > len(steps) / 2  # all of a minibatch's returns may be 0
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["episodes"] == 64
    before, after = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, summary.parent / "model")]
    (output_before, output_after) = [model.get_output_embeddings().weight for model in (before, after)]
    assert not torch.equal(output_before, output_after)
    assert (after.get_input_embeddings().weight is output_after) == tied


@pytest.mark.parametrize("kind", SHAPES)
def test_a_cache_of_fixed_size_gives_the_logits_of_full_forwards(kind):
    """Rows repeat, prompts are ragged, and halfway all but two rows are dropped."""
    model, (_, ids, mask) = make_model(kind), ragged_prompts(0)
    tokens = torch.randint(1, 11, (8, 6), generator=torch.Generator().manual_seed(2))
    for fixed_size in (False, True):
        with torch.no_grad():
            decoder = common.Decoder(model, ids, mask, 2, 7, fixed_size)
            assert decoder.fixed_size == (fixed_size and kind in FULL_ATTENTION)
            rows = torch.arange(8)
            for t in range(6):
                for row, logits in zip(rows.tolist(), decoder.logits):
                    text = torch.cat([ids[row // 2][mask[row // 2]], tokens[row, :t]])
                    torch.testing.assert_close(logits, model(text[None]).logits[0, -1], rtol=1e-4, atol=1e-4)
                if t == 3:
                    decoder.select(torch.tensor([6, 1]))
                    rows = rows[[6, 1]]
                decoder.step(tokens[rows, t, None])


@pytest.mark.parametrize("kind", FULL_ATTENTION)
def test_the_pass_of_one_token_can_be_replayed(kind, monkeypatch):
    """What a CUDA graph asks for, on a CPU: a trace of one pass, with every Python number in it frozen, is right at
    the next positions too, and no tensor's value was asked for while it was recorded (a trace refuses that)."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # as transformers does while a stream is captured
    model, (_, ids, mask) = make_model(kind), ragged_prompts(0)
    tokens = torch.randint(1, 11, (8, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        replayed, plain = [common.Decoder(model, ids, mask, 2, 7, True) for _ in range(2)]
        layers = replayed.cache.layers
        moving = [replayed.tokens, replayed.positions, *[layer.cumulative_length for layer in layers]]
        state = [x.clone() for x in [*moving, *[layer.keys for layer in layers], *[layer.values for layer in layers]]]
        trace = make_fx(lambda: replayed.forward())()
        for x, old in zip([*moving, *[y.keys for y in layers], *[y.values for y in layers]], state, strict=True):
            x.copy_(old)  # tracing has run the pass, capturing does not
        for t in range(6):
            replayed.tokens.copy_(tokens[:, t, None])
            replayed.positions += 1
            replayed.logits = trace()
            plain.step(tokens[:, t, None])
            torch.testing.assert_close(replayed.logits, plain.logits, rtol=1e-4, atol=1e-5)


def test_rows_that_have_ended_are_dropped_and_the_others_do_not_notice():
    model, (_, ids, mask), sizes = make_model("llama"), ragged_prompts(0), []
    end_ids = [0, 3, 5]

    def sample(**settings):
        generator = torch.Generator().manual_seed(0)
        return rollout(model, ids, mask, 12, end_ids, samples_per_prompt=8, generator=generator, **settings)

    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    responses, response_mask, logprobs = sample()
    hook.remove()
    assert sizes[:2] == [4, 32] and sizes[-1] < 16, "half of the rows have ended early"
    lengths = response_mask.sum(1)
    assert lengths.min() < 3 and lengths.max() > 4
    for i in range(32):
        prompt, response = ids[i // 8][mask[i // 8]], responses[i][response_mask[i]]
        scored = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = scored.gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(logprobs[i][response_mask[i]], expected, rtol=1e-4, atol=1e-4)
        assert not set(response[:-1].tolist()) & set(end_ids)


def test_sampling_draws_what_multinomial_draws():
    model, prompt = make_model("llama"), torch.tensor([[1, 2, 3]])
    responses, *_ = rollout(
        model, prompt, prompt.bool(), 1, [], samples_per_prompt=500, generator=torch.Generator().manual_seed(7)
    )
    p = model(prompt).logits[0, -1].log_softmax(-1).exp().expand(500, -1)
    assert torch.equal(responses, p.multinomial(1, generator=torch.Generator().manual_seed(7)))


def gradients(script, tmp_path, *flags):
    with recorded_gradients(torch.optim.AdamW) as steps:
        run_main(importlib.import_module(script), *SHORT, "--output-dir", tmp_path, *flags)
    return steps


@pytest.mark.parametrize("script", SCRIPTS)
def test_activation_checkpointing_changes_nothing_but_memory(script, tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(common, "MIN_SAVED_TOKENS", 0)  # a layer runs twice in each of the two passes
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
    common.prepare(model, ids.device, Args(activation_checkpointing=True))
    with common.autocast(ids.device, Args(activation_checkpointing=True)):
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
def test_bfloat16_is_the_precision_of_the_passes(script):
    module, model, dtypes = importlib.import_module(script), make_model("llama"), []
    sequences = torch.ones(2, 7, dtype=torch.long)
    for dtype in (torch.float32, torch.bfloat16):
        args = module.Args(dtype=str(dtype).removeprefix("torch."), response_length=3)
        assert common.response_logits(model, sequences, sequences.bool(), args).dtype == dtype
        if script != "reinforce_lm":
            critic = module.Critic(model)
            critic.backbone.layers[0].mlp.down_proj.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
            assert critic(sequences, sequences.bool(), args).dtype == torch.float32
            assert dtypes.pop() == dtype


def test_code_of_a_model_runs_only_if_the_user_says_so(tmp_path):
    imported, code = tmp_path / "imported", "from transformers import PretrainedConfig, PreTrainedModel\n"
    code += f"open({str(imported)!r}, 'w')\nclass C(PretrainedConfig):\n    model_type = 'mine'\n"
    code += "class M(PreTrainedModel):\n    config_class = C\n"
    (tmp_path / "mine.py").write_text(code)
    names = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoModelForSequenceClassification": "mine.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    tokenizer = common.character_tokenizer("0123456789")
    for load in (
        lambda **trust: common.load_tokenizer(str(tmp_path), [], **trust),
        lambda **trust: load_policy(str(tmp_path), tokenizer, 8, 1, **trust),
        lambda **trust: common.load_reward(Args(reward=f"model:{tmp_path}", **trust), "cpu", []),
    ):
        with pytest.raises(common.InputError):
            load()
        assert not imported.exists()
        with pytest.raises((common.InputError, NotImplementedError, AttributeError)):  # there is no such code
            load(trust_remote_code=True)
        assert imported.exists()
        imported.unlink()
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_graph_of_the_entropy_is_gone_before_the_backward_pass(script, tmp_path, monkeypatch):
    policy_logprobs, backward, entropies, alive = common.policy_logprobs, torch.Tensor.backward, [], []

    def recording_logprobs(*inputs):
        logprobs, entropy = policy_logprobs(*inputs)
        entropies.append(weakref.ref(entropy))
        return logprobs, entropy

    def recording_backward(*inputs, **settings):
        alive.extend(entropy() is not None for entropy in entropies)
        return backward(*inputs, **settings)

    monkeypatch.setattr(common, "policy_logprobs", recording_logprobs)
    monkeypatch.setattr(torch.Tensor, "backward", recording_backward)
    gradients(script, tmp_path, "--total-episodes", 32, "--kl-coef", 0)
    assert alive and not any(alive)


@pytest.mark.parametrize("script", SCRIPTS)
def test_compile_runs_the_update_and_nothing_else(script, tmp_path, monkeypatch, model_folder):
    """With a compiler that counts and changes nothing, which takes the time out of it."""
    monkeypatch.setattr(common, "MIN_SAVED_TOKENS", 0)
    torch.compiler.reset()  # what other tests compiled counts against a limit
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    def eagerly(function):
        def checked(*args, **settings):
            before = len(compiled)
            result = function(*args, **settings)
            assert len(compiled) == before
            return result

        return checked

    monkeypatch.setattr(common, "rollout", eagerly(common.rollout))
    product = eagerly(importlib.import_module("trpo_lm").fisher_vector_product)
    monkeypatch.setattr(importlib.import_module("trpo_lm"), "fisher_vector_product", product)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    folder = model_folder("gpt2", pad_token_id=0, n_layer=1)
    flags = ["--model", folder, "--total-episodes", 32, "--response-length", 2]
    flags += [] if script == "reinforce_lm" else ["--num-minibatches", 1, "--update-epochs", 1, "--kl-coef", 0]
    plain, count = gradients(script, tmp_path, *flags), len(compiled)
    both = ["--compile", *(["--activation-checkpointing"] if script == "ppo_lm" else [])]
    steps = gradients(script, tmp_path, *flags, *both)
    assert count == 0 and len(compiled) > 0
    for step, expected in zip(steps, plain, strict=True):
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8, allow_unspec_int_on_nn_module=False)
def test_what_is_compiled_serves_all_layers_and_any_width(monkeypatch):
    """Policy and reference, with and without gradient, prompts shared and distinct, at changing widths."""
    torch.compiler.reset()
    compiled = []
    counting = functools.partial(torch.compile, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(common, "MIN_SAVED_TOKENS", 0)
    args = Args(dtype="float32", response_length=9, compile=True)
    model = tiny_model("gpt2", n_layer=4, n_positions=64)
    policy = common.prepare(common.copy_network(model), torch.device("cpu"), args)
    reference = common.prepare(common.copy_network(model).requires_grad_(False), torch.device("cpu"), args)
    torch._dynamo.config.recompile_limit = 8  # fewer than four layers would need
    counts = []
    for length, response, distinct in [(12, 9, 4), (20, 7, 2), (17, 6, 4), (40, 9, 2)]:
        prompts = torch.randint(1, 10, (distinct, length)).repeat_interleave(4 // distinct, 0)
        mask = (torch.arange(length + 9) < length + response).expand(4, -1)
        batch = torch.cat([prompts, torch.randint(1, 10, (4, 9))], 1), mask, args
        logprobs, expected = [common.policy_logprobs(network, *batch)[0] for network in (policy, model)]
        torch.testing.assert_close(logprobs, expected)
        for values in (logprobs, expected):
            values.sum().backward()
        for parameter, eager in zip(policy.parameters(), model.parameters()):
            torch.testing.assert_close(parameter.grad, eager.grad, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for network in (policy, reference):
                torch.testing.assert_close(logprobs, common.policy_logprobs(network, *batch)[0])
        counts.append(len(compiled))
    assert counts[0] > 0 and counts[1:] == [counts[1]] * 3


@pytest.mark.parametrize("setting", ["activation_checkpointing", "compile"])
def test_settings_of_layers_refuse_a_model_without_them(setting):
    network, device = torch.nn.Linear(1, 1), torch.device("cpu")
    assert common.prepare(network, device, Args()) is network
    with pytest.raises(common.InputError, match="--compile: expected layers .* found .*Linear"):
        common.prepare(network, device, Args(**{setting: True}))


def test_a_model_without_a_cache_of_keys_and_values_is_refused(tmp_path, capsys):
    config = AutoConfig.for_model("mamba", vocab_size=11, hidden_size=16, num_hidden_layers=1, state_size=4)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    common.character_tokenizer("0123456789").save_pretrained(tmp_path / "mamba")
    with pytest.raises(SystemExit):
        gradients("reinforce_lm", tmp_path, "--model", tmp_path / "mamba")
    assert "--model: expected a cache of keys and values" in error_line(capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_diverged_policy_ends_the_run_in_one_line(script, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "shaped_rewards", lambda scores, logprobs, *_: logprobs * float("nan"))
    if script == "trpo_lm":  # a gradient that is not finite moves nothing; its critic's ends the run
        monkeypatch.setattr(common, "whiten", lambda advantages, *_: torch.zeros_like(advantages))
    with pytest.raises(SystemExit) as stop:
        gradients(script, tmp_path)
    assert stop.value.code == 2 and "expected finite; try a lower learning rate" in error_line(capsys)


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
    with Heads(model.config.vocab_size) as heads, torch.no_grad():
        rollout(model, prompts, torch.ones_like(prompts).bool(), 3, [0])
        common.policy_logprobs(model, sequences, torch.ones_like(sequences).bool(), args)
    assert heads.counts["mm"] >= 4 and not heads.counts["bmm"]
