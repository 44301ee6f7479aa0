"""A typed function as a command: its signature is the options, its docstring the help."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser

__all__ = ["run_function", "spell_out"]

_SOURCE = "source"
_SOURCE_HELP = "What the command is about, instead of an option that names it."


def run_function(function: Callable[..., None], program: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of a function, from the command line and YAML, and call it.

    Raises:
        argparse.ArgumentError: for an unknown, missing or mistyped argument.
        Exception: whatever the function raises.
    """
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    parser = ArgumentParser(
        prog=program, description=summary, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="Read these options from a YAML file.")
    hints = get_type_hints(function)
    bare = _takes_bare_source(function)
    if bare:
        parser.add_argument(_SOURCE, nargs="?", type=hints[_SOURCE], help=_SOURCE_HELP)
    parser.add_function_arguments(function, skip={_SOURCE} if bare else None)
    parsed = parser.parse_args(spell_out(arguments, hints))
    values = vars(parser.instantiate(parsed))
    function(**{name: value for name, value in values.items() if name != "config"})


def _takes_bare_source(function: Callable[..., None]) -> bool:
    """Whether the source may be left out, and so needs no option in front where it is given."""
    source = inspect.signature(function).parameters.get(_SOURCE)
    return source is not None and source.default is None


def spell_out(arguments: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Complete ``--flag`` to ``--flag true``, and ``--list 1 2`` to ``--list [1,2]``.

    Args:
        arguments: As typed.
        hints: Type hint by option; those of a bool are flags.
    """
    spelled: list[str] = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        spelled.append(option)
        hint = hints.get(option.removeprefix("--")) if option.startswith("--") else None
        if hint is None:
            continue
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if hint is bool and not values:
            values = ["true"]
        elif _takes_list(hint) and values and not values[0].startswith("["):
            values = [f"[{','.join(values)}]"]
        spelled += values
    return spelled


def _takes_list(hint: Any) -> bool:
    return any(getattr(kind, "__origin__", None) is list for kind in (hint, *get_args(hint)))
