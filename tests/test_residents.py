"""server/residents: models by name, loaded and unloaded at run time, never more than allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmkit.backends.scripted import Scripted
from llmkit.chat.sampling import Sampling
from llmkit.errors import InvalidModel, LlmkitError, ModelNotFound
from llmkit.server.jobs import Busy, Closed, Request, collect
from llmkit.server.residents import Models

PATIENCE = 60.0


class Shelf:
    """Openers of scripted models that note who is in memory."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.opened: list[str] = []
        self.present: set[str] = set()
        self.most = 0
        self.changed = threading.Condition()
        self.delay = threading.Event()
        self.delay.set()

    def open(self, name: str) -> Scripted:
        shelf = self

        class Kept(Scripted):
            def close(self) -> None:
                with shelf.changed:
                    shelf.present.discard(name)
                    shelf.changed.notify_all()

        with self.changed:
            self.opened.append(name)
            self.present.add(name)
            self.most = max(self.most, len(self.present))
            self.changed.notify_all()
        assert self.delay.wait(PATIENCE)
        if name == "broken":
            self.present.discard(name)
            raise InvalidModel("broken: is no model")
        return Kept([name])

    def models(self, **options: object) -> Models:
        return Models({name: lambda name=name: self.open(name) for name in self.names}, **options)  # type: ignore


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    yield Shelf("a", "b", "c", "broken")


def answer(models: Models, name: str) -> str:
    with models.get(name) as scheduler:
        prompt = tuple(scheduler.backend.encode("?<assistant>"))
        steps, _ = collect(scheduler.submit(Request(prompt, Sampling(temperature=0))))
        return "".join(step.text for step in steps)


def states(models: Models) -> dict[str, str]:
    return {each.name: each.state for each in models.list()}


def test_models_are_loaded_when_asked_for_and_leave_for_each_other(shelf: Shelf) -> None:
    models = shelf.models(most=2)
    assert models.names == ("a", "b", "c", "broken") and models.default == "a"
    assert set(states(models).values()) == {"unloaded"} and shelf.opened == []
    assert [answer(models, name) for name in ("", "b", "a", "c", "a")] == ["a", "b", "a", "c", "a"]
    assert shelf.opened == ["a", "b", "c"]  # b was unused for longest
    assert shelf.most == 2 and shelf.present == {"a", "c"}
    assert states(models) == {"a": "loaded", "b": "unloaded", "c": "loaded", "broken": "unloaded"}
    (a, *_) = models.list()
    assert a.stats is not None and a.stats.ended == 3 and a.info is not None and a.context == 4 * 4096
    models.close()
    assert shelf.present == set()
    with pytest.raises(Closed):
        models.lease("a")


def test_a_model_in_use_stays(shelf: Shelf) -> None:
    models = shelf.models(most=1, patience=0.05)
    lease = models.lease("a")
    with pytest.raises(Busy, match="a is in use"):
        models.load("b")
    with pytest.raises(Busy, match="in use by 1"):
        models.unload("a")
    lease.release()
    lease.release()
    assert models.list()[0].leases == 0
    models.load("b")
    assert shelf.present == {"b"}
    assert models.unload("b") and not models.unload("b")
    assert shelf.present == set()
    models.close()


def test_who_waits_gets_the_place_that_becomes_free(shelf: Shelf) -> None:
    models = shelf.models(most=1, patience=PATIENCE)
    lease = models.lease("a")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answer, models, "b")
        while models.list()[1].leases == 0:
            pass
        lease.release()
        assert waiting.result(PATIENCE) == "b"
    assert shelf.most == 1
    models.close()


def test_many_who_ask_at_once_load_it_once(shelf: Shelf) -> None:
    models = shelf.models(most=2)
    shelf.delay.clear()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(answer, models, name) for name in "abababab"]
        with shelf.changed:
            assert shelf.changed.wait_for(lambda: len(shelf.opened) == 2, PATIENCE)
        shelf.delay.set()
        assert [each.result(PATIENCE) for each in answers] == list("abababab")
    assert sorted(shelf.opened) == ["a", "b"]
    models.close()


def test_many_models_in_few_places(shelf: Shelf) -> None:
    models = shelf.models(most=2)
    names = "abcacbbacabcbacabcab"
    with ThreadPoolExecutor(6) as pool:
        assert "".join(pool.map(lambda name: answer(models, name), names)) == names
    assert shelf.most <= 2
    models.close()


def test_what_cannot_be_loaded_is_told_and_can_be_tried_again(shelf: Shelf) -> None:
    models = shelf.models()
    for _ in range(2):
        with pytest.raises(InvalidModel):
            models.load("broken")
    assert states(models)["broken"] == "unloaded" and shelf.opened == ["broken"] * 2
    with pytest.raises(ModelNotFound) as raised:
        models.lease("brken")
    assert raised.value.hint == "Nearest: broken."
    with pytest.raises(LlmkitError, match="already"):
        models.add("a", lambda: shelf.open("a"))
    models.add("d", lambda: shelf.open("d"))
    assert answer(models, "d") == "d"
    models.close()


def test_an_idle_model_is_unloaded(shelf: Shelf) -> None:
    models = shelf.models(idle=0.05)
    lease = models.lease("a")
    with shelf.changed:
        assert not shelf.changed.wait_for(lambda: not shelf.present, 0.3)  # in use
    lease.release()
    with shelf.changed:
        assert shelf.changed.wait_for(lambda: not shelf.present, PATIENCE)
    assert answer(models, "a") == "a"
    models.close()
