"""Talking with a model: templates, sampling, and the conversation that ties them to a backend.

Written once for every backend, in numpy. Prints nothing: an answer is an iterator of Steps.
"""

from __future__ import annotations

from .conversation import Alternative, Chat, Step, Turn
from .sampling import Sampling
from .templates import Message

__all__ = ["Alternative", "Chat", "Message", "Sampling", "Step", "Turn"]
