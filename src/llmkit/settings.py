"""Every environment variable llmkit reads, one function each, read when called.

HF_HOME and HF_TOKEN belong to huggingface_hub and are left to it.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Folder for what llmkit keeps between runs (LLMKIT_HOME, else the user's cache folder)."""
    if chosen := os.environ.get("LLMKIT_HOME"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit"


def data() -> Path:
    """Folder for what the user wrote, which is no cache (LLMKIT_HOME, else the user's data folder)."""
    if chosen := os.environ.get("LLMKIT_HOME"):
        return Path(chosen)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "llmkit"


def chats() -> Path:
    """The file that conversations are kept in."""
    return data() / "chats.sqlite"


def hub_address() -> str | None:
    """The Hub's address (HF_ENDPOINT, as huggingface_hub reads it), or None when it is not to be used."""
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(switch, "").upper() in ("1", "ON", "YES", "TRUE"):
            return None
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def debug() -> bool:
    """Whether doors show tracebacks of user errors (LLMKIT_DEBUG=1)."""
    return os.environ.get("LLMKIT_DEBUG", "") not in ("", "0")


def colour_allowed() -> bool:
    """Whether colours may be printed: NO_COLOR (no-color.org) forbids them, and a dumb terminal knows none."""
    return not os.environ.get("NO_COLOR") and not dumb_terminal()


def dumb_terminal() -> bool:
    """Whether the terminal knows no escape sequences (TERM=dumb)."""
    return os.environ.get("TERM") == "dumb"


def threads() -> int:
    """Worker threads when nobody says otherwise: the CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)
