"""The prompts that come with llmkit, from the source tree and from an installed package."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llmkit import prompts
from llmkit.errors import ModelNotFound

ROOT = Path(__file__).resolve().parents[1]
SYSTEM, PROBES = ROOT / "prompts" / "system", ROOT / "prompts" / "probes"


def test_names_are_the_files() -> None:
    assert prompts.system_names() == tuple(sorted(path.stem for path in SYSTEM.iterdir()))
    assert prompts.probe_names() == tuple(sorted(path.stem for path in PROBES.iterdir()))
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
