"""Code and README say the same: flags, metrics, equations, shared sections."""

import ast
import difflib
import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, run_main

import common

README = (ROOT / "README.md").read_text()
SOURCES = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}


def sections(source):
    """Banner -> text up to the next banner, for every `# ===== name (shared by all three scripts) =====`."""
    parts = re.split(r"^( *# ===== .+? =====)$", source, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_shared_sections_are_the_same_to_the_byte():
    shared = {}
    for script, source in SOURCES.items():
        found = {banner: text for banner, text in sections(source).items() if "(shared by all three scripts)" in banner}
        assert all(
            banner.endswith(("(shared by all three scripts) =====", "(algorithm) =====")) for banner in sections(source)
        )
        assert len(found) >= 9
        shared[script] = found
    first = shared[SCRIPTS[0]]
    for script in SCRIPTS[1:]:
        assert list(shared[script]) == list(first)
        for banner, text in first.items():
            assert shared[script][banner] == text, f"{script}: {banner}"


def test_ppo_and_trpo_have_the_same_critic_and_advantages():
    """A paper's box on either would mention them, so each script has them; only the number of an equation differs."""
    ppo, trpo = [
        {
            node.name: re.sub(r"# \(\d+\)", "# (k)", ast.get_source_segment(SOURCES[script], node))
            for node in ast.parse(SOURCES[script]).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        for script in ("ppo_lm", "trpo_lm")
    ]
    different = {name for name in ppo.keys() & trpo.keys() if ppo[name] != trpo[name]}
    assert different == {"Args", "check_algorithm_args", "main"}
    assert {"Critic", "batched_values", "generalized_advantages", "exact_kl", "value_loss"} <= ppo.keys() & trpo.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_none_is_written(script):
    tree = ast.parse(SOURCES[script])
    fields = importlib.import_module(script).Args.__dataclass_fields__
    reads, names = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
            assert isinstance(node.ctx, ast.Load), f"line {node.lineno} writes a flag"
            reads.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "vars"):
            names.add(ast.unparse(node))
    assert not names and set(fields) == reads


def flag_rows(script):
    """The rows of the README's tables of flags, from the script: (shared by all three?, row)."""
    (args,) = [n for n in ast.parse(SOURCES[script]).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    start = SOURCES[script].splitlines().index("    # Algorithm specific arguments")
    for field, text in zip(args.body[::2], args.body[1::2], strict=True):
        assert isinstance(text.value.value, str) and "\n" not in text.value.value, field.target.id
        default = str(ast.literal_eval(field.value))
        default = {"": "empty", "True": "on", "False": "off"}.get(default, default)
        flag = "--" + field.target.id.replace("_", "-")
        yield field.lineno < start, f"| `{flag}` | {default} | {text.value.value} |"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_readme_with_its_default_and_help(script):
    """Regenerate the tables with `python tests/test_docs.py`."""
    for _, row in flag_rows(script):
        assert row in README


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_is_explained_in_the_readme(script):
    tags = set(re.findall(r'"((?:objective|policy|value|trpo|loss|eval|time)/\w+)"', SOURCES[script]))
    assert len(tags) > 10
    for tag in tags:
        assert f"`{tag}`" in README, tag


def test_readme_explains_no_flag_or_metric_that_is_gone():
    everything = "".join(SOURCES.values())
    for tag in re.findall(r"`((?:objective|policy|value|trpo|loss|eval|time)/\w+)`", README):
        assert f'"{tag}"' in everything, tag
    flags = {
        f"--{name.replace('_', '-')}" for s in SCRIPTS for name in importlib.import_module(s).Args.__dataclass_fields__
    }
    negated = {"--no-" + flag[2:] for flag in flags}
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README):
        assert flag in flags | negated | {"--nproc-per-node", "--logdir", "--help", "--sections", "--rollout-model"}, (
            flag
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_has_one_anchor(script):
    module = ast.parse(SOURCES[script])
    docstring = ast.get_docstring(module)
    code = SOURCES[script].split('"""', 2)[2]
    equations = [int(n) for n in re.findall(r"^    \((\d+)\) ", docstring, flags=re.MULTILINE)]
    assert equations == list(range(1, len(equations) + 1)) and len(equations) > 5
    anchors = [
        int(n) for line in code.splitlines() if "# " in line for n in re.findall(r"\((\d+)\)", line.split("# ", 1)[1])
    ]
    assert sorted(anchors) == equations


def enclosing_function(script, line_number):
    """Name of the top-level function or class that a line of a script belongs to."""
    for node in ast.parse(SOURCES[script]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line_number <= node.end_lineno:
            return node.name


def test_the_table_of_formulas_points_to_their_lines():
    table = README.split("## From the formula to the line")[1].split("## ")[0]
    rows = re.findall(r"^\| .+ \| .+ \| `(\w+)\.py` \| (.+) \| `(\w+)` \|$", table, flags=re.MULTILINE)
    assert len(rows) == table.count("\n| ") - 2  # header and rule
    listed = set()
    for script, equations, function in rows:
        for equation in re.findall(r"\(\d+\)", equations):
            lines = [
                i
                for i, line in enumerate(SOURCES[script].splitlines(), 1)
                if re.search(f"# .*{re.escape(equation)}", line)
            ]
            assert [enclosing_function(script, line) for line in lines] == [function], (script, equation)
            listed.add((script, equation))
    for script in SCRIPTS:  # equations of PPO and TRPO that another script's row explains are not listed again
        equations = re.findall(r"^    (\(\d+\)) ", ast.get_docstring(ast.parse(SOURCES[script])), flags=re.MULTILINE)
        first_own = {"reinforce_lm": 1, "ppo_lm": 3, "trpo_lm": 6}[script]
        own = {(script, e) for e in equations if int(e[1:-1]) >= first_own}
        assert own - listed <= {("trpo_lm", "(12)")}, "an equation that is not in the table"


def test_every_detail_names_a_test_that_exists():
    table = README.split("## Details that matter")[1].split("## ")[0]
    names = re.findall(r"\| `(test_\w+)` \|$", table, flags=re.MULTILINE)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(names) == table.count("\n| ") - 2 > 20
    for name in names:
        assert f"def {name}(" in tests, name


def code_block(first_line):
    """The indented block of the README that starts with this line, without the indentation."""
    block = README.split(f"\n    {first_line}")[1]
    return first_line + re.split(r"\n(?=\S)", block)[0].replace("\n    ", "\n")


def test_the_chat_recipe_runs(tmp_path, model_folder):
    (tmp_path / "chat.py").write_text(code_block("# chat.py"))
    (tmp_path / "gsm8k.py").write_text(code_block("# gsm8k.py"))
    rows = [{"question": f"{i}+{i}", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(30)]
    command, text = [sys.executable, tmp_path / "chat.py"], "\n".join(map(json.dumps, rows))
    chat = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    (tmp_path / "chat.jsonl").write_text(chat)
    assert len(chat.splitlines()) == 29 and json.loads(chat.splitlines()[0])["reference"] == "2"
    verify = common.load_reward(f"{tmp_path}/gsm8k.py:verify")
    assert verify(None, ["so #### 1,200", "#### 3.", "#### 5", "12"], ["1200", "3", "4", "12"]) == [1, 1, 0.1, 0]
    assert verify(None, ["#### 1.2.3", "#### 3..5", "#### ,"], ["72"] * 3) == [0.1, 0.1, 0], "no number stops a run"
    folder = model_folder("gpt2", characters="0123456789+=#\n ", n_positions=64)
    tokenizer = common.load_tokenizer(folder, [])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    flags = ["--model", folder, "--dataset", tmp_path / "chat.jsonl", "--reward", f"{tmp_path}/gsm8k.py:verify"]
    flags += ["--total-episodes", 64, "--batch-size", 32, "--device", "cpu", "--output-dir", tmp_path / "runs"]
    run_main(importlib.import_module("reinforce_lm"), *flags)
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert 0 <= json.loads(summary.read_text())["eval_score"] <= 1


def kept_share(first, second):
    """Percentage of the non-blank lines of one text that stand in the other, in order."""
    first, second = [[line for line in text.splitlines() if line.strip()] for text in (first, second)]
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return 100 * sum(block.size for block in blocks) / len(first)


@pytest.mark.parametrize(
    "first, second, at_least",
    [("reinforce_lm", "ppo_lm", 75), ("reinforce_lm", "trpo_lm", 72), ("ppo_lm", "trpo_lm", 65)],
)
def test_the_diff_is_the_algorithm(first, second, at_least):
    share = kept_share(SOURCES[first], SOURCES[second])
    assert share >= at_least
    assert f"| `{first}.py` | `{second}.py` | {share:.0f} % |" in README


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_counts_the_lines(script):
    table = README.split("## Which script do I copy?")[1]
    row = next(line for line in table.splitlines() if line.startswith(f"| `{script}.py` |"))
    assert f"| {len(SOURCES[script].splitlines())} |" in row


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_word_per_concept(script):
    for source in (SOURCES[script], (ROOT / "common.py").read_text()):
        assert not re.findall(r"\b(query|queries|completions?|log_probs?|logps?)\b", source)
        assert not re.findall(r"\b(TODO|FIXME|XXX)\b", source)


if __name__ == "__main__":
    for script in SCRIPTS:
        print(script, *[row for is_shared, row in flag_rows(script) if script == SCRIPTS[0] or not is_shared], sep="\n")
