"""One step over several processes, as `accelerate launch` or `torchrun` starts them: each works on its share of rows.

    team = Team()
    with Output(...) as output:               # in process 0 alone
        journal = team.begin(output)          # rows go here, in every process
        for row in team.share(rows): ...
        counts = team.gather(counts)          # process 0: the counts of each, all rows now in its output

The others write to files beside the output (`<output>.partial.1`, ...), which process 0 takes into its journal:
at the end, and at the start those of a run that was stopped, however many processes that had. The messages go
by gloo over the network that the launcher has set up; no GPU is needed for them. Leaves out training, where
Trainer does all of this.
"""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from cai.base import run_settings
from cai.data.outputs import Output, dump_row

_Item = TypeVar("_Item")


class Team:
    """The processes of this run. A single process sends no messages.

    Attributes:
        rank: number of this process from 0, count: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def first(self) -> bool:
        """Whether this is the process that reads, writes and reports on the output."""
        return self.rank == 0

    def share(self, rows: Iterable[_Item]) -> Iterator[_Item]:
        """Every `count`-th of the rows, from this process' own number."""
        return islice(rows, self.rank, None, self.count)

    def tell(self, value: Any = None) -> Any:
        """The value that process 0 passes, in all of them."""
        if self.count == 1:
            return value
        values = [value]
        self._network().broadcast_object_list(values, src=0)
        return values[0]

    def begin(self, output: Output | None) -> "Output | _Share | None":
        """Where this process writes its rows: the output itself, or a file beside it; None if it is complete.

        output: entered, in process 0; None in the others.
        """
        if output is not None:
            if output.resuming:
                _merge_shares(output)
            elif not output.complete:
                for path in _share_files(output):  # of a run with other settings
                    os.unlink(path)
            state = self.tell(
                None if output.complete else (str(output.path), sorted(output.done), run_settings.run_date())
            )
            return None if state is None else output
        state = self.tell()
        if state is not None:
            run_settings.fix_date(state[2])
        return None if state is None else _Share(Path(f"{state[0]}.partial.{self.rank}"), frozenset(state[1]))

    def gather(self, journal: Any, value: Any) -> list[Any] | None:
        """Merge the rows of all processes into the journal of process 0, which gets the value of each; others None."""
        if self.count == 1:
            return [value]
        if not self.first:
            journal.file.close()
        values = [None] * self.count if self.first else None
        self._network().gather_object(value, values, dst=0)
        if self.first:
            _merge_shares(journal)
        return values

    def _network(self) -> Any:
        from torch import distributed

        if not distributed.is_initialized():
            # One process may have the longest rows: the others wait for it, and the launcher ends them if it dies.
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        return distributed


class _Share:
    """The rows of a process other than the first."""

    def __init__(self, path: Path, done: frozenset[str]):
        self.done = done
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by Team.gather

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(dump_row(row))


def _share_files(output: Output) -> list[str]:
    """The files of the other processes, whose names end in a number."""
    return sorted(glob.glob(f"{glob.escape(str(output.path))}.partial.[0-9]*"))


def _merge_shares(output: Output) -> None:
    """Move the rows of the other processes' files into the journal; a line without its end was torn."""
    for path in _share_files(output):
        with open(path, "rb") as file:
            for raw in file:
                if raw.endswith(b"\n") and (row := json.loads(raw))["id"] not in output.done:
                    output.write(row)
        os.unlink(path)
