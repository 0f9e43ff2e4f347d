"""What the documents say is so: verbs, commands, files, the folders shown."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import llmkit
from llmkit.cli import main as frame
from llmkit.convert import architectures

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every `llmkit …` line of the shell blocks, as words."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "llmkit"]


def test_the_verbs_are_listed_as_help_lists_them() -> None:
    listed = "".join(f"{verb:<10} {line}\n" for verb, line in frame.VERBS.items())
    assert listed in blocks("text")


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    """The words of each command are what its verb's parser takes; running them is test_end_to_end's."""
    name, module, rest = frame.chosen(words)
    assert frame._verb_parser(name, module).parse_args(rest)


@pytest.mark.parametrize("verb", frame.VERBS)
def test_examples_in_help_parse(verb: str) -> None:
    topics = getattr(frame._load(verb), "TOPICS", {})
    for name in [verb, *(f"{verb} {topic}" for topic in topics)]:
        for example in frame._load(name.replace(" ", ".")).EXAMPLES:
            command = shlex.split(re.split("[|<]", example)[0], comments=True)
            assert command[0] == "llmkit" and " ".join(command[1:]).startswith(name)
            called, module, rest = frame.chosen(command[1:])
            assert frame._verb_parser(called, module).parse_args(rest)


def test_the_folders_shown_are_the_folders_there() -> None:
    tree = next(block for block in blocks("text") if block.startswith("src/llmkit/"))
    shown = {line.split()[0].split("/")[0] for line in tree.splitlines()}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    assert shown == {path.split("/")[0] for path in tracked.stdout.splitlines() if "/" in path}


def test_make_targets_named_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = set(re.findall(r'(?:^|`|" )make ([a-z]+)\b', text, re.MULTILINE))
    assert {"demo", "test", "check", "engine"} <= named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.name))
def test_files_named_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"\b((?:scripts|tests|docs)/[\w/]+\.(?:py|md))\b", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_families_named_are_supported() -> None:
    sentence = re.search(r"Models it converts: (.*?)\. Quants", README, re.DOTALL)
    assert sentence
    named = sentence[1].lower().replace(" ", "")
    for family in {name.removesuffix("ForCausalLM").lower() for name in architectures.CLASSES if "Causal" in name}:
        assert family in named


def test_architecture_is_under_a_page() -> None:
    text = re.sub(
        r"```text\nllmkit/.*?```", "", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert len(text.splitlines()) <= 60


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", llmkit.__version__)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[(Unreleased|{re.escape(llmkit.__version__)})\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_ci_runs_make_test() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.rstrip().endswith("make --no-print-directory test")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
