"""engine/: kernels against gguf's own decoders, the children's deaths, the probe's memory."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmkit import engine
from llmkit.engine import library, probe, symbols
from llmkit.errors import EngineError, InvalidModel, MissingDependency, Unsupported
from llmkit.quants import TENSOR_TYPES, TensorType

# ── functions that run in children ──


def echo(**arguments: object) -> object:
    """What came in goes out; prints must not disturb the answer."""
    print("a line on stdout")
    ctypes.CDLL(None).puts(b"a line from C")
    return arguments


def die_of(number: int) -> None:
    """Die as a crashing engine does, after some last words in the log."""
    os.write(2, b"last words of the engine\n")
    os.kill(os.getpid(), number)


def sleep_long() -> None:
    """Outlive any timeout; leave the process id where the test finds it."""
    Path(os.environ["LLMKIT_TEST_PID"]).write_text(str(os.getpid()))
    time.sleep(60)


def refuse() -> None:
    """Raise an error of ours."""
    raise InvalidModel("x.gguf: broken", "Mend it.")


def in_child(name: str, arguments: dict[str, object] | None = None, timeout: float = 30.0) -> object:
    return engine.run_in_child(function=f"{__name__}:{name}", arguments=arguments or {}, timeout=timeout)


# ── loading and the table ──


def test_engine_is_loaded_once_and_is_of_a_supported_version() -> None:
    assert engine.load() is engine.load()
    symbols.check_version(engine.load().version)


@pytest.mark.parametrize("version", ["0.3.35", "0.3.37", "1.0.0", "nonsense"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(MissingDependency, match="0.3.36 or newer, below 0.3.37") as caught:
        symbols.check_version(version)
    assert "pip install" in (caught.value.hint or "")


def test_a_missing_symbol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = symbols.Symbol("ggml-base", "ggml_no_such_function", None, ())
    monkeypatch.setattr(symbols, "SYMBOLS", (*symbols.SYMBOLS, row))
    with pytest.raises(MissingDependency, match=r"0\.3\.36.*ggml_no_such_function"):
        symbols.bind(engine.load().libraries, "0.3.36")


@pytest.mark.parametrize(
    ("struct", "field"), [("llama_context_default_params", "swa_full"), ("llama_model_default_params", "vocab_only")]
)
def test_a_moved_field_is_noticed(monkeypatch: pytest.MonkeyPatch, struct: str, field: str) -> None:
    loaded = engine.load()
    wrong = not symbols.KNOWN_DEFAULTS[struct][field]
    monkeypatch.setitem(symbols.KNOWN_DEFAULTS[struct], field, wrong)
    with pytest.raises(MissingDependency, match=field):
        symbols.check(loaded.functions, loaded.llama, loaded.version)


def test_a_tensor_of_another_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = [("type", ctypes.c_int), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4)]

    monkeypatch.setattr(symbols, "TensorHead", Shifted)
    loaded = engine.load()
    with pytest.raises(MissingDependency, match="ggml_tensor of 5 rows"):
        symbols.check(loaded.functions, loaded.llama, loaded.version)


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="libggml-base"):
        library.library_path(tmp_path, "ggml-base")


def test_an_absent_llama_cpp_is_a_sentence_not_a_traceback(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from llmkit import engine, errors\n"
        "try: engine.load()\n"
        "except errors.MissingDependency as error: print(error.message, '|', error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env_with_path())
    assert "not installed" in done.stdout and "pip install" in done.stdout, done


def _env_with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


# ── kernels ──


@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=lambda kind: kind.name)
def test_our_table_of_types_is_the_engines(kind: TensorType) -> None:
    loaded = engine.load()
    assert loaded.row_size(kind.ggml_id, kind.block * 3) == kind.nbytes * 3
    assert loaded.functions["ggml_type_name"](kind.ggml_id).decode().upper() == kind.name.upper()


@pytest.mark.parametrize(
    "name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_S"]
)
def test_to_float_equals_ggufs_own_decoder(name: str) -> None:
    loaded, kind = engine.load(), TENSOR_TYPES[name]
    weights = np.random.default_rng(7).normal(0, 0.3, (6, 512)).astype(np.float32)
    blocks = np.empty((6, kind.row_nbytes(512)), np.uint8)
    written = loaded.quantize_chunk(kind.ggml_id, weights.ctypes.data, blocks.ctypes.data, 0, 6, 512)
    assert written == blocks.nbytes
    found = np.empty_like(weights)
    loaded.to_float(kind.ggml_id, blocks.ctypes.data, found.ctypes.data, weights.size)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.ggml_id)).reshape(weights.shape)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert np.abs(found - weights).mean() < 0.15 * np.abs(weights).mean() or kind.bits_per_weight < 4


def test_integers_have_no_floats() -> None:
    with pytest.raises(Unsupported, match="i32"):
        engine.load().to_float(26, 0, 0, 1)


def test_rows_with_a_nan_scale_are_not_valid() -> None:
    loaded, kind = engine.load(), TENSOR_TYPES["Q8_0"]
    weights, block = np.ones(32, np.float32), np.empty(34, np.uint8)
    loaded.quantize_chunk(kind.ggml_id, weights.ctypes.data, block.ctypes.data, 0, 1, 32)
    assert loaded.validate_rows(kind.ggml_id, block.ctypes.data, 34)
    block[:2] = np.array([np.nan], np.float16).view(np.uint8)
    assert not loaded.validate_rows(kind.ggml_id, block.ctypes.data, 34)


def test_quantizing_releases_the_interpreter() -> None:
    loaded, kind = engine.load(), TENSOR_TYPES["Q4_K"]
    weights = np.random.default_rng(1).normal(size=(256, 4096)).astype(np.float32)
    blocks = np.empty((256, kind.row_nbytes(4096)), np.uint8)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    loaded.quantize_chunk(kind.ggml_id, weights.ctypes.data, blocks.ctypes.data, 0, 256, 4096)
    stop.set()
    thread.join()
    assert ticks[0] > 2


# ── log ──


def test_the_engines_log_is_captured_and_the_terminal_stays_clean(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = engine.load()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with loaded.capture_log() as lines:
        assert not loaded.llama.llama_model_load_from_file(str(bad).encode(), loaded.llama.llama_model_default_params())
    assert any("bad.gguf" in line or "fail" in line.lower() for line in lines), lines
    before = len(lines)
    loaded.llama.llama_model_load_from_file(str(bad).encode(), loaded.llama.llama_model_default_params())
    assert len(lines) == before
    assert "\n    engine: " in loaded.error("cannot load", lines).message
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_log_lines_are_put_together_from_pieces() -> None:
    log = library.Log()
    for piece in (b"one ", b"two\nth", b"", b"ree\n\n", b"four"):
        log.write(1, piece, None)
    assert list(log.recent) == ["one two", "three"]
    log.flush()
    assert list(log.recent)[-1] == "four"


def test_telling_lines_go_into_errors() -> None:
    assert library.quoted([]) == ""
    assert library.quoted(["a", "error: b", "c"]) == "\n    engine: error: b"


# ── children ──


def test_arguments_and_results_pass_and_prints_do_not_disturb() -> None:
    sent: dict[str, object] = {"text": "é\n", "numbers": [1, 2.5, None], "nested": {"a": True}}
    assert in_child("echo", sent) == sent


def test_our_errors_come_back_as_themselves() -> None:
    with pytest.raises(InvalidModel, match=r"x\.gguf: broken") as caught:
        in_child("refuse")
    assert caught.value.hint == "Mend it."


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGILL", "SIGABRT", "SIGKILL"])
def test_a_death_names_the_signal_and_the_last_words(name: str) -> None:
    with pytest.raises(EngineError, match=name) as caught:
        in_child("die_of", {"number": int(getattr(signal, name))})
    assert "last words of the engine" in caught.value.message


def test_other_failures_name_the_exception() -> None:
    with pytest.raises(EngineError, match="TypeError"):
        in_child("die_of", {"no_such_argument": 1})


def test_the_engines_own_last_words_are_kept(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match="engine: .*bad.gguf") as caught:
        engine.run_in_child(
            function="llmkit.engine.probe:evaluate", arguments={"path": str(bad), "model_params": {}}, timeout=30
        )
    assert "cannot load" in caught.value.message


def test_a_timeout_kills_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("LLMKIT_TEST_PID", str(pid_file))
    with pytest.raises(EngineError, match="no answer after 4 seconds"):
        in_child("sleep_long", timeout=4)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_ctrl_c_kills_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("LLMKIT_TEST_PID", str(pid_file))

    def interrupt() -> None:
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        in_child("sleep_long")
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


# ── probe ──


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path))
    probe.verdict.cache_clear()
    yield tmp_path
    probe.verdict.cache_clear()


def test_the_probe_runs_the_engine_and_remembers(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine.verdict()
    assert found.settings in ({}, {"use_extra_bufts": False})
    (file,) = (fresh_home / "engine").iterdir()
    assert json.loads(file.read_text())["build"] == engine.load().build
    probe.verdict.cache_clear()
    monkeypatch.setattr(probe, "_probe", lambda *_: pytest.fail("probed again"))
    assert engine.verdict() == found
    assert engine.safe_model_params() == dict(found.settings)


WRONG_SETTINGS = b'{"build": "x", "cpu": "y", "settings": {"n_gpu_layers": 9}}'


@pytest.mark.parametrize("rubbish", [b"", b"{", b"[1]", WRONG_SETTINGS, b'{"other": 1}'])
def test_a_broken_memory_is_written_again(fresh_home: Path, rubbish: bytes) -> None:
    engine.verdict()
    (file,) = (fresh_home / "engine").iterdir()
    whole = file.read_bytes()
    file.write_bytes(rubbish)
    probe.verdict.cache_clear()
    engine.verdict()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert json.loads(file.read_bytes()) == json.loads(whole)


def test_another_cpu_is_another_verdict(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.verdict()
    monkeypatch.setattr(probe, "cpu_features", lambda: "another cpu")
    probe.verdict.cache_clear()
    engine.verdict()
    assert len(list((fresh_home / "engine").iterdir())) == 2


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "file"))
    probe.verdict.cache_clear()
    assert engine.verdict().build == engine.load().build
    probe.verdict.cache_clear()


def crash_unless_safe(path: str, model_params: dict[str, bool]) -> float:
    """As the engine on a CPU with AMX: dies with the usual settings."""
    if model_params:
        return probe.evaluate(path, model_params)
    os.kill(os.getpid(), signal.SIGILL)
    return 0.0


def always_crash(path: str, model_params: dict[str, bool]) -> float:
    """As a build for another CPU."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0.0


def killed_unless_safe(path: str, model_params: dict[str, bool]) -> float:
    """As when memory ran out: that says nothing of the CPU."""
    if not model_params:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def refused_unless_safe(path: str, model_params: dict[str, bool]) -> float:
    """As when the engine finds no memory."""
    if not model_params:
        raise EngineError("the engine cannot make a context for the probe's model")
    return 1.0


def _probe_with(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the real probe run a child that really dies."""

    def run(function: str, arguments: dict[str, object], timeout: float) -> object:
        return engine.run_in_child(function=f"{__name__}:{name}", arguments=arguments, timeout=timeout)

    monkeypatch.setattr(probe, "run_in_child", run)


def test_a_crash_with_the_usual_settings_leads_to_the_safe_ones(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _probe_with(monkeypatch, "crash_unless_safe")
    assert engine.safe_model_params() == {"use_extra_bufts": False}
    assert not engine.verdict().full_speed
    assert "SIGILL" in engine.verdict().found
    assert [path.suffix for path in (fresh_home / "engine").iterdir()] == [".json"]


@pytest.mark.parametrize("name", ["killed_unless_safe", "refused_unless_safe"])
def test_what_may_not_come_again_is_not_remembered(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _probe_with(monkeypatch, name)
    assert engine.safe_model_params() == {"use_extra_bufts": False}
    assert not (fresh_home / "engine").exists()


def test_when_nothing_works_the_rebuild_command_is_given(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _probe_with(monkeypatch, "always_crash")
    with pytest.raises(EngineError, match="SIGSEGV") as caught:
        engine.verdict()
    assert "GGML_NATIVE=OFF" in (caught.value.hint or "")


# ── what doctor asks ──


def test_the_machine_is_described() -> None:
    loaded = engine.load()
    assert loaded.system_info()
    assert isinstance(loaded.gpu_offload(), bool)
    assert any(device.kind == "cpu" and device.total_nbytes > 1 << 28 for device in loaded.devices())
