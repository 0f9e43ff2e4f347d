"""llama.cpp, owned here: the only package that imports llama_cpp and knows its C symbols.

    load()               the engine of this process: kernels, dequantizing, log, devices
    run_in_child(…)      a function in a process of its own: a crash of the engine becomes an EngineError
    held_interrupts()    Ctrl-C waits until C code that calls Python has returned
    json_schema_to_gbnf(…)  a grammar for the JSON of a schema; unenforced(…) names what it leaves out
    safe_model_params()  the settings models must be loaded with on this CPU and build (probe.py finds them)

Knows tensors' bytes and addresses, not models or vocabularies: those are backends/.
"""

from __future__ import annotations

from .child import EngineDied, run_in_child
from .interrupts import held_interrupts
from .library import Device, Engine, load, show_log
from .probe import PROBED_TYPES, Verdict, safe_model_params, verdict
from .schema import json_schema_to_gbnf, unenforced

__all__ = [
    "PROBED_TYPES",
    "Device",
    "Engine",
    "EngineDied",
    "Verdict",
    "held_interrupts",
    "json_schema_to_gbnf",
    "load",
    "run_in_child",
    "safe_model_params",
    "show_log",
    "unenforced",
    "verdict",
]
