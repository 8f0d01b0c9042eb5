"""--reward model:NAME, with a small classifier that is trained here and has a tokenizer of its own."""

import json

import common
import reinforce_lm

import pytest
import torch
from helpers import character_tokenizer, run_main, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
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
    folder, tokenizer = tmp_path_factory.mktemp("reward") / "classifier", character_tokenizer(CHARACTERS)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=2, pad_token_id=0, **size)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
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


def load(folder, logit=-1):
    args = reinforce_lm.Args(reward_logit=logit)
    return common.reward_model(str(folder), args, torch.device("cpu"))


@pytest.fixture
def changed(classifier, tmp_path):
    """A function that saves the classifier with another tokenizer, or other weights, and returns its folder."""

    def save(change=lambda model, tokenizer: None):
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        tokenizer = AutoTokenizer.from_pretrained(classifier)
        change(model, tokenizer)
        model.save_pretrained(tmp_path / "changed")
        tokenizer.save_pretrained(tmp_path / "changed")
        return tmp_path / "changed"

    return save


def test_scores_are_the_logits_of_single_texts(classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = common.load_tokenizer(classifier, [])
    prompts, responses = ["12", "34567", "7"] * 12, ["777", "", "1234567"] * 12  # more than are scored at once
    for logit in (-1, 0):
        texts = [tokenizer(p + r, return_tensors="pt") for p, r in zip(prompts, responses)]
        expected = torch.stack([model(**text).logits[0, logit] for text in texts[:3]]).repeat(12)
        torch.testing.assert_close(load(classifier, logit)(prompts, responses), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config, pad_token",
    [({"pad_token_id": None}, None), ({"pad_token_id": 3}, "<end>"), ({"attention_dropout": 0.5}, "<end>")],
    ids=["no padding token", "another padding token than the tokenizer's", "dropout"],
)
def test_batches_are_scored_alike_whatever_was_saved_with_the_weights(config, pad_token, classifier, changed):
    """A decoder's score would be read after the end of a short text if its config decided what padding is."""

    def change(model, tokenizer):
        vars(model.config).update(config)
        tokenizer.pad_token = pad_token

    pairs = ["12", "345", "7"], ["777", "", "1234567"]
    torch.testing.assert_close(load(changed(change))(*pairs), load(classifier)(*pairs))


@pytest.mark.parametrize("trained_with", [None, "#"], ids=["trained without padding", "padding that the config knows"])
def test_padding_of_a_tokenizer_that_has_none(trained_with, changed):
    """An end token that closes a text is part of it, unless the classifier was trained with it as padding."""

    def change(model, tokenizer):
        tokenizer.pad_token, tokenizer.bos_token = None, "!"
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<end>"
        model.config.pad_token_id = trained_with and tokenizer.convert_tokens_to_ids(trained_with)

    folder = changed(change)
    model, tokenizer = [kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer)]
    prompts = [[{"role": "user", "content": "12"}], [{"role": "user", "content": "345"}]]
    ids = [torch.tensor([tokenizer(f"{text}<end>").input_ids]) for text in ("12777", "3451")]
    expected = torch.stack([model(input_ids=row).logits[0, -1] for row in ids]).detach()
    torch.testing.assert_close(load(folder)(prompts, ["777", "1"]), expected, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_pads_on_the_left(tmp_path):
    """GPT-2's classifiers count positions from the first column, which must be a text's."""
    tokenizer = character_tokenizer(CHARACTERS)
    size = dict(n_positions=32, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0, initializer_range=1.0)
    AutoModelForSequenceClassification.from_config(GPT2Config(vocab_size=13, **size)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path, padding_side="left").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    reward_fn = load(tmp_path)
    torch.testing.assert_close(reward_fn(["12", "345678"], ["777", "0"])[:1], reward_fn(["12"], ["777"]))


def test_positions_that_begin_after_the_padding_id(tmp_path):
    """RoBERTa has room for 32 tokens where its config says 34."""
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    config = RobertaConfig(vocab_size=13, max_position_embeddings=34, pad_token_id=1, **size)
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward_fn = load(tmp_path)
    torch.testing.assert_close(reward_fn(["9" * 60], ["7"]), reward_fn(["9" * 31], ["7"]))


def test_a_text_that_is_too_long_is_read_from_its_end(classifier):
    reward_fn = load(classifier)  # 64 positions, two of which RoBERTa could not use
    long = reward_fn(["1" * 90] * 2, ["7777"] * 2)
    torch.testing.assert_close(long, reward_fn([""], ["1" * 58 + "7777"]).expand(2))


def test_a_limit_of_the_tokenizer_counts_too(changed):
    """Where it is below that of the positions, which may be there without having been trained."""
    reward_fn = load(changed(lambda model, tokenizer: setattr(tokenizer, "model_max_length", 20)))
    long = reward_fn(["1" * 30], ["7777"])
    torch.testing.assert_close(long, load(changed())([""], ["1" * 16 + "7777"]))


def test_the_policy_learns_to_please_it(classifier, tmp_path):
    flags = ["--reward", f"model:{classifier}", "--total-episodes", 64 * 25, "--batch-size", 64, "--eval-size", 32]
    flags += ["--learning-rate", 1e-2, "--device", "cpu", "--eval-every", 0, "--save-every", 0]
    run_main(reinforce_lm, *flags, "--output-dir", tmp_path)
    (run_dir,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 64 + 25 * 4
    answers = [line["response"] for line in lines if line["split"] == "eval"]
    before, after = [[text.count("7") > 1 for text in part] for part in (answers[:32], answers[32:])]
    assert len(after) == 32 and sum(after) > sum(before) + 16, "it learned to write sevens"


# ----- Chats -----

USER, BEGUN = {"role": "user", "content": "12"}, {"role": "assistant", "content": "34"}
TURNS = "{% for m in messages %}{{ '#' + m.content + '!' }}{% endfor %}{% if add_generation_prompt %}#7{% endif %}"


def use_turns(model, tokenizer):
    tokenizer.chat_template = TURNS


def test_chats_go_through_its_chat_template_and_end_with_the_turn_of_the_response(classifier, changed):
    score = load(changed(use_turns))([[USER]], ["777"])
    torch.testing.assert_close(score, load(classifier)(["#12!#777!"], [""]))


def test_special_tokens_are_added_to_texts_once_and_to_chats_not_again(classifier, changed):
    """The tokenizer begins a text with `!`; the chat template has written it already."""

    def change(model, tokenizer):
        start = tokenizer.convert_tokens_to_ids("!")
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing("! $A", None, [("!", start)])
        tokenizer.chat_template = "!{% for m in messages %}{{ '#' + m.content }}{% endfor %}"

    reward_fn, plain = load(changed(change)), load(classifier)
    chat = [{"role": role, "content": f"{i}7"} for i, role in enumerate(["user", "assistant", "user"])]
    torch.testing.assert_close(reward_fn([chat], ["777"]), plain(["!#07#17#27#777"], [""]))
    torch.testing.assert_close(reward_fn(["12"], ["777"]), plain(["!12"], ["777"]))


# ----- Refusals -----


def try_reward(folder, prompt="12", **flags):
    args = reinforce_lm.Args(reward=f"model:{folder}", **flags)
    return common.load_reward(args, torch.device("cpu"), [{"prompt": prompt}])


def test_bad_reward_models_are_refused_before_any_work(classifier, changed, tmp_path):
    with pytest.raises(SystemExit, match="^error: --reward: could not load .*$"):
        try_reward(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "language_model")  # its head would get random weights
    with pytest.raises(SystemExit, match="^error: --reward: .*'score.weight'.*$"):
        try_reward(tmp_path / "language_model")
    with pytest.raises((SystemExit, IndexError), match="2"):
        try_reward(classifier, reward_logit=2)
    with pytest.raises((SystemExit, ValueError), match="chat"):
        try_reward(classifier, prompt=[USER])


def test_weights_that_the_class_would_drop_are_refused(changed):
    folder = changed()
    weights = load_file(folder / "model.safetensors") | {"score.bias": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="--reward: .*'score.bias'"):
        try_reward(folder)


def test_an_answer_that_the_assistant_has_begun_and_the_response_are_one_turn(classifier, changed):
    score = load(changed(use_turns))([[USER, BEGUN]], ["777"])
    torch.testing.assert_close(score, load(classifier)(["#12!#34777!"], [""]))
