"""llmkit downloads language models, makes them smaller, runs them, and shows what happens inside.

    checkpoint folder ─ checkpoint.read ─► Checkpoint ─┐
                                                       ├─ quantize (one pass) ─► .gguf ─ backends.load ─► Backend
                 .gguf ─ gguf.read ─► GgufFile ────────┘                                   │
    cli  ◄─ inspection ◄─ Step, Step, Step … ◄─ chat ◄─ Session.eval ◄─────────────────────┘

Imports go one way, from right to left: doors (cli) → talk (backends, chat, inspection) and steps (convert,
quantize) → engine → files (checkpoint, gguf) → words (errors, progress, quants).
"""

__version__ = "0.1.0"
