"""The layout that README promises: short files to read, imports without a circle."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from lite_ppo import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = [ROOT / "lite_ppo.py", ROOT / "tricks.py", *sorted((ROOT / "support").glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Names of the project's modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "support":
            names |= {f"support.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & {module_name(source) for source in SOURCES}


def module_name(path: Path) -> str:
    return f"support.{path.stem}" if path.parent.name == "support" else path.stem


def test_imports_have_no_circle():
    graph = {module_name(path): imported(path) for path in SOURCES}
    assert graph["lite_ppo"] >= {"tricks", "support.data", "support.run"}  # the reader works
    while graph:
        leaves = {name for name, others in graph.items() if not others & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in leaves}


def test_nothing_imports_the_trainer():
    for path in SOURCES:
        assert "lite_ppo" not in imported(path), path


@pytest.mark.parametrize(
    "name, lines", [("lite_ppo.py", 520), ("tricks.py", 460), ("README.md", 130)]
)
def test_files_stay_short(name, lines):
    assert len((ROOT / name).read_text().splitlines()) <= lines


def test_readme_says_how_long_the_files_are():
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| ([\d,]+) \|", README, re.MULTILINE)
    assert len(rows) == 3
    for name, number in rows:
        lines = len((ROOT / name).read_text().splitlines())
        assert int(number.replace(",", "")) == pytest.approx(lines, rel=0.03), name


def test_map_of_support_names_every_file_once():
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "support/README.md").read_text(), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([a-z_]+\.py)`", row)]
    files = {path.name for path in (ROOT / "support").glob("[a-z]*.py")}  # not __init__.py
    assert sorted(names) == sorted(files)


def test_functions_of_the_trainer_fit_on_a_screen():
    for node in ast.walk(ast.parse((ROOT / "lite_ppo.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert node.end_lineno - node.lineno < 42, node.name
            assert len(arguments) <= 6, node.name


# ---- documents -----------------------------------------------------------------------------------

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / name / "README.md" for name in ("support", "benchmarks", "experiments")]


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a Markdown file."""
    text = re.sub(r"\]\([^)]*\)", "]", path.read_text())  # of a link, only its text counts
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_documents_name_only_existing_flags():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)}
    for path in (ROOT / "docs").glob("*.md"):
        if path.name != "measurements.md":
            for line in re.findall(r"^\| .*", path.read_text(), re.MULTILINE):
                for flag in re.findall(r"`(--[a-z-]+)", line):
                    known = flag in flags or flag.replace("--no-", "--", 1) in flags
                    assert known or flag.startswith("--master"), (path.name, flag)
