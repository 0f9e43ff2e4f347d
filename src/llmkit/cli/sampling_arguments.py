"""Sampling on the command line: an option for each row of SETTINGS, for every verb that samples."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from ..chat.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser, without: frozenset[str] = frozenset()) -> None:
    """The options, in a group of their own; `without` names fields of Sampling that the verb has other words for."""
    from ..chat.sampler_settings import SETTINGS, Sampling

    group = parser.add_argument_group("sampling")
    defaults = Sampling()
    for setting in SETTINGS.values():
        if setting.name in without:
            continue
        default = getattr(defaults, setting.name)
        said = f", default {default:g}" if setting.kind in ("number", "count") and default is not None else ""
        what = f"{setting.what} ({setting.right}{said})".replace("%", "%%")
        group.add_argument(f"--{setting.option}", metavar=setting.metavar, dest=f"sampling_{setting.name}", help=what)


def sampling(args: argparse.Namespace, start: Sampling | None = None) -> Sampling:
    """What the options say, on top of `start`; what a JSON schema asks in vain is told on stderr.

    Raises Unsupported for values that mean nothing.
    """
    from dataclasses import replace

    from ..chat.sampler_settings import SETTINGS, Sampling

    given = {name: getattr(args, f"sampling_{name}", None) for name in SETTINGS}
    read = {name: SETTINGS[name].read(text) for name, text in given.items() if text is not None}
    if read.get("json_schema"):
        tell_unenforced(read["json_schema"])
    return replace(start or Sampling(), **read)


def given(args: argparse.Namespace) -> list[str]:
    """The options of sampling that were given, as they are written."""
    from ..chat.sampler_settings import SETTINGS

    rows = SETTINGS.values()
    return [f"--{row.option}" for row in rows if getattr(args, f"sampling_{row.name}", None) is not None]


def tell_unenforced(schema: str) -> None:
    """Say on stderr what of a JSON schema its grammar does not enforce. Raises LlmkitError for what is no schema."""
    from .. import engine

    if ignored := engine.unenforced(schema):
        output.note(f"note: the grammar made of this JSON schema does not enforce {', '.join(ignored)}")
