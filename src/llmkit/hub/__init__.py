"""The Hugging Face Hub: is it there, and fetch a checkpoint folder. What huggingface_hub does well is left to it.

Owner of huggingface_hub. Knows nothing of what is in the files.
"""

from __future__ import annotations

import socket
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from . import settings
from .errors import LlmkitError, MissingDependency

_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "README.md", "LICENSE*"]


def reachable(seconds: float = 3.0) -> bool:
    """Whether the Hub (HF_ENDPOINT, else the public one) accepts connections within `seconds`."""
    endpoint = settings.hub_address()
    if endpoint is None:
        return False
    try:
        address = urlsplit(endpoint)
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), seconds):
            return True
    except (OSError, ValueError):  # nobody there, or no address at all
        return False


def fetch_checkpoint(repo: str, folder: Path) -> Path:
    """Fetch config, tokenizer and safetensors of `repo` into `folder`. Raises LlmkitError, MissingDependency."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        http_error = import_module("huggingface_hub.utils").httpx.HTTPError  # httpx or httpx2, whichever it uses
    except ImportError as error:
        raise MissingDependency(
            f"huggingface_hub cannot be imported: {error}", "pip install huggingface_hub"
        ) from error
    try:
        snapshot_download(repo, local_dir=folder, allow_patterns=_WANTED)
    except (HfHubHTTPError, LocalEntryNotFoundError, http_error, OSError) as error:
        raise LlmkitError(f"{repo}: could not be fetched from the Hub: {error}") from error
    return folder
