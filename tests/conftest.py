"""Settings and fixtures of all tests. Everything runs offline on a CPU; `helpers.py` holds what they share."""

import os
import sys

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # as fast for models of this size, and other work on the machine does not hurt it


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """A smaller `sort`, which is quicker to make, for the runs in this process."""
    import common  # here, since the process that only hands out tests needs no torch

    monkeypatch.setitem(sys.modules, "common", common)  # a reward file makes room for its own
    monkeypatch.setattr(common, "NUM_SORT_PROMPTS", 2**9)


@pytest.fixture
def model_folder(tmp_path):
    """A function that saves a tiny checkpoint with a character tokenizer and returns its folder."""
    from helpers import character_tokenizer, tiny_model

    def save(kind="gpt2", characters="0123456789", **settings):
        tokenizer = character_tokenizer(characters)
        folder = tmp_path / f"{kind}_checkpoint"
        tiny_model(kind, vocab_size=len(tokenizer), **settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save
