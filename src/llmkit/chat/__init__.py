"""Talking with a model: templates, sampling, and the conversation that ties them to a backend.

Written once for every backend, in numpy. Prints nothing: an answer is an iterator of Steps. What is named here is
imported when it is first used, so that who only needs the settings of the samplers does not wait for numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answer import Alternative, Answer, Dropped, Step, Turn
    from .conversation import Chat
    from .overflow import ContextFull
    from .persona import Persona
    from .record import Conversation
    from .sampler_settings import Sampling
    from .store import Store
    from .templates import Message
    from .tree import Node, Tree

_HOMES = {
    "answer": ("Alternative", "Answer", "Dropped", "Step", "Turn"),
    "conversation": ("Chat",),
    "overflow": ("ContextFull",),
    "persona": ("Persona",),
    "record": ("Conversation",),
    "sampler_settings": ("Sampling",),
    "store": ("Store",),
    "templates": ("Message",),
    "tree": ("Node", "Tree"),
}

__all__ = [
    "Alternative", "Answer", "Chat", "ContextFull", "Conversation", "Dropped", "Message", "Node", "Persona", "Sampling",
    "Step", "Store", "Tree", "Turn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
