#!/usr/bin/env python3
"""What a model takes in memory, to the byte, before it is made or fetched: `llmkit estimate` and nothing else.

    estimate_memory.py Qwen/Qwen3-8B                            # every bit width
    estimate_memory.py Qwen/Qwen3-8B Q4_K_M --context 32768     # one, part by part
    estimate_memory.py model.gguf --fit 8GB --json

Options are those of `llmkit estimate`: --help lists them. In Python:

    from llmkit import convert
    from llmkit.memory import estimate, setting

    draft = convert.open_draft(folder_or_gguf)
    chosen = estimate.variants(draft, ["Q4_K_M"])
    found = estimate.estimate(draft, chosen, [setting.runtime("llmkit").with_context(8192)])[0][0]
    print(found.needed_nbytes, {part.name: part.nbytes for part in found.parts})
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import llmkit  # noqa: F401  (is it installed?)
except ModuleNotFoundError:  # a checkout will do
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from llmkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["estimate", *sys.argv[1:]]))
