"""Commands that change what the model is told, how it chooses, and which model it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LlmkitError, Unsupported, nearest_hint
from .. import output, sampling_arguments
from . import completion

if TYPE_CHECKING:
    from ...chat import Sampling
    from ...prompts import Kind
    from .completion import Names
    from .talk import Talk

# what each changes; everything else (seed, order, grammar …) stays
PRESETS: dict[str, dict[str, Any]] = {
    "precise": {"temperature": 0.2, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "xtc_probability": 0.0},
    "balanced": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "xtc_probability": 0.0},
    "creative": {"temperature": 1.2, "top_k": 0, "top_p": 1.0, "min_p": 0.05, "xtc_probability": 0.3},
}
_OPEN: tuple[str, ...] = ("seed", "max_tokens")  # without a value something else decides
_VALUE = 24  # characters of a value in a table
_FILES = ("grammar", "json_schema")


# ── what it is told ──


def system_text(name_or_text: str) -> str:
    """The system prompt of that name, or the text itself. A single word must be a name: raises ModelNotFound."""
    from ... import prompts

    return name_or_text if len(name_or_text.split()) > 1 else prompts.system(name_or_text)


def system(talk: Talk, text: str) -> None:
    """Show or change the system prompt."""
    if text:
        talk.chat.system = None if text == "off" else system_text(text)
        talk.keeper.keep(talk.chat)
    output.emit(output.printable(talk.chat.system or "(no system prompt)"))


def systems(_: Talk, before: list[str], __: str) -> Names:
    """For Tab."""
    from ... import prompts

    return [] if before else [*prompts.system_names(), ("off", "no system prompt")]


def prompts(talk: Talk, text: str) -> None:
    """List system prompts, show one, or use it."""
    from ... import prompts

    name, _, verb = text.partition(" ")
    if verb.strip() not in ("", "use"):
        raise Unsupported(f"/prompts {output.one_line(text, 40)}: expected a name, then nothing or use")
    if verb:
        return system(talk, name)
    if name:
        output.emit(output.printable(prompts.system(name)))
        output.note(f"/prompts {name} use makes it the system prompt.")
        return None
    _show_prompts("system")
    output.emit(f"Your own: {prompts.own_folder() / 'system'}/NAME.md")
    return None


def _show_prompts(kind: Kind) -> None:
    from ... import prompts

    rows = []
    for each in prompts.listing(kind):
        try:
            begins = next(iter(prompts.read_text(each.path).split("\n"))).lstrip("# ")
        except LlmkitError as error:  # the user's own files may be anything
            begins = error.message
        whose = "yours" + ", in place of ours" * each.shadows if each.own else ""
        rows.append((each.name, whose, output.one_line(begins, 80)))
    output.table(("name", "", "it begins"), rows)


def prompt_words(_: Talk, before: list[str], __: str) -> Names:
    """For Tab."""
    from ... import prompts

    return ["use"] if before else prompts.system_names()


# ── how it chooses ──


def set_(talk: Talk, text: str) -> None:
    """Show or change the sampling."""
    from ...chat.sampler_settings import SETTINGS

    name, _, value = text.partition(" ")
    if name:
        take(talk, changed(talk.chat.sampling, name, value.strip()))
    key = name.lstrip("-").replace("-", "_")
    shown = [SETTINGS[key]] if key else list(SETTINGS.values())
    width = None if key else _VALUE
    rows = [(row.option, output.one_line(value_words(talk.chat.sampling, row.name), width), row.what) for row in shown]
    output.table(("setting", "value", "what it does"), rows)


def take(talk: Talk, sampling: Sampling) -> None:
    """Choose with `sampling` from now on. Raises LlmkitError where this model cannot, and nothing changes.

    What of it has no effect is told.
    """
    from ...chat.sampler_settings import ORDER
    from ...chat.sampling import Sampler

    before = talk.chat.sampling
    Sampler(sampling, backend=talk.chat.backend, seed=0).close()  # compiles a grammar, looks up tokens
    if sampling.json_schema and sampling.json_schema != before.json_schema:
        sampling_arguments.tell_unenforced(sampling.json_schema)
    talk.chat.sampling = sampling
    was, now = (replace(each, order=ORDER, mirostat=0) for each in (before, sampling))
    for stage in ORDER:
        if now.on(stage) and now.label(stage) != was.label(stage) and not sampling.on(stage):
            why = "it is not in the order" if stage not in sampling.order else "mirostat takes its place"
            output.note(f"{stage} has no effect: {why} (/samplers).")


def changed(sampling: Sampling, name: str, value: str) -> Sampling:
    """`sampling` with one setting changed, given as words; - is off. Raises Unsupported for names and values."""
    from ...chat.sampler_settings import SETTINGS

    key = name.strip().lstrip("-").replace("-", "_")
    if not value and key in SETTINGS:
        raise Unsupported(f"{name}: the value is missing, expected {SETTINGS[key].right}")
    if key in _OPEN and value in ("off", "-"):
        return replace(sampling, seed=None) if key == "seed" else replace(sampling, max_tokens=None)
    return sampling.set(name, from_file(key, "off" if value == "-" else value))


def from_file(setting: str, value: str) -> str:
    """Where a file is meant (grammars, schemas), as Setting.read wants it: @FILE."""
    return f"@{value}" if setting in _FILES and len(value) < 4096 and _is_file(value) else value


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a text that no path can be
        return False


def value_words(sampling: Sampling, name: str) -> str:
    """The value of a setting, as /set takes it."""
    value = getattr(sampling, name)
    if value is None or value == ():
        return "-"
    if name == "logit_bias":
        return ",".join(f"{token}:{bias:g}" for token, bias in value)
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_words(talk: Talk, before: list[str], _: str) -> Names:
    """For Tab: the settings, then the value it has."""
    from ...chat.sampler_settings import SETTINGS

    if not before:
        return [(row.option, row.what) for row in SETTINGS.values()]
    row = SETTINGS.get(before[0].replace("-", "_"))
    if row is None or len(before) > 1:
        return []
    return [(value_words(talk.chat.sampling, row.name), "as it is"), ("off", row.right)]


def samplers(talk: Talk, text: str) -> None:
    """The samplers in their order, with values; change the order, or take a preset."""
    words = text.split(maxsplit=1)
    if words[:1] == ["order"]:
        take(talk, changed(talk.chat.sampling, "order", words[1] if len(words) > 1 else ""))
    elif words:
        if text not in PRESETS:
            raise Unsupported(f"unknown preset '{output.one_line(text, 40)}'", nearest_hint(text, (*PRESETS, "order")))
        take(talk, replace(talk.chat.sampling, **PRESETS[text]))
    show_samplers(talk.chat.sampling)


def show_samplers(sampling: Sampling) -> None:
    """Logits go through these from top to bottom; then one token is drawn."""
    from ...chat.sampler_settings import ORDER

    output.emit("The model's logits go through")
    number = 0
    for stage in (*sampling.order, *(["mirostat"] if sampling.mirostat else [])):
        number += 1
        on = sampling.on(stage)
        text = f"{number:>3}  {sampling.label(stage)}"
        output.emit(text if on else output.paint(text, colour=244))
    output.emit(f"and one token is drawn, seed {'fresh each time' if sampling.seed is None else sampling.seed}.")
    if left := [stage for stage in ORDER if stage not in sampling.order]:
        output.emit(f"Left out of the order: {', '.join(left)}.")
    output.emit(f"/samplers order A,B,… changes the order, /samplers {'|'.join(PRESETS)} the values.")


def sampler_words(talk: Talk, before: list[str], last: str) -> Names:
    """For Tab: presets, or the stages that are not yet in the list."""
    from ...chat.sampler_settings import ORDER

    return completion.listed(ORDER, last) if before == ["order"] else [] if before else ["order", *PRESETS]


# ── which model ──


def model(talk: Talk, text: str) -> None:
    """Show the model, or go on with another one."""
    if text:
        talk.change_model(text)
    info = talk.chat.backend.info
    first, *rows = [
        ("model", talk.chat.conversation.model or info.name),
        ("name", info.name),
        ("architecture", f"{info.architecture}, {info.n_layer} layers, width {info.n_embd}"),
        ("weights", f"{info.n_params / 1e6:,.0f} M parameters, {output.size(info.weight_nbytes)}"),
        ("vocabulary", f"{info.n_vocab:,} tokens"),
        ("context", f"{talk.chat.total} tokens here, trained on {info.n_ctx_train or 'an unknown number'}"),
        ("template", talk.chat.template.name),
        ("engine", info.engine or "-"),
    ]
    output.table(first, rows)


def model_files(_: Talk, before: list[str], last: str) -> Names:
    """For Tab."""
    return [] if before else completion.files(last, ".gguf")


# ── personas ──


def personas(talk: Talk, name: str) -> None:
    """List personas, or begin anew with one."""
    from ... import prompts

    if not name:
        _show_prompts("personas")
        output.emit(f"Your own: {prompts.own_folder() / 'personas'}/NAME.txt. /personas NAME begins anew with one.")
        return
    talk.begin_persona(name)
    output.note(f"A dialogue with {name} begins.")


def persona_names(_: Talk, before: list[str], __: str) -> Names:
    """For Tab."""
    from ... import prompts

    return [] if before else prompts.persona_names()
