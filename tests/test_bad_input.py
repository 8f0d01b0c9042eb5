"""Bad input is one line on standard error that names the flag or the row, and exit code 1, before any training."""

import json
import runpy
import sys
import types
from dataclasses import replace

import common
import ppo_lm
import reinforce_lm
import trpo_lm
from reinforce_lm import Args, policy_logprobs

import pytest
import torch
from helpers import ROOT, SIZE, load_policy, run_main, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

GOOD_ROW = {"prompt": "ab", "reference": "ba"}


def message_of(capsys, monkeypatch, *flags, script=reinforce_lm):
    """The one line that a bad command prints. Fails if a single response is sampled before."""
    monkeypatch.setattr(common, "rollout", lambda *_, **__: pytest.fail("sampled before the check"))
    with pytest.raises(SystemExit) as stop:
        run_main(script, "--device", "cpu", *flags)
    assert stop.value.code
    error = capsys.readouterr().err
    if "For full helptext" not in error:  # from tyro, about what does not parse
        assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ----- Flags -----


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--dataset", "nowhere.jsonl"], ["--dataset", "nowhere.jsonl", "No such file"]),
        (["--dataset", "no-such-set"], ["--dataset", "sort", "datasets", "no-such-set"]),
        (["--reward", "no-such-reward"], ["--reward", "match, exact, rouge, bleu", "no-such-reward"]),
        (["--reward", "missing.py:fn"], ["--reward", "FILE.py:function", "missing.py"]),
        (["--model", "/no/such/model"], ["--model", "/no/such/model"]),
        (["--prompt-length", "4"], ["--prompt-length", "row 1", "1 to 4 tokens", "5"]),
        (["--samples-per-prompt", "1"], ["--samples-per-prompt", "leave_one_out", "1"]),
        (["--baseline", "critic"], ["--baseline", "leave_one_out", "critic"]),
        (["--batchsize", "8"], ["--batchsize"]),
        (["--seed", "x"], ["--seed", "'x'"]),
        (["--dtype", "float16"], ["--dtype", "bfloat16", "float16"]),
    ],
)
def test_flags_that_name_nothing(flags, parts, capsys, monkeypatch):
    error = message_of(capsys, monkeypatch, *flags)
    for part in parts:
        assert part in error


POSITIVE, NOT_NEGATIVE = "a positive number", "0 or more"
UP_TO_ONE, ZERO_TO_ONE = "more than 0 and at most 1", "0 to 1"


@pytest.mark.parametrize(
    "script, name, values, expected",
    [
        (reinforce_lm, "batch_size", [0], POSITIVE),
        (reinforce_lm, "micro_batch_tokens", [-1], NOT_NEGATIVE),
        (reinforce_lm, "rollout_tokens", [-1], POSITIVE),
        (reinforce_lm, "samples_per_prompt", [0], POSITIVE),
        (reinforce_lm, "response_length", [0], POSITIVE),
        (reinforce_lm, "prompt_length", [0], POSITIVE),
        (reinforce_lm, "eval_size", [0], POSITIVE),
        (reinforce_lm, "temperature", [0.0, float("nan"), float("inf")], POSITIVE),
        (reinforce_lm, "learning_rate", [0.0, -1e-3, float("inf")], POSITIVE),
        (reinforce_lm, "max_grad_norm", [0.0], POSITIVE),
        (reinforce_lm, "kl_ref_horizon", [0], POSITIVE),
        (reinforce_lm, "kl_ref_coef", [-0.1, float("nan")], NOT_NEGATIVE),
        (reinforce_lm, "sampler_clip", [-1.0], NOT_NEGATIVE),
        (reinforce_lm, "lora_rank", [-1], NOT_NEGATIVE),
        (reinforce_lm, "total_episodes", [-128], NOT_NEGATIVE),
        (reinforce_lm, "save_every", [-1], NOT_NEGATIVE),
        (reinforce_lm, "seed", [-1], NOT_NEGATIVE),
        (reinforce_lm, "gamma", [0.0, 1.5], UP_TO_ONE),
        (reinforce_lm, "ema_decay", [-0.1, 1.1], ZERO_TO_ONE),
        (ppo_lm, "clip_coef", [0.0, 1.5], UP_TO_ONE),
        (ppo_lm, "clip_coef_high", [-0.1], NOT_NEGATIVE),
        (ppo_lm, "update_epochs", [0], POSITIVE),
        (ppo_lm, "num_minibatches", [0], POSITIVE),
        (ppo_lm, "gae_lambda", [-0.5, 1.5], ZERO_TO_ONE),
        (ppo_lm, "target_kl", [-1.0], NOT_NEGATIVE),
        (ppo_lm, "penalty_coef", [0.0], POSITIVE),
        (ppo_lm, "penalty_target", [0.0], POSITIVE),
        (ppo_lm, "critic_learning_rate", [0.0], POSITIVE),
        (trpo_lm, "max_kl", [0.0], POSITIVE),
        (trpo_lm, "cg_iters", [0], POSITIVE),
        (trpo_lm, "cg_damping", [-0.1], NOT_NEGATIVE),
        (trpo_lm, "backtrack_coeff", [0.0, 2.0], UP_TO_ONE),
        (trpo_lm, "fvp_fraction", [0.0, 1.5], UP_TO_ONE),
        (trpo_lm, "accept_ratio", [0.0], UP_TO_ONE),
    ],
)
def test_numbers_out_of_range(script, name, values, expected):
    common.check_flags(script.Args(), 1)
    for value in values:
        with pytest.raises(SystemExit) as error:
            common.check_flags(replace(script.Args(), **{name: value}), 1)
        flag = name.replace("_", "-")
        assert str(error.value) == f"error: --{flag}: expected {expected}, found {value}"


@pytest.mark.parametrize(
    "flags, world_size, message",
    [
        (dict(batch_size=30), 1, "--batch-size: expected a multiple of --samples-per-prompt times ranks"),
        (dict(batch_size=12), 2, "--batch-size: expected a multiple of --samples-per-prompt times ranks"),
        (dict(total_episodes=100), 1, "--total-episodes: expected at least --batch-size, or 0"),
        (dict(num_minibatches=33), 1, "--num-minibatches: expected at most the 32 prompts of a rank, found 33"),
        (dict(num_minibatches=17), 2, "--num-minibatches: expected at most the 16 prompts of a rank, found 17"),
    ],
)
def test_flags_that_do_not_fit_each_other(flags, world_size, message):
    common.check_flags(ppo_lm.Args(total_episodes=0, num_minibatches=16), 2)
    with pytest.raises(SystemExit, match=message):
        common.check_flags(ppo_lm.Args(**flags), world_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys, monkeypatch):
    assert "--device" in message_of(capsys, monkeypatch, "--device", "cuda")


def test_resume_from_a_folder_without_a_checkpoint(tmp_path, capsys, monkeypatch):
    assert "--resume: expected a run directory" in message_of(capsys, monkeypatch, "--resume", tmp_path)


def test_a_script_ends_with_the_line(monkeypatch):
    """Python prints the text of a SystemExit on standard error and ends with code 1."""
    monkeypatch.setattr(sys, "argv", ["reinforce_lm.py", "--reward", "nothing", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(f"{ROOT}/reinforce_lm.py", run_name="__main__")
    assert stop.value.code.startswith("error: --reward: ") and "\n" not in stop.value.code


# ----- Data -----


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text, flags, parts",
    [
        ("", [], ["--dataset", "row 1", "a JSON object"]),
        (lines(GOOD_ROW, "{broken"), [], ["--dataset", "row 2", "{broken"]),
        (lines(GOOD_ROW, "[1]"), [], ["--dataset", "row 2", "a JSON object"]),
        (json.dumps([GOOD_ROW] * 1000), [], ["--dataset", "row 1", "a JSON object"]),
        (lines(GOOD_ROW, {"reference": "b"}), [], ["row 2", "'prompt'", "found ['reference']"]),
        (lines(GOOD_ROW, {"prompt": "b"}), [], ["row 2", "['prompt', 'reference']", "['prompt']"]),
        (lines(GOOD_ROW, GOOD_ROW | {"more": 1}), [], ["row 2", "more"]),
        (lines(GOOD_ROW), ["--prompt-column", "q"], ["['q'] (--prompt-column, ", "found ['prompt', 'reference']"]),
        (lines(GOOD_ROW), ["--reference-column", "a"], ["['a', 'prompt'] (--prompt-column, --reference-column)"]),
        (lines({"q": "a"}), ["--prompt-column", "reference"], ["['reference'] (--prompt-column, ", "found ['q']"]),
        (lines({"prompt": "a", "q": ""}), ["--prompt-column", "q"], ["row 1", "a prompt", "''"]),
        (lines(GOOD_ROW, GOOD_ROW | {"prompt": []}), [], ["row 2", "a prompt", "[]"]),
        (lines(GOOD_ROW, GOOD_ROW | {"prompt": 5}), [], ["row 2", "text in all rows or lists", "5"]),
        (lines(GOOD_ROW | {"prompt": ["a"]}, GOOD_ROW), [], ["row 2", "text in all rows or lists", "'ab'"]),
        (lines(GOOD_ROW, GOOD_ROW | {"prompt": ["a"]}), [], ["row 2", "text in all rows or lists", "['a']"]),
        (lines(GOOD_ROW | {"prompt": ["a"]}), [], ["--model", "messages of row 1"]),
        (lines(*[GOOD_ROW] * 20), [], ["--dataset", "held out"]),
        (lines({"prompt": "a"}, {"prompt": "b"}), [], ["--reward match", "a text reference", "found {'prompt': "]),
        (lines(GOOD_ROW, '{"prompt": "c\\nd", "reference": NaN}'), [], ["--reward match", "a text reference", "nan"]),
        (lines(GOOD_ROW, GOOD_ROW | {"prompt": "ab\nb"}), ["--prompt-length", 3], ["row 2", "1 to 3 tokens", "4"]),
    ],
)
def test_bad_data(text, flags, parts, tmp_path, capsys, monkeypatch):
    (tmp_path / "data.jsonl").write_text(text)
    error = message_of(capsys, monkeypatch, "--dataset", tmp_path / "data.jsonl", *flags)
    for part in parts:
        assert part in error


def test_bad_held_out_data(tmp_path, capsys, monkeypatch):
    (tmp_path / "data.jsonl").write_text(lines(GOOD_ROW, "{broken"))
    error = message_of(capsys, monkeypatch, "--eval-dataset", tmp_path / "data.jsonl")
    assert "--eval-dataset" in error and "row 2" in error
    (tmp_path / "data.jsonl").write_text(lines(GOOD_ROW))
    (tmp_path / "eval.jsonl").write_text(lines({"prompt": "1"}))
    files = ["--dataset", tmp_path / "data.jsonl", "--eval-dataset", tmp_path / "eval.jsonl"]
    error = message_of(capsys, monkeypatch, *files)
    assert "--reward match: expected a text reference in each row, found {'prompt': '1'" in error


@pytest.mark.parametrize("name", ["responses", "ended"])
def test_a_column_with_a_name_that_rewards_get_from_us_is_an_error(name, tmp_path):
    (tmp_path / "data.jsonl").write_text(lines(*[GOOD_ROW | {"prompt": f"{i}", name: 1} for i in range(20)]))
    with pytest.raises(TypeError, match=f"multiple values for .*argument '{name}'"):
        run_main(ppo_lm, "--dataset", tmp_path / "data.jsonl", "--device", "cpu", "--output-dir", tmp_path)


# ----- Models -----


def test_context_that_is_too_short(model_folder, capsys, monkeypatch):
    folder = model_folder()
    capsys.readouterr()
    error = message_of(capsys, monkeypatch, "--model", folder, "--response-length", 30)
    assert "--response-length" in error and "at most 32, " in error and "35" in error


def test_the_context_is_that_of_the_part_for_text(model_folder, monkeypatch):
    """Of a model for images and text the positions are in a configuration inside the configuration."""
    folder = model_folder("llama")  # 32 positions
    text = AutoConfig.from_pretrained(folder)
    whole = types.SimpleNamespace(get_text_config=lambda: text)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: whole)
    with pytest.raises(
        SystemExit,
        match="--response-length: expected at most 32, prompt included, found 33",
    ):
        load_policy(folder, None, 33)


ROWS = [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9]}, {"input_ids": [4, 5]}]
LAYERS = {name: value for name, value in SIZE.items() if name not in ("num_key_value_heads", "head_dim")}
DECODER = LAYERS | dict(is_decoder=True, pad_token_id=1)


@pytest.fixture
def load_and_try(model_folder):
    """A function that saves a checkpoint, loads it as the policy, lets `change` change it, and tries it."""

    def attempt(
        kind="llama",
        dtype="float32",
        end_ids=(0,),
        rows=ROWS,
        change=None,
        prepare=None,
        logprobs_of=policy_logprobs,
        **settings,
    ):
        folder = model_folder(kind, **settings)
        if prepare:
            prepare(folder)
        args = Args(model=folder, dtype=dtype, response_length=4)
        tokenizer = common.load_tokenizer(folder, [])
        policy = common.load_policy(args, tokenizer, rows)
        if change:
            change(policy)
        common.try_model(policy, tokenizer, list(end_ids), args, logprobs_of, rows)

    return attempt


def refusal(attempt, *args, **settings):
    """The one line, which names --model."""
    with pytest.raises(SystemExit) as error:
        attempt(*args, **settings)
    line = str(error.value)
    assert line.startswith("error: --model: ") and "\n" not in line
    return line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("gpt2", {}),
        ("llama", {}),
        ("gemma2", {}),
        ("bert", DECODER),
    ],
)
def test_good_models_pass_their_trial(kind, settings, dtype, load_and_try):
    load_and_try(kind, dtype, **settings)


@pytest.mark.parametrize("script", [reinforce_lm, ppo_lm, trpo_lm])
def test_a_model_with_room_for_one_token_is_tried_with_one(script, tmp_path):
    """The positions of --model tiny are as many as the longest prompt and response need."""
    run_main(script, "--response-length", 1, "--total-episodes", 0, "--device", "cpu", "--output-dir", tmp_path)


def test_a_model_with_attention_of_its_own_is_refused(load_and_try):
    assert "a trial of" in refusal(load_and_try, "bloom", hidden_size=16, n_layer=2, n_head=2)


def make_loud(policy):
    """Weights with which positions and context matter."""
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 2.0 if "position" in name else 0.5)


def test_a_model_passes_its_trial_if_the_mask_has_holes(load_and_try, monkeypatch):
    """The second token is in the attention mask alone, as the output of a tool would be."""
    sample = common.sample

    def sample_with_hole(*args):
        sequences, attention_mask, response_mask, logprobs, *others = sample(*args)
        response_mask[:, 1] = False
        assert response_mask[:, 2].any()
        return sequences, attention_mask, response_mask, logprobs.where(response_mask, 0.0), *others

    monkeypatch.setattr(common, "sample", sample_with_hole)
    load_and_try("llama", change=make_loud)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("roberta", "float32"),
        ("roberta", "bfloat16"),
        ("roformer", "float32"),
        ("bert", "float32"),
        ("bert", "bfloat16"),
    ],
)
def test_a_model_that_padding_changes_is_refused(kind, dtype, load_and_try):
    """Positions that begin after padding, positions that cannot be given, and attention to what follows."""
    settings = DECODER | dict(is_decoder=kind != "bert", change=make_loud)
    line = refusal(load_and_try, kind, dtype, **settings)
    assert "the log-probabilities of the plain model, from sampler and loss" in line


@pytest.mark.parametrize("row", [0, 1])
def test_log_probabilities_of_the_loss_that_are_nan_are_refused(row, load_and_try):
    def broken(*args):
        logprobs, entropy = policy_logprobs(*args)
        logprobs[row] = float("nan")
        return logprobs, entropy

    assert "nan" in refusal(load_and_try, logprobs_of=broken)


def test_weights_that_are_nan_are_refused(load_and_try):
    line = refusal(load_and_try, change=lambda policy: policy.lm_head.weight.data[5].fill_(float("nan")))
    assert "finite logits" in line


@pytest.mark.parametrize("end_ids, rows", [([0, 12], ROWS), ([0], [*ROWS, {"input_ids": [12]}])])
def test_ids_without_an_embedding_are_refused(end_ids, rows, load_and_try):
    assert "an embedding of each token, found 12" in refusal(load_and_try, end_ids=end_ids, rows=rows)


def test_tuples_in_place_of_named_outputs_are_refused(load_and_try):
    assert "'tuple' object has no attribute" in refusal(load_and_try, return_dict=False)


def with_old_signature(policy, accepts_more):
    """Lets the model's own code take only what all models once took, and perhaps ignore the rest."""
    forward = policy.forward

    def old(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)

    def tolerant(self, *args, logits_to_keep=None, **kwargs):
        return old(self, *args, **kwargs)

    policy.forward = types.MethodType(tolerant if accepts_more else old, policy)


@pytest.mark.parametrize("accepts_more", [False, True])
def test_a_model_that_does_not_pass_settings_on_is_refused(accepts_more, load_and_try):
    refusal(load_and_try, change=lambda policy: with_old_signature(policy, accepts_more))


def quantize(folder):
    """Layers in fp8, in blocks with a scale each, and the rest in bfloat16."""
    weights = {}
    for name, value in load_file(f"{folder}/model.safetensors").items():
        weights[name] = value.bfloat16()
        if value.ndim == 2 and "layers" in name:
            weights[name] = (value * 100).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = torch.full([-(-size // 16) for size in value.shape], 0.01)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with open(f"{folder}/config.json") as file:
        config = json.load(file)
    config["quantization_config"] = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[16, 16])
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_weights_are_refused(dtype, load_and_try):
    refusal(load_and_try, dtype=dtype, prepare=quantize)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_folder_without_a_tokenizer_is_refused(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as error:
        common.encode_prompts(common.load_tokenizer(str(tmp_path), []), [{"prompt": "12"}], 10)
    line = str(error.value)
    assert line.startswith("error: --model: ") and "tokenizer" in line and "\n" not in line


def test_a_classifier_is_no_policy(load_and_try):
    """Its embeddings could serve as a head; its score would be lost."""

    def save_classifier(folder):
        kind = AutoModelForSequenceClassification
        kind.from_pretrained(folder, num_labels=1, pad_token_id=0).save_pretrained(folder)

    assert "score.weight" in refusal(load_and_try, "gpt2", prepare=save_classifier)
    assert "lm_head.weight" in refusal(load_and_try, "llama", prepare=save_classifier)
