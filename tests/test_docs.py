"""Code and README say the same: flags, metrics, equations, shared sections."""

import ast
import difflib
import importlib
import re

import pytest
from conftest import ROOT, SCRIPTS

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
        assert flag in flags | negated | {"--nproc-per-node", "--logdir", "--help"}, flag


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
