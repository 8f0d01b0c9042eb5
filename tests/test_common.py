"""Tokenization, prompts, data sets, rewards, randomness and checkpoints."""

import json
import sys
import types

import common
import ppo_lm
import reinforce_lm
from reinforce_lm import Args

import numpy as np
import pytest
import torch
from helpers import character_tokenizer, run_main, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "ba"}]
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"


# ----- Tokenizers -----


def encode(*prompts, tokenizer=None, prompt_length=20):
    """The ids of each prompt."""
    rows = [{"prompt": prompt} for prompt in prompts]
    common.encode_prompts(tokenizer or character_tokenizer("ab<>!"), rows, prompt_length)
    return [row["input_ids"] for row in rows]


def byte_tokenizer(*texts):
    """A byte-pair tokenizer that merges what is frequent in `texts`, and nothing without any."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = dict(special_tokens=["<eos>"], initial_alphabet=alphabet, vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def metaspace_tokenizer():
    """Words with their space before them, and a decoder that drops the first space of a text, as Llama 2's."""
    words = ["<unk>", "<s>", "</s>", "▁one", "▁two", "▁three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def bert_tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "say", "wor", "##d"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))


def test_the_tiny_tokenizer_has_one_token_per_character(tmp_path):
    tokenizer = character_tokenizer("héllo\n wörld|")
    text = "wörld |\nhéllo"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    again = common.load_tokenizer(str(tmp_path), [])
    assert again(text).input_ids == ids and again.decode(ids) == text


def test_the_tiny_tokenizer_knows_every_character_of_prompts_and_references():
    tokenizer = common.load_tokenizer("tiny", [{"prompt": "ab", "reference": 12, "note": "z"}, {"prompt": "cé"}])
    assert set(tokenizer.get_vocab()) == {"<end>", "a", "b", "c", "é", "1", "2"}


def test_a_character_that_the_tokenizer_does_not_know_is_one_line():
    with pytest.raises(SystemExit, match="error: --model: its tokenizer has to know the prompts.*UNK"):
        encode("ab", "xyz")


def test_prompts_are_padded_on_the_left():
    a, b = character_tokenizer("ab<>!")("ab").input_ids
    args, model = Args(response_length=1, dtype="float32"), tiny_model(vocab_size=6)

    def padded(*prompts):
        rows = [{"input_ids": ids} for ids in prompts]
        sequences, mask, *_ = common.sample(model, character_tokenizer("ab<>!"), [0], args, rows, greedy=True)
        return sequences[:, :-1], mask[:, :-1]

    ids, mask = padded([a, b], [a, b, b, a], [b])
    assert mask.tolist() == [[False, False, True, True], [True] * 4, [False, False, False, True]]
    assert [row[real].tolist() for row, real in zip(ids, mask)] == [[a, b], [a, b, b, a], [b]]
    assert padded([a, b], [b])[0].shape == (2, 2), "the longest of the chosen ones has two tokens"
    assert padded([a, 0, b], [0, b])[1].tolist() == [[True] * 3, [False, True, True]], "of the padding's id, too"


def test_texts_and_their_prompts_survive_a_tokenizer_that_merges(tmp_path):
    texts = ["the film is a delight", "the film is a bore", "a bore"]
    byte_tokenizer(*texts).save_pretrained(tmp_path)
    tokenizer = common.load_tokenizer(str(tmp_path), [])
    ids = encode(*texts, tokenizer=tokenizer)
    assert tokenizer.batch_decode(ids) == texts and max(map(len, ids)) < 10


@pytest.mark.parametrize("template", ["$A <end>", "$A <end> <end>", "! $A <end>"])
def test_special_tokens_that_close_a_prompt_are_taken_off(template):
    tokenizer = character_tokenizer("ab<>!")
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<end>", "!")]
    plain = tokenizer("ab").input_ids
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(template, None, special)
    start = [special[1][1]] * template.startswith("!")
    ids = encode("ab<end>", "ab", tokenizer=tokenizer)
    assert ids == [[*start, *plain, 0], [*start, *plain]], "one that the prompt itself ends with stays"


def test_the_closing_token_of_an_encoder_is_taken_off_and_its_name_does_not_matter(bert_tokenizer):
    ids = encode("say word [SEP]", "say word", tokenizer=bert_tokenizer)
    tokens = [bert_tokenizer.convert_ids_to_tokens(prompt) for prompt in ids]
    assert tokens == [["[CLS]", "say", "wor", "##d", "[SEP]"], ["[CLS]", "say", "wor", "##d"]]


def test_a_start_token_that_the_tokenizer_adds_stays_and_counts():
    tokenizer = metaspace_tokenizer()
    assert encode("one two", prompt_length=3, tokenizer=tokenizer) == [[1, 3, 4]]  # exactly that long
    with pytest.raises(SystemExit, match=r"--prompt-length, row 2 \(one two\): expected 1 to 2 tokens, found 3"):
        encode("one", "one two", prompt_length=2, tokenizer=tokenizer)


def test_a_start_token_that_the_prompt_has_already_is_not_doubled():
    tokenizer = metaspace_tokenizer()
    assert tokenizer("<s> two").input_ids == [1, 1, 4]
    assert encode("two", "<s> two", tokenizer=tokenizer) == [[1, 4]] * 2
    tokenizer.chat_template = "<s>{% for m in messages %} {{ m.content }}{% endfor %}"
    assert encode([{"role": "user", "content": "two"}], tokenizer=tokenizer) == [[1, 4]]


def test_a_prompt_may_begin_with_one_token_twice():
    tokenizer = character_tokenizer("ab<>!")  # which has no start token
    assert [tokenizer.decode(ids) for ids in encode("aab", "aa", "a", tokenizer=tokenizer)] == ["aab", "aa", "a"]
    tokenizer = metaspace_tokenizer()
    tokenizer.add_bos_token = False
    tokenizer.backend_tokenizer.post_processor = None
    ids = tokenizer("one one two").input_ids
    assert ids == [3, 3, 4] and encode("one one two", tokenizer=tokenizer) == [ids]  # with one that is not there


def test_chat_prompts_go_through_the_template():
    tokenizer = character_tokenizer("ab<>!")
    tokenizer.chat_template = TEMPLATE
    (ids,) = encode(CHAT, tokenizer=tokenizer)
    assert tokenizer.decode(ids) == "<ab><b><ba>!"
    refusal = "--model: its chat template has to fit the messages of row"
    with pytest.raises(SystemExit, match=refusal):
        encode(CHAT)
    with pytest.raises(SystemExit, match=refusal):
        encode(CHAT, "ab", tokenizer=tokenizer)
    with pytest.raises(SystemExit, match="--model: its tokenizer has to know the prompts"):
        encode("ab", CHAT, tokenizer=tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(SystemExit, match=f"{refusal}.*no system role"):
        encode(CHAT, tokenizer=tokenizer)


def test_an_answer_that_the_assistant_has_begun_is_continued():
    tokenizer = character_tokenizer("ab<>!")
    tokenizer.chat_template = TEMPLATE
    begun, open_question = encode(CHAT[:2], CHAT, tokenizer=tokenizer)
    assert tokenizer.decode(begun) == "<ab><b" and tokenizer.decode(open_question) == "<ab><b><ba>!"


# ----- The text of a response -----


def texts_of(tokenizer, prompts, responses, monkeypatch):
    """The texts and facts that `common.sample` returns for given ids of prompts and responses; 0 ends a response."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(response) for response in responses], batch_first=True)
    mask = common.mask_through_first_end(tokens, [0])
    monkeypatch.setattr(common, "rollout", lambda *_, **__: (tokens, mask, torch.zeros(tokens.shape)))
    model, args = tiny_model(), Args(dtype="float32", response_length=tokens.shape[1])
    rows = [{"input_ids": prompt} for prompt in prompts]
    *_, texts, facts = common.sample(model, tokenizer, [0], args, rows, len(responses) // len(prompts))
    return texts, facts


def test_the_text_of_a_response_is_what_it_adds_to_its_prompt(bert_tokenizer, monkeypatch):
    tokenizer = metaspace_tokenizer()
    ids = tokenizer("one two three").input_ids
    assert tokenizer.decode(ids[3:]) == "three", "alone, a response loses its first space"
    assert texts_of(tokenizer, [ids[:3]], [ids[3:]], monkeypatch)[0] == [" three"]
    ids = bert_tokenizer("say word", add_special_tokens=False).input_ids
    assert bert_tokenizer.decode(ids[2:]) == "##d"
    assert texts_of(bert_tokenizer, [ids[:1], ids[:2]], [ids[1:], ids[2:]], monkeypatch)[0] == [" word", "d"]


def test_a_character_of_several_tokens_may_be_cut_anywhere(monkeypatch):
    tokenizer = byte_tokenizer()
    a, first, second, b = tokenizer("aéb").input_ids
    assert texts_of(tokenizer, [[a], [a]], [[first, second, b], [b, first, 0]], monkeypatch)[0] == ["éb", "b\ufffd"]
    # A prompt that ends with half a character is not repeated, and nothing after the other half is lost.
    (text,), _ = texts_of(tokenizer, [[a, first]], [[second, b]], monkeypatch)
    assert text == "\ufffdb"


def test_texts_have_no_special_tokens_and_facts_say_how_responses_ended(monkeypatch):
    tokenizer = character_tokenizer("ab")
    prompts, responses = [[1, 2], [2]], [[1, 0], [2, 1, 2], [0], [1, 2, 0]]
    texts, facts = texts_of(tokenizer, prompts, responses, monkeypatch)
    assert texts == ["a", "bab", "", "ab"]
    assert facts == {"ended": [True, False, True, True], "num_tokens": [2, 3, 1, 3]}


# ----- Data sets -----


def load(dataset, eval_dataset="", eval_size=8, world_size=1, **settings):
    """The tokenizer, and the training and held-out rows without their ids."""
    args = Args(dataset=str(dataset), eval_dataset=str(eval_dataset), eval_size=eval_size, prompt_length=64, **settings)
    tokenizer, *parts = common.load_prompts(args, world_size)
    for rows in parts:
        for row in rows:
            assert row.pop("input_ids")
    return tokenizer, *parts


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sort_prompts_are_disjoint_and_their_references_sorted(monkeypatch):
    _, train, held_out = load("sort", eval_size=50)
    rows = train + held_out
    assert len(held_out) == 50 and len(rows) == len({row["prompt"] for row in rows}) == common.NUM_SORT_PROMPTS
    for row in rows:
        assert len(row["prompt"]) == 5 and row["reference"] == "".join(sorted(row["prompt"]))
    monkeypatch.undo()
    rows = common.load_rows("sort", "--dataset", Args())
    assert len({row["prompt"] for row in rows}) == len(rows) == 2**15


def test_the_held_out_rows_are_the_same_for_all_seeds():
    (_, train, held_out), (_, other_train, other_held_out) = [load("sort", seed=seed) for seed in (1, 2)]
    assert held_out == other_held_out and train == other_train


def test_jsonl_columns_and_split(tmp_path):
    rows = [{"question": f"q{i % 40}", "answer": i, "level": i / 2} for i in range(50)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    _, train, held_out = load(path, prompt_column="question", reference_column="answer")
    assert len(held_out) == 5  # a tenth, though 8 were asked for
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    for row in train + held_out:
        i = row["reference"]
        assert row == {"prompt": f"q{i % 40}", "reference": i, "level": i / 2}
    eval_path = write_rows(tmp_path / "eval.jsonl", rows[:20])
    _, train, held_out = load(path, eval_path, prompt_column="question", reference_column="answer")
    assert len(train) == 50 and [row["reference"] for row in held_out] == list(range(8))
    with pytest.raises(SystemExit, match="--eval-dataset: expected a row for each rank, found 8 rows"):
        load(path, eval_path, world_size=9, prompt_column="question", reference_column="answer")


def test_held_out_data_may_have_characters_of_its_own_and_files_a_byte_order_mark(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "ab", "reference": "b"}] * 3)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    eval_path = write_rows(tmp_path / "eval.jsonl", [{"prompt": "cd", "reference": "e"}])
    tokenizer, train, held_out = load(path, eval_path)
    assert set(tokenizer.get_vocab()) == {"<end>", *"abcde"}
    assert len(train) == 3 and held_out == [{"prompt": "cd", "reference": "e"}]


def test_columns_that_are_chosen_win_and_other_line_separators_are_text(tmp_path):
    rows = [{"prompt": "old", "q": f"a\u2028b{i}", "reference": "x", "answer": "y"} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _, train, _ = load(tmp_path / "data.jsonl", prompt_column="q", reference_column="answer")
    assert all(row["prompt"].startswith("a\u2028b") and row["reference"] == "y" for row in train)


def test_prompts_and_references_may_change_places(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": f"p{i}", "reference": f"r{i}"} for i in range(3)])
    rows = common.load_rows(str(path), "--dataset", Args(prompt_column="reference", reference_column="prompt"))
    assert rows == [{"prompt": f"r{i}", "reference": f"p{i}"} for i in range(3)]


def test_hub_names_go_to_the_datasets_package(monkeypatch):
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        return [{"prompt": f"{i}", "reference": "b"} for i in range(20)]

    module = types.ModuleType("datasets")
    module.load_dataset, module.__spec__ = load_dataset, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", module)
    load("someone/some-data")
    load("someone/some-data:test")
    load("someone/some-data@main:train[:5%]")
    assert calls == [
        ("someone/some-data", None, "train"),
        ("someone/some-data", None, "test"),
        ("someone/some-data", "main", "train[:5%]"),
    ]


def test_chats_of_the_held_out_rows_leave_the_training_rows(tmp_path, monkeypatch):
    rows = [{"prompt": [{"role": "user", "content": f"q{i % 15}"}], "reference": str(i)} for i in range(60)]
    monkeypatch.setattr(common, "encode_prompts", lambda _, rows, __: [row.update(input_ids=[1]) for row in rows])
    path = write_rows(tmp_path / "data.jsonl", rows)
    _, train, held_out = load(path, eval_size=4)
    texts = [{row["prompt"][0]["content"] for row in part} for part in (train, held_out)]
    assert len(held_out) == 4 and not texts[0] & texts[1] and texts[0] | texts[1] == {f"q{i}" for i in range(15)}
    assert [len(load(path, eval_size=size)[2]) for size in (1, 6, 50)] == [1, 6, 6]
    assert len(load(path, eval_size=1, world_size=2)[2]) == 2, "one for each rank"


# ----- Rewards -----


def test_builtin_rewards():
    def match(response, reference):
        return common.match_reward(None, [response], [reference])[0]

    assert match("01234", "01234") == 1.0
    assert match("01233", "01234") == pytest.approx(5 / 6)
    assert match("0123", "01234") == pytest.approx(4 / 6)  # the end is too early
    assert match("012345", "01234") == pytest.approx(5 / 6)  # the end is too late
    assert match("", "ab") == 0.0 and match("ba", "ab") == pytest.approx(1 / 3)
    assert common.exact_reward(None, [" 42\n", "4 2"], [42, "42"]) == [1.0, 0.0]
    assert common.bleu_reward(None, ["the cat is on the mat"], ["the cat is on the mat"]) == [pytest.approx(1.0)]
    # n-gram precisions 5/6, 3/5, 1/4 and, smoothed, (1/2)/3; equal lengths, so no brevity penalty
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert common.bleu_reward(None, ["the cat sat on the mat"], ["the cat is on the mat"]) == [pytest.approx(expected)]


def test_rouge_is_that_of_the_longest_common_subsequence():
    def rouge(response, reference):
        return common.rouge_reward(None, [response], [reference])[0]

    # "the cat sat": P = 3/3, R = 3/6
    assert rouge("the cat sat", "the cat on the mat sat") == pytest.approx(2 / 3)
    # All six words are in the reference (ROUGE-1 is 1); "the cat the" is the longest part in one order: P = R = 3/6
    assert rouge("mat the on sat cat the", "the cat sat on the mat") == pytest.approx(1 / 2)
    assert rouge("cats", "cat") == 0.0 and rouge("Cat", "cat") == 1.0, "no stemming, no case"


def test_bleu_of_texts_of_unequal_length():
    short, long = "the cat sat", "the cat sat on the mat"
    # n-gram precisions 3/6, 2/5, 1/4 and, smoothed, (1/2)/3; a response that is too long has no brevity penalty
    expected = (3 / 6 * 2 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert common.bleu_reward(None, [long], [short]) == [pytest.approx(expected)]
    # every n-gram is found, but the length costs exp(1 - 6/3); 4-grams, of which there are none, are smoothed
    assert 0 < common.bleu_reward(None, [short], [long])[0] < 0.37 * 1.001


@pytest.mark.parametrize("reference", [None, float("nan"), ["b"]])
def test_a_reference_that_is_no_text_is_one_line(reference):
    rows = [{"prompt": "ab", "reference": 1.5}, {"prompt": "ba", "reference": reference}]
    with pytest.raises(SystemExit, match=r"error: --reward match: expected a text reference in each row, found .*'ba'"):
        common.load_reward(Args(reward="match"), "cpu", rows)


@pytest.fixture
def load_reward(tmp_path, monkeypatch):
    """A function that writes files and loads FILE:fn, tried on `rows`; what this changes of imports is undone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before, main = dict(sys.modules), dict(vars(sys.modules["__main__"]))

    def load(rows=({"prompt": "a"},), file="my_reward.py", **files):
        for name, code in files.items():
            (tmp_path / f"{name}.py").write_text(code)
        return common.load_reward(Args(reward=f"{tmp_path}/{file}:fn"), torch.device("cpu"), list(rows))

    yield load
    for name in set(sys.modules) - set(before):
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.modules |= before
    namespace = vars(sys.modules["__main__"])
    for name in set(namespace) - set(main):  # a worker of pytest-xdist has no __file__ there
        del namespace[name]
    namespace.update(main)


def scores_of(score_responses, responses=("", "ab"), prompt="a"):
    return score_responses([{"prompt": prompt}], list(responses), {})[0].tolist()


def test_reward_functions_get_prompts_responses_and_columns(load_reward):
    code = """
def fn(prompts, responses, letter, reference, **facts):
    return [len(p) + 10 * r.count(c) + 100 * x for p, r, c, x in zip(prompts, responses, letter, reference)]
"""
    rows = [{"prompt": "ab", "letter": "x", "reference": 1}, {"prompt": "abb", "letter": "y", "reference": 2}]
    score_responses = load_reward(rows, my_reward=code)
    scores, _ = score_responses([row | {"input_ids": [1]} for row in rows], ["xx", "y", "yy", "x"], {})
    assert scores.tolist() == [122.0, 102.0, 223.0, 203.0]


COUNT = "def fn(prompts, responses, **columns):\n    return [float(len(r)) for r in responses]\n"


def test_a_reward_file_may_have_any_name_that_no_module_has(load_reward):
    assert scores_of(load_reward(file="my-reward.py", **{"my-reward": COUNT})) == [0.0, 2.0]
    with pytest.raises(SystemExit, match="--reward: expected a function 'fn' in .*math.py, found <module 'math' "):
        load_reward(file="math.py", math=COUNT)


def test_a_reward_file_imports_what_lies_beside_it(load_reward):
    code = "from beside import VALUE\ndef fn(prompts, responses, **columns):\n    return [VALUE] * len(responses)\n"
    assert scores_of(load_reward(my_reward=code, beside="VALUE = 7.0\n")) == [7.0, 7.0]


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from beside import size

def one(text):
    return size(text)

def fn(prompts, responses, **columns):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # unlike Pool, it ends with its workers
        return list(pool.map(one, responses))
"""


def test_a_reward_may_start_processes(load_reward, tmp_path):
    """Each imports the running script, which imports our `common`, and the file of the reward."""
    (tmp_path / "product").mkdir()
    (tmp_path / "product" / "script.py").write_text("from common import ours\n")
    (tmp_path / "product" / "common.py").write_text("ours = 1\n")
    sys.path.insert(0, f"{tmp_path}/product")
    vars(sys.modules["__main__"]).update(__spec__=None, __file__=f"{tmp_path}/product/script.py")
    size = "def size(text):\n    return 10.0 * len(text)\n"
    score_responses = load_reward(my_reward=POOL, beside=size)
    assert scores_of(score_responses) == [0.0, 20.0]


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "def fn(*_, **__):\n    exit(3)\n"], ids=["import", "call"])
def test_a_reward_that_calls_exit_is_one_line(code, load_reward):
    with pytest.raises(SystemExit, match="^error: --reward .*my_reward.py:fn: must not call exit: SystemExit: 3$"):
        load_reward(my_reward=code)


@pytest.mark.parametrize("code", ["fn = 3", "def other(): pass"])
def test_a_reward_file_without_the_function_is_one_line(code, load_reward):
    with pytest.raises(SystemExit, match="error: --reward: expected a function 'fn' in .*my_reward.py, found"):
        load_reward(my_reward=code)


def test_errors_of_the_reward_keep_their_traceback(load_reward):
    with pytest.raises(ZeroDivisionError):
        load_reward(my_reward="1 / 0")
    with pytest.raises(ZeroDivisionError):
        score(lambda prompts, responses: 1 / 0)
    with pytest.raises(TypeError, match="level"):
        score(lambda prompts, responses, level: [0.0] * 4)


def test_a_reward_may_change_what_it_gets():
    """As one that adds the response to the messages of its prompt."""
    rows, responses, seen = [{"prompt": [CHAT[0]], "tags": ["t"]}], ["w", "x"], []

    def vandal(prompts, responses, tags):
        for prompt, response, labels in zip(prompts, responses, tags):
            prompt.append({"role": "assistant", "content": response})
            seen.append((len(prompt), labels.pop()))
        responses.clear()
        return [0.0, 0.0]

    common.score_responses(vandal, Args(), None, rows, responses, {})
    assert seen == [(2, "t")] * 2 and rows == [{"prompt": [CHAT[0]], "tags": ["t"]}] and responses == ["w", "x"]


def score(function, facts=None, part_names=None):
    """Scores and parts of four responses to two prompts."""
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    return common.score_responses(function, Args(reward="mine"), part_names, rows, list("wxyz"), facts or {})


@pytest.mark.parametrize(
    "body, message",
    [
        ("[None, 1.0, 1.0, 1.0]", "expected numbers, found [None, 1.0"),
        ("[1.0, 1.0, 1.0, float('nan')]", "expected a list of 4 finite scores, found [1.0, 1.0, 1.0, nan]"),
        ("[1.0, 1.0, 1.0, float('inf')]", "expected a list of 4 finite scores, found [1.0, 1.0, 1.0, inf]"),
        ("[1.0, 1.0, 1.0, -1e39]", "expected a list of 4 finite scores"),
        ("['1', 1.0, 1.0, 1.0]", "expected numbers, found ['1'"),
        ("[1.0]", "expected a list of 4 finite scores, found [1.0]"),
        ("torch.ones(4, 1)", "expected a list of 4 finite scores"),
        ("None", "expected numbers, found None"),
        ("([0.0] * 4, {'style': [1.0]})", "expected a list of 4 finite style, found [1.0]"),
    ],
)
def test_scores_that_are_no_finite_numbers_are_one_line(body, message):
    with pytest.raises(SystemExit) as error:
        score(eval(f"lambda prompts, responses: {body}"))
    assert str(error.value).startswith(f"error: --reward mine: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "scores",
    [
        [torch.tensor(1.0), torch.tensor(0), torch.tensor(True), torch.tensor(0.0, dtype=torch.bfloat16)],
        [np.True_, np.False_, np.float64(1), np.int32(0)],
        [True, False, 1, 0.0],
        np.array([1.0, 0.0, 1.0, 0.0]),
        torch.tensor([1, 0, 1, 0], dtype=torch.int8),
        torch.tensor([1.0, 0.0, 1.0, 0.0], requires_grad=True),
    ],
    ids=["torch scalars", "numpy scalars", "python", "numpy", "torch integers", "with gradient"],
)
def test_numbers_are_numbers(scores):
    result, _ = score(lambda prompts, responses: scores)
    assert result.tolist() == [1.0, 0.0, 1.0, 0.0] and result.dtype == torch.float32
    assert not result.requires_grad, "or the loss would train the reward"


def test_the_mean_of_booleans_and_integers_is_no_boolean_and_no_integer():
    assert common.mean(torch.tensor([True, False, False, True])).item() == 0.5
    values, mask = torch.tensor([5, 2, 4, 1]), torch.tensor([True, True, True, False])
    torch.testing.assert_close(common.mean(values, mask), torch.tensor(11 / 3))
    assert common.mean(values.double()).dtype == torch.float64


def test_rewards_get_facts_and_may_return_parts():
    facts = {"ended": [True, False, True, True], "num_tokens": [1, 2, 3, 4]}

    def ask(prompts, responses, ended, num_tokens, **columns):
        return [n if end else -1 for n, end in zip(num_tokens, ended)], {"length": num_tokens}

    scores, parts = score(ask, facts)
    assert scores.tolist() == [1, -1, 3, 4] and parts["length"].tolist() == [1, 2, 3, 4]
    scores, parts = score(lambda prompts, responses, **columns: [len(columns)] * 4, facts)
    assert scores.tolist() == [2.0] * 4 and parts == {}
    _, parts = score(lambda prompts, responses, **columns: ([0.0] * 4, {"b": [1.0] * 4, "a": [2.0] * 4}))
    assert list(parts) == ["a", "b"], "in one order on all ranks, which add them up"


def test_parts_keep_the_names_of_the_first_call(load_reward):
    """Or ranks would not add up the same ones."""
    code = COUNT[:-1] + ", {name: [0.0] * len(responses) for name in responses[0]}\n"
    score_responses = load_reward(my_reward=code)
    assert scores_of(score_responses, ["", "ab"]) == [0.0, 2.0]
    with pytest.raises(SystemExit, match="--reward .*my_reward.py:fn: expected the parts of its first call, .* {'a'}"):
        scores_of(score_responses, ["a", "ab"])


# ----- Randomness and files -----


def test_prompt_stream_visits_each_prompt_once_per_epoch():
    stream = common.prompt_indices(7, 0, 21, seed=3)
    epochs = [stream[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 3
    pieces = [common.prompt_indices(7, start, 3, seed=3) for start in range(0, 21, 3)]
    assert sum(pieces, []) == stream
    assert common.prompt_indices(7, 0, 21, seed=4) != stream
    epochs = {tuple(common.prompt_indices(50, 50 * e, 50, seed)) for seed in (1, 2, 3) for e in (0, 1, 2)}
    assert len(epochs) == 9, "seeds have no epoch in common"


def test_seeds_and_iterations_have_shuffles_of_their_own():
    shuffles, args = [], ppo_lm.Args(num_minibatches=25)
    for key in ((1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 1, 1)):
        minibatches = common.shuffled_minibatches(torch.ones(100, 1, dtype=torch.bool), args, *key)
        shuffles.append(tuple(torch.cat([rows for minibatch in minibatches for rows in minibatch]).tolist()))
    assert len(set(shuffles)) == 4 and all(sorted(shuffle) == list(range(100)) for shuffle in shuffles)


def test_checkpoints_are_whole_or_absent_and_two_are_kept(tmp_path, monkeypatch):
    for iteration in (1, 2, 3):
        common.save_checkpoint(tmp_path, iteration, {"iteration": iteration, "weights": torch.full((3,), iteration)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000002.pt", "checkpoint_00000003.pt"]

    def full_disk(state, path):
        path.write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        common.save_checkpoint(tmp_path, 4, {})
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["checkpoint_00000002.pt", "checkpoint_00000003.pt"]
    assert common.load_checkpoint(tmp_path)["weights"].tolist() == [3, 3, 3]


def test_the_output_folder_may_be_given_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--total-episodes", 0, "--eval-size", 1, "--kl-ref-coef", 0, "--device", "cpu"]
    run_main(reinforce_lm, *flags, "--output-dir=~/x")
    (run_dir,) = (tmp_path / "x").iterdir()
    assert json.loads((run_dir / "summary.json").read_text())["run_dir"] == str(run_dir)
