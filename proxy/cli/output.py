"""What commands print: for people text and aligned tables, for programs one JSON object, on terminals progress."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import click
import msgspec

from proxy.errors import SettingsError, TollgateError, Unavailable, reason_of

_GAP = "  "
_STEPS = 1000
"""Of a progress bar."""


def show(shown: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result of a command: `shown` for programs, `text` for people."""
    click.echo(json.dumps(shown) if as_json else text)


def fail(error: TollgateError) -> int:
    """Say what is wrong, in one line; returns the exit status."""
    reason = f" ({reason_of(error)})" if isinstance(error, Unavailable) and error.__cause__ is not None else ""
    click.echo(f"tollgate: {error}{reason}", err=True)
    return 2 if isinstance(error, SettingsError) else 1


def plain(struct: Any) -> Any:
    """A struct as plain objects, as the HTTP API sends it."""
    return msgspec.to_builtins(struct)


# ---- tables


class Column(NamedTuple):
    """A column: its title, and the field of a row that it shows, where a dot leads into a nested object."""

    title: str
    field: str
    is_number: bool = False


def words(*fields: str) -> list[Column]:
    """Columns of words; each is named as its field, or as what `title=field` says."""
    return [_column(field, is_number=False) for field in fields]


def numbers(*fields: str) -> list[Column]:
    """Likewise of numbers and amounts, which end at the same place."""
    return [_column(field, is_number=True) for field in fields]


def _column(field: str, *, is_number: bool) -> Column:
    title, _, path = field.rpartition("=")
    return Column((title or path.rpartition(".")[2]).replace("_", " "), path, is_number)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, nothing: str) -> str:
    """Aligned lines under a head; `nothing` where there are no rows. No cell is ever cut."""
    if not rows:
        return nothing
    lines = [[column.title.upper() for column in columns]]
    lines += [[cell(_field(row, column.field)) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        _GAP.join(
            value.rjust(width) if column.is_number else value.ljust(width)
            for value, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    )


def page_text(page: Mapping[str, Any], columns: Sequence[Column], *, nothing: str) -> str:
    """The table of one page, and how to ask for the next one."""
    lines = table(page["items"], columns, nothing=nothing)
    cursor = page["next_cursor"]
    return lines if cursor is None else f"{lines}\nThere are more: --cursor {cursor}"


def block(shown: Mapping[str, Any]) -> str:
    """One object: a line for each field, nested objects in lines of their own."""
    lines = list(_lines(shown, ""))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}{_GAP}{value}" for name, value in lines)


def _lines(shown: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in shown.items():
        title = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict) and value:
            yield from _lines(value, f"{title} ")
        else:
            yield title, cell(value)


def cell(value: Any) -> str:
    """A value for people: one line that no terminal takes for a command."""
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() if all(isinstance(each, str) for each in value):
            shown = ",".join(value) or "none"
        case dict() | list():
            shown = json.dumps(value, ensure_ascii=False)
        case _:
            shown = str(value)
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in shown)


def _field(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


# ---- progress


@contextmanager
def progress(label: str) -> Iterator[Callable[[float], None]]:
    """Takes the share that is done, from 0 to 1, and draws it on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _share: None
        return
    with click.progressbar(length=_STEPS, label=label, file=sys.stderr) as bar:

        def advance(share: float) -> None:
            steps = int(share * _STEPS) - bar.pos
            if steps > 0:
                bar.update(steps)

        yield advance
