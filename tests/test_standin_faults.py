"""The stand-in Hub on the wire: ranges, revisions, connections, and each fault is what it says."""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import standin_hub
import standin_material
from standin_faults import (
    ChangeContent,
    Drop,
    Fault,
    FlipBytes,
    IgnoreRange,
    LyingTree,
    MissingFile,
    Refuse416,
    ShortBody,
    Stall,
    Status,
    Trickle,
    UnsafeName,
    WrongETag,
    XetHeaders,
)
from standin_hub import Hub
from standin_material import FILES, MODEL, WEIGHTS, ask, connect, json_of


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A stand-in with the repository org/name."""
    with standin_hub.serve(standin_material.fill(tmp_path / "root")) as hub:
        yield hub


# the wire


@pytest.mark.parametrize(
    ("asked", "status", "start", "stop"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=100000-", 206, 100_000, 512_000),
        ("bytes=-10", 206, 511_990, 512_000),
        ("bytes=5-99999999", 206, 5, 512_000),
        ("bytes=0-1,5-6", 200, 0, 512_000),
        ("bytes=9-3", 200, 0, 512_000),
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_ranges(hub: Hub, asked: str, status: int, start: int, stop: int, in_memory: bool) -> None:
    if in_memory:
        hub.add_synthetic("org/name", FILES)
    for method in ("GET", "HEAD"):
        answer, body = ask(hub, MODEL, method, Range=asked)
        assert answer.status == status
        assert answer.headers["Content-Length"] == str(stop - start)
        assert answer.headers["Content-Range"] == (f"bytes {start}-{stop - 1}/512000" if status == 206 else None)
        assert body == (WEIGHTS[start:stop] if method == "GET" else b"")
    get = hub.requests("GET")[-1]
    assert (get.range, get.status, get.sent, get.host) == (asked, status, stop - start, hub.address[7:])


def test_past_the_end_and_changed_meanwhile(hub: Hub) -> None:
    answer, _ = ask(hub, MODEL, Range="bytes=512000-")
    assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */512000")
    answer, body = ask(hub, MODEL, Range="bytes=5-", If_Range='"other"')
    assert answer.status == 200 and body == WEIGHTS
    answer, body = ask(hub, MODEL, Range="bytes=5-", If_Range=answer.headers["ETag"])
    assert answer.status == 206 and body == WEIGHTS[5:]


def test_one_connection_serves_many_requests(hub: Hub) -> None:
    connection = connect(hub)
    began = time.monotonic()
    for path in (MODEL, "/org/name/resolve/main/none", "/api/models/org/name", MODEL) * 20:
        connection.request("GET", path)
        first = connection.sock
        connection.getresponse().read()
        assert connection.sock is first and first is not None
    assert time.monotonic() - began < 2, "headers and body do not wait for each other"
    connection.close()


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    before = json_of(hub, "/api/models/org/name")["sha"]
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "greeting.txt").write_bytes(b"hi\n")
    hub.add_revision("org/name", "refs/pr/1", tmp_path / "v1")
    assert ask(hub, "/org/name/resolve/refs%2Fpr%2F1/greeting.txt")[1] == b"hi\n"
    sha = json_of(hub, "/api/models/org/name/revision/refs%2Fpr%2F1")["sha"]
    assert sha != before and ask(hub, f"/org/name/resolve/{sha}/greeting.txt")[1] == b"hi\n"
    os.utime(hub.repositories.root / "org" / "name" / "greeting.txt", ns=(1, 1))
    assert json_of(hub, "/api/models/org/name")["sha"] != before
    answer, _ = ask(hub, f"/org/name/resolve/{before}/greeting.txt")
    assert (answer.status, answer.headers["X-Error-Code"]) == (404, "RevisionNotFound")


@pytest.mark.parametrize("path", ["../../../etc/passwd", "%2e%2e/other/secret", "/etc/passwd", "deep"])
def test_no_path_leads_out(hub: Hub, path: str) -> None:
    secret = hub.repositories.root / "org" / "other" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    answer, _ = ask(hub, f"/org/name/resolve/main/{path}")
    assert (answer.status, answer.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert ask(hub, "/api/models/org/..")[0].status == 404


# faults


@pytest.mark.parametrize(
    ("fault", "arrives"),
    [
        (Drop(after=1000), 1000),
        (Drop(after=0), 0),
        (ShortBody(), 511_999),
        (ShortBody(by=2000), 510_000),
    ],
)
def test_bodies_that_end_early(hub: Hub, fault: Fault, arrives: int) -> None:
    hub.fail("org/name", "model.bin", fault)
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(hub, MODEL)
    assert caught.value.partial == WEIGHTS[:arrives]
    assert hub.requests("GET")[-1].sent == arrives
    assert ask(hub, MODEL)[1] == WEIGHTS, "once was all"


def test_a_reset(hub: Hub) -> None:
    hub.fail("org/name", "model.bin", Drop(after=0, reset=True), times=2)
    for _ in range(2):
        assert ask(hub, MODEL, "HEAD")[0].status == 200, "a body's fault is not spent on a HEAD"
        with pytest.raises(ConnectionResetError):
            ask(hub, MODEL)
    assert ask(hub, MODEL, Range="bytes=1000-")[1] == WEIGHTS[1000:]


def test_ranges_that_are_not_kept(hub: Hub) -> None:
    hub.fail("org/name", "model.bin", IgnoreRange())
    hub.fail("org/name", "model.bin", Refuse416())
    assert ask(hub, MODEL)[0].status == 200, "a request without a range meets neither"
    assert hub.unmet() == [IgnoreRange(), Refuse416()]
    answer, body = ask(hub, MODEL, Range="bytes=5-")
    assert (answer.status, body, answer.headers["Content-Range"]) == (200, WEIGHTS, None)
    answer, _ = ask(hub, MODEL, Range="bytes=5-")
    assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */512000")
    assert ask(hub, MODEL, Range="bytes=5-")[0].status == 206
    assert hub.unmet() == []


def test_wrong_bytes_and_wrong_names(hub: Hub) -> None:
    hub.fail("org/name", "model.bin", FlipBytes(at=300_000, count=2))
    answer, body = ask(hub, MODEL, Range="bytes=100000-")
    different = [100_000 + i for i, (a, b) in enumerate(zip(body, WEIGHTS[100_000:], strict=True)) if a != b]
    assert different == [300_000, 300_001]
    hub.fail("org/name", "*.bin", WrongETag("abc"), method="HEAD")
    assert ask(hub, MODEL)[0].headers["ETag"] == answer.headers["ETag"]
    assert ask(hub, MODEL, "HEAD")[0].headers["ETag"] == '"abc"'


def test_errors_of_the_server(hub: Hub) -> None:
    hub.fail("org/name", "model.bin", Status(429, retry_after=3))
    hub.fail("org/name", "model.bin", Status(503), times=2)
    answers = [ask(hub, MODEL)[0] for _ in range(4)]
    assert [answer.status for answer in answers] == [429, 503, 503, 200]
    assert [answer.headers["Retry-After"] for answer in answers] == ["3", None, None, None]
    hub.fail_route("api/models/org/*", Status(500), times=None)
    assert ask(hub, "/api/models/org/name/revision/main")[0].status == 500
    assert ask(hub, MODEL)[0].status == 200
    hub.heal()
    assert ask(hub, "/api/models/org/name/revision/main")[0].status == 200
    with pytest.raises(TypeError):
        hub.fail_route("api/models/org/name", Drop(after=1))


def test_silence_and_slowness(hub: Hub) -> None:
    hub.fail("org/name", "model.bin", Stall(after=1000, seconds=0.3))
    hub.fail("org/name", "model.bin", Trickle(bytes_per_second=1_000_000))
    for least in (0.3, 0.5):
        began = time.monotonic()
        assert ask(hub, MODEL)[1] == WEIGHTS
        assert time.monotonic() - began >= least
    hub.fail("org/name", "model.bin", Stall(after=1000))
    connection = connect(hub, timeout=0.2)
    connection.request("GET", MODEL)
    response = connection.getresponse()
    assert response.read(1000) == WEIGHTS[:1000]
    with pytest.raises(TimeoutError):
        response.read(1)
    assert hub.sent() == hub.log[-1].sent + 2 * len(WEIGHTS) == 1000 + 2 * len(WEIGHTS)
    response.close()
    connection.close()
    began = time.monotonic()
    hub.fail_route("api/models/org/name", Stall(seconds=0.3))
    assert ask(hub, "/api/models/org/name")[0].status == 200
    assert time.monotonic() - began >= 0.3


def test_listings_that_lie(hub: Hub) -> None:
    true = json_of(hub, "/api/models/org/name?blobs=true")
    hub.fail("org/name", "greeting.txt", MissingFile())
    hub.fail("org/name", "model.bin", LyingTree(size=5))
    hub.fail("org/name", "README.md", UnsafeName("../../x"))
    hub.fail("org/name", "deep/*", ChangeContent(b"other"))
    hub.fail("org/name", "model.bin", XetHeaders())
    info = json_of(hub, "/api/models/org/name?blobs=true")
    rows = {row["path"]: row for row in json_of(hub, f"/api/models/org/name/tree/{info['sha']}?recursive=true")}
    assert info["sha"] != true["sha"]
    assert {sibling["rfilename"] for sibling in info["siblings"]} <= set(rows)
    assert "greeting.txt" not in rows and ask(hub, "/org/name/resolve/main/greeting.txt")[0].status == 404
    assert rows["model.bin"]["size"] == rows["model.bin"]["lfs"]["size"] == 5
    answer, body = ask(hub, MODEL)
    assert body == WEIGHTS and answer.headers["X-Xet-Hash"] == rows["model.bin"]["xetHash"]
    assert ask(hub, "/org/name/resolve/main/../../x")[1] == FILES["README.md"], "a client that asks for it gets it"
    answer, body = ask(hub, "/org/name/resolve/main/deep/er/notes.txt")
    assert body == b"other" and answer.headers["ETag"] == f'"{rows["deep/er/notes.txt"]["oid"]}"'


def test_nobody_listens(hub: Hub) -> None:
    connection = connect(hub)
    connection.request("GET", MODEL)
    connection.getresponse().read()
    hub.stop()
    assert connection.sock.recv(1) == b"", "open connections are closed too"
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        ask(hub, MODEL)
    hub.start()
    assert ask(hub, MODEL)[1] == WEIGHTS
