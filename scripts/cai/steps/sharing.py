"""One output, written by this process or by several of which each does its share of the rows.

    with share_work(team, output, load, work) as (engine, results):
        if results is not None:
            finish_output(output, ids, counts, failed)

Leaves out how the processes talk to each other (data/processes.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

from cai.base import cli, requests
from cai.data import outputs, processes
from cai.models.engine import Engine
from cai.models.local import fast_path


@contextmanager
def share_work(
    team: processes.Team,
    output: outputs.Output | None,
    load: Callable[[], Engine],
    work: Callable[[processes.Team, Any, Engine], Any],
) -> Iterator[tuple[Engine | None, list[Any] | None]]:
    """(engine, what `work` returned in each process) in process 0; the results are None elsewhere, and if the output
    is complete.

    In process 0 the model is loaded before anything is written: one that can't be loaded leaves no trace.

    Args:
        output: in process 0, and open while this context is; None in the others.
        work: takes the team, the journal of this process (`done`, `write`) and the engine.
    """
    engine = load() if output is not None and not output.complete else None
    with output or nullcontext():
        journal = team.begin(output)
        if journal is None:
            yield None, None
            return
        engine = engine or load()
        results = team.gather(journal, (work(team, journal, engine), requests.request_report()))
        yield engine, results and _take_results(results)


def _take_results(results: list[tuple[Any, requests.RequestReport]]) -> list[Any]:
    """What the work returned in each process; the requests of the others are added to those of this one."""
    report = requests.request_report()
    for _, others in results[1:]:
        report.counts.add(others.counts)
        report.unseeded = report.unseeded or others.unseeded
    return [result for result, _ in results]


@contextmanager
def share_progress(team: processes.Team, total: int, done: int, label: str) -> Iterator[Any]:
    """A progress bar over this process's share of the rows, visible in process 0 only."""
    with cli.progress(len(range(team.rank, total, team.count)), label, done // team.count) as bar:
        bar.disable = bar.disable or not team.first
        yield bar


def finish_output(
    output: outputs.Output,
    ids: Sequence[str],
    counts: dict,
    failed: dict[str, str],
    engine: Engine | None = None,
    **info,
) -> None:
    """Finish an output, and warn of the first rows that failed.

    Args:
        failed: {row id: reason}, also recorded in the manifest.
        info: further fields of the manifest.
    """
    output.finish(ids, counts, failed_rows=failed, **info, **fast_path(engine))
    for row_id, reason in islice(failed.items(), 5):
        cli.warn(f"row {row_id}: {reason}")
