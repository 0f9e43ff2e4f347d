"""The Hugging Face Hub: find, fetch to the byte, verify, publish.

find(ref) → Path | None           what is whole on this machine, without a request
plan(ref) → DownloadPlan; fetch(plan) → Path
cast(plan) → Shadow               the same folder with true headers and no weights, from kilobytes
Knows nothing of what is in the files, but which of them make a model.
"""

from __future__ import annotations

from .cache import Cache
from .crew import fetch
from .download import DownloadPlan, FileDone, find, plan, reachable
from .shadow import Shadow, cast, outline

__all__ = ["Cache", "DownloadPlan", "FileDone", "Shadow", "cast", "fetch", "find", "outline", "plan", "reachable"]
