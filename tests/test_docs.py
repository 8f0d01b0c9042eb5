"""Code, README and docs/ say the same: commands, flags, metrics, equations, shared sections."""

import argparse
import ast
import difflib
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap

import common

import pytest
import torch
from helpers import ROOT, SCRIPTS, reward_file, run_main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DOCS = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
SOURCES = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
SOURCES["common"] = (ROOT / "common.py").read_text()
FLAGS = {script: set(importlib.import_module(script).Args.__dataclass_fields__) for script in SCRIPTS}
TAG = r"(?:objective|policy|value|trpo|loss|eval|time)/\w+"


def flag(name):
    """total_episodes -> --total-episodes"""
    return "--" + name.replace("_", "-")


def top_level(script):
    """Name -> node of each function and class of a script or common.py."""
    nodes = ast.parse(SOURCES[script]).body
    return {node.name: node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def sections(source):
    """Banner -> text up to the next banner, for every `# ===== name (shared by all three scripts) =====`."""
    parts = re.split(r"^( *# ===== .+? =====)$", source, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ----- The scripts -----


def test_shared_sections_are_the_same_to_the_byte():
    shared = {}
    for script in SCRIPTS:
        found = sections(SOURCES[script])
        assert all(banner.endswith(("(shared by all three scripts) =====", "(algorithm) =====")) for banner in found)
        shared[script] = {banner: text for banner, text in found.items() if "(shared by all three scripts)" in banner}
        assert len(shared[script]) >= 9
    first = shared[SCRIPTS[0]]
    for script in SCRIPTS[1:]:
        assert list(shared[script]) == list(first)
        for banner, text in first.items():
            assert shared[script][banner] == text, f"{script}: {banner}"


def test_ppo_and_trpo_have_the_same_critic_and_advantages():
    """A paper's box on either would mention them, so each script has them; only the number of an equation differs."""
    ppo, trpo = [
        {
            name: re.sub(r"# \(\d+\)", "# (k)", ast.get_source_segment(SOURCES[script], node))
            for name, node in top_level(script).items()
        }
        for script in ("ppo_lm", "trpo_lm")
    ]
    assert {"Critic", "generalized_advantages", "value_loss"} <= ppo.keys() & trpo.keys()
    assert {name for name in ppo.keys() & trpo.keys() if ppo[name] != trpo[name]} == {"Args", "main"}


def flags_read(tree):
    """Names of the flags that code reads, as `args.name`. Fails if it writes one."""
    reads = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
            assert isinstance(node.ctx, ast.Load), f"line {node.lineno} writes a flag"
            reads.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "vars"):
            assert getattr(node.args[0], "id", "") != "args", f"line {node.lineno}: {ast.unparse(node)}"
    return reads


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_none_is_written(script):
    reads = flags_read(ast.parse(SOURCES[script]))
    assert reads <= FLAGS[script]
    # A flag that is only checked has no effect.
    in_common = [flags_read(node) for name, node in top_level("common").items() if name != "check_flags"]
    assert FLAGS[script] - reads <= set().union(*in_common)
    assert flags_read(top_level("common")["check_flags"]) <= set.intersection(*FLAGS.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_has_one_anchor(script):
    docstring = ast.get_docstring(ast.parse(SOURCES[script]))
    code = SOURCES[script].split('"""', 2)[2]
    equations = [int(n) for n in re.findall(r"^    \((\d+)\) ", docstring, flags=re.MULTILINE)]
    assert equations == list(range(1, len(equations) + 1)) and len(equations) > 5
    comments = [line.split("# ", 1)[1] for line in code.splitlines() if "# " in line]
    assert sorted(int(n) for comment in comments for n in re.findall(r"\((\d+)\)", comment)) == equations


# ----- docs/equations.md -----


def table(heading, name="equations.md"):
    """Cells of the rows of the first table under a heading of a document."""
    text = DOCS[name].split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]  # without header and rule


@pytest.mark.parametrize("heading, name", [("From the formula to the line", "equations.md"), ("从公式到代码", "zh.md")])
def test_the_table_of_formulas_points_to_their_lines(heading, name):
    listed = []
    for *_, scripts, equations, function in table(heading, name):
        for script in re.findall(r"`(\w+)\.py`", scripts):
            node = top_level(script)[function.strip("`")]
            for equation in re.findall(r"\(\d+\)", equations):
                lines = SOURCES[script].splitlines()
                found = [i for i, line in enumerate(lines, 1) if re.search(f"# .*{re.escape(equation)}", line)]
                assert len(found) == 1 and node.lineno <= found[0] <= node.end_lineno, (script, equation, function)
                listed.append((script, equation))
    in_docstrings = [
        (script, equation)
        for script in SCRIPTS
        for equation in re.findall(
            r"^    (\(\d+\)) ", ast.get_docstring(ast.parse(SOURCES[script])), flags=re.MULTILINE
        )
    ]
    assert len(listed) > 15 and set(listed) <= set(in_docstrings)
    assert name == "zh.md" or sorted(listed) == sorted(in_docstrings)


def test_every_detail_names_a_test_that_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = table("Details that matter")
    assert len(rows) > 20
    for row in rows:
        assert len(row) == 3
        (name,) = re.findall(r"^`(test_\w+)`$", row[2])
        assert f"def {name}(" in tests, name


# ----- docs/metrics.md -----


def explained_metrics(script):
    """Metrics of the tables under "Every script" and under the script's own heading."""
    text = "".join(DOCS["metrics.md"].split(f"## {name}\n")[1].split("\n## ")[0] for name in ("Every script", script))
    return re.findall(f"^\\| `({TAG})` \\|", text, flags=re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_that_is_logged_is_explained_and_no_other(script, tmp_path):
    runs = [["--dtype", "bfloat16", "--sampler-clip", 2], ["--surrogate", "kl_penalty"]][: 1 + (script == "ppo_lm")]
    for number, flags in enumerate(runs):
        sizes = ["--total-episodes", 32, "--batch-size", 32, "--eval-size", 4, "--save-every", 0, "--device", "cpu"]
        run_main(importlib.import_module(script), *sizes, *flags, "--output-dir", tmp_path / str(number))
    logged = set()
    for run_dir in tmp_path.glob("*/*"):
        events = EventAccumulator(str(run_dir))
        events.Reload()
        logged |= {tag for tag in events.Tags()["scalars"] if "/" in tag}
    explained = explained_metrics(f"{script}.py")
    assert len(explained) == len(set(explained)) and set(explained) == logged


def test_every_metric_named_in_code_or_docs_is_explained():
    """Those of rare branches, too, which the runs of the test above may not enter."""
    explained = set().union(*[explained_metrics(f"{script}.py") for script in SCRIPTS])
    for source in SOURCES.values():
        constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
        assert {text for text in constants if isinstance(text, str) and re.fullmatch(TAG, text)} <= explained
    for text in DOCS.values():
        assert set(re.findall(f"`({TAG})`", text)) <= explained


# ----- Commands, flags and recipes -----


def test_flags_in_the_docs_exist():
    flags = {flag(name) for names in FLAGS.values() for name in names}
    flags |= {"--no-" + flag[2:] for flag in flags}
    for script in (ROOT / "benchmark").glob("*.py"):
        flags |= {flag(name) for name in re.findall(r"^    (\w+): .+ = ", script.read_text(), re.M)}
    flags |= {"--help", "--logdir", "--nproc-per-node", "--nnodes"}
    flags |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
    for name, text in DOCS.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= flags, name


def commands():
    """(document, script, flags) of each command in a code block that runs a script."""
    for name, text in DOCS.items():
        for command in re.findall(r"^    (?:.*&& )?((?:python|torchrun) .*)$", text.replace("\\\n", ""), re.MULTILINE):
            words = shlex.split(command, comments=True)
            script = next((word for word in words if word in [f"{name}.py" for name in SCRIPTS]), None)
            if script:
                yield name, script.removesuffix(".py"), words[words.index(script) + 1 :]


def test_commands_in_the_docs_have_flags_that_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # --output-dir is made
    found = list(commands())
    assert {script for _, script, _ in found} == set(SCRIPTS) and len(found) > 8
    for _, script, flags in found:
        module = importlib.import_module(script)
        if "--resume" not in flags:
            args, _ = common.parse_flags(module.Args, module.TINY, module.ADAPTERS, flags)
            common.check_flags(args, 1)


def code_block(first_line):
    """The indented block of docs/recipes.md that starts with this line, without the indentation."""
    block = DOCS["recipes.md"].split(f"\n    {first_line}")[1]
    return first_line + re.split(r"\n(?=\S)", block)[0].replace("\n    ", "\n")


def test_the_chat_recipe_runs(tmp_path, model_folder):
    (tmp_path / "chat.py").write_text(code_block("# chat.py"))
    (tmp_path / "gsm8k.py").write_text(code_block("# gsm8k.py"))
    rows = [{"question": f"{i}+{i}", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(30)]
    command, text = [sys.executable, tmp_path / "chat.py"], "\n".join(map(json.dumps, rows))
    chat = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    (tmp_path / "chat.jsonl").write_text(chat)
    rows = common.load_rows(str(tmp_path / "chat.jsonl"), "--dataset", importlib.import_module("reinforce_lm").Args())
    assert len(rows) == 29 and rows[0]["reference"] == "2"
    module = importlib.import_module("reinforce_lm")
    verify = runpy.run_path(str(tmp_path / "gsm8k.py"))["verify"]
    assert verify(None, ["so #### 1,200", "#### 3.", "#### 5", "12"], ["1200", "3", "4", "12"]) == [1, 1, 0.1, 0]
    assert verify(None, ["#### 1.2.3", "#### 3..5", "#### ,"], ["72"] * 3) == [0.1, 0.1, 0], "no number stops a run"
    folder = model_folder("gpt2", characters="0123456789+=#\n ", n_positions=64)
    tokenizer = common.load_tokenizer(folder, [])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    flags = ["--model", folder, "--dataset", tmp_path / "chat.jsonl", "--reward", f"{tmp_path}/gsm8k.py:verify"]
    flags += ["--total-episodes", 64, "--batch-size", 32, "--device", "cpu", "--output-dir", tmp_path / "runs"]
    run_main(module, *flags)
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert {name for name in json.loads(summary.read_text()) if name.startswith("eval")} == {
        "eval_score_before",
        "eval_score",
    }


def recipes():
    """(line before a group of changes, [(old, new) text]) of the section of changes, for those next to each other."""
    section = DOCS["recipes.md"].split("## Changes to copy\n")[1].split("\n## ")[0]
    found = []
    for text, change in re.findall(r"(.*?)```diff\n(.*?)```", section, re.DOTALL):
        lines = change.splitlines()
        old, new = ["\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +")]
        if text.strip() or not found:
            found.append((" ".join(text.split()), []))
        found[-1][1].append((old, new))
    return found


RECIPES = recipes()


def run_changed(number, reward, tmp_path, monkeypatch, *flags):
    """Run a script after a recipe: -> run directory."""
    text, changes = RECIPES[number]
    script = (re.findall(r"`(\w+)\.py`", text) or ["ppo_lm"])[-1]
    source = SOURCES[script]
    for old, new in changes:
        assert source.count(old + "\n") == 1, old
        source = source.replace(old + "\n", new + "\n" * bool(new))
    (tmp_path / "changed.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "changed", raising=False)
    changed = importlib.import_module("changed")
    sizes = ["--batch-size", 32, "--eval-size", 4, "--eval-every", 1, "--reward", reward, *flags]
    run_main(changed, *sizes, "--device", "cpu", "--output-dir", tmp_path / "runs")
    (run_dir,) = tmp_path.glob("runs/*")
    return run_dir


@pytest.mark.parametrize("number", range(7))
def test_the_changes_to_copy_apply_and_run(number, tmp_path, monkeypatch):
    run_dir = run_changed(number, "match", tmp_path, monkeypatch, "--total-episodes", 96, "--save-every", 0)
    assert not (run_dir / "best").exists()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_model_is_saved_and_training_ends_when_evaluations_get_no_better(sign, tmp_path, monkeypatch):
    assert len(RECIPES) == 8 and "best" in RECIPES[7][0]
    code = (
        "def fn(prompts, responses, calls=[], **_):\n    calls.append(SIGN)\n    return [sum(calls)] * len(prompts)\n"
    )
    reward = reward_file(tmp_path, code.replace("SIGN", str(float(sign))))  # rises or falls with each call
    run_dir = run_changed(7, reward, tmp_path, monkeypatch, "--total-episodes", 160)
    assert (run_dir / "best/model").is_dir() == (sign == 1)
    iterations = 5 if sign == 1 else 3
    assert json.loads((run_dir / "summary.json").read_text())["episodes"] == 32 * iterations
    assert [path.name for path in run_dir.glob("*.pt")] == [f"checkpoint_{iterations:08d}.pt"]


def changed_function(name, number):
    """A function of ppo_lm.py after a recipe."""
    source = SOURCES["ppo_lm"]
    for old, new in RECIPES[number][1]:
        source = source.replace(old, new)
    names = {"torch": torch, "common": common}
    node = next(node for node in ast.parse(source).body if getattr(node, "name", "") == name)
    exec(compile(ast.Module([node], []), name, "exec"), names)
    return names[name]


def test_the_dual_clip_bounds_what_a_bad_token_can_do():
    ratio, advantages = torch.tensor([0.5, 10.0, 10.0, 2.0]), torch.tensor([-1.0, -1.0, 1.0, -1.0])
    surrogate = changed_function("clipped_surrogate", 5)(ratio, advantages, 0.2, 0.2)
    torch.testing.assert_close(surrogate, torch.tensor([-0.8, -3.0, 1.2, -2.0]))


def test_the_recipes_of_group_normalized_advantages():
    for number, name in enumerate(("returns", "rewards")):

        def advantages(totals, k, number=number, name=name):
            other = torch.zeros_like(totals) if name == "rewards" else totals
            names = {name: torch.stack([totals, other], 1), "args": argparse.Namespace(samples_per_prompt=k)}
            names["response_mask"] = torch.tensor([[True, False]]).expand(len(totals), 2)
            exec(textwrap.dedent(RECIPES[number][1][0][1]), names)
            return names["advantages"]

        found = advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), k=2)
        expected = torch.tensor([[-(0.5**0.5), 0.0], [0.5**0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        assert not advantages(torch.full((7,), 0.7), k=7).any(), "rounding error is not normalized"


# ----- The README's first screen -----


def test_the_readme_quotes_the_loss_and_counts_the_lines():
    readme = DOCS["README.md"]
    block = readme.split("stands in the script")[1].split("\n\n")[1]
    assert block.count("\n") > 5 and block in SOURCES["ppo_lm"]
    counts = dict(re.findall(r"`(\w+)\.py` \((\d+)", " ".join(readme.split())))
    assert counts == {name: str(len(source.splitlines())) for name, source in SOURCES.items()}


def test_the_documents_stay_short():
    assert len(DOCS["README.md"].encode()) <= 10_000
    assert len(DOCS["benchmarks.md"].splitlines()) <= 150
    benchmarks = [path.read_text() for path in (ROOT / "benchmark").glob("*.py")]
    assert sum(len(text.splitlines()) for text in benchmarks) <= 900


# ----- Language and files -----


@pytest.mark.parametrize("name", [*SOURCES, *DOCS])
def test_one_word_per_concept(name):
    text = (SOURCES | DOCS)[name]
    attention = r"\bquer(?:y|ies)\b" if name != "common" else "$^"  # prompts are no queries; attention has some
    assert not re.findall(attention + r"|\b(?:completions?|log_probs?|logps?)\b", text)
    assert not re.findall(r"\b(TODO|FIXME|XXX)\b", text)
    american = r"\w*(?:token|penal|normal|optim|summar|initial|general|quant)is(?:e[sdr]?|ing|ation)\b"
    assert not re.findall(american + r"|\b(?:behaviour|colour|favour|centre)s?\b", text, flags=re.IGNORECASE)


@pytest.mark.parametrize("name", DOCS)
def test_links_in_the_docs_lead_somewhere(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)]+)\)", DOCS[name]):
        path, _, anchor = target.partition("#")
        assert (folder / path).is_file(), target
        headings = re.findall(r"^#+ (.+)$", (folder / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-").replace(",", "") for heading in headings], (
            target
        )


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_docs.py prints what no test asserts: lines, kept lines
    for script, source in SOURCES.items():
        print(f"{script}.py: {len(source.splitlines())} lines")
    for first, second in [("reinforce_lm", "ppo_lm"), ("reinforce_lm", "trpo_lm"), ("ppo_lm", "trpo_lm")]:
        old, new = [[line for line in SOURCES[name].splitlines() if line.strip()] for name in (first, second)]
        blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
        print(f"{first}.py -> {second}.py: {sum(block.size for block in blocks) / len(old):.0%} of the lines are kept")
