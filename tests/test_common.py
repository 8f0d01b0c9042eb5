"""Tokenization, prompts, rewards, randomness and checkpoints."""

import datetime
import json
import os
import sys
import types

import common
import ppo_lm
from common import InputError
from reinforce_lm import Args

import pytest
import torch
from helpers import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "ba"}]
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"


def encode(rows, prompt_length=10, tokenizer=None):
    tokenizer = tokenizer or common.character_tokenizer("ab<>!")
    return common.encode_prompts(tokenizer, rows, prompt_length)


def test_character_tokenizer_is_one_token_per_character(tmp_path):
    tokenizer = common.character_tokenizer("héllo\n wörld|")
    text = "wörld |\nhéllo"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    again = common.load_tokenizer(str(tmp_path), [])
    assert again(text).input_ids == ids and again.decode(ids) == text
    with pytest.raises(Exception, match="UNK"):
        tokenizer("x")


def test_tiny_tokenizer_knows_every_character_of_the_rows():
    tokenizer = common.load_tokenizer("tiny", [{"prompt": "ab", "reference": 12, "note": "z"}, {"prompt": "cé"}])
    assert set(tokenizer.get_vocab()) == {"<end>", "a", "b", "c", "é", "1", "2"}


def test_prompts_are_padded_on_the_left():
    prompts = encode([{"prompt": "ab"}, {"prompt": "abba"}, {"prompt": "b"}])
    a, b = common.character_tokenizer("ab<>!")("ab").input_ids
    ids, mask = prompts.padded()
    assert mask.tolist() == [[False, False, True, True], [True] * 4, [False, False, False, True]]
    assert [row[real].tolist() for row, real in zip(ids, mask)] == [[a, b], [a, b, b, a], [b]]
    chosen = prompts.select([2, 0, 2])
    assert [row["prompt"] for row in chosen.rows] == ["b", "ab", "b"]
    ids, mask = chosen.padded()
    assert [row[real].tolist() for row, real in zip(ids, mask)] == [[b], [a, b], [b]]
    assert ids.shape == (3, 2), "the longest of the chosen ones has two tokens"


def test_an_end_token_that_the_tokenizer_adds_is_taken_off():
    tokenizer = common.character_tokenizer("ab<>!")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("$A <end>", None, [("<end>", 0)])
    assert tokenizer("ab").input_ids[-1] == 0
    assert tokenizer.decode(encode([{"prompt": "ab"}], tokenizer=tokenizer).ids[-1]) == "ab"
    own = encode([{"prompt": "ab<end>"}], tokenizer=tokenizer)
    assert own.ids[0][-1] == 0, "one that the prompt ends with stays"


def test_chat_prompts_go_through_the_template():
    tokenizer = common.character_tokenizer("ab<>!")
    tokenizer.chat_template = TEMPLATE
    (ids,) = encode([{"prompt": CHAT}], tokenizer=tokenizer, prompt_length=20).ids
    assert tokenizer.decode(ids) == "<ab><b><ba>!"
    with pytest.raises(InputError, match="chat template"):
        encode([{"prompt": CHAT}])
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"row 1 .*: expected messages for the chat template.*no system role"):
        encode([{"prompt": CHAT}], tokenizer=tokenizer)
    with pytest.raises(InputError, match="texts, or lists of messages"):
        encode([{"prompt": "ab"}, {"prompt": CHAT}], tokenizer=tokenizer)


def test_end_tokens_come_from_tokenizer_and_generation_config():
    tokenizer, model = common.character_tokenizer("ab"), tiny_model()
    model.generation_config.eos_token_id = [5, 7]
    assert common.end_token_ids(tokenizer, model) == [0, 5, 7]
    model.generation_config.eos_token_id = 3
    assert common.end_token_ids(tokenizer, model) == [0, 3]
    model.generation_config.eos_token_id = None
    assert common.end_token_ids(tokenizer, model) == [0]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="--model: expected an end token"):
        common.end_token_ids(tokenizer, model)


def load(dataset, eval_dataset="", eval_size=8, **settings):
    sizes = dict(eval_size=eval_size, prompt_length=64)
    return common.load_prompts(Args(dataset=str(dataset), eval_dataset=str(eval_dataset), **sizes, **settings))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sort_prompts_are_disjoint_and_their_references_sorted(monkeypatch):
    monkeypatch.setattr(common, "NUM_SORT_PROMPTS", 2**15)
    _, train, held_out = load("sort", eval_size=512)
    assert len(held_out.rows) == 512 and len(train.rows) > 30_000
    prompts = [row["prompt"] for row in train.rows + held_out.rows]
    assert len(set(prompts)) == len(prompts)
    for row in train.rows[:100] + held_out.rows:
        assert len(row["prompt"]) == 5 and row["reference"] == "".join(sorted(row["prompt"]))


def test_jsonl_columns_and_split(tmp_path):
    rows = [{"question": f"q{i % 40}", "answer": i, "level": i / 2} for i in range(50)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    _, train, held_out = load(path, prompt_column="question", reference_column="answer")
    assert len(held_out.rows) == 5  # a tenth, though 8 were asked for
    assert not {row["prompt"] for row in train.rows} & {row["prompt"] for row in held_out.rows}
    for prompts in (train, held_out):
        for row in prompts.rows:
            i = row["reference"]
            assert row == {"prompt": f"q{i % 40}", "reference": i, "level": i / 2}
    eval_path = write_rows(tmp_path / "eval.jsonl", rows[:20])
    _, train, held_out = load(path, eval_path, prompt_column="question", reference_column="answer")
    assert len(train.rows) == 50 and [row["reference"] for row in held_out.rows] == list(range(8))


def test_held_out_data_may_have_characters_of_its_own_and_files_a_byte_order_mark(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "ab", "reference": "b"}] * 3)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    eval_path = write_rows(tmp_path / "eval.jsonl", [{"prompt": "cd", "reference": "e"}])
    tokenizer, train, held_out = load(path, eval_path)
    assert set(tokenizer.get_vocab()) == {"<end>", *"abcde"}
    assert len(train.rows) == 3 and held_out.rows == [{"prompt": "cd", "reference": "e"}]


def test_columns_that_are_chosen_win_and_other_line_separators_are_text(tmp_path):
    rows = [{"prompt": "old", "q": f"a\u2028b{i}", "reference": "x", "answer": "y"} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _, train, _ = load(tmp_path / "data.jsonl", prompt_column="q", reference_column="answer")
    assert all(row["prompt"].startswith("a\u2028b") and row["reference"] == "y" for row in train.rows)


def test_hub_names_go_to_the_datasets_package(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
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


def test_prompt_stream_visits_each_prompt_once_per_epoch():
    stream = common.prompt_indices(7, 0, 21, seed=3)
    epochs = [stream[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 3
    pieces = [common.prompt_indices(7, start, 3, seed=3) for start in range(0, 21, 3)]
    assert sum(pieces, []) == stream
    assert common.prompt_indices(7, 0, 21, seed=4) != stream
    epochs = {tuple(common.prompt_indices(50, 50 * e, 50, seed)) for seed in (1, 2, 3) for e in (0, 1, 2)}
    assert len(epochs) == 9, "seeds have no epoch in common"


def test_builtin_rewards():
    def match(response, reference):
        return common.match_reward(None, [response], [reference])[0]

    assert match("01234", "01234") == 1.0
    assert match("01233", "01234") == pytest.approx(5 / 6)
    assert match("0123", "01234") == pytest.approx(4 / 6)  # the end is too early
    assert match("012345", "01234") == pytest.approx(5 / 6)  # the end is too late
    assert match("", "ab") == 0.0 and match("ba", "ab") == pytest.approx(1 / 3)
    assert common.exact_reward(None, [" 42\n", "4 2"], [42, "42"]) == [1.0, 0.0]
    # ROUGE-L of "the cat sat" and "the cat on the mat sat": longest common subsequence 3, P = 3/3, R = 3/6
    assert common.rouge_reward(None, ["the cat sat"], ["the cat on the mat sat"]) == [pytest.approx(2 / 3)]
    assert common.bleu_reward(None, ["the cat is on the mat"], ["the cat is on the mat"]) == [pytest.approx(1.0)]
    # n-gram precisions 5/6, 3/5, 1/4 and, smoothed, (1/2)/3; equal lengths, so no brevity penalty
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert common.bleu_reward(None, ["the cat sat on the mat"], ["the cat is on the mat"]) == [pytest.approx(expected)]


def test_reward_functions_get_prompts_responses_and_columns(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def count(prompts, responses, letter, reference):\n"
        "    return [len(p) + 10 * r.count(c) + 100 * x for p, r, c, x in zip(prompts, responses, letter, reference)]\n"
    )
    rows = [{"prompt": "ab", "letter": "x", "reference": 1}, {"prompt": "abb", "letter": "y", "reference": 2}]
    reward_fn = common.load_reward(Args(reward=f"{path}:count"), "cpu", rows)
    scores = common.score_responses(reward_fn, Args(), rows, ["xx", "y", "yy", "x"], {})[0]
    assert scores.tolist() == [122.0, 102.0, 223.0, 203.0]


def test_a_reward_file_imports_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_the_reward.py").write_text("VALUE = 7.0\n")
    code = "from beside_the_reward import VALUE\n\n\ndef fn(prompts, responses):\n    return [VALUE]\n"
    (tmp_path / "imports.py").write_text(code)
    assert common.load_reward(Args(reward=f"{tmp_path}/imports.py:fn"), "cpu", [{"prompt": "a"}])(["a"], ["b"]) == [7.0]


ROW_1, ROW_2 = "prompt 'a', response 'w'", "prompt 'b', response 'z'"


@pytest.mark.parametrize(
    "body, message",
    [
        ("[None, 1.0, 1.0, 1.0]", f", {ROW_1}: expected finite scores, found None"),
        ("[1.0, 1.0, 1.0, float('nan')]", f", {ROW_2}: expected finite scores, found nan"),
        ("[1.0, 1.0, 1.0, float('inf')]", f", {ROW_2}: expected finite scores, found inf"),
        ("[1.0, 1.0, 1.0, -1e39]", f", {ROW_2}: expected finite scores, found -1e+39"),
        ("[1.0, 1.0, 1.0, 10**400]", f", {ROW_2}: expected finite scores, found 1000"),
        ("['1', 1.0, 1.0, 1.0]", f", {ROW_1}: expected finite scores, found '1'"),
        ("[1.0]", ": expected a list of 4 scores, found [1.0]"),
        ("None", ": expected a list of 4 scores, found None"),
        ("[1 / (p != 'b') for p in prompts]", ": ZeroDivisionError: division by zero (<string>:1)"),
        ("[exit(p) for p in prompts if p != 'a']", ": SystemExit: b"),
    ],
)
def test_broken_rewards_name_the_reward_and_the_prompt(body, message):
    reward_fn = eval(f"lambda prompts, responses, **columns: {body}")
    with pytest.raises(InputError) as error:
        common.score_responses(reward_fn, Args(reward="mine"), [{"prompt": "a"}, {"prompt": "b"}], list("wxyz"), {})
    assert str(error.value).startswith(f"--reward mine{message}")


def test_checkpoints_are_whole_or_absent_and_two_are_kept(tmp_path, monkeypatch):
    for iteration in (1, 2, 3):
        common.save_checkpoint(tmp_path, iteration, {"iteration": iteration, "weights": torch.full((3,), iteration)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000002.pt", "checkpoint_00000003.pt"]

    def full_disk(state, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match="writing .*checkpoint_00000004.pt: .* No space left"):
        common.save_checkpoint(tmp_path, 4, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000002.pt", "checkpoint_00000003.pt"]
    assert common.load_checkpoint(tmp_path)["weights"].tolist() == [3, 3, 3]


def test_real_tokenizer_round_trip(tmp_path):
    """A byte-pair tokenizer that merges: what the reward reads is the text, whatever the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = ["the film is a delight", "the film is a bore", "a bore"]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    tokenizer = common.load_tokenizer(str(tmp_path), [])
    prompts = encode([{"prompt": t} for t in text], tokenizer=tokenizer)
    ids, mask = prompts.padded()
    assert ids.shape[1] < 10 and len(set(mask.sum(1).tolist())) > 1
    assert common.decode(tokenizer, ids, mask) == text


def test_chats_of_the_held_out_rows_leave_the_training_rows(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"q{i % 15}"}], "reference": str(i)} for i in range(60)]
    prompts = common.Prompts(rows, [[1]] * 60)
    train, held_out = common.split_prompts(prompts, 4)
    texts = [{row["prompt"][0]["content"] for row in part.rows} for part in (train, held_out)]
    assert len(held_out.rows) == 4 and not texts[0] & texts[1] and texts[0] | texts[1] == {f"q{i}" for i in range(15)}
    assert [len(common.split_prompts(prompts, size)[1].rows) for size in (1, 6, 50)] == [1, 6, 6]


def test_a_start_token_that_the_tokenizer_adds_stays_and_counts():
    tokenizer = common.character_tokenizer("ab<>!")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<end> $A", None, [("<end>", 0)])
    ids = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert encode([{"prompt": "ab"}], prompt_length=3, tokenizer=tokenizer).ids == [[0, *ids]]  # exactly that long
    with pytest.raises(InputError, match="1 to 2 tokens, found 3"):
        encode([{"prompt": "ab"}], prompt_length=2, tokenizer=tokenizer)


def test_a_character_that_the_tokenizer_does_not_know_is_one_line():
    with pytest.raises(InputError, match="character that the tokenizer of --model does not know"):
        encode([{"prompt": "ab"}, {"prompt": "xyz"}])


def test_metrics_of_unequal_texts():
    """A response that is shorter than its reference, and inflected words."""
    short, reference = "the cat sat", "the cat sat on the mat"
    # every n-gram of the response is found, but its length costs exp(1 - 6/3); 4-grams, of which it has none, smooth
    assert 0 < common.bleu_reward(None, [short], [reference])[0] < 0.37 * 1.001
    longer = common.bleu_reward(None, [reference], [short])[0]
    assert longer != pytest.approx(common.bleu_reward(None, [short], [reference])[0]), "which text is which matters"
    assert common.rouge_reward(None, ["cats"], ["cat"]) == [0.0] and common.rouge_reward(None, ["Cat"], ["cat"]) == [
        1.0
    ]


def score(function, rows=({"prompt": "a"}, {"prompt": "b"}), responses=("w", "x", "y", "z"), facts=None):
    return common.score_responses(function, Args(reward="mine"), list(rows), list(responses), facts or {})


def test_rewards_get_copies_and_leave_no_setting_behind(tmp_path):
    rows, responses = [{"prompt": [{"role": "user", "content": "hi"}], "tags": ["t"]}], ["w", "x"]

    def vandal(prompts, responses, tags):
        responses.pop()
        prompts[0].append("more")
        tags[0].clear()
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        os.chdir(tmp_path)
        return [1.0, 2.0]

    folder = os.getcwd()
    scores, _ = common.score_responses(vandal, Args(), rows, responses, {})
    assert scores.tolist() == [1.0, 2.0] and scores.dtype == torch.get_default_dtype() == torch.float32
    assert responses == ["w", "x"] and rows == [{"prompt": [{"role": "user", "content": "hi"}], "tags": ["t"]}]
    assert torch.is_grad_enabled() and torch.zeros(1).device.type == "cpu" and os.getcwd() == folder


@pytest.mark.parametrize("returned", [torch.zeros(4, device="meta"), torch.eye(4).to_sparse(), iter([1.0] * 4), {}])
def test_odd_scores_are_one_line(returned):
    with pytest.raises(InputError, match="--reward mine: "):
        score(lambda prompts, responses: returned)


def test_a_reward_that_is_a_coroutine_is_told_so(tmp_path):
    (tmp_path / "mine.py").write_text("async def fn(prompts, responses):\n    return [0.0]\n")
    with pytest.raises(InputError, match="--reward: expected a function that returns scores, found 'async def fn'"):
        common.load_reward(Args(reward=f"{tmp_path}/mine.py:fn"), "cpu", [{"prompt": "a"}])


def test_a_reward_is_called_once_even_if_it_fails():
    calls = []
    with pytest.raises(InputError, match="TimeoutError: judge"):
        score(lambda prompts, responses: calls.append(1) or exec("raise TimeoutError('judge')"))
    assert len(calls) == 1


def test_a_full_gpu_in_a_reward_is_no_fault_of_the_reward():
    with pytest.raises(torch.OutOfMemoryError):
        score(lambda prompts, responses: exec("raise torch.OutOfMemoryError"))


def test_rewards_that_ask_get_facts_and_may_return_parts():
    facts = {"ended": [True, False, True, True], "num_tokens": [1, 2, 3, 4]}

    def ask(prompts, responses, ended, num_tokens):
        return [n if end else -1 for n, end in zip(num_tokens, ended)], {"length": num_tokens}

    scores, parts = score(ask, facts=facts)
    assert scores.tolist() == [1, -1, 3, 4] and parts["length"].tolist() == [1, 2, 3, 4]
    scores, parts = score(lambda prompts, responses, **columns: [len(columns)] * 4, facts=facts)
    assert scores.tolist() == [0.0] * 4 and parts == {}
    _, parts = score(lambda prompts, responses: ([0.0] * 4, {"b": [1.0] * 4, "a": [2.0] * 4}))
    assert list(parts) == ["a", "b"], "in one order on all ranks, which add them up"
    with pytest.raises(InputError, match="--reward mine: expected a list of 4 style, found"):
        score(lambda prompts, responses: ([0.0] * 4, {"style": [1.0]}))
    with pytest.raises(InputError, match="other names than scores, score and exact, found .'scores'"):
        score(lambda prompts, responses: ([0.0] * 4, {"scores": [1.0] * 4}))


def test_a_digest_tells_data_apart_and_takes_what_hubs_hold():
    rows = [{"prompt": "a", "when": datetime.date(2026, 1, 1)}, {"prompt": "b", "when": datetime.date(2026, 1, 2)}]
    same, other = common.Prompts([dict(row) for row in rows], []), common.Prompts(rows[::-1], [])
    assert common.digest(common.Prompts(rows, [])) == common.digest(same) != common.digest(other)


def test_lines_never_end_a_run(tmp_path):
    """A pipe that nobody reads, and a terminal that has no such character."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="ascii") as closed:
        common.show("a line", closed)
        common.show("another", closed)
    with open(tmp_path / "ascii", "w", encoding="ascii") as file:
        common.show("ü is \N{GRINNING FACE}", file)
    assert (tmp_path / "ascii").read_text() == "\\xfc is \\U0001f600\n"


def test_log_probabilities_of_bfloat16_logits_are_computed_in_float32():
    logits = 4 * torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    tokens, exact = torch.tensor([[1, 2, 3], [4, 5, 6]]), logits.bfloat16().double().log_softmax(-1)
    logprobs, entropy = common.token_statistics(logits.bfloat16(), tokens, 1.0)
    torch.testing.assert_close(logprobs.double(), exact.gather(2, tokens[..., None])[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=1e-6)


def test_the_sampling_copy_rounds_parameters_and_nothing_else():
    model = tiny_model("llama")
    copied = common.copy_network(model, torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    for (name, buffer), original in zip(copied.named_buffers(), model.buffers(), strict=True):
        assert buffer.dtype == original.dtype == torch.float32 and torch.equal(buffer, original), name
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_seeds_and_iterations_have_shuffles_of_their_own():
    shuffles, args = [], ppo_lm.Args(num_minibatches=25)
    for key in ((1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 1, 1)):
        minibatches = common.shuffled_minibatches(torch.ones(100, 1, dtype=torch.bool), args, *key)
        shuffles.append(tuple(torch.cat([inds for minibatch in minibatches for inds in minibatch]).tolist()))
    assert len(set(shuffles)) == 4
    streams = [common.prompt_indices(1000, 0, 50, seed) for seed in (1, 2)]
    assert streams[0] != streams[1]
