"""Settings of a whole run that many layers read: the date of chat templates, and reasoning tags of your own.

    with_options = run_settings.date_option(run_settings.reasoning_option(command))
    run_settings.run_date(), run_settings.reasoning_tags()

They are kept in click's context, so that no function has to pass them on; the commands that run.py calls in its own
process share them. A chat template may write today's date (Llama 3, Mistral, gpt-oss, Granite): the date is fixed for
a run, is part of its fingerprint, and a resumed run takes the date of its first day. Leaves out the time of day, which
is midnight, and the templates of servers.
"""

from collections.abc import Callable, Mapping
from datetime import date, datetime
from typing import Any, TypeVar

import click

from cai.base.errors import InputError

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Entries of click's context.
_DATE, _IS_DATED, _TAGS = "run_date", "template_writes_a_date", "reasoning_tags"


def _keep(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that keeps an option's value for `key`; where it is not given, an outer command's value stays."""

    def callback(context: click.Context, _option: click.Parameter, value: Any) -> None:
        if value:
            context.meta[key] = value.date() if isinstance(value, datetime) else value

    return callback


def date_option(function: _Function) -> _Function:
    """Add `--date`, which `run_date` returns."""
    return click.option(
        "--date",
        type=click.DateTime(["%Y-%m-%d"]),
        metavar="YYYY-MM-DD",
        expose_value=False,
        callback=_keep(_DATE),
        help="Date for a chat template that writes one.  [default: today, or the date of the run that is resumed]",
    )(function)


def reasoning_option(function: _Function) -> _Function:
    """Add `--reasoning-tags`, which `reasoning_tags` returns."""
    return click.option(
        "--reasoning-tags",
        nargs=2,
        multiple=True,
        metavar="OPEN CLOSE",
        expose_value=False,
        callback=_keep(_TAGS),
        help="Texts that open and close the model's reasoning, to cut it out; the usual ones are known. Repeatable.",
    )(function)


def _meta() -> dict[str, Any]:
    """The entries of the running command; new ones where no command runs."""
    context = click.get_current_context(silent=True)
    return context.meta if context else {}


def run_date() -> date:
    """The date that chat templates write in this run."""
    fixed: date | None = _meta().get(_DATE)
    return fixed or date.today()


def fix_date(day: date) -> None:
    """Make `day` the date of this run, and of the steps that follow it in one process."""
    _meta()[_DATE] = day


def reasoning_tags() -> tuple[tuple[str, str], ...]:
    """The pairs of --reasoning-tags."""
    return tuple(_meta().get(_TAGS, ()))


def note_dated_template() -> None:
    """Remember that a model of this command has a chat template that writes a date, or may have one."""
    _meta()[_IS_DATED] = True


def forget_dated_template() -> None:
    """Forget the models of an earlier command in this process."""
    _meta().pop(_IS_DATED, None)


def command_options() -> list[str]:
    """The options of this run as arguments of a command line; [] where none was given."""
    day = _meta().get(_DATE)
    tags = [part for pair in reasoning_tags() for part in ("--reasoning-tags", *pair)]
    return [*(["--date", day.isoformat()] if day else []), *tags]


def identify(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What these settings add to the fingerprint of an output.

    A date is added if a model's template writes one. It is that of --date, else that of the run to be resumed, else
    today's, and stays the date of this process.

    Args:
        earlier: fingerprint of the run that the output is from, {} if there is none.
    Raises:
        InputError: the date of the earlier run is not a date.
    """
    settings: dict[str, Any] = {"reasoning_tags": [list(pair) for pair in reasoning_tags()]} if reasoning_tags() else {}
    if not _meta().get(_IS_DATED) and "date" not in earlier:
        return settings
    if _DATE not in _meta():
        try:
            day = date.fromisoformat(earlier["date"]) if "date" in earlier else date.today()
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the date {earlier['date']!r} in the manifest",
                expected="YYYY-MM-DD",
                remedy="Restore the manifest, or start again with --overwrite",
            ) from error
        fix_date(day)
    return {**settings, "date": run_date().isoformat()}
