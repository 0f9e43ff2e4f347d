"""Tokens, models, figures and the inside of a model over HTTP: what the functions themselves say. And the OpenAPI."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends.scripted import Scripted
from llmkit.chat.details import log_softmax
from llmkit.chat.sampling import Sampling
from llmkit.inspection import attention, branches, embeddings, layers, lens, temperature
from llmkit.server.app import document
from llmkit.server.inspecting import plain
from llmkit.server.routes import ROUTES
from serving import Paced, Served, served

TEXT = "The cat sat on the mat"


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> Iterator[Served]:
    with served(backends.load(gguf_of(tiny_checkpoint("qwen3"), "f32"), n_threads=1)) as server:
        yield server


def asked(server: Served, path: str, **body: Any) -> Any:
    told = server.post(path, **body)
    assert told.status_code == 200, told.text
    return told.json()


def refused(server: Served, path: str, **body: Any) -> Any:
    told = server.post(path, **body)
    assert 400 <= told.status_code < 500, told.text
    return told.json()["error"]


# ── tokens ──


def test_tokens_and_back(tiny: Served) -> None:
    backend = tiny.scheduler.backend
    ids = asked(tiny, "/tokenize", content=TEXT)["tokens"]
    assert ids == backend.encode(TEXT)
    assert asked(tiny, "/detokenize", tokens=ids) == {"content": TEXT}
    rows = asked(tiny, "/tokenize", content="naïve ✓", with_pieces=True)["tokens"]
    pieces = [bytes(row["piece"]) if isinstance(row["piece"], list) else row["piece"].encode() for row in rows]
    assert b"".join(pieces).decode() == "naïve ✓" and pieces == [backend.piece(row["id"]) for row in rows]
    mark = backend.piece(min(backend.info.eos)).decode()
    assert len(asked(tiny, "/tokenize", content=mark)["tokens"]) == 1
    assert len(asked(tiny, "/tokenize", content=mark, parse_special=False)["tokens"]) > 1
    assert refused(tiny, "/detokenize", tokens=[10**6])["param"] == "tokens"


# ── models come and go ──


def test_models_are_loaded_swapped_and_unloaded() -> None:
    opened: list[str] = []

    def opener(name: str) -> Any:
        def load() -> Scripted:
            opened.append(name)
            return Scripted([f"I am {name}."])

        return load

    with served(openers={"one": opener("one"), "two": opener("two")}, most=1) as server, server.http() as client:

        def states() -> dict[str, str]:
            return {each["id"]: each["state"] for each in client.get("/v1/models").json()["data"]}

        def says(name: str) -> str:
            told = asked(server, "/v1/chat/completions", model=name, messages=[{"role": "user", "content": "?"}])
            return str(told["choices"][0]["message"]["content"])

        assert states() == {"one": "loaded", "two": "unloaded"}
        assert says("two") == "I am two." and states() == {"one": "unloaded", "two": "loaded"}
        assert asked(server, "/models/unload", model="two")["state"] == "unloaded"
        assert asked(server, "/models/load", model="one")["state"] == "loaded"
        assert opened == ["one", "two", "one"]
        assert refused(server, "/models/load", model="three")["code"] == "model_not_found"


def test_a_model_in_use_is_not_unloaded() -> None:
    slow = Paced(["x" * 400])
    with served(slow) as server, server.http() as client:
        body = {"messages": [{"role": "user", "content": "?"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as told:
            lines = told.iter_lines()
            next(lines)
            answer = server.post("/models/unload", model="scripted")
            assert answer.status_code == 503 and "retry-after" in answer.headers


# ── figures ──


def test_figures_for_prometheus(tiny: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    before = tiny.scheduler.stats()
    asked(tiny, "/v1/completions", prompt="a", max_tokens=3, temperature=0, logit_bias={})
    with tiny.http() as client:
        client.get("/no/such/route")
        families = {each.name: each for each in text_string_to_metric_families(client.get("/metrics").text)}
    decoded = families["llmkit_decoded_tokens"].samples[0]
    assert (
        decoded.labels == {"model": tiny.models.default}
        and before.decoded_tokens < decoded.value <= before.decoded_tokens + 3
    )
    routes = {sample.labels["route"] for sample in families["llmkit_http_requests"].samples}
    assert "other" in routes and not any("such" in route for route in routes)
    assert families["llmkit_slots"].type == "gauge" and families["llmkit_busy_seconds"].type == "counter"


# ── inside ──


def test_steps_are_the_engines(tiny: Served) -> None:
    backend = tiny.scheduler.backend
    ids = backend.encode(TEXT, bos=True)
    rows = asked(tiny, "/inspect/steps", text=TEXT, top=3)["tokens"]
    session = backend.session(128)
    logits = session.eval(ids, logits="all").logits
    session.close()
    assert [row["id"] for row in rows] == ids and rows[0]["logprob"] is None
    for place in range(1, len(ids)):
        expected = log_softmax(logits[place - 1])
        assert rows[place]["logprob"] == pytest.approx(expected[ids[place]], abs=1e-3)
        assert rows[place]["rank"] == 1 + int((expected > expected[ids[place]]).sum())
        assert [each["id"] for each in rows[place]["alternatives"]] == np.argsort(-expected)[:3].tolist()
    assert asked(tiny, "/inspect/steps", tokens=ids, top=3)["tokens"] == rows
    last = asked(tiny, "/inspect/alternatives", text=TEXT, top=4)
    assert [each["id"] for each in last["alternatives"]] == np.argsort(-logits[-1])[:4].tolist()


def test_the_inside_is_what_the_functions_say(tiny: Served) -> None:
    backend = tiny.scheduler.backend
    ids = backend.encode(TEXT, bos=True)
    place = temperature.at(backend, ids, 2)
    expected: dict[str, tuple[object, dict[str, Any]]] = {
        "sampler": (temperature.trace(place, Sampling(top_k=7), tokens=[5]), {"position": 2, "top_k": 7, "watch": [5]}),
        "temperature": (
            temperature.grid(place, Sampling(), (0.5, 2.0)),
            {"position": 2, "temperatures": [0.5, 2.0]},
        ),
        "lens": (lens.lens(backend, ids, positions=[0, 2], top=2), {"positions": [0, 2], "top": 2}),
        "attention": (attention.attention(backend, ids, 1), {"layer": 1}),
        "residual": (layers.residual(backend, ids), {}),
        "branches": (branches.grow(backend, ids, branches.Shape(width=2, length=3)), {"width": 2, "length": 3}),
    }
    for topic, (value, body) in expected.items():
        near(asked(tiny, f"/inspect/{topic}", text=TEXT, **body), plain(value), topic)
    near(asked(tiny, "/inspect/neighbours", token=9, top=4), plain(embeddings.neighbours(backend, 9, 4)), "neighbours")
    near(
        asked(tiny, "/inspect/embeddings", texts=["a b", "c"]),
        plain(embeddings.sentences(backend, ["a b", "c"])),
        "texts",
    )
    tokens = asked(tiny, "/inspect/tokens", text=TEXT)["tokens"]
    assert [token["id"] for token in tokens] == backend.encode(TEXT)
    shown = asked(tiny, "/inspect/template", messages=[{"role": "user", "content": "Hi"}])
    prompt = asked(tiny, "/apply-template", messages=[{"role": "user", "content": "Hi"}])
    assert shown["text"] == prompt["prompt"] and len(shown["tokens"]) == prompt["tokens"]


def near(found: Any, expected: Any, at: str) -> None:
    """The same but for rounding."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), at
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for name in expected:
            near(found[name], expected[name], f"{at}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for index, each in enumerate(expected):
            near(found[index], each, f"{at}[{index}]")
    else:
        assert found == expected, at


@pytest.mark.parametrize(
    "topic, body",
    [
        ("steps", {}), ("steps", {"text": ""}), ("steps", {"tokens": [10**6]}), ("steps", {"text": "a " * 5000}),
        ("alternatives", {"text": "a", "position": 9}), ("lens", {"text": "a", "positions": [7]}),
        ("lens", {"text": "a", "watch": [10**6]}), ("lens", {"text": "a " * 400}),
        ("attention", {"text": "a", "layer": 99}), ("neighbours", {"token": 10**6}), ("embeddings", {"texts": [" "]}),
        ("sampler", {"text": "a", "order": ["nonsense"]}), ("sampler", {"text": "a", "watch": [10**6]}),
        ("tokens", {}),
    ],
)  # fmt: skip
def test_what_cannot_be_inspected_is_said(tiny: Served, topic: str, body: dict[str, Any]) -> None:
    assert refused(tiny, f"/inspect/{topic}", **body)["message"]


def test_streams_go_on_beside_an_inspection(tiny: Served) -> None:
    """Both take turns in the engine's thread."""
    body: Any = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 40, "seed": 1}
    with tiny.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as told:
        lines = told.iter_lines()
        next(lines)
        asked(tiny, "/inspect/lens", text=TEXT)
        assert list(lines)[-2] == "data: [DONE]"


# ── the description ──


def test_every_route_is_described_by_what_checks_it(tiny: Served) -> None:
    with tiny.http() as client:
        told = client.get("/openapi.json").json()
    for route in ROUTES:
        operation = told["paths"][route.path.replace(":path", "")][route.method.lower()]
        assert operation["summary"].endswith(".") and operation["tags"] == [route.tag]
        if route.body is not None:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert schema["properties"].keys() == route.body["properties"].keys()
            assert schema.get("required") == route.body.get("required")
    assert sum(len(methods) for methods in told["paths"].values()) == len(ROUTES)


def test_the_description_is_sound() -> None:
    """By the schema of OpenAPI itself, which schemathesis brings."""
    jsonschema = pytest.importorskip("jsonschema_rs")
    with served(Scripted([])) as server:
        made = server.post("/tokenize", content="x")
        assert made.status_code == 200
        from llmkit.server.app import app
        from llmkit.server.security import Policy

        told = document(app(server.models, policy=Policy()))
    for methods in told["paths"].values():
        for operation in methods.values():
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if schema is not None:
                jsonschema.Draft202012Validator(schema)


def test_those_who_wait_for_a_model_do_not_stop_others() -> None:
    slow = Paced(["x" * 900])
    openers = {"busy": lambda: slow, "wanted": lambda: Scripted(["Hello"])}
    with served(openers=openers, most=1, patience=3) as server, server.http() as client:
        body: Any = {"messages": [{"role": "user", "content": "?"}], "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as told:
            lines = told.iter_lines()
            next(lines)
            statuses: list[int] = []

            def wait() -> None:
                statuses.append(server.post("/tokenize", model="wanted", content="x").status_code)

            threads = [Thread(target=wait) for _ in range(40)]
            for thread in threads:
                thread.start()
            time.sleep(0.3)
            began = time.monotonic()
            assert asked(server, "/tokenize", model="busy", content="x") == {"tokens": [ord("x")]}
            assert time.monotonic() - began < 1.5 and not statuses
        for thread in threads:
            thread.join()
    assert set(statuses) <= {200, 503} and len(statuses) == 40


def test_an_embedding_model_makes_vectors_and_no_answers(tmp_path: Path) -> None:
    from test_pooling import bert

    path, _ = bert(tmp_path, 1)
    backend = backends.load(path, n_threads=1)
    with served(backend) as server:
        told, by_ids = (asked(server, "/v1/embeddings", input=each) for each in ("w1 w2 w3", [6, 7, 8]))
        expected = backend.pool([6, 7, 8])
        assert "warning" not in told and told["data"] == by_ids["data"]
        assert np.allclose(told["data"][0]["embedding"], expected / np.linalg.norm(expected), atol=1e-5)
        assert refused(server, "/v1/embeddings", input=[[7] * 49])["code"] == "context_length_exceeded"
        assert "48" in refused(server, "/v1/embeddings", input=[[7] * 48])["message"]
        for path_, body in (
            ("/v1/completions", {"prompt": "w1"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w1"}]}),
            ("/inspect/steps", {"text": "w1"}),
        ):
            assert "vectors" in refused(server, path_, **body)["message"]
