"""What llmkit uses of the engine beyond llama-cpp-python's public functions: one table, checked before use.

Struct layouts and non-public functions change between builds, and a wrong one is a crash, not an exception. So
`bind` looks up every name, and `check` builds one tensor and reads a few known values through every struct below.
Layouts: llama.cpp ggml/include/ggml.h (ggml_tensor, ggml_type_traits, ggml_init_params).
"""

from __future__ import annotations

import ctypes as C
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import MissingDependency

SUPPORTED_VERSIONS = ((0, 3, 36), (0, 3, 37))  # of llama-cpp-python: from the first, below the second


@dataclass(frozen=True)
class Symbol:
    """A C function: the library it lives in, its result and its arguments."""

    library: str
    name: str
    result: Any
    arguments: tuple[Any, ...]


class InitParams(C.Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool)]


class TensorHead(C.Structure):
    """The leading fields of ggml_tensor; the others are not relied on. `ne` counts from the innermost dimension."""

    _fields_ = [("type", C.c_int), ("buffer", C.c_void_p), ("ne", C.c_int64 * 4), ("nb", C.c_size_t * 4)]


class TypeTraits(C.Structure):
    """ggml_type_traits: a tensor type's block and its reference conversions."""

    _fields_ = [
        ("name", C.c_char_p),
        ("block", C.c_int64),
        ("block_interleave", C.c_int64),
        ("nbytes", C.c_size_t),
        ("is_quantized", C.c_bool),
        ("to_float", C.c_void_p),
        ("from_float", C.c_void_p),
    ]


# void to_float(const void * blocks, float * weights, int64_t count)
TO_FLOAT = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_int64)

_P, _I, _I64, _SIZE = C.c_void_p, C.c_int, C.c_int64, C.c_size_t
SYMBOLS = (
    # quantizing
    Symbol("ggml-base", "ggml_quantize_chunk", _SIZE, (_I, _P, _P, _I64, _I64, _I64, _P)),
    Symbol("ggml-base", "ggml_quantize_init", None, (_I,)),
    Symbol("ggml-base", "ggml_quantize_requires_imatrix", C.c_bool, (_I,)),
    Symbol("ggml-base", "ggml_row_size", _SIZE, (_I, _I64)),
    Symbol("ggml-base", "ggml_validate_row_data", C.c_bool, (_I, _P, _SIZE)),
    Symbol("ggml-base", "ggml_get_type_traits", C.POINTER(TypeTraits), (_I,)),
    Symbol("ggml-base", "ggml_type_name", C.c_char_p, (_I,)),
    # reading tensors inside cb_eval
    Symbol("ggml-base", "ggml_get_name", C.c_char_p, (_P,)),
    Symbol("ggml-base", "ggml_nbytes", _SIZE, (_P,)),
    Symbol("ggml-base", "ggml_is_contiguous", C.c_bool, (_P,)),
    Symbol("ggml-base", "ggml_backend_tensor_get", None, (_P, _P, _SIZE, _SIZE)),
    # the self-check's own tensor
    Symbol("ggml-base", "ggml_init", _P, (InitParams,)),
    Symbol("ggml-base", "ggml_new_tensor_2d", _P, (_P, _I, _I64, _I64)),
    Symbol("ggml-base", "ggml_set_name", _P, (_P, C.c_char_p)),
    Symbol("ggml-base", "ggml_tensor_overhead", _SIZE, ()),
    Symbol("ggml-base", "ggml_free", None, (_P,)),
    # devices
    Symbol("ggml", "ggml_backend_dev_count", _SIZE, ()),
    Symbol("ggml", "ggml_backend_dev_get", _P, (_SIZE,)),
    Symbol("ggml-base", "ggml_backend_dev_name", C.c_char_p, (_P,)),
    Symbol("ggml-base", "ggml_backend_dev_description", C.c_char_p, (_P,)),
    Symbol("ggml-base", "ggml_backend_dev_type", _I, (_P,)),
    Symbol("ggml-base", "ggml_backend_dev_memory", None, (_P, C.POINTER(_SIZE), C.POINTER(_SIZE))),
)

# Default values the engine puts into its parameter structs; a field read at the wrong place shows another value.
# The last field checked lies near the end of each struct (include/llama.h).
KNOWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_model_default_params": {
        "n_gpu_layers": -1, "load_mode": -1, "vocab_only": False, "use_extra_bufts": True, "no_alloc": False,
    },
    "llama_context_default_params": {
        "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "flash_attn_type": -1, "pooling_type": -1,
        "defrag_thold": -1.0, "type_k": 1, "embeddings": False, "offload_kqv": True, "swa_full": True,
        "kv_unified": False,
    },
    "llama_model_quantize_default_params": {
        "nthread": 0, "ftype": 7, "output_tensor_type": 43, "token_embedding_type": 43, "quantize_output_tensor": True,
        "pure": False, "dry_run": False,
    },
}  # fmt: skip


def check_version(version: str) -> None:
    """Raise MissingDependency unless llmkit was written for this version of llama-cpp-python."""
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED_VERSIONS)
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None or not SUPPORTED_VERSIONS[0] <= tuple(map(int, match.groups())) < SUPPORTED_VERSIONS[1]:
        raise MissingDependency(
            f"llama-cpp-python {version} is installed, llmkit works with {low} or newer, below {high}",
            f'Run: pip install "llama-cpp-python=={low}"',
        )


def bind(libraries: Mapping[str, C.CDLL], version: str) -> dict[str, Any]:
    """Every function of the table by name, with its types set. Raises MissingDependency naming the first one absent."""
    functions: dict[str, Any] = {}
    for symbol in SYMBOLS:
        try:
            function = getattr(libraries[symbol.library], symbol.name)
        except AttributeError:
            raise mismatch(f"{symbol.name} is not in its lib{symbol.library}", version) from None
        function.restype, function.argtypes = symbol.result, list(symbol.arguments)
        functions[symbol.name] = function
    return functions


def check(functions: Mapping[str, Any], llama: Any, version: str) -> None:
    """Read known values through every struct used. Raises MissingDependency with the first that differs."""
    for what, found, expected in _known_values(functions, llama):
        if found != expected:
            raise mismatch(f"{what} is {found!r}, expected {expected!r}", version)


def _known_values(functions: Mapping[str, Any], llama: Any) -> Iterator[tuple[str, Any, Any]]:
    for name, fields in KNOWN_DEFAULTS.items():
        params = getattr(llama, name)()
        for field, value in fields.items():
            yield f"{name}().{field}", getattr(params, field, None), value
    yield "the size of ggml_tensor", functions["ggml_tensor_overhead"](), 368  # 336, and 32 for its list entry
    q4_k = 12
    yield "ggml_type_name(Q4_K)", functions["ggml_type_name"](q4_k), b"q4_K"
    yield "ggml_row_size(Q4_K, 256)", functions["ggml_row_size"](q4_k, 256), 144
    traits = functions["ggml_get_type_traits"](q4_k).contents
    yield "ggml_type_traits.name", traits.name, b"q4_K"
    yield "ggml_type_traits.block", traits.block, 256
    yield "ggml_type_traits.nbytes", traits.nbytes, 144
    yield "ggml_type_traits.is_quantized", traits.is_quantized, True
    yield "whether Q4_K can be dequantized", bool(traits.to_float), True
    yield "ggml_tensor of 5 rows of 3", _sample_tensor(functions), (0, (3, 5, 1, 1), (4, 12, 60, 60), b"sample", 60)


def _sample_tensor(functions: Mapping[str, Any]) -> tuple[Any, ...]:
    """A described tensor, read back: type, ne, nb, name, bytes."""
    context = functions["ggml_init"](InitParams(4 * functions["ggml_tensor_overhead"](), None, True))
    try:
        tensor = functions["ggml_new_tensor_2d"](context, 0, 3, 5)
        functions["ggml_set_name"](tensor, b"sample")
        head = TensorHead.from_address(tensor)
        name, nbytes = functions["ggml_get_name"](tensor), functions["ggml_nbytes"](tensor)
        return head.type, tuple(head.ne), tuple(head.nb), name, nbytes
    finally:
        functions["ggml_free"](context)


def mismatch(what: str, version: str) -> MissingDependency:
    """The error for an engine that is not the one llmkit was written for."""
    known = ".".join(map(str, SUPPORTED_VERSIONS[0]))
    return MissingDependency(
        f"the engine of llama-cpp-python {version} is not one llmkit knows: {what}",
        f'Run: pip install --force-reinstall "llama-cpp-python=={known}"',
    )
