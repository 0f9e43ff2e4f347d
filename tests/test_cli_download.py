"""llmkit download against the stand-in Hub: plan, fetch, resume, sweep, refusals, secrets, what a terminal shows."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import desks
from desks import PATIENCE, QUANTIZED, TINY, Desk, Silence, files, size, wait_until, weights
from llmkit.hub import claim, sweep
from standin_faults import Stall, Status, Trickle, UnsafeName

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and pseudo-terminals of POSIX")
root, serving, desk, silence = desks.root, desks.serving, desks.desk, desks.silence
TOKEN = "hf_secret" + "0123456789" * 3
SHARD = "model-00003-of-00005.safetensors"
LIBRARY = (
    "import sys, huggingface_hub; huggingface_hub.snapshot_download(sys.argv[1], local_dir=(sys.argv + [None])[2])"
)


def models(folder: Path) -> dict[str, bytes]:
    """The files of a folder that was fetched into, without the notes kept there."""
    return {name: content for name, content in files(folder).items() if not name.startswith(".cache/")}


# --- plan and fetch --------------------------------------------------------------------------------------------------


def test_the_plan_is_what_is_done(desk: Desk, root: Path) -> None:
    plan = json.loads(desk.ok("download", TINY, "--dry-run", "--json").stdout)
    assert {each["path"]: each["state"] for each in plan["files"]} == dict.fromkeys(files(root / TINY), "missing")
    assert plan["nbytes"] == plan["fetch_nbytes"] == size(root / TINY)
    assert (plan["licence"], plan["gated"], plan["commit"]) == ("apache-2.0", False, desk.hub.snapshot(TINY).commit)
    shown = desk.ok("download", TINY, "--dry-run")
    assert re.search(rf"^{SHARD} +[\d.]+ MB +to fetch$", shown.stdout, re.M) and "Nothing was fetched." in shown.stderr
    assert weights(desk.hub) == [] and not desk.cache.exists()

    result = json.loads(desk.ok("download", TINY, "--json").stdout)
    assert models(Path(result["path"])) == models(root / TINY)
    assert {each["path"]: each["nbytes"] for each in result["files"]} == {
        each["path"]: each["nbytes"] for each in plan["files"]
    }
    again = desk.ok("download", TINY)
    assert again.stdout == f"{result['path']}\n" and "fetch  0 B" in again.stderr
    assert len(weights(desk.hub)) == 5


def test_into_a_folder(desk: Desk, root: Path) -> None:
    desk.ok("download", TINY, "--to", "here", "--exclude", "*.md")
    assert models(desk.out / "here") == {k: v for k, v in models(root / TINY).items() if k != "README.md"}
    assert not list(desk.cache.rglob("*.safetensors"))
    desk.hub.clear()
    done = desk.ok("download", TINY, "--to", "here", "--include", "*.safetensors", "--include", "README.md")
    assert weights(desk.hub) == [] and "README.md" in done.stderr
    assert models(desk.out / "here") == models(root / TINY)
    one = desk.ok("download", f"{QUANTIZED}:Q8_0", "--to", "one")
    assert one.stdout == "one/tiny-Q8_0.gguf\n" and "llmkit chat one/tiny-Q8_0.gguf" in one.stderr
    assert list(models(desk.out / "one")) == ["tiny-Q8_0.gguf"]
    (desk.out / "one" / "tiny-Q4_K_M.gguf").write_bytes(b"mine")
    assert "is another file than" in desk.refused("download", f"{QUANTIZED}:Q4_K_M", "--to", "one")
    split = desk.ok("download", f"{QUANTIZED}:F16", "--to", "split")
    assert split.stdout.endswith("-00001-of-00004.gguf\n") and len(models(desk.out / "split")) == 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("to", [(), ("--to", "here")])
def test_it_goes_on(desk: Desk, root: Path, number: signal.Signals, to: tuple[str, ...]) -> None:
    desk.hub.fail(TINY, SHARD, Trickle(1e6), times=None)
    with desk.running("download", TINY, *to) as process:
        wait_until(lambda: any(SHARD in each.path and each.sent > 500_000 for each in weights(desk.hub)), process)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=PATIENCE)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in said
        assert said.endswith("\nInterrupted. What came is kept: run the same command again to go on.\n")
    desk.hub.heal()
    desk.hub.clear()
    planned = desk.ok("download", TINY, *to, "--dry-run")
    assert re.search(rf"^{SHARD} +[\d.]+ MB +[\d.]+ [kM]B here, to be gone on with$", planned.stdout, re.M)
    done = desk.ok("download", TINY, *to)
    assert re.search(rf"^  {SHARD}  [\d.]+ MB  gone on with, verified$", done.stderr, re.M)
    asked = {each.path.rpartition("/")[2]: each.range for each in weights(desk.hub)}
    assert re.fullmatch(r"bytes=[1-9]\d{5,}-", str(asked[SHARD]))
    whole = desk.out / "here" if to else Path(done.stdout.strip())
    assert models(whole) == models(root / TINY)
    assert not [path for path in desk.place.rglob("*") if ".partial" in path.name]


# --- sweep -----------------------------------------------------------------------------------------------------------


def orphan(desk: Desk, repo: str, *to: str) -> None:
    """Kill the library in the middle of a file."""
    with desk.running(repo, *to, program=("-c", LIBRARY)) as process:
        place = desk.out / to[0] if to else desk.cache
        desk.hub.clear()
        wait_until(lambda: any(each.sent > 200_000 for each in weights(desk.hub)), process)
        wait_until(lambda: any(place.rglob("*.incomplete")), process)


@pytest.mark.slow
def test_sweep(desk: Desk, root: Path) -> None:
    for repo, pattern, rate in ((TINY, "*.safetensors", 5e5), (QUANTIZED, "*.gguf", 3e5)):
        desk.hub.fail(repo, pattern, Trickle(rate), times=None)
    orphan(desk, TINY)
    orphan(desk, TINY, "theirs")
    with desk.running("download", TINY, "--to", "ours") as process:
        wait_until(lambda: any(path.stat().st_size for path in desk.out.glob("ours/*.safetensors.partial")), process)
    (desk.out / "ours" / "x-Q4_K_M.gguf.partial").write_bytes(b"of quantize")
    orphans, partials = set(desk.cache.rglob("*.incomplete")), set(desk.out.glob("ours/*.safetensors.partial"))
    others = set((desk.out / "theirs").rglob("*.incomplete"))
    assert orphans and partials and others
    with desk.running(QUANTIZED, program=("-c", LIBRARY)) as busy:
        wait_until(lambda: set(desk.cache.rglob("*.incomplete")) > orphans, busy)
        looked = desk.ok("download", "--sweep", "--to", "ours", "--dry-run")
        shown = {Path(line.split()[0]) for line in looked.stdout.splitlines()[1:]}
        assert shown == orphans | partials, "not those under work, not those of quantize"
        assert re.search(r"\d+ more belong to downloads that run now and stay", looked.stderr)
        refused = desk.run("download", "--sweep", "--to", "ours")
        assert refused.returncode == 1 and "--yes" in refused.stderr
        assert all(path.exists() for path in orphans | partials)
        desk.ok("download", "--sweep", "--to", "ours", "--yes")
        assert not any(path.exists() for path in orphans | partials)
        assert list(desk.cache.rglob("*.incomplete")) and busy.poll() is None
    told = json.loads(desk.ok("download", "--sweep", "--to", "theirs", "--yes", "--json").stdout)
    assert {each["path"] for each in told["leftovers"]} > {str(path) for path in others}
    assert not list(desk.place.rglob("*.incomplete")) and not list(desk.out.rglob("*.partial.json"))
    assert "Nothing to sweep" in desk.ok("download", "--sweep", "--to", "ours", "--yes").stderr
    assert (desk.out / "ours" / "x-Q4_K_M.gguf.partial").exists()
    desk.hub.heal()
    assert models(Path(desk.ok("download", TINY).stdout.strip())) == models(root / TINY)


def test_what_a_sweep_leaves_alone(desk: Desk) -> None:
    """Unfinished files of other programs in a folder of the user's; what was taken up between the look and the yes."""
    old = (time.time() - 3600,) * 2
    theirs = desk.out / ".cache" / "huggingface" / "download" / "x.01234567.incomplete"
    strange, taken = desk.out / "film.incomplete", desk.out / "model.safetensors.partial"
    theirs.parent.mkdir(parents=True)
    for path in (theirs, strange, taken):
        path.write_bytes(b"x" * 5000)
        os.utime(path, old)
    (desk.out / "model.safetensors.partial.json").write_text("{}")
    shown = desk.ok("download", "--sweep", "--to", ".", "--dry-run")
    assert {Path(line.split()[0]) for line in shown.stdout.splitlines()[1:]} == {theirs, taken}
    refused = desk.run("download", "--sweep", "--to", ".", "--json")
    assert (refused.returncode, refused.stdout) == (1, "") and "--yes" in refused.stderr

    def look() -> list[sweep.Leftover]:
        return list(sweep._under(desk.out))

    with claim.claim(desk.out / "model.safetensors"):
        assert {each.path: each.busy for each in look()} == {theirs: False, taken: True}
        assert [each.path for each in sweep.delete(look())] == [theirs]
    assert taken.exists() and (desk.out / "model.safetensors.partial.json").exists()
    assert [each.path for each in sweep.delete(look())] == [taken]
    assert [path.name for path in desk.out.iterdir() if path.is_file()] == ["film.incomplete"]


def test_sweep_of_a_conversion(desk: Desk) -> None:
    """What --low-disk holds while it runs stays; what it left when killed goes."""
    desk.hub.fail(TINY, SHARD, Trickle(5e5), times=None)
    with desk.running("quantize", TINY, "Q8_0", "--low-disk") as process:
        wait_until(lambda: any(SHARD in each.path and each.sent > 300_000 for each in weights(desk.hub)), process)
        during = desk.ok("download", "--sweep", "--yes")
        assert "run now and stay" in during.stderr and process.poll() is None
    streams = desk.home / "streams"
    assert list(streams.glob("models--org--tiny"))
    after = desk.ok("download", "--sweep", "--yes")
    assert "--low-disk" in after.stdout and "freed" in after.stderr and not list(streams.iterdir())


@pytest.mark.parametrize("verb", [("inspect", f"{TINY}"), ("quantize", TINY, "Q8_0", "--low-disk")])
def test_ctrl_c_while_headers_do_not_come(desk: Desk, verb: tuple[str, ...]) -> None:
    desk.hub.fail(TINY, "*.safetensors", Stall(0, 60), times=None)
    with desk.running(*verb) as process:
        wait_until(lambda: len(weights(desk.hub)) >= 5, process)
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - start < 5, "it did not wait for the silent server"
    assert process.returncode == 130 and "Interrupted." in said and "Traceback" not in said


# --- refusals and secrets --------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be(desk: Desk) -> None:
    """The hint names the option or variable that chooses the folder."""
    (desk.out / "file").write_text("mine")
    blocked = str(desk.out / "file" / "below")
    assert "another folder with --to" in desk.refused("download", TINY, "--to", "file")
    assert "HF_HUB_CACHE" in desk.refused("download", TINY, HF_HUB_CACHE=blocked)
    assert "LLMKIT_HOME" in desk.refused("quantize", TINY, "Q8_0", "--low-disk", LLMKIT_HOME=blocked)
    desk.hub.clear()
    assert "LLMKIT_HOME" in desk.refused("chat", f"{TINY}:Q8_0", "--prompt", "x", LLMKIT_HOME=blocked)
    assert weights(desk.hub) == [], "said before anything is fetched"
    assert "--out" in desk.refused("quantize", TINY, "Q8_0", "--out", blocked)
    assert "token" in desk.refused("download", TINY, HF_HOME=blocked), "it is kept there"


def test_the_next_command(desk: Desk) -> None:
    assert desk.ok("download", f"{TINY}:Q8_0").stderr.endswith(f"next: llmkit quantize {TINY}:Q8_0\n")
    assert desk.ok("download", f"{TINY}:Q8_0", "--to", "here").stderr.endswith("next: llmkit quantize here Q8_0\n")
    assert desk.ok("download", TINY).stderr.endswith(f"next: llmkit quantize {TINY} Q4_K_M\n")
    assert desk.ok("quantize", f"{TINY}:Q8_0", "--dry-run").returncode == 0
    said = desk.refused("inspect", TINY)
    assert f"{TINY}: is a folder or a checkpoint" in said and f"llmkit quantize {TINY} Q4_K_M --dry-run" in said


def test_every_refusal_names_the_next_step(desk: Desk) -> None:
    assert "no such repository" in (said := desk.refused("download", "org/nothing")) and "hf auth login" in said
    assert "no such revision" in desk.refused("download", f"{TINY}@v9")
    said = desk.refused("download", f"{QUANTIZED}:Q5_K_M")
    assert "has no Q5_K_M" in said and "Nearest: Q4_K_M" in said
    assert "no file matches" in desk.refused("download", TINY, "--include", "*.onnx")
    assert "'org/name'" in desk.refused("download", "https://huggingface.co/org/name/tree/main")
    assert "no model was named" in desk.refused("download")
    desk.hub.require_token(TINY, TOKEN)
    assert "or it is private" in (said := desk.refused("download", TINY)) and "HF_TOKEN" in said
    assert "HF_TOKEN" not in desk.refused("download", TINY, HF_TOKEN="hf_other"), "somebody is logged in"
    desk.hub.require_token(TINY, TOKEN, gated="manual")
    for environment, word in (({}, "nobody is logged in"), ({"HF_TOKEN": "hf_other"}, "your account may not read it")):
        said = desk.refused("download", TINY, **environment)
        assert word in said and f"Accept its terms on {desk.hub.address}/{TINY} " in said
    assert ", gated)" in desk.ok("download", TINY, "--dry-run", HF_TOKEN=TOKEN).stderr
    desk.ok("download", TINY, "--include", "*.json", HF_TOKEN=TOKEN)
    desk.hub.guards.clear()
    desk.hub.fail(TINY, "config.json", UnsafeName("../evil.json"))
    assert "leaves its folder" in desk.refused("download", TINY)


@pytest.mark.slow
def test_nobody_answers(desk: Desk, silence: Silence) -> None:
    began = time.monotonic()
    assert "does not answer" in desk.refused("download", TINY, HF_ENDPOINT=silence.address)
    assert "cannot be reached" in desk.refused("download", TINY, HF_ENDPOINT="http://127.0.0.1:9")
    assert "HF_HUB_OFFLINE" in desk.refused("download", TINY, HF_HUB_OFFLINE="1")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("verb", [("download", TINY), ("quantize", TINY, "Q8_0"), ("inspect", f"{QUANTIZED}:Q8_0")])
def test_the_token_is_never_shown(desk: Desk, verb: tuple[str, ...]) -> None:
    loud = {"HF_TOKEN": TOKEN, "LLMKIT_DEBUG": "1"}
    said = desk.refused(verb[0], "org/nothing", *verb[2:], "-v", **loud)
    desk.hub.require_token(verb[1].partition(":")[0], "another", gated="auto")
    said += desk.refused(*verb, "-v", **loud)
    desk.hub.guards.clear()
    desk.hub.fail_route("api/*", Status(403), times=None)
    said += desk.refused(*verb, "-v", **loud)
    desk.hub.heal()
    desk.hub.fail(verb[1].partition(":")[0], "*", Status(400), times=None)
    said += desk.refused(*verb, "-v", **loud)
    desk.hub.heal()
    said += desk.refused(*verb, "-v", **loud, HF_ENDPOINT="http://127.0.0.1:9")
    done = desk.ok(*verb, "-v", **loud)
    said += done.stdout + done.stderr
    assert "Traceback" in said and TOKEN not in said and TOKEN[3:] not in said
    assert {each.authorization for each in desk.hub.log} == {f"Bearer {TOKEN}"}


# --- a terminal ------------------------------------------------------------------------------------------------------


def on_terminal(desk: Desk, *words: str, answer: str = "") -> tuple[int, str]:
    """A run whose input and error stream are a terminal: exit code and what it shows there."""
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "llmkit", *words], env=desk.environment(), cwd=desk.out,
        stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        os.write(ours, answer.encode())
        shown, end = b"", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # the other side has closed
                    break
        code = process.wait(PATIENCE)
    os.close(ours)
    return code, shown.decode()


def test_one_bar_over_all_and_a_line_for_each_file(desk: Desk, root: Path) -> None:
    desk.hub.fail(TINY, "*.safetensors", Trickle(5e6), times=None)
    code, shown = on_terminal(desk, "download", TINY)
    assert code == 0
    drawn = re.findall(r"\x1b\[K(fetch [━╌]{20} +\d+%.*?)(?=\r)", shown)
    assert len(drawn) > 5 and {line.split()[0] for line in drawn} == {"fetch"}
    total = f"{size(root / TINY) / 1e6:.1f} MB"
    bar = re.compile(rf"fetch \S+ +(\d+)%  [\d.]+ [kM]?B of {re.escape(total)}  [\d.]+ [kM]?B/s  [\d.]+ s left  \S+")
    shares = [int(match[1]) for line in drawn if (match := bar.fullmatch(line))]
    assert len(shares) > 5 and shares == sorted(shares) and shares[0] < 50 and drawn[-1].split()[2] == "100%"
    for name in files(root / TINY):
        line = rf"(?:^|\x1b\[K)  {re.escape(name)}  [\d.]+ [kM]?B  fetched, verified\r$"
        assert len(re.findall(line, shown, re.M)) == 1
    assert shown.rstrip().endswith(f"llmkit quantize {TINY} Q4_K_M"), "nothing of the bar is left"


def test_no_bar_in_a_pipe_and_nothing_when_quiet(desk: Desk) -> None:
    done = desk.ok("download", TINY)
    assert "━" not in done.stderr and "\r" not in done.stderr and "fetched, verified" in done.stderr
    assert desk.ok("download", QUANTIZED + ":Q8_0", "-q").stderr == ""


def test_sweep_asks(desk: Desk) -> None:
    blobs = desk.cache / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    orphan = blobs / f"{'0' * 64}.01234567.incomplete"
    orphan.write_bytes(b"x" * 5000)
    os.utime(orphan, (time.time() - 3600,) * 2)
    code, shown = on_terminal(desk, "download", "--sweep", answer="n\n")
    assert code == 1 and "Delete 1 leftover, " in shown and orphan.exists()
    code, shown = on_terminal(desk, "download", "--sweep", answer="y\n")
    assert code == 0 and "freed" in shown and not orphan.exists()
