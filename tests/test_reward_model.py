"""--reward model:NAME, with a small classifier that is trained here and has a tokenizer of its own."""

import common
import reinforce_lm

import pytest
import torch
from helpers import error_line, load_policy, rollout, run_main, tiny_model
from safetensors.torch import load_file, save_file
from test_runs import scalars
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

CHARACTERS = "!#0123456789"  # more than the policy has, so that the ids of its digits are others


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a classifier whose second label is: the text has more than one 7."""
    folder, tokenizer = tmp_path_factory.mktemp("reward") / "classifier", common.character_tokenizer(CHARACTERS)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=2, pad_token_id=0, **size)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        digits = torch.randint(10, (64, 10), generator=generator)
        digits[torch.rand(64, 10, generator=generator) < 0.1] = 7
        lengths = torch.randint(5, 11, (64,), generator=generator)
        texts = ["".join(map(str, row[:length].tolist())) for row, length in zip(digits, lengths)]
        labels = torch.tensor([text.count("7") > 1 for text in texts]).long()
        loss = torch.nn.functional.cross_entropy(
            model(**tokenizer(texts, padding=True, return_tensors="pt")).logits, labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_scores_are_the_logits_of_single_texts(classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = common.load_tokenizer(classifier, [])
    prompts, responses = ["12", "34567", "7"], ["777", "", "1234567"]
    for logit in (-1, 0):
        reward_fn = common.RewardModel(classifier, logit, batch_size=2)
        expected = [model(**tokenizer(p + r, return_tensors="pt")).logits[0, logit] for p, r in zip(prompts, responses)]
        torch.testing.assert_close(reward_fn(prompts, responses), torch.stack(expected), rtol=1e-4, atol=1e-5)
    args = reinforce_lm.Args(reward="model", reward_clip=0.01)
    clipped, _ = common.score_responses(reward_fn, args, [{"prompt": p} for p in prompts], responses, {})
    torch.testing.assert_close(clipped, torch.stack(expected).clamp(-0.01, 0.01), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config, pad_token",
    [({"pad_token_id": None}, None), ({"pad_token_id": 3}, "<end>"), ({"attention_dropout": 0.5}, "<end>")],
    ids=["no padding token", "another padding token than the tokenizer's", "dropout"],
)
def test_batches_are_scored_alike_whatever_was_saved_with_the_weights(config, pad_token, classifier, tmp_path):
    """A decoder's score would be read after the end of a short text if its config decided what padding is."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokenizer = common.load_tokenizer(classifier, [])
    vars(model.config).update(config)
    tokenizer.pad_token = pad_token
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = ["12", "345", "7"], ["777", "", "1234567"]
    scores = [common.RewardModel(folder)(*pairs) for folder in (classifier, tmp_path)]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("trained_with", [None, "#"], ids=["trained without padding", "padding that the config knows"])
def test_padding_of_a_tokenizer_that_has_none(trained_with, classifier, tmp_path):
    """An end token that closes a text is part of it, unless the classifier was trained with it as padding."""
    model, tokenizer = [
        load.from_pretrained(classifier) for load in (AutoModelForSequenceClassification, AutoTokenizer)
    ]
    tokenizer.pad_token, tokenizer.bos_token = None, "!"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<end>"
    model.config.pad_token_id = trained_with and tokenizer.convert_tokens_to_ids(trained_with)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = [[{"role": "user", "content": "12"}], [{"role": "user", "content": "345"}]]
    scores = common.RewardModel(tmp_path)(prompts, ["777", "1"])
    texts = ["12777", "3451"]
    ids = [torch.tensor([tokenizer(f"{text}<end>").input_ids]) for text in texts]
    expected = [model(input_ids=row).logits[0, -1] for row in ids]
    torch.testing.assert_close(scores, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_pads_on_the_left(tmp_path):
    """GPT-2's classifiers count positions from the first column, which must be a text's."""
    tokenizer = common.character_tokenizer(CHARACTERS)
    tokenizer.padding_side = "left"
    size = dict(n_positions=32, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0, initializer_range=1.0)
    AutoModelForSequenceClassification.from_config(GPT2Config(vocab_size=13, **size)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward_fn = common.RewardModel(tmp_path)
    torch.testing.assert_close(reward_fn(["12", "345678"], ["777", "0"])[:1], reward_fn(["12"], ["777"]))


def test_positions_that_begin_after_the_padding_id(tmp_path):
    """RoBERTa has room for 32 tokens where its config says 34."""
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    config = RobertaConfig(vocab_size=13, max_position_embeddings=34, pad_token_id=1, **size)
    tokenizer = common.character_tokenizer(CHARACTERS)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward_fn = common.RewardModel(tmp_path)
    torch.testing.assert_close(reward_fn(["9" * 60], ["7"]), reward_fn(["9" * 31], ["7"]))


def test_a_text_that_is_too_long_is_read_from_its_end(classifier):
    reward_fn = common.RewardModel(classifier)  # 64 positions, two of which RoBERTa could not use
    long = reward_fn(["1" * 90] * 2, ["7777"] * 2)
    torch.testing.assert_close(long, reward_fn([""], ["1" * 58 + "7777"]).expand(2))


def test_the_policy_learns_to_please_it(classifier, tmp_path):
    flags = ["--reward", f"model:{classifier}", "--total-episodes", 64 * 60, "--batch-size", 64, "--eval-size", 32]
    flags += ["--learning-rate", 5e-3, "--device", "cpu", "--eval-every", 0, "--save-every", 0, "--reward-clip", 3]
    run_main(reinforce_lm, *flags, "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    score = [value for _, value in scalars(run_dir)["objective/score"]]
    assert max(score) <= 3 and sum(score[-5:]) / 5 > sum(score[:5]) / 5 + 1
    tokenizer = common.load_tokenizer(str(run_dir / "model"), [])
    prompts = torch.tensor(tokenizer(["01234", "56890", "31313", "98654"]).input_ids)
    policies = [AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()]
    policies.append(load_policy("tiny", tokenizer, 11, seed=1))
    share = []
    for policy in policies:
        responses, mask, _ = rollout(
            policy, prompts, prompts > -1, 6, [0], samples_per_prompt=64, generator=torch.Generator().manual_seed(0)
        )
        texts = common.decode(tokenizer, responses, mask)
        share.append(sum(text.count("7") > 1 for text in texts) / len(texts))
    assert share[0] > share[1] + 0.4, "it learned to write sevens"


def chat_rows():
    return [{"prompt": [{"role": "user", "content": "12"}]}]


def test_chat_prompts_go_through_its_chat_template(classifier, tmp_path):
    tokenizer = common.load_tokenizer(classifier, [])
    tokenizer.chat_template = "{% for m in messages %}{{ '#' + m.content + '!' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(classifier).save_pretrained(tmp_path)
    reward_fn = common.RewardModel(tmp_path)
    plain = common.RewardModel(classifier)
    torch.testing.assert_close(reward_fn([chat_rows()[0]["prompt"]], ["777"]), plain(["#12!#777!"], [""]))


def test_special_tokens_are_added_to_texts_once_and_to_chats_not_again(classifier, tmp_path):
    """The tokenizer begins a text with `!`; the chat template has written it already."""
    tokenizer = common.load_tokenizer(classifier, [])
    start = tokenizer.convert_tokens_to_ids("!")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("! $A", None, [("!", start)])
    tokenizer.chat_template = "!{% for m in messages %}{{ '#' + m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(classifier).save_pretrained(tmp_path)
    reward_fn, plain, turns = common.RewardModel(tmp_path), common.RewardModel(classifier), [1, 2, 3]
    chat = [{"role": "user" if i % 2 else "assistant", "content": f"{i}7"} for i in turns]
    torch.testing.assert_close(reward_fn([chat], ["777"]), plain(["!#17#27#37#777"], [""]))
    torch.testing.assert_close(reward_fn(["12"], ["777"]), plain(["!12"], ["777"]))


def refusal(capsys, tmp_path, *flags):
    with pytest.raises(SystemExit) as stop:
        run_main(reinforce_lm, "--device", "cpu", "--output-dir", tmp_path, *flags)
    assert stop.value.code == 2
    return error_line(capsys)


def test_bad_reward_models_are_refused_before_any_work(classifier, tmp_path, capsys):
    line = refusal(capsys, tmp_path, "--reward", f"model:{classifier}", "--reward-logit", 2)
    assert "--reward-logit: expected one of the 2 logits" in line
    assert "--reward: expected a sequence classifier" in refusal(capsys, tmp_path, "--reward", f"model:{tmp_path}")
    assert "--reward-clip: expected 0 or more" in refusal(capsys, tmp_path, "--reward-clip", -1)
    language_model = tmp_path / "language_model"  # its head would get random weights
    tiny_model("llama").save_pretrained(language_model)
    common.load_tokenizer(classifier, []).save_pretrained(language_model)
    assert "'score.weight'" in refusal(capsys, tmp_path, "--reward", f"model:{language_model}")
    with_bias = tmp_path / "with_bias"  # the class has no bias and would drop it
    AutoModelForSequenceClassification.from_pretrained(classifier).save_pretrained(with_bias)
    common.load_tokenizer(classifier, []).save_pretrained(with_bias)
    weights = load_file(with_bias / "model.safetensors") | {"score.bias": torch.ones(2)}
    save_file(weights, with_bias / "model.safetensors", metadata={"format": "pt"})
    assert "'score.bias'" in refusal(capsys, tmp_path, "--reward", f"model:{with_bias}")
    with pytest.raises(common.InputError, match="chat template"):
        common.load_reward(reinforce_lm.Args(reward=f"model:{classifier}"), "cpu", chat_rows())
