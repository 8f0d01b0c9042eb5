"""A metric as the reward, where more maximum likelihood does not help: `python benchmark/metric_reward.py`.

A task of text to text with noisy references: a sentence of 4 to 9 words is put into other words, each two swapped. In
the references a fifth of the words is another one of three synonyms, a tenth is missing, and a tenth of the places
ends the sentence. A GPT-2 of 1M parameters learns 4,096 of them by maximum likelihood until its held-out loss and
metrics stay put. Each script then goes on from it with ROUGE-L as the reward. Rows are printed when they are measured:
ROUGE-L, and the metrics that were not the reward, of sampled and greedy responses to the held-out rows, with the gain
over the model of maximum likelihood in standard errors of the mean difference per row. A model that is there is reused.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import reinforce_lm

import numpy as np
import throughput
import tokenizers
import torch
import transformers
import tyro
from sacrebleu import sentence_chrf

SCRIPTS = {
    "reinforce_lm": ["--learning-rate", "2e-4"],
    "ppo_lm": ["--learning-rate", "1e-4", "--critic-learning-rate", "5e-4", "--value-clip", "0.2"],
    "trpo_lm": ["--max-kl", "0.02", "--critic-learning-rate", "5e-4", "--value-clip", "0.2"],
}


@dataclass
class Args:
    output_dir: str = "runs/metric_reward"  # folder for data, models and runs
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # scripts to run
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of each script
    reward: str = "rouge"  # rouge or bleu
    epochs: int = 20  # of maximum likelihood; the reward takes over from the one with the best held-out loss
    total_episodes: int = 25_600  # responses of each run


def make_rows(count, seed):
    """Rows with a source sentence as the prompt and a noisy reference."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(count):
        source = random.integers(0, 40, random.integers(4, 10))
        target = [source[i ^ 1] if i ^ 1 < len(source) else source[i] for i in range(len(source))]
        words = []
        for word in target:
            if words and random.random() < 0.1:
                break
            if random.random() >= 0.1:
                words.append(f"{'abc'[random.choice(3, p=[0.8, 0.1, 0.1])]}{word}")
        rows.append({"prompt": " ".join(f"s{i}" for i in source) + " =", "reference": " ".join(words) or "a0"})
    return rows


def make_tokenizer():
    words = ["<end>", "=", *[f"{kind}{i}" for kind in "sabc" for i in range(40)]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def loss(model, tokenizer, rows):
    """Mean cross-entropy of the references' tokens, given their sources."""
    ids = [torch.tensor(tokenizer(f"{row['prompt']} {row['reference']} <end>").input_ids) for row in rows]
    starts = torch.tensor([len(tokenizer(row["prompt"]).input_ids) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)  # (B, L)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < starts[:, None], -100)
    return model(ids.clamp(min=0), labels=labels).loss


def evaluate(folder, rows):
    """{metric: (N,) array} of sampled and greedy responses of a saved model to the N rows, and their lengths."""
    flags = reinforce_lm.Args(model=str(folder), response_length=12, dtype="float32")
    tokenizer, rows = transformers.AutoTokenizer.from_pretrained(folder), [dict(row) for row in rows]
    common.encode_prompts(tokenizer, rows, flags.prompt_length)
    model = common.load_policy(flags, tokenizer, rows)
    results, references = {}, [row["reference"] for row in rows]
    for kind, greedy in (("sampled", False), ("greedy", True)):
        generator = common.make_generator("cpu", 0)
        end_ids = [tokenizer.eos_token_id]
        *_, texts, _ = common.sample(model, tokenizer, end_ids, flags, rows, generator=generator, greedy=greedy)
        results[f"ROUGE-L {kind}"] = common.rouge_reward(None, texts, references)
        results[f"BLEU {kind}"] = common.bleu_reward(None, texts, references)
        results[f"chrF {kind}"] = [sentence_chrf(*pair).score / 100 for pair in zip(texts, zip(references))]
        results[f"words {kind}"] = [len(text.split()) for text in texts]
    return {name: np.array(values, dtype=float) for name, values in results.items()}


def show(name, results, base=None):
    cells = []
    for metric, values in results.items():
        gain = values - base[metric] if base else None
        errors = f" ({gain.mean() / (gain.std() / len(gain) ** 0.5):+.1f})" if base and "words" not in metric else ""
        cells.append(f"{values.mean():.3f}{errors}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def pretrain(folder, tokenizer, train, test, args):
    """Maximum likelihood, a row for each epoch; the model with the best held-out loss is saved as FOLDER/best."""
    torch.manual_seed(0)
    size = dict(vocab_size=len(tokenizer), n_positions=32, n_embd=160, n_layer=3, n_head=4)
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer, best = torch.optim.Adam(model.parameters(), lr=2e-3), float("inf")
    for epoch in range(1, args.epochs + 1):
        order = np.random.default_rng(epoch).permutation(len(train))
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - (epoch - 1) / args.epochs)
        model.train()
        for start in range(0, len(train), 64):
            loss(model, tokenizer, [train[i] for i in order[start : start + 64]]).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            held_out = loss(model, tokenizer, test).item()
        for name in ["latest", *["best"] * (held_out < best)]:
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        best = min(best, held_out)
        results = evaluate(folder / "latest", test)
        if epoch == 1:
            print(f"| | {' | '.join(results)} |\n|{' --- |' * (len(results) + 1)}")
        show(f"maximum likelihood, epoch {epoch}, held-out loss {held_out:.4f}", results)


def train_on_metric(folder, script, seed, args):
    """Run a script from FOLDER/best with the metric as the reward; returns the folder of the trained model."""
    out = folder / f"{script}_{args.reward}_{seed}"
    flags = dict(model=folder / "best", dataset=folder / "train.jsonl", eval_dataset=folder / "test.jsonl", seed=seed)
    flags |= dict(reward=args.reward, response_length=12, batch_size=256, total_episodes=args.total_episodes)
    flags |= dict(eval_size=512, eval_every=25, kl_ref_coef=0.01, output_dir=out)
    throughput.run_script(f"{script}.py", *SCRIPTS[script], **flags)
    return max(out.iterdir(), key=os.path.getmtime) / "model"


def main(args):
    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, train, test = make_tokenizer(), make_rows(4096, 1), make_rows(2048, 2)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (folder / "best").exists():
        pretrain(folder, tokenizer, train, test, args)
    base = evaluate(folder / "best", test)
    show("maximum likelihood, best", base)
    for script in args.scripts:
        for seed in args.seeds:
            show(f"`{script}.py`, seed {seed}", evaluate(train_on_metric(folder, script, seed, args), test), base)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
