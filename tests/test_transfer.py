"""The connection fails, the server refuses, leads elsewhere: the files at the end, the words, what was asked for."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fetching
import standin_hub
from fetching import FILES, NBYTES, REPO, STOP, WEIGHTS, Client, Outcome, assert_holds, checkpoint, whole
from llmkit import hub, model
from llmkit.errors import (
    AccessDenied,
    LlmkitError,
    ModelNotFound,
    Unreachable,
)
from llmkit.hub import client
from standin_faults import (
    Drop,
    Fault,
    IgnoreRange,
    Redirect,
    Refuse416,
    ShortBody,
    Stall,
    Status,
    Trickle,
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """A client, and a stand-in that holds FILES as org/tiny."""
    with fetching.in_process(monkeypatch, tmp_path / "root", tmp_path / "cache") as found:
        found.hub.add_synthetic(REPO, FILES)
        yield found


# ── the connection ──


def test_a_dropped_link_goes_on_at_the_byte(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, Drop(STOP))
    outcome = whole(here)
    assert here.ranges() == [None, f"bytes={STOP}-"]
    assert sum(request.sent for request in here.hub.requests("GET", suffix=WEIGHTS)) == NBYTES
    assert outcome.done[WEIGHTS].nbytes == NBYTES


def test_a_reset_link_goes_on_where_the_bytes_ended(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, Drop(STOP, reset=True))
    whole(here)
    first, second = here.ranges()
    assert first is None
    assert second is None or 0 < int(second.removeprefix("bytes=").rstrip("-")) <= STOP


def test_a_link_that_drops_again_and_again(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, Drop(400_000), times=7)
    whole(here)
    assert here.ranges() == [None, *(f"bytes={number * 400_000}-" for number in range(1, 8))]


def test_a_short_body_is_asked_for_again(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, ShortBody())
    whole(here)
    assert here.ranges() == [None, f"bytes={NBYTES - 1}-"]


def test_a_body_that_stays_short_is_given_up_and_kept(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, ShortBody(), times=None)
    with pytest.raises(LlmkitError, match=r"model\.safetensors: gave up after 5 tries.*byte 2,999,999") as caught:
        here.fetch()
    assert "run the same command again" in (caught.value.hint or "")
    here.hub.heal()
    here.hub.clear()
    whole(here)
    assert here.ranges() == [f"bytes={NBYTES - 1}-"]


def test_a_server_that_ignores_range(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, Drop(STOP))
    here.hub.fail(REPO, WEIGHTS, IgnoreRange())
    outcome = whole(here)
    assert here.ranges() == [None, f"bytes={STOP}-"]
    assert any("does not go on at byte 1,000,000" in remark for remark in outcome.remarks)


def test_416_on_going_on_starts_the_file_again(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, Drop(STOP))
    here.hub.fail(REPO, WEIGHTS, Refuse416())
    outcome = whole(here)
    assert here.ranges() == [None, f"bytes={STOP}-", None]
    assert any("starting this file again" in remark for remark in outcome.remarks)


@dataclass(frozen=True)
class StartsOver(IgnoreRange, Drop):
    """Whatever is asked for, the body starts at the first byte and breaks off."""

    needs_range = False


@pytest.mark.parametrize("faults", [[StartsOver(STOP)], [Drop(STOP), Refuse416()]], ids=["starts over", "416"])
def test_a_server_that_never_comes_to_the_end_is_given_up(here: Client, faults: list[Fault]) -> None:
    for fault in faults * 50:
        here.hub.fail(REPO, WEIGHTS, fault)
    with pytest.raises(LlmkitError, match="gave up after 5 tries"):
        here.fetch()
    assert len(here.ranges()) < 10


def test_silence_is_noticed_and_the_file_goes_on(here: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.library().constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    here.hub.fail(REPO, WEIGHTS, Stall(after=STOP))
    whole(here)
    assert here.ranges() == [None, f"bytes={STOP}-"]


def test_a_listing_that_never_comes(here: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_TIMEOUT", 0.3)
    for route in (f"api/models/{REPO}", f"api/models/{REPO}/tree/*"):
        here.hub.fail_route(route, Stall(), times=None)
        began = time.monotonic()
        with pytest.raises(Unreachable, match="does not answer"):
            here.plan()
        assert time.monotonic() - began < 5
        here.hub.heal()


def test_the_library_s_own_timeout_setting_holds(here: Client, tmp_path: Path) -> None:
    here.hub.fail(REPO, WEIGHTS, Stall(after=STOP))
    began = time.monotonic()
    report = fetching.start(REPO, fetching.environment(here.hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")).finish()
    assert_holds(report.path, FILES)
    assert time.monotonic() - began < 9, "ten seconds are what it bears otherwise"


@pytest.mark.parametrize("fault", [Trickle(20_000), Stall(after=STOP)], ids=["trickle", "silence"])
def test_ctrl_c_is_answered_at_once_and_what_came_is_kept(here: Client, tmp_path: Path, fault: Fault) -> None:
    here.hub.fail(REPO, "*", fault, times=None)
    files = {f"part-{number}.bin.json": content for number, content in enumerate([FILES[WEIGHTS]] * 4)}
    here.hub.add_synthetic(REPO, {name: bytes([number]) + text for number, (name, text) in enumerate(files.items())})
    environ = fetching.environment(here.hub, tmp_path)
    child = fetching.start(REPO, environ, include=["*"])
    blobs = tmp_path / "hf" / "hub" / "models--org--tiny" / "blobs"
    fetching.wait_for(lambda: sum(fetching.size(path) > 1000 for path in blobs.glob("*.partial")) == 4, "all four")
    began = time.monotonic()
    child.process.send_signal(signal.SIGINT)
    child.process.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert child.process.returncode != 0
    kept = {path.name.partition(".")[0]: fetching.size(path) for path in blobs.glob("*.partial")}
    assert len(kept) == 4 and all(kept.values())
    here.hub.heal()
    here.hub.clear()
    report = fetching.start(REPO, environ, include=["*"]).finish()
    assert report.code == 0 and sorted(report.hows.values()) == ["resumed"] * 4
    etags = {entry.name: entry.etag for entry in here.hub.snapshot(REPO).entries.values()}
    for name, etag in etags.items():
        assert here.ranges(name) == [f"bytes={kept[etag]}-"]


# ── answers that are errors ──


@pytest.mark.parametrize("code", [429, 500, 502, 503, 408])
def test_an_error_that_passes(here: Client, code: int) -> None:
    here.hub.fail(REPO, WEIGHTS, Status(code, retry_after=0))
    outcome = whole(here)
    assert [request.status for request in here.hub.requests("GET", suffix=WEIGHTS)] == [code, 200]
    assert any(f"answered {code}: trying again" in remark for remark in outcome.remarks)


def test_retry_after_is_kept_to(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, Status(429, retry_after=1))
    began = time.monotonic()
    outcome = whole(here)
    assert time.monotonic() - began >= 1
    assert any("trying again in 1 s" in remark for remark in outcome.remarks)


@pytest.mark.parametrize("asked", ["soon", "nan", "-1", "1e9", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_retry_after_that_is_no_number_is_not_believed(asked: str) -> None:
    assert client.wait_seconds(asked, 3) == 4
    assert client.wait_seconds("86400", 1) == 300


def test_the_rate_limit_is_kept_to() -> None:
    """In the words of the Hub's own answers, as huggingface_hub reads them."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    for words in ('"api";r=0;t=55', '"resolvers"; r=0; t=290'):
        told = parse_ratelimit_headers({"RateLimit": words})
        assert told is not None and client.wait_seconds(client.asked_wait({"RateLimit": words}), 1) == (
            told.reset_in_seconds
        )
    assert client.asked_wait({"RateLimit": '"api";r=0;t=55', "Retry-After": "3"}) == "3"
    assert client.asked_wait({"RateLimit": '"api";r=400;t=55'}) is None, (
        "the refusal is not about the number of requests"
    )
    assert client.asked_wait({}) is None


def test_an_error_that_stays_is_given_up(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, Status(503), times=None)
    with pytest.raises(LlmkitError, match=r"org/tiny: model\.safetensors: gave up after 5 tries: .*503"):
        here.fetch()
    assert len(here.hub.requests("GET", suffix=WEIGHTS)) == 5


@pytest.mark.parametrize("route", [f"api/models/{REPO}", f"api/models/{REPO}/tree/*"])
def test_errors_of_the_listing(here: Client, route: str) -> None:
    waits: list[str] = []
    here.hub.fail_route(route, Status(503))
    here.hub.fail_route(route, Status(429, retry_after=0))
    assert len(here.plan(on_wait=waits.append).files) == 3
    assert [wait.partition(":")[0] for wait in waits] == ["the Hub answered 503", "the Hub answered 429"]
    here.hub.fail_route(route, Status(500), times=None)
    with pytest.raises(Unreachable, match=r"out of order \(500\)"):
        here.plan()
    here.hub.heal()
    here.hub.fail_route(route, Status(429), times=None)
    with pytest.raises(LlmkitError, match="fewer requests"):
        here.plan()


def test_every_refusal_has_words_of_its_own(here: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("secret", "gated", "plain"):
        here.hub.add_synthetic(f"org/{name}", FILES)
    here.hub.require_token("org/secret", "hf_right")
    here.hub.require_token("org/gated", "hf_right", gated="manual")

    def refusal(text: str, token: str | None = None) -> LlmkitError:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(LlmkitError) as caught:
            here.fetch(text)
        assert "hf_" not in f"{caught.value}{caught.value.hint}".replace("hf_home", "")
        return caught.value

    found = {
        "no such repository": (refusal("org/nothing"), ModelNotFound, "llmkit search"),
        "private, nobody": (refusal("org/secret"), ModelNotFound, "log in first"),
        "private, another": (refusal("org/secret", "hf_wrong"), ModelNotFound, "your token"),
        "no such revision": (refusal("org/plain@v9"), ModelNotFound, "ranches"),
        "gated, nobody": (refusal("org/gated"), AccessDenied, "hf auth login"),
        "gated, another": (refusal("org/gated", "hf_wrong"), AccessDenied, "Accept its terms"),
    }
    for code, error_code, name in (
        (401, None, "asked for a name"), (403, None, "forbidden"), (404, "EntryNotFound", "gone")
    ):  # fmt: skip
        here.hub.fail("org/plain", WEIGHTS, Status(code, error_code=error_code))
        error = refusal("org/plain", "hf_right")
        found[f"file, {name}"] = (error, LlmkitError, "")
    for name, (error, kind, hint) in found.items():
        assert isinstance(error, kind) and error.hint and hint in error.hint, (name, error, error.hint)
        assert "org/" in error.message, name
    words = {name: (error.message.partition(": ")[2], error.hint) for name, (error, _, _) in found.items()}
    assert words.pop("private, nobody") == words["no such repository"], "the Hub does not tell strangers which"
    assert len(set(words.values())) == len(words)
    assert "/org/gated" in (found["gated, another"][0].hint or "")


def test_private_and_gated_with_the_right_token(here: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    here.hub.require_token(REPO, "hf_right", gated="auto")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    outcome = whole(here)
    assert outcome.plan.repository.gated
    assert {request.authorization for request in here.hub.log} == {"Bearer hf_right"}


def test_the_repository_changes_between_plan_and_fetch(here: Client) -> None:
    outcome = Outcome(here.plan())
    here.hub.add_synthetic(REPO, checkpoint(seed=1))
    with pytest.raises(ModelNotFound, match=r"\.json: is listed, but not there|model\.safetensors: is listed"):
        here.carry_out(outcome)
    assert hub.find(model.parse(REPO), here.cache) is None


# ── redirects ──


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[standin_hub.Hub]:
    """Another host with the same files."""
    with standin_hub.serve(tmp_path / "elsewhere") as found:
        found.add_synthetic(REPO, FILES)
        yield found


def test_another_host_gets_the_range_and_no_token(
    here: Client, elsewhere: standin_hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    here.hub.fail(REPO, WEIGHTS, Redirect(elsewhere.address), times=None)
    elsewhere.fail(REPO, WEIGHTS, Drop(STOP))
    whole(here)
    assert [(request.range, request.authorization) for request in elsewhere.log] == [
        (None, None), (f"bytes={STOP}-", None)
    ]  # fmt: skip
    asked = here.hub.requests("GET", suffix=WEIGHTS)
    assert [request.authorization for request in asked] == ["Bearer hf_secret"] * 2, "the Hub is asked again each time"


def test_the_same_host_gets_the_token_too(here: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    here.break_off()
    here.hub.fail(REPO, WEIGHTS, Redirect(here.hub.address))
    whole(here)
    asked = [(request.status, request.range, request.authorization) for request in here.hub.requests(suffix=WEIGHTS)]
    assert asked == [(status, f"bytes={STOP}-", "Bearer hf_secret") for status in (302, 206)]


def test_an_address_that_is_good_no_more_is_asked_for_again(here: Client, elsewhere: standin_hub.Hub) -> None:
    here.hub.fail(REPO, WEIGHTS, Redirect(elsewhere.address), times=2)
    elsewhere.fail(REPO, WEIGHTS, Drop(STOP))
    elsewhere.fail(REPO, WEIGHTS, Status(403))
    whole(here)
    assert here.ranges() == [None, f"bytes={STOP}-", f"bytes={STOP}-"]


@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1:1/x", "data:,x"])
def test_redirects_lead_to_the_web_only(here: Client, to: str) -> None:
    here.hub.fail(REPO, WEIGHTS, Redirect(to), times=None)
    began = time.monotonic()
    with pytest.raises(LlmkitError, match="leads to an address that is not safe"):
        here.fetch()
    assert time.monotonic() - began < 2


def test_a_listing_that_leads_elsewhere(
    here: Client, elsewhere: standin_hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    here.hub.fail_route(f"api/models/{REPO}/tree/*", Redirect(elsewhere.address), times=None)
    assert elsewhere.snapshot(REPO).commit == here.hub.snapshot(REPO).commit
    whole(here)
    assert [request.authorization for request in elsewhere.log] == [None]
    many = FILES | {f"{number}.txt": b"" for number in range(1000)}
    for server in (here.hub, elsewhere):
        server.add_synthetic(REPO, many)
        server.clear()
    assert here.plan().choice.left_out == {"not needed to run the model": 1000}
    assert [request.authorization for request in elsewhere.log] == [None, None]
    assert len(here.hub.requests(contains="/tree/")) == 2, "the next page was asked of the Hub itself"
