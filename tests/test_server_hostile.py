"""Requests nobody should send: each is refused as it should be, nothing leaks, and the server goes on."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends.scripted import Scripted
from llmkit.errors import EngineError, InvalidModel, LlmkitError
from llmkit.server import listening
from llmkit.server.errors import without_paths
from llmkit.server.service import Limits
from serving import Paced, Served, served, until

HI: Any = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(Scripted(["Hello"]), limits=Limits(body_seconds=1.0)) as found:
        yield found


@pytest.fixture(autouse=True)
def goes_on(server: Served) -> Iterator[None]:
    """After every test it still answers."""
    yield
    assert server.post(CHAT, messages=HI).json()["choices"][0]["message"]["content"] == "Hello"


def raw(server: Served, sent: bytes, *, timeout: float = 10) -> bytes:
    """What comes back for these bytes until the server closes the connection."""
    place = urlsplit(server.address)
    with socket.create_connection((place.hostname, place.port), timeout=timeout) as connection:
        connection.sendall(sent)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def error_of(told: httpx.Response) -> dict[str, Any]:
    body = told.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


# ── bodies ──


def test_fifty_megabytes(server: Served) -> None:
    with server.http() as client:
        told = client.post(CHAT, content=b'{"messages": "' + b"x" * (50 << 20) + b'"}')
        assert told.status_code == 413 and error_of(told)["code"] == "body_too_large"
        chunks = (b"x" * (1 << 20) for _ in range(50))  # without a Content-Length
        told = client.post(CHAT, content=chunks)
        assert told.status_code == 413


def test_a_body_that_claims_to_be_endless(server: Served) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999999999\r\n\r\n"
    assert b" 413 " in raw(server, head + b"{}").partition(b"\r\n")[0]


def test_a_body_that_never_comes(server: Served) -> None:
    began = time.monotonic()
    told = raw(server, b'POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{"content"')
    assert b" 408 " in told.partition(b"\r\n")[0]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b'{"messages": NaN}', b'{"n": 1e999}', b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"n": ' + b"9" * 10_000 + b"}", b"messages=1&x=2",
        b'{"messages": [' + b'{"role":"user","content":[' * 100 + b"]}" * 100 + b"]}",
    ],
)  # fmt: skip
def test_what_is_no_json_or_too_deep(server: Served, body: bytes) -> None:
    with server.http() as client:
        told = client.post(CHAT, content=body)
    assert told.status_code == 400 and error_of(told)["type"] == "invalid_request_error"


def test_halves_of_characters(server: Served) -> None:
    with server.http() as client:
        body = b'{"messages": [{"role": "user", "content": "\\ud83d \\udc00"}], "stop": "\\ud800"}'
        assert client.post(CHAT, content=body).status_code == 200
        assert client.post("/tokenize", content=b'{"content": "\\ud83d\\ude00"}').json()["tokens"] == list(
            "😀".encode()
        )


def test_a_deep_schema_and_a_costly_one(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    deep: Any = {"type": "string"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    costly = {"type": "string", "pattern": "^((((a{1,900}){1,900}){1,900}){1,900})$"}
    with served(backends.load(gguf_of(tiny_checkpoint("qwen3"), "f32"), n_threads=1)) as tiny:
        for schema in (deep, costly, {"type": "string", "pattern": "("}):
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            began = time.monotonic()
            told = tiny.post(CHAT, messages=HI, response_format=wanted, max_tokens=2)
            assert told.status_code in (200, 400), told.text
            assert time.monotonic() - began < 30
        assert tiny.post(CHAT, messages=HI, max_tokens=2).status_code == 200


# ── connections ──


def test_slow_headers_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HEADER_SECONDS", 0.4)
    with served(Scripted(["Hello"])) as server:
        place = urlsplit(server.address)
        slow = [socket.create_connection((place.hostname, place.port), timeout=10) for _ in range(50)]
        try:
            for connection in slow:
                connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: local")
            assert server.post(CHAT, messages=HI).status_code == 200  # meanwhile
            began, dripping = time.monotonic(), list(slow)
            while dripping:
                assert time.monotonic() - began < 8
                time.sleep(0.1)
                dripping = [connection for connection in dripping if drips(connection)]
        finally:
            for connection in slow:
                connection.close()
        with server.http() as client:  # one that is kept alive, and slow with its second request
            assert client.get("/health").status_code == client.get("/health").status_code == 200
        with socket.create_connection((place.hostname, place.port), timeout=10) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += second.recv(65536)
            second.sendall(b"GET /hea")
            assert second.recv(65536) == b""


def drips(connection: socket.socket) -> bool:
    """Send one more byte; False once the server has closed."""
    try:
        connection.sendall(b"x")
        connection.settimeout(0.01)
        return connection.recv(100) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def test_a_slow_answer_is_not_taken_for_a_slow_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HEADER_SECONDS", 0.3)
    with served(Paced(["x" * 12], seconds=0.05)) as server:
        assert server.post(CHAT, messages=HI).json()["choices"][0]["message"]["content"] == "x" * 12
        with server.http() as client, client.stream("POST", CHAT, json={"messages": HI, "stream": True}) as told:
            assert list(told.iter_lines())[-2] == "data: [DONE]"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / FTP/1.1\r\n\r\n", b"GET  /\r\n\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_http(server: Served, sent: bytes) -> None:
    try:
        told = raw(server, sent)
    except ConnectionError:  # closed while we still sent
        return
    assert told.startswith(b"HTTP/1.1 4") or told == b""


# ── who asks ──


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:8080", "", "[::1", "a@b"]
)
def test_a_foreign_host(server: Served, host: str) -> None:
    with server.http() as client:
        told = client.get("/v1/models", headers={"host": host})
        assert told.status_code == 403 and error_of(told)["code"] == "host_not_allowed"
        assert client.get("/health", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:8080", "192.168.0.7:8080"])
def test_hosts_that_no_foreign_name_stands_for(server: Served, host: str) -> None:
    with server.http() as client:
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "file://", "", "http://127.0.0.1"]
)
def test_a_foreign_page(server: Served, origin: str) -> None:
    with server.http() as client:
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("OPTIONS", CHAT)):
            told = client.request(method, path, headers={"origin": origin}, json={"messages": HI})
            assert told.status_code == 403 and error_of(told)["code"] == "origin_not_allowed"
            assert "access-control-allow-origin" not in told.headers


def test_pages_told_by_the_browser_alone(server: Served) -> None:
    with server.http() as client:
        for site, mode, status in (
            ("cross-site", "no-cors", 403), ("same-site", "no-cors", 403), ("cross-site", "navigate", 200),
            ("same-origin", "cors", 200), ("none", "navigate", 200),
        ):  # fmt: skip
            told = client.get("/docs", headers={"sec-fetch-site": site, "sec-fetch-mode": mode})
            assert told.status_code == status, (site, mode)


def test_our_own_page_and_those_that_are_named() -> None:
    named = "https://friend.example"
    with served(Scripted(["Hello"]), origins=[named + "/"]) as server, server.http() as client:
        assert client.get("/v1/models", headers={"origin": server.address}).status_code == 200
        told = client.post(CHAT, json={"messages": HI}, headers={"origin": named})
        assert told.status_code == 200 and told.headers["access-control-allow-origin"] == named
        assert told.headers["vary"] == "Origin" and "access-control-allow-credentials" not in told.headers
        asks = {"origin": named, "access-control-request-method": "POST"}
        assert client.options(CHAT, headers=asks).status_code == 204
        other = client.options(CHAT, headers=asks | {"origin": "https://evil.example"})
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


KEY = "sk-llmkit-0123456789-secret"


def test_keys(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(Scripted(["Hello"]), keys=[KEY, "another"]) as server, httpx.Client(base_url=server.address) as client:
        wrong = [KEY[:-1], KEY + "x", KEY.upper(), "x", "\xff" * 9]
        for given in [None, f"Basic {KEY}", KEY, *(f"Bearer {each}" for each in wrong)]:
            headers = {} if given is None else {b"authorization": given.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/nowhere", "/models"):
                told = client.get(path, headers=headers)
                assert told.status_code == 401 and error_of(told)["code"] == "invalid_api_key", (given, path)
                assert told.headers["www-authenticate"] == "Bearer"
                assert KEY not in told.text
            assert client.post(CHAT, headers=headers, content=b"{").status_code == 401
            assert client.get("/health", headers=headers).json() == {"status": "ok"}
        for key in (KEY, "another"):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert server.openai().models.list().data[0].id == "scripted"
        assert client.post(CHAT, headers={"authorization": f"Bearer {KEY}"}, content=b"{").status_code == 400
    assert KEY not in caplog.text and "secret" not in repr(server.service)


# ── what is told ──


def test_no_path_is_told(tmp_path: Any) -> None:
    secret = f"{tmp_path}/private/model.gguf"

    def opener(error: LlmkitError) -> Any:
        def fails() -> Any:
            raise error

        return fails

    openers = {
        "fine": lambda: Scripted(["Hello"]),
        "broken": opener(InvalidModel(f"{secret}: is broken at byte 7", f"Look at {secret}")),
        "dead": opener(EngineError(f"{secret}: the engine died\nlog: {secret}")),
    }
    with served(openers=openers) as server:
        for name, status in (("broken", 400), ("dead", 500), ("absent", 404)):
            told = server.post(CHAT, model=name, messages=HI)
            assert told.status_code == status
            assert str(tmp_path) not in told.text and "private" not in told.text and "log:" not in told.text
        for path in ("/docs", "/openapi.json", "/v1/models", "/metrics"):
            with server.http() as client:
                assert str(tmp_path) not in client.get(path).text


def test_paths_in_messages() -> None:
    assert without_paths("/home/me/models/a.gguf: is broken") == "a.gguf: is broken"
    assert (
        without_paths("cannot read '/a/b c/d' or ~/x/y.txt, see /v1x/")
        == "cannot read 'b c/d' or y.txt, see (a folder)"
    )
    kept = "schema: #/definitions/x, https://example.org/a/b, a/b/c, 1/2, and/or"
    assert without_paths(kept) == kept


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/", "/v1", "/", "//", "/%00"],
)
def test_no_file_is_served(server: Served, path: str) -> None:
    told = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, body = told.partition(b"\r\n\r\n")
    assert b" 404 " in head.partition(b"\r\n")[0] and json.loads(body)["error"]["code"] == "no_such_route"
    assert b"server:" not in head.lower() and b"root:" not in body


def test_the_wrong_method(server: Served) -> None:
    with server.http() as client:
        told = client.get(CHAT)
        assert told.status_code == 405 and told.headers["allow"] == "POST" and error_of(told)


def test_what_a_model_says_stays_data() -> None:
    evil = "<script>alert(1)</script>\n\ndata: [DONE]\r\n\r\nevent: x\u2028data: y\x85z"
    with served(Scripted([evil])) as server:
        told = server.post(CHAT, messages=HI)
        assert told.json()["choices"][0]["message"]["content"] == evil
        assert (
            told.headers["content-type"] == "application/json" and told.headers["x-content-type-options"] == "nosniff"
        )
        stream = server.post(CHAT, messages=HI, stream=True)
        events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
        assert "".join(each["choices"][0]["delta"].get("content", "") for each in events) == evil
        assert stream.text.count("\n\ndata: [DONE]\n\n") == 1


def test_the_documentation_is_one_page_without_scripts(server: Served) -> None:
    with server.http() as client:
        told = client.get("/docs")
    assert "default-src 'none'" in told.headers["content-security-policy"]
    assert "<script" not in told.text and "src=" not in told.text and "//" not in told.text.replace("</", "")
    for route in ("/v1/chat/completions", "max_completion_tokens", "/inspect/lens"):
        assert route in told.text


def test_bugs_are_told_without_their_insides(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(Scripted):
        def pool(self, tokens: Any, how: Any = None) -> Any:
            raise ZeroDivisionError("the insides")

    with served(Buggy(["Hello"])) as server:
        told = server.post("/v1/embeddings", input="x")
    assert told.status_code == 500 and error_of(told)["code"] == "internal_error" and "insides" not in told.text
    assert "the insides" in caplog.text


def test_those_who_wait_and_go_leave_the_queue() -> None:
    slow = Paced(["x" * 50] * 9)
    with served(slow, slots=1, queue=4) as server:
        slow.go.clear()
        place = urlsplit(server.address)
        body = json.dumps({"messages": HI}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        clients = []
        for count in range(4):
            clients.append(socket.create_connection((place.hostname, place.port)))
            clients[-1].sendall(head + body)
            until(lambda least=count: server.scheduler.stats().submitted > least)  # type: ignore[misc]
        for client in clients:
            client.close()
        time.sleep(0.2)
        slow.go.set()
        until(lambda: server.scheduler.stats().waiting == server.scheduler.stats().running == 0)
        assert server.scheduler.stats().cancelled == 4 and server.scheduler.stats().decoded_tokens <= 2
