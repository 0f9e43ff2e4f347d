"""The model card: README.md of a repository, with our part between two comment lines and the user's text around it.

Our part is written anew at each upload; rows of quants sent earlier are kept while their files are still there. Each
row stands there twice: for people in the table, and as JSON in a comment, from which it is read back.
Nothing that comes from a file can break out of its cell, its code, its comment or its YAML value.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .. import __version__
from ..errors import LlmkitError
from .release import Part, Release, Row

BEGIN, END = "<!-- llmkit:begin -->", "<!-- llmkit:end -->"
_ROW = re.compile(r"^<!-- llmkit:row (\{.*\}) -->\s*$", re.MULTILINE)
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"""^["']?([A-Za-z_][\w-]*)["']?[ \t]*:""", re.MULTILINE)
_PLAIN = re.compile(r"[\w.+/@:=-]+(?: [\w.+/@:=-]+)*", re.ASCII)
_WORDS = {"gguf", "llmkit", "quantized", "other", "text-generation", "feature-extraction"}  # YAML needs no quotes here
_USUAL_BITS = 4.85  # of Q4_K_M, the usual choice
_HUB = "https://huggingface.co"  # links of a card are for readers of the Hub, whatever HF_ENDPOINT was at upload


# ── the whole card ──


def compose(
    release: Release, rows: Sequence[Row], *, name: str, existing: str = "", remote: Mapping[str, str] | None = None
) -> str:
    """README.md for repository `name`: `existing` with our part and the missing keys of its front matter.

    `remote` maps the files of the repository to their sha256: rows of earlier uploads stay while theirs are there.
    Raises LlmkitError when the marks in `existing` are out of order, or its rows are of another model.
    """
    before, after = _around(existing, name)
    kept = [row for row in kept_rows(existing, remote or {}) if not _replaced(row, rows)]
    _refuse_strangers(kept, rows, name)
    everything = sorted([*rows, *kept], key=lambda row: (row.bits_per_weight, row.parts[0].name))
    part = _part(release, everything, name)
    newline = "\r\n" if "\r\n" in existing else "\n"
    ours = f"{BEGIN}\n{part}\n{END}".replace("\n", newline)
    if not existing.strip():
        before = f"# {text(release.get('general.name') or name.partition('/')[2])} GGUF\n\n"
    return _with_front_matter(before + ours + (after or newline), front_matter(release), newline)


def _around(existing: str, name: str) -> tuple[str, str]:
    """The user's text before and after our part."""
    if BEGIN not in existing and END not in existing:
        newline = "\r\n" if "\r\n" in existing else "\n"
        ends = sum(existing.endswith(newline * count) for count in (1, 2))
        return existing + newline * (2 - ends if existing else 0), ""
    before, begin, rest = existing.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise LlmkitError(
            f"{name}: README.md has not one {BEGIN} followed by one {END}, so it is not clear what may be replaced",
            "Put the two lines right, or take both out, and run it again.",
        )
    return before, after


def kept_rows(existing: str, remote: Mapping[str, str]) -> list[Row]:
    """The rows in our part of `existing` whose files are all in the repository still, with the same bytes."""
    ours = existing.partition(BEGIN)[2].partition(END)[0]
    rows = (_row_of(found[1]) for found in _ROW.finditer(ours))
    return [row for row in rows if row and all(remote.get(part.name) == part.sha256 for part in row.parts)]


def _replaced(row: Row, new: Iterable[Row]) -> bool:
    names = {part.name for each in new for part in each.parts}
    return any(part.name in names for part in row.parts)


def _refuse_strangers(kept: Sequence[Row], new: Sequence[Row], name: str) -> None:
    """Raise LlmkitError when the repository's table is of another model than the new files."""
    for old in kept:
        for what in ("architecture", "base_model"):
            theirs, ours = getattr(old, what), getattr(new[0], what)
            if theirs and ours and theirs != ours:
                raise LlmkitError(
                    f"{name}: holds quants of another model: the {what.replace('_', ' ')} of {old.parts[0].name} is"
                    f" {theirs}, that of {new[0].parts[0].name} is {ours}",
                    "Upload to a repository of its own.",
                )


def _row_of(line: str) -> Row | None:
    """The row in a comment, or None when it is none of ours."""
    try:
        found = json.loads(line)
        parts = tuple(Part(_is(str, p["name"]), _is(int, p["nbytes"]), _is(str, p["sha256"])) for p in found["parts"])
        row = Row(
            label=_is(str, found["label"]),
            parts=parts,
            n_weights=_is(int, found["n_weights"]),
            tensor_nbytes=_is(int, found["tensor_nbytes"]),
            types={_is(str, kind): _is(int, count) for kind, count in found["types"].items()},
            quality={_is(str, key): _is(str, value) for key, value in found["quality"].items()},
            **{key: _is(str, found[key]) if found[key] is not None else None for key in _OPTIONAL},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return row if row.parts and row.n_weights > 0 else None


_OPTIONAL = tuple(each.name for each in dataclasses.fields(Row) if each.default is None)


def _is(kind: Callable[..., Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


# ── our part ──


def _part(release: Release, rows: Sequence[Row], name: str) -> str:
    sections = [_intro(release), _table(rows), _use(rows, name), _made(rows), _checksums(rows)]
    comments = "\n".join(f"<!-- llmkit:row {_comment(row)} -->" for row in rows)
    return "\n\n".join([*sections, comments])


def _intro(release: Release) -> str:
    base, source = release.base_model, release.get("llmkit.source.name")
    if base:
        revision = release.get("llmkit.source.revision")
        of = f"[{text(base)}]({_HUB}/{base})" + (f" at {code(revision)}" if revision else "")
    else:
        of = f"{text(source)}, whose repository the files do not name" if source else "a model they do not name"
    licence = release.get("general.license")
    terms = f"Licence, carried over from the original: {text(licence)}." if licence else "The files name no licence."
    return (
        f"GGUF files of {of}.\n{terms}\n\n"
        f"This part was written by `llmkit upload` ({__version__}) and is replaced by the next one;"
        " text around it stays."
    )


def _table(rows: Sequence[Row]) -> str:
    lines = ["| Quant | File | Size | Bits per weight | Tensors by type | Quality |", "|---|---|---:|---:|---|---|"]
    for row in rows:
        more = f" and {len(row.parts) - 1} more parts" if len(row.parts) > 1 else ""
        types = ", ".join(f"{count} {text(kind)}" for kind, count in row.types.items())
        quality = ", ".join(f"{text(key)} {text(value)}" for key, value in row.quality.items()) or "not measured"
        bits = f"{float(row.bits_per_weight):.2f}"
        cells = (text(row.label), code(row.parts[0].name) + more, size(row.nbytes), bits, types, quality)
        lines.append(f"| {' | '.join(cells)} |")
    how = (
        "Measured on these files: the size on disk; the bits per weight, as 8 times the bytes of all tensors over all"
        " weights; the number of tensors of each type."
    )
    if any(row.quality for row in rows):
        how += (
            " Quality: as the file itself states it (`llmkit.quality.*`); where it says nothing, it was not measured."
        )
    else:
        how += " Quality was not measured: nothing here says how much a quant loses."
    return "## Quants\n\n" + "\n".join(lines) + f"\n\n{how}"


def _use(rows: Sequence[Row], name: str) -> str:
    row = min(rows, key=lambda row: (row.tag != "Q4_K_M", abs(float(row.bits_per_weight) - _USUAL_BITS)))
    file = row.parts[0].name
    alone = row.tag and sum(each.tag == row.tag for each in rows) == 1  # else the tag does not say which
    tag = row.tag if alone else file
    where = f"-hf {name}:{tag}" if alone else f"--hf-repo {name} --hf-file {_quoted(file)}"
    llmkit = f"llmkit chat {name}:{tag}" if alone else f"llmkit download {name} --include {_quoted(file)}"
    lines = [
        ("llama.cpp", f"llama-cli {where}\nllama-server {where}"),
        ("Ollama", f"ollama run {_quoted(f'hf.co/{name}:{tag}')}"),
        ("LM Studio", f"lms get {_quoted(f'{_HUB}/{name}' + (f'@{tag}' if alone else ''))}"),
        ("llmkit", llmkit),
    ]
    if len(row.parts) > 1:
        del lines[1]  # Ollama takes no split files
    return "## Use\n\n" + "\n\n".join(f"{program}:\n\n{fenced(command)}" for program, command in lines)


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


def _made(rows: Sequence[Row]) -> str:
    found = ["## How each was made"]
    for row in rows:
        version = f" (llmkit {text(row.version)})" if row.version else ""
        lines = [f"{text(row.label)}, {code(row.parts[0].name)}{version}:"]
        if row.command:
            lines.append(fenced(row.command))
        elif row.recipe:
            lines.append(f"by the recipe {code(row.recipe)}; the file says too little for a whole command.")
        else:
            lines.append("the file does not say.")
        lines += [line for line in (_about_imatrix(row), _about_parts(row)) if line]
        found.append("\n\n".join(lines))
    for source in dict.fromkeys(row.source for row in rows if row.command and row.source and not row.base_model):
        found.append(f"{code(source)} stands for the checkpoint folder or GGUF of that name they were made from.")
    return "\n\n".join(found)


def _about_imatrix(row: Row) -> str | None:
    if not row.imatrix_fingerprint:
        return None
    what = f"The importance matrix {code(row.imatrix)} is needed" if row.imatrix else "An importance matrix is needed"
    return f"{what}; its values have the fingerprint {code(row.imatrix_fingerprint)}."


def _about_parts(row: Row) -> str | None:
    return f"It was written in {len(row.parts)} parts, with `--split-size`." if len(row.parts) > 1 else None


def _checksums(rows: Sequence[Row]) -> str:
    lines = (f"{part.sha256}  {part.nbytes}  {part.name}" for row in rows for part in row.parts)
    return "## Checksums\n\nsha256, bytes and name of each file.\n\n" + fenced("\n".join(lines), "text")


def size(nbytes: int) -> str:
    """Bytes as files are sold: MB and GB are powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


# ── front matter ──


def front_matter(release: Release) -> tuple[dict[str, str], ...]:
    """YAML lines by key, in groups: a group is written whole, or not at all where its first key is there already."""
    licence, link = release.get("general.license"), release.get("general.license.link") or ""
    named = licence and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence.lower())
    other = release.get("general.license.name") or (None if named else licence)
    groups: list[dict[str, Any]] = [
        {"base_model": release.base_model, "base_model_relation": "quantized" if release.base_model else None},
        {
            "license": (licence.lower() if named else "other") if licence else None,
            "license_name": re.sub(r"[^a-z0-9.]+", "-", other.lower()).strip("-.") if other else None,
            "license_link": link if re.fullmatch(r"https?://[!-~]+|[A-Za-z0-9_.-]+", link) else None,
        },
        {"language": list(release.languages)},
        {"library_name": "gguf"},
        {"pipeline_tag": "feature-extraction" if release.embeds else "text-generation"},
        {"tags": ["gguf", "llmkit"]},
        {"quantized_by": "llmkit"},
    ]
    return tuple({key: _yaml(value) for key, value in group.items() if value} for group in groups)


def _yaml(value: str | list[str]) -> str:
    if isinstance(value, list):
        return "".join(f"\n-{_yaml(item)}" for item in value)
    return f" {value}" if value in _WORDS else f" {json.dumps(value)}"


def _with_front_matter(card: str, groups: Iterable[Mapping[str, str]], newline: str) -> str:
    """`card` with the keys its YAML block lacks; what is there stays as it is."""
    block = _FRONT.match(card)
    there = set(_KEY.findall(block[1])) if block else set()
    if block and block[1].strip() and not there:
        return card  # a mapping written in another way: leave it alone
    missing = [group for group in groups if group and next(iter(group)) not in there]
    lines = [f"{key}:{value}" for group in missing for key, value in group.items() if key not in there]
    added = "".join(f"{line}\n" for line in lines).replace("\n", newline)
    if block:
        return card[: block.end(1)] + added + card[block.end(1) :]
    return f"---{newline}{added}---{newline}{newline}{card}" if added else card


# ── text that cannot break out ──


def _clean(value: str) -> str:
    """`value` as text that can be written as UTF-8: bytes that were none become question marks."""
    return value.encode("utf-8", "replace").decode()


def text(value: str) -> str:
    """`value` as plain words in Markdown, on one line: whatever could be markup is an entity."""
    flat = " ".join(_clean(value).split())
    return re.sub(r"[^\w .,/+()=%-]|(?<![^\W_])_|_(?![^\W_])", lambda char: f"&#{ord(char[0])};", flat)


def code(value: str) -> str:
    """`value` as code in a line of Markdown."""
    return f"`{value}`" if _PLAIN.fullmatch(value) else f"<code>{text(value)}</code>"


def fenced(value: str, language: str = "sh") -> str:
    """`value` as a block of code; one that could end the block, or our part, is written in HTML."""
    value = "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in _clean(value))
    if "```" in value or "<!--" in value:
        lines = (re.sub(r"\S+", lambda word: text(word[0]), line) for line in value.split("\n"))
        return f"<pre><code>{'&#10;'.join(lines)}</code></pre>"
    return f"```{language}\n{value}\n```"


def _comment(row: Row) -> str:
    """JSON for an HTML comment: it holds neither `<`, `>` nor two hyphens in a row."""
    found = json.dumps(dataclasses.asdict(row))
    return re.sub("[<>-]", lambda char: f"\\u{ord(char[0]):04x}", found)
