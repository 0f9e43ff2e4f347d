"""The prompts that come with llmkit, from the source tree and from an installed package."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llmkit import prompts
from llmkit.errors import LlmkitError, ModelNotFound

ROOT = Path(__file__).resolve().parents[1]
SYSTEM, PROBES = ROOT / "prompts" / "system", ROOT / "prompts" / "probes"
PERSONAS = ROOT / "prompts" / "personas"


def test_names_are_the_files() -> None:
    assert prompts.system_names() == tuple(sorted(path.stem for path in SYSTEM.iterdir()))
    assert prompts.probe_names() == tuple(sorted(path.stem for path in PROBES.iterdir()))
    assert prompts.persona_names() == tuple(sorted(path.stem for path in PERSONAS.iterdir()))
    assert len(prompts.system_names()) >= 5 and len(prompts.probe_names()) >= 6


@pytest.mark.parametrize("name", prompts.system_names())
def test_system_prompts(name: str) -> None:
    text = prompts.system(name)
    assert text + "\n" == (SYSTEM / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith("You ") and 100 < len(text) < 2000 and text.endswith(".")


@pytest.mark.parametrize("name", prompts.probe_names())
def test_probes_end_where_the_model_goes_on(name: str) -> None:
    text = prompts.probe(name)
    assert text + "\n" == (PROBES / f"{name}.txt").read_text(encoding="utf-8")
    assert text == text.rstrip() and len(text) > 40


def test_probes_cover_what_they_are_for() -> None:
    everything = "".join(map(prompts.probe, prompts.probe_names()))
    for what in (
        r"\d",
        r"\t",
        r"\n    ",
        r"\n\n",
        "[а-я]",
        "[一-鿿]",
        "[\u0600-\u06ff]",
        "[\U0001f600-\U0001f64f]",
        "\u200d",
    ):
        assert re.search(what, everything), what


def test_unknown_names_show_the_nearest() -> None:
    with pytest.raises(ModelNotFound) as caught:
        prompts.system("tutr")
    assert caught.value.message == "there is no system prompt called 'tutr'"
    assert caught.value.hint is not None and "tutor" in caught.value.hint
    with pytest.raises(ModelNotFound) as caught:
        prompts.probe("zzzzz")
    assert caught.value.hint is not None and "capitals" in caught.value.hint


@pytest.mark.parametrize("name", ["../system/tutor", "tutor.md", "", "/etc/passwd"])
def test_names_are_no_paths(name: str) -> None:
    with pytest.raises(ModelNotFound):
        prompts.system(name)


@pytest.mark.slow  # pip fetches the build tool
def test_prompts_are_installed_with_the_package(tmp_path: Path) -> None:
    """A wheel is built, unpacked elsewhere, and asked."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "from llmkit import prompts; print(prompts.__file__, *prompts.system_names()); print(prompts.probe('capitals'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True, env={}
    )
    first, second = done.stdout.splitlines()
    assert first.split() == [str(tmp_path / "site" / "llmkit" / "prompts.py"), *prompts.system_names()]
    assert second == prompts.probe("capitals")


# ── the user's own ──


def test_the_users_own_prompts_stand_beside_ours_and_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path))
    own = prompts.own_folder()
    assert own == tmp_path / "prompts" and prompts.system("tutor").startswith("You are a patient")
    for name, text in {
        "system/tutor.md": "Mine.\r\n",
        "system/poet.md": "Rhyme.\n",
        "personas/ann.txt": "A:\nB:\n",
    }.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(text.encode())
    (own / "system" / "notes.txt").write_text("not a system prompt")
    assert prompts.system("tutor") == "Mine." and prompts.system("poet") == "Rhyme."
    assert prompts.persona("ann") == "A:\nB:"
    listed = {each.name: each for each in prompts.listing("system")}
    assert "notes" not in listed and list(listed) == sorted(listed)
    assert (listed["tutor"].own, listed["tutor"].shadows) == (True, True)
    assert (listed["poet"].own, listed["poet"].shadows, listed["poet"].path) == (True, False, own / "system/poet.md")
    assert not listed["coder"].own and listed["coder"].path == SYSTEM / "coder.md"


@pytest.mark.parametrize(
    ("raw", "words"), [(b"caf\xe9", "byte 3 is no UTF-8"), (b"x" * (1 << 21), "larger than 1 MiB")]
)
def test_files_that_are_no_prompts(raw: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path))
    (tmp_path / "prompts" / "system").mkdir(parents=True)
    (tmp_path / "prompts" / "system" / "bad.md").write_bytes(raw)
    with pytest.raises(LlmkitError, match=words):
        prompts.system("bad")
    with pytest.raises(LlmkitError, match="cannot be read"):
        prompts.read_text(tmp_path / "none.md")


def test_personas_are_named_like_files() -> None:
    assert {"bob", "socrates", "storyteller"} <= set(prompts.persona_names())
    with pytest.raises(ModelNotFound, match="no persona called 'bobb'") as caught:
        prompts.persona("bobb")
    assert "bob" in (caught.value.hint or "")
