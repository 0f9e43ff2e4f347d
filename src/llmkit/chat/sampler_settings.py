"""What can be set of sampling, one row each, and `Sampling`, which holds the values.

Rows make the options of the command line, the words of /set, the checks and the help: nothing else knows the settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from math import inf, isnan
from pathlib import Path
from typing import Any, Literal

from ..errors import Unsupported, nearest_hint

# llama.cpp: common/common.h, common_params_sampling.samplers; logit bias and grammar come before them
ORDER = (
    "logit_bias", "grammar", "penalties", "dry", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc",
    "temperature",
)  # fmt: skip
# mirostat chooses by itself what to cut: llama.cpp (common/sampling.cpp) leaves all other stages out
WITH_MIROSTAT = ("logit_bias", "grammar", "temperature")

_LARGEST = 1e30  # what is computed with in float32 stays finite

Kind = Literal["number", "count", "text", "names", "words", "biases"]


@dataclass(frozen=True)
class Setting:
    """One setting: a field of Sampling. `least` to `most` are its right values, `off` the one that does nothing."""

    name: str
    kind: Kind
    what: str
    right: str
    off: float | str | tuple[object, ...] | None = None
    least: float = -_LARGEST
    most: float = _LARGEST

    @property
    def option(self) -> str:
        """Its name on the command line, without dashes in front."""
        return self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        """What to write after the option."""
        return {"number": "X", "count": "N", "biases": "ID:BIAS,…", "words": "TEXT,…", "names": "STAGE,…"}.get(
            self.kind, "TEXT"
        )

    def read(self, text: str) -> Any:
        """The value that `text` spells; "off" where that is possible. Raises Unsupported."""
        if text.strip() == "off" and (self.off is not None or self.kind == "text"):
            return self.off
        try:
            return _READERS[self.kind](text)
        except ValueError:
            raise Unsupported(f"{self.option} {text}: expected {self.right}") from None
        except OSError as error:
            raise Unsupported(f"{self.option} {text}: cannot be read: {error.strerror}") from error

    def check(self, value: Any) -> Any:
        """`value`, if it means something. Raises Unsupported with what was expected."""
        if value is None and getattr(Sampling, self.name) is None:
            return value
        wrong = Unsupported(f"{self.option} {value}: expected {self.right}")
        if self.kind in ("number", "count"):
            kinds = (int,) if self.kind == "count" else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or isnan(value):
                raise wrong
            if not self.least <= value <= self.most:
                raise wrong
        elif self.kind == "text" and not isinstance(value, str):
            raise wrong
        return value


def _number(text: str) -> float:
    return float(text)


def _text(text: str) -> str:
    """The text itself, or what a file holds: @FILE."""
    return Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip().replace("-", "_") for name in text.replace(" ", ",").split(",") if name.strip())


def _words(text: str) -> tuple[str, ...]:
    """A JSON list, or words between commas, where \\n and \\t stand for what they say."""
    if text.startswith("["):
        return tuple(json.loads(text))
    return tuple(word.replace("\\n", "\n").replace("\\t", "\t") for word in text.split(",") if word)


def _biases(text: str) -> tuple[tuple[int, float], ...]:
    pairs = (pair.rsplit(":", 1) for pair in text.split(",") if pair.strip())
    return tuple((int(token), float(bias)) for token, bias in pairs)


_READERS: dict[Kind, Callable[[str], object]] = {
    "number": _number, "count": int, "text": _text, "names": _names, "words": _words, "biases": _biases,
}  # fmt: skip

_TINY = 1e-30  # "more than 0" for a row's `least`

SETTINGS = {
    row.name: row
    for row in (
        Setting("temperature", "number", "logits are divided by it; 0 takes the most likely token", "0 or more",
                1.0, 0),
        Setting("top_k", "count", "keep the K most likely tokens", "0 (off) or more", 0, 0),
        Setting("top_p", "number", "keep the fewest tokens whose probabilities reach P together",
                "more than 0, at most 1 (off)", 1.0, _TINY, 1),
        Setting("min_p", "number", "keep tokens at least P times as likely as the most likely one", "0 (off) to 1",
                0.0, 0, 1),
        Setting("typical_p", "number", "keep the tokens whose surprise is nearest to the entropy, up to P together",
                "more than 0, at most 1 (off)", 1.0, _TINY, 1),
        Setting("top_n_sigma", "number", "keep logits within N standard deviations of the highest", "0 (off) or more",
                0.0, 0),
        Setting("xtc_probability", "number", "chance to leave out all but the last of the likely tokens",
                "0 (off) to 1", 0.0, 0, 1),
        Setting("xtc_threshold", "number", "what counts as likely for xtc; above 0.5 xtc is off", "0 to 1", 1.0, 0, 1),
        Setting("dry_multiplier", "number", "strength of the penalty on going on with a repetition",
                "0 (off) or more", 0.0, 0),
        Setting("dry_base", "number", "how fast that penalty grows with the length of the repetition",
                "1 or more", None, 1),
        Setting("dry_allowed_length", "count", "repetitions shorter than this are free", "0 or more tokens", None, 0),
        Setting("dry_last_n", "count", "how many tokens dry looks back over", "-1 (all), 0 (off) or more", 0, -1),
        Setting("dry_breakers", "words", "texts that end a repetition", "texts between commas, or a JSON list", ()),
        Setting("repeat_penalty", "number", "tokens that came before: logits above 0 divided by it, others multiplied",
                "more than 0, 1 is off", 1.0, _TINY),
        Setting("frequency_penalty", "number", "taken off a token's logit for each time it came before",
                "a number, 0 is off", 0.0),
        Setting("presence_penalty", "number", "taken off a token's logit if it came before", "a number, 0 is off", 0.0),
        Setting("repeat_last_n", "count", "how many tokens the three penalties look back over",
                "-1 (all), 0 (off) or more", 0, -1),
        Setting("mirostat", "count", "2: keep the surprise near mirostat_tau, in place of all that cuts",
                "0 (off) or 2", 0, 0, 2),
        Setting("mirostat_tau", "number", "the surprise mirostat aims at, in bits", "more than 0", None, _TINY),
        Setting("mirostat_eta", "number", "how fast mirostat learns", "0 or more", None, 0),
        Setting("logit_bias", "biases", "added to the logits of tokens; -inf forbids one",
                "ID:BIAS pairs between commas", ()),
        Setting("grammar", "text", "what may be said, in GBNF; @FILE reads it from a file", "GBNF with a rule root"),
        Setting("json_schema", "text", "what JSON may be said; @FILE reads it from a file", "a JSON schema"),
        Setting("order", "names", "the stages and their order; those not named are off", "stages between commas"),
        Setting("seed", "count", "the same seed gives the same tokens", "0 or more", None, 0),
        Setting("max_tokens", "count", "an answer's longest", "1 or more", None, 1),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; SETTINGS tells what each value means and where it is off.

    `seed` None draws a fresh one, `max_tokens` None: until the model ends or the context is full. Raises Unsupported
    for values that mean nothing.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_last_n: int = 64
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    json_schema: str | None = None
    order: tuple[str, ...] = ORDER
    seed: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for setting in SETTINGS.values():
            setting.check(getattr(self, setting.name))
        if self.mirostat == 1:
            raise Unsupported("mirostat 1: expected 0 (off) or 2", "Version 2 does the same with less.")
        _check_biases(self.logit_bias)
        _check_breakers(self.dry_breakers)
        _check_order(self.order)
        _check_grammar(self.grammar, self.json_schema)

    def on(self, stage: str) -> bool:
        """Whether that stage can change anything."""
        if stage == "mirostat":
            return self.mirostat == 2
        if stage not in self.order or (self.mirostat and stage not in WITH_MIROSTAT):
            return False
        return _ON[stage](self)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are on, in order."""
        return tuple(stage for stage in (*self.order, "mirostat") if self.on(stage))

    def label(self, stage: str) -> str:
        """A stage with its values, for people: "top-k 40", "xtc off"."""
        name = stage.replace("_", "-")
        return f"{name} {_LABELS[stage](self)}".rstrip() if self.on(stage) else f"{name} off"

    def set(self, name: str, text: str) -> Sampling:
        """With one setting changed, given by its name or option and a text. Raises Unsupported."""
        setting = SETTINGS.get(name.strip().lstrip("-").replace("-", "_"))
        if setting is None:
            raise Unsupported(
                f"unknown setting '{name}'", nearest_hint(name, (row.option for row in SETTINGS.values()))
            )
        return replace(self, **{setting.name: setting.read(text)})

    def to_json(self) -> dict[str, Any]:
        """Every setting, in JSON's types; an infinite bias as text."""
        biases = [[token, bias if abs(bias) < inf else str(bias)] for token, bias in self.logit_bias]
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return values | {"logit_bias": biases}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sampling:
        """What `to_json` gave; settings not named have their defaults. Raises Unsupported."""
        unknown = [name for name in values if name not in SETTINGS]
        if unknown:
            raise Unsupported(f"unknown setting '{unknown[0]}'", nearest_hint(unknown[0], SETTINGS))
        given = dict(values)
        for name in ("dry_breakers", "order", "logit_bias"):
            if name in given:
                given[name] = _tuple(name, given[name])
        return cls(**given)


_ON: dict[str, Callable[[Sampling], bool]] = {
    "logit_bias": lambda s: bool(s.logit_bias),
    "grammar": lambda s: s.grammar is not None or s.json_schema is not None,
    "penalties": lambda s: bool(
        s.repeat_last_n and (s.repeat_penalty != 1 or s.frequency_penalty or s.presence_penalty)
    ),
    "dry": lambda s: bool(s.dry_multiplier and s.dry_last_n),
    "top_n_sigma": lambda s: s.top_n_sigma > 0,
    "top_k": lambda s: s.top_k > 0,
    "typical_p": lambda s: s.typical_p < 1,
    "top_p": lambda s: s.top_p < 1,
    "min_p": lambda s: s.min_p > 0,
    "xtc": lambda s: s.xtc_probability > 0 and s.xtc_threshold <= 0.5,
    "temperature": lambda s: s.temperature != 1,
}
_LABELS: dict[str, Callable[[Sampling], str]] = {
    "logit_bias": lambda s: f"of {len(s.logit_bias)} tokens" if len(s.logit_bias) > 1 else "of 1 token",
    "grammar": lambda s: "" if s.json_schema is None else "from a JSON schema",
    "penalties": lambda s: (
        f"repeat {s.repeat_penalty:g}, frequency {s.frequency_penalty:g}, presence {s.presence_penalty:g},"
        f" last {'all' if s.repeat_last_n < 0 else s.repeat_last_n}"
    ),
    "dry": lambda s: f"{s.dry_multiplier:g}, base {s.dry_base:g}, from {s.dry_allowed_length} tokens",
    "top_n_sigma": lambda s: f"{s.top_n_sigma:g}",
    "top_k": lambda s: f"{s.top_k}",
    "typical_p": lambda s: f"{s.typical_p:g}",
    "top_p": lambda s: f"{s.top_p:g}",
    "min_p": lambda s: f"{s.min_p:g}",
    "xtc": lambda s: f"{s.xtc_probability:g}, threshold {s.xtc_threshold:g}",
    "temperature": lambda s: f"{s.temperature:g}",
    "mirostat": lambda s: f"2, tau {s.mirostat_tau:g}, eta {s.mirostat_eta:g}",
}


def _check_biases(biases: object) -> None:
    right = SETTINGS["logit_bias"].right
    if not isinstance(biases, tuple):
        raise Unsupported(f"logit-bias {biases}: expected {right}")
    for pair in biases:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], int)):
            raise Unsupported(f"logit-bias {pair}: expected {right}")
        token, bias = pair
        if token < 0 or not isinstance(bias, (int, float)) or isnan(bias) or bias > _LARGEST or -inf < bias < -_LARGEST:
            raise Unsupported(f"logit-bias {token}:{bias}: expected a token's id and a number, or -inf to forbid it")


def _check_breakers(breakers: object) -> None:
    if not isinstance(breakers, tuple) or not all(isinstance(each, str) and each for each in breakers):
        raise Unsupported(f"dry-breakers {breakers}: expected {SETTINGS['dry_breakers'].right}, none of them empty")


def _check_order(order: object) -> None:
    if not isinstance(order, tuple):
        raise Unsupported(f"order {order}: expected {SETTINGS['order'].right}")
    for stage in order:
        if stage not in ORDER:
            raise Unsupported(f"unknown sampler '{stage}'", nearest_hint(str(stage), ORDER))
        if order.count(stage) > 1:
            raise Unsupported(f"order: {stage} is named {order.count(stage)} times, expected once")


def _check_grammar(grammar: str | None, schema: str | None) -> None:
    if grammar is not None and schema is not None:
        raise Unsupported("a grammar and a JSON schema are given, expected one of them", "Set the other one to off.")
    if schema is not None:
        try:
            json.loads(schema)
        except ValueError as error:
            raise Unsupported(f"json-schema: not JSON: {error}") from None


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    """A JSON list as Sampling holds it. Raises Unsupported."""
    try:
        if name == "logit_bias":
            return tuple((token, float(bias)) for token, bias in value)
        if isinstance(value, str):
            raise TypeError
        return tuple(value)
    except (TypeError, ValueError):
        raise Unsupported(f"{name} {value}: expected a list") from None
