"""`llmkit upload` against the stand-in Hub over HTTP, in child processes; huggingface_hub reads back what was sent."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import standin_hub
from conftest import TinyCheckpoint, cli_environment
from llmkit import convert, quantize
from llmkit.cli import upload as verb
from llmkit.errors import LlmkitError
from llmkit.publish import card
from llmkit.quantize import Recipe
from llmkit.quants import quant
from standin_faults import MissingFile, Status

NAME = "me/tiny-GGUF"
TOKEN = "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"
WRITES = ("POST", "PUT", "PATCH", "DELETE")
Done = subprocess.CompletedProcess[str]
Upload = Callable[..., Done]

IN_STEPS = """
import json, pathlib, sys
from llmkit.hub import upload
paths, seen = [pathlib.Path(word) for word in sys.argv[2:]], []
files = upload.hashed(paths, on_progress=seen.append)
planned = upload.plan(upload.look(sys.argv[1]), files, "# card")
if sys.stdin.read():
    paths[0].write_bytes(paths[0].read_bytes()[::-1])
upload.upload(planned, message="m", on_progress=seen.append)
print(json.dumps([(each.stage, each.done, each.total, each.detail) for each in seen]))
"""
FETCH = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], local_dir=sys.argv[2]))"


@pytest.fixture(scope="module")
def quants(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model in Q4_K_M, Q8_0 and F16."""
    draft = convert.open_draft(tiny_checkpoint("llama", width=256))
    recipes = [Recipe(quant(name)) for name in ("Q4_K_M", "Q8_0", "F16")]
    planned = quantize.plan(draft, recipes, tmp_path_factory.mktemp("quants"))
    quantize.run(planned, threads=1)
    return [each.path for each in planned.outputs]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[standin_hub.Hub]:
    (tmp_path / "root").mkdir()
    with standin_hub.serve(tmp_path / "root") as running:
        yield running


@pytest.fixture
def environment(hub: standin_hub.Hub, tmp_path: Path) -> dict[str, str]:
    found = cli_environment() | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "LLMKIT_DEBUG": "1",  # tracebacks too must keep the token to themselves
    }
    return {key: value for key, value in found.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}


@pytest.fixture
def upload(environment: dict[str, str]) -> Upload:
    """upload(file, …, "--yes") → the finished process; its output never holds the token."""

    def run(*arguments: object, to: str = NAME, **changes: str | None) -> Done:
        changed = environment | {key: value for key, value in changes.items() if value is not None}
        done = subprocess.run(
            command(*arguments, to=to),
            env={key: value for key, value in changed.items() if changes.get(key, "") is not None},
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=120,
        )  # fmt: skip
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


def command(*arguments: object, to: str = NAME) -> list[str]:
    return [sys.executable, "-m", "llmkit", "upload", *map(str, arguments), "--to", to]


def written(hub: standin_hub.Hub) -> list[str]:
    """Requests that change something on the Hub, or would."""
    return [f"{request.method} {request.path}" for request in hub.log if request.method in WRITES]


def in_repository(hub: standin_hub.Hub, name: str = NAME) -> dict[str, bytes]:
    folder = hub.repositories.root / name
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def failed(done: Done, *words: str) -> None:
    assert done.returncode == 1, done.stderr
    message = done.stderr.partition("llmkit: error:")[2]
    for word in words:
        assert word in message, done.stderr


# ── all the way ──


def test_what_was_sent_comes_back(
    upload: Upload, hub: standin_hub.Hub, quants: list[Path], environment: dict[str, str], tmp_path: Path
) -> None:
    done = upload(*quants[:2], "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.address}/{NAME}"
    fetched = tmp_path / "fetched"
    subprocess.run([sys.executable, "-c", FETCH, NAME, str(fetched)], env=environment, check=True, timeout=60)
    for path in quants[:2]:
        assert (fetched / path.name).read_bytes() == path.read_bytes()
    rows = re.findall(r"^\| (Q\w+) \| `(\S+)` \| (\S+) MB \|", (fetched / "README.md").read_text(), re.MULTILINE)
    assert rows == [
        (label, path.name, f"{(fetched / path.name).stat().st_size / 1e6:.2f}")
        for label, path in zip(("Q4_K_M", "Q8_0"), quants, strict=False)
    ]
    assert f"llama-cli -hf {NAME}:Q4_K_M" in (fetched / "README.md").read_text()


def test_a_second_run_sends_nothing(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    assert upload(quants[0], "--yes").returncode == 0
    before = in_repository(hub)
    hub.clear()
    done = upload(quants[0], "--yes")
    assert done.returncode == 0 and "nothing to send" in done.stderr
    assert written(hub) == [] and in_repository(hub) == before


def test_a_quant_added_later_joins_the_table(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    assert upload(quants[1], "--yes").returncode == 0
    hub.clear()
    assert upload(quants[0], quants[1], "--yes").returncode == 0
    assert [request.received for request in hub.requests("PUT")] == [quants[0].stat().st_size]
    assert upload(quants[2], "--yes", "--message", "a third").returncode == 0
    text = in_repository(hub)["README.md"].decode()
    assert re.findall(r"^\| (\w+) \| `", text, re.MULTILINE) == ["Q4_K_M", "Q8_0", "F16"]


def test_text_of_one_s_own_is_kept(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    assert upload(quants[0], "--yes").returncode == 0
    path = hub.repositories.root / NAME / "README.md"
    path.write_text(path.read_text().replace(card.BEGIN, f"My words.\n\n{card.BEGIN}") + "\nLast words.\n")
    assert upload(quants[1], "--yes").returncode == 0
    text = path.read_text()
    assert "\nMy words.\n\n" in text and text.endswith("\nLast words.\n")
    assert text.count(quants[0].name) == text.count(quants[1].name) > 1


def test_a_new_repository_can_be_private(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    done = upload(quants[0], "--yes", "--private")
    assert done.returncode == 0 and "(new, private)" in done.stderr
    assert hub.guards[NAME].token == TOKEN and hub.guards[NAME].gated is False
    (hub.repositories.root / "me" / "open").mkdir()
    hub.clear()
    failed(upload(quants[0], "--yes", "--private", to="me/open"), "exists and is public")
    assert written(hub) == []


# ── only with a yes ──


def test_a_dry_run_changes_nothing_and_shows_the_card(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    done = upload(quants[0], "--dry-run")
    assert done.returncode == 0, done.stderr
    assert written(hub) == [] and {request.method for request in hub.log} <= {"GET", "HEAD"} and hub.log
    assert "(new, public)" in done.stderr and card.BEGIN in done.stdout and "base" not in in_repository(hub)
    shown = json.loads(upload(quants[0], "--dry-run", "--json").stdout)
    assert shown["new"] and shown["files"][0]["send"] and shown["nbytes"] == quants[0].stat().st_size
    assert shown["card"] in done.stdout
    assert upload(quants[0], "--yes").returncode == 0
    assert in_repository(hub)["README.md"].decode() == shown["card"]


def test_a_dry_run_needs_no_token(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    assert upload(quants[0], "--dry-run", HF_TOKEN=None).returncode == 0
    hub.clear()
    failed(upload(quants[0], "--yes", HF_TOKEN=None), "nobody is logged in", "hf auth login", "HF_TOKEN")
    assert hub.log == []


def test_without_a_terminal_a_yes_is_needed(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    failed(upload(quants[0]), "nothing is uploaded without a yes", "--yes")
    assert hub.log == []


@pytest.mark.parametrize(("answer", "code"), [("\n", 1), ("n\n", 1), ("y\n", 0)])
def test_on_a_terminal_one_is_asked(
    answer: str, code: int, hub: standin_hub.Hub, quants: list[Path], environment: dict[str, str]
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    child = subprocess.Popen(
        command(*quants[:2]), env=environment, stdin=theirs, stderr=theirs, stdout=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end, when the child has gone
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    nbytes = sum(path.stat().st_size for path in quants[:2])
    asked = f"Upload 2 files, {nbytes / 1e6:.1f} MB, to {NAME} (new, public)? [y/N]"
    assert asked in shown.decode() and TOKEN not in shown.decode()
    assert child.wait() == code
    assert bool(written(hub)) == bool(in_repository(hub)) == (code == 0)


# ── interruptions ──


def test_a_killed_upload_goes_on_with_the_file_it_was_at(
    hub: standin_hub.Hub, quants: list[Path], environment: dict[str, str], upload: Upload
) -> None:
    second = json.loads(upload(*quants[:2], "--dry-run", "--json").stdout)["files"][1]
    hub.clear()
    hub.fail_route(f"lfs/{NAME}/{second['sha256']}", Status(503), times=None, method="PUT")  # tried again for seconds
    child = subprocess.Popen(command(*quants[:2], "--yes"), env=environment, stdin=subprocess.DEVNULL)
    wait_for(lambda: any(request.path.endswith(second["sha256"]) for request in hub.requests("PUT")))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert in_repository(hub) == {}, "nothing shows before all of it is there"
    hub.heal()
    hub.clear()
    done = upload(*quants[:2], "--yes")
    assert done.returncode == 0, done.stderr
    assert [request.path for request in hub.requests("PUT")] == [f"/lfs/{NAME}/{second['sha256']}"]
    for path in quants[:2]:
        assert in_repository(hub)[path.name] == path.read_bytes()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_storage_that_hiccups_is_asked_again(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    hub.fail_route(f"lfs/{NAME}/*", Status(503), method="PUT")
    assert upload(quants[0], "--yes").returncode == 0
    assert [request.status for request in hub.requests("PUT")] == [503, 200]
    assert in_repository(hub)[quants[0].name] == quants[0].read_bytes()


def in_steps(environment: dict[str, str], *paths: Path, change: bool = False) -> Done:
    """The library's own steps in a child; `change` changes the first file after it was hashed."""
    words = [sys.executable, "-c", IN_STEPS, NAME, *map(str, paths)]
    typed = "change" if change else ""
    return subprocess.run(words, env=environment, input=typed, capture_output=True, encoding="utf-8", timeout=120)


def test_progress_counts_every_byte(quants: list[Path], environment: dict[str, str]) -> None:
    done = in_steps(environment, *quants[:2])
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    total = sum(path.stat().st_size for path in quants[:2])
    for stage in ("hash", "upload"):
        counts = [report[1] for report in reports if report[0] == stage]
        assert counts == sorted(counts) and counts[-1] == total and len(counts) >= 3
    assert len([report for report in reports if report[0] == "upload"]) > total // 2**17, "within the files too"
    assert {report[2] for report in reports} == {total}
    assert [report[3] for report in reports][-1] == quants[1].name


def test_a_file_that_changes_meanwhile_is_not_sent(
    hub: standin_hub.Hub, quants: list[Path], environment: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(quants[0].read_bytes())
    done = in_steps(environment, copy, change=True)
    assert done.returncode == 1 and "copy.gguf: was changed before it was sent" in done.stderr
    assert hub.requests("PUT") == [] and in_repository(hub) == {}


def test_what_the_repository_does_not_take_is_noticed(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    hub.fail(NAME, quants[0].name, MissingFile())
    failed(upload(quants[0], "--yes"), f"{quants[0].name} was sent, but is not in the repository")


# ── refusals ──


@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("api/repos/create", 403, ("may not write there (403)", "--to YOU/tiny-GGUF")),
        ("api/repos/create", 401, ("does not accept your token (401)", "hf auth login")),
        (f"api/models/{NAME}/preupload/main", 403, ("may not write there (403)",)),
        (f"{NAME}.git/info/lfs/objects/batch", 413, ("has no room for this (413)",)),
        (f"lfs/{NAME}/*", 403, ("may not write there (403)",)),
        (f"api/models/{NAME}/commit/main", 412, ("was changed by somebody else meanwhile (412)", "again")),
        ("api/validate-yaml", 400, ("does not accept README.md",)),
    ],
)
def test_what_the_hub_refuses(
    route: str, status: int, words: tuple[str, ...], upload: Upload, hub: standin_hub.Hub, quants: list[Path]
) -> None:
    hub.fail_route(route, Status(status), times=None)
    failed(upload(quants[0], "--yes"), *words)
    assert quants[0].name not in in_repository(hub)
    if status == 400:
        assert [path for path in written(hub) if "validate-yaml" not in path] == [], "asked before anything is made"


def test_a_card_whose_yaml_is_broken_is_left_alone(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    path = hub.repositories.root / NAME / "README.md"
    path.parent.mkdir(parents=True)
    path.write_text("---\nlicense: [mit\n---\nMine.\n")
    failed(upload(quants[0], "--yes"), "the YAML at the top of README.md cannot be read")
    assert written(hub) == []
    path.write_bytes(b"\xff\xfe not UTF-8")
    failed(upload(quants[0], "--yes"), "README.md is not UTF-8")
    assert path.read_bytes() == b"\xff\xfe not UTF-8"


def test_nobody_there(upload: Upload, hub: standin_hub.Hub, quants: list[Path]) -> None:
    hub.stop()
    failed(upload(quants[0], "--yes"), "cannot be reached")
    failed(upload(quants[0], "--yes", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")


def test_a_broken_file_is_noticed_before_anything_is_asked(
    upload: Upload, hub: standin_hub.Hub, quants: list[Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut-Q4_K_M.gguf"
    cut.write_bytes(quants[0].read_bytes()[:-100])
    failed(upload(quants[1], cut, "--yes"), "cut-Q4_K_M.gguf", "cut short")
    (tmp_path / "other").mkdir()
    same_name = tmp_path / "other" / quants[0].name
    same_name.write_bytes(quants[0].read_bytes())
    failed(upload(quants[0], same_name, "--yes"), "another of the files has the same name")
    odd = tmp_path / "a\nb.gguf"
    odd.write_bytes(quants[0].read_bytes())
    failed(upload(odd, "--yes"), "Rename the file")
    assert written(hub) == []


@pytest.mark.parametrize("text", ["me/x@main", "me/x:Q4_K_M", "x", "./me/x", "me/x/y", "https://huggingface.co/me/x"])
def test_only_a_plain_name_is_a_destination(text: str) -> None:
    with pytest.raises(LlmkitError) as caught:
        verb.repository_name(text)
    assert caught.value.message.startswith("--to ") and text in caught.value.message


def test_a_folder_of_the_same_name_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert verb.repository_name("me/x") == "me/x"
