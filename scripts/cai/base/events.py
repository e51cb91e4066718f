"""Events of a command while it runs, as JSON lines in the file of --events: for agents and dashboards.

    with record("runs/x/events.jsonl", "generate", outcome):
        emit("warning", text="3 rows were left out")

Every line is one object with `time`, `event` and `command`; references/data-formats.md lists the fields. A line is
appended in one write, so that a reader never sees half of one. Figures are numbers: text that a model has written does
not get in by them. Leaves out where events come from: cli.py sends what it prints.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from cai.base.errors import InputError

EVENTS = ("started", "progress", "warning", "figures", "ended", "failed")

# Seconds between two progress events of one bar, at least.
INTERVAL = 1.0

# Exit codes of work that is done; 3: some records failed.
DONE = (0, 3)

# The only texts among figures: names of files, command lines, and verdicts on models.
_WORDS = ("command", "output", "report", "next", "or", "qualification", "failed_rows")

Outcome = Callable[[BaseException], tuple[int, str]]


class _Stream:
    """The open file. outcome: (exit code, text) of an exception. place: fields of all events, such as the step."""

    def __init__(self, path: str, outcome: Outcome):
        self.path, self.outcome, self.lock = path, outcome, threading.Lock()
        self.place: dict[str, Any] = {}
        self.file: int | None = _open(path)

    def write(self, event: str, fields: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {"time": now, "event": event, **self.place, **_finite(fields)}
        line = json.dumps(row, allow_nan=False).encode("ascii") + b"\n"
        with self.lock:
            if self.file is None:
                return
            try:
                os.write(self.file, line)
            except OSError as error:  # the work is worth more than its events
                self.close()
                click.echo(f"warning: {self.path}: no more events can be written ({error}); the work goes on", err=True)

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


_stream: _Stream | None = None


def _open(path: str) -> int:
    """A descriptor to append lines to. InputError if the file can't be written, or holds something else."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if Path(path).is_file():
            _check_content(path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise InputError(
            f"events can't be written ({error.strerror})",
            where=path,
            expected="a file that can be written",
            remedy="Give --events another FILE",
        ) from error


def _check_content(path: str) -> None:
    """InputError unless the file is empty, or its first line is an event: it may be an input of the same command."""
    with open(path, "rb") as file:
        first = file.readline(1 << 16)
    if not first:
        return
    try:
        is_event = json.loads(first).get("event") in EVENTS
    except (ValueError, AttributeError):
        is_event = False
    if not is_event:
        raise InputError(
            "the file is not one of events",
            where=path,
            expected="a new file, or one that --events has written: new lines are appended",
            remedy="Give --events another FILE",
        )


def _finite(value: Any) -> Any:
    """The value without numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def emit(event: str, **fields: Any) -> None:
    """Append an event, if the running command has --events."""
    if _stream is not None:
        _stream.write(event, fields)


def emit_figures(figures: Mapping[str, Any]) -> None:
    """Append the numbers of a summary, and of its texts those that name files, commands and verdicts on models."""
    if _stream is not None:
        emit("figures", figures=_numbers(figures))


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures without texts, except `_WORDS`."""

    def keep(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _numbers(value) or None
        if isinstance(value, list | tuple):
            return [part for part in (keep("", part) for part in value) if part is not None]
        is_number = isinstance(value, bool | int | float)
        return value if is_number or (isinstance(value, str) and name in _WORDS) else None

    kept = {str(name): keep(str(name), value) for name, value in figures.items()}
    return {name: value for name, value in kept.items() if value is not None}


@contextmanager
def record(path: str | None, command: str, outcome: Outcome, **fields: Any) -> Iterator[None]:
    """Append events to the file while the context is open: `started` first, then `ended` or `failed`.

    Does nothing without a path, inside of another record, and in all processes of a launcher except the first.

    Args:
        outcome: (exit code, text of the error) of an exception that leaves the context.
        fields: further fields of `started`.
    Raises:
        InputError: the file can't be written, or is not one of events.
    """
    global _stream
    if path is None or _stream is not None or os.environ.get("RANK", "0") != "0":
        yield
        return
    stream = _Stream(path, outcome)
    stream.place = {"command": command}
    _stream = stream
    try:
        with _outcome_of({"pid": os.getpid(), **fields}):
            yield
    finally:
        _stream = None
        stream.close()


@contextmanager
def record_step(place: Mapping[str, Any], **fields: Any) -> Iterator["Ending"]:
    """Give the events of a step of run.py the fields of `place`, and report its start and its end.

    Args:
        place: {command, step, number, steps}. fields: further ones of `started`.
    """
    if _stream is None:
        yield Ending()
        return
    stream, before = _stream, _stream.place
    stream.place = {**before, **place}
    try:
        with _outcome_of(fields) as ending:
            yield ending
    finally:
        stream.place = before


class Ending:
    """How a step ends: the exit code of one that raises nothing."""

    exit_code = 0


@contextmanager
def _outcome_of(fields: Mapping[str, Any]) -> Iterator[Ending]:
    emit("started", **fields)
    began, ending = time.monotonic(), Ending()
    code, text = 1, ""
    try:
        yield ending
        code = ending.exit_code
    except BaseException as exception:
        code, text = _stream.outcome(exception) if _stream else (1, "")
        raise
    finally:
        more = {"text": text} if text else {}
        seconds = round(time.monotonic() - began, 1)
        emit("ended" if code in DONE else "failed", exit_code=code, seconds=seconds, **more)


def watch_bar(bar: Any, label: str) -> None:
    """Report what a tqdm bar counts: at its start, at most once per `INTERVAL`, and at its end.

    Its own output stays as it is.
    """
    if _stream is None:
        return
    began = time.monotonic()
    counts = {"done": bar.initial, "reported": -1, "time": began}
    update, close = bar.update, bar.close

    def report() -> None:
        now = time.monotonic()
        counts.update(reported=counts["done"], time=now)
        rate = (counts["done"] - bar.initial) / (now - began) if now > began else 0.0
        remaining = max(0, (bar.total or 0) - counts["done"])
        emit(
            "progress",
            label=label,
            unit=bar.unit,
            done=counts["done"],
            total=bar.total,
            rate=float(f"{rate:.4g}"),
            eta_seconds=round(remaining / rate, 1) if rate and bar.total else None,
        )

    def count(n: float = 1) -> Any:
        counts["done"] += n
        if time.monotonic() - counts["time"] >= INTERVAL:
            report()
        return update(n)

    def end() -> None:
        if counts["done"] != counts["reported"]:
            report()
            counts["reported"] = counts["done"]
        close()

    bar.update, bar.close = count, end
    report()
