"""How a command reads its rows: names of columns, the kind of the prompts, a public set, and bad rows to skip.

    @reading_options
    def main(inputs, reading): Source(inputs, reading=reading)

Leaves out what a row must hold (sources.py) and the shapes of its values (shapes.py).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any

import click

from cai.base.errors import InputError, shorten
from cai.data.kinds import KINDS
from cai.data.public_sets import FORMATS, convert
from cai.data.readers import Row

FIELDS = ("prompt", "response", "kind")


@dataclass(frozen=True)
class Reading:
    """The options of `reading_options`.

    Attributes:
        prompt_field, response_field, kind_field: columns to read in place of `prompt`, `response` and `kind`.
        kind: the kind of rows that have none. form: the public set that the rows belong to.
        skip_invalid: leave bad rows out and report them, instead of refusing the input.
    """

    prompt_field: str | None = None
    response_field: str | None = None
    kind_field: str | None = None
    kind: str | None = None
    form: str | None = None
    skip_invalid: bool = False

    @property
    def renames(self) -> dict[str, str]:
        """What decides the rows, by option; nothing where all is as usual."""
        return {name: value for name, value in asdict(self).items() if value and name != "skip_invalid"}

    def only(self, *names: str) -> "Reading":
        """The same with these options alone, and `skip_invalid`."""
        return Reading(**{name: getattr(self, name) for name in (*names, "skip_invalid")})

    @property
    def arguments(self) -> list[str]:
        """The options that are set, as arguments for another command."""
        named = [
            part
            for name, value in self.renames.items()
            for part in ("--set" if name == "form" else f"--{name.replace('_', '-')}", value)
        ]
        return [*named, *(["--skip-invalid"] if self.skip_invalid else [])]

    def apply(self, row: Row, where: str, line: int) -> Row:
        """The row with our names of the fields. InputError for a column that is not there, or two kinds."""
        for field in FIELDS:
            name = getattr(self, f"{field}_field")
            if name is None:
                continue
            if row.get(name) is None:
                raise InputError(
                    f"no column {name!r}" if name not in row else f"nothing in the column {name!r}",
                    where=where,
                    line=line,
                    expected=f"the column of --{field}-field",
                    remedy=f"The row has: {list_columns(row)}",
                )
            row = {**row, field: row[name]}
        if self.form or not self.prompt_field:
            row = convert(row, self.form, self.kind, where, line)
        if self.kind and row.get("kind") not in (None, self.kind):
            raise InputError(
                f"the kind {shorten(row['kind'])!r}, and --kind is {self.kind}",
                where=where,
                line=line,
                expected="rows without a kind, or of the same",
                remedy="Leave out --kind, or read this file alone",
            )
        return {**row, "kind": self.kind} if self.kind else row


AS_THEY_ARE = Reading()


def list_columns(row: Row) -> str:
    """The columns of a row, for an error message."""
    return shorten(", ".join(map(str, row)) or "nothing", 300)


_OPTIONS = (
    click.option(
        "--prompt-field", metavar="COLUMN", help="The column of the prompts, if it has another name than `prompt`."
    ),
    click.option("--response-field", metavar="COLUMN", help="The column of the responses, if it is not `response`."),
    click.option("--kind-field", metavar="COLUMN", help="The column of the prompts' kinds, if it is not `kind`."),
    click.option("--kind", type=click.Choice(KINDS), help="The kind of all prompts, for files that do not say it."),
    click.option(
        "--set",
        "form",
        type=click.Choice(list(FORMATS)),
        help="The public set that the rows belong to. Default: recognised by their columns.",
    ),
    click.option(
        "--skip-invalid",
        is_flag=True,
        help="Leave out bad rows, list them in the manifest, and exit with 3. Default: they are refused.",
    ),
)


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: adds the options of how rows are read, and passes them on as `reading`."""

    @wraps(function)
    def command(**values: Any) -> Any:
        names = Reading.__dataclass_fields__
        reading = Reading(**{name: values.pop(name) for name in names})
        return function(reading=reading, **values)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command
