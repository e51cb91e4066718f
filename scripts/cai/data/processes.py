"""One step over several processes, as `accelerate launch` or `torchrun` starts them: each its share of the rows.

    team = Team()
    with Output(...) as output:               # in process 0 alone
        journal = team.begin(output)          # rows go here, in every process
        for row in team.share(rows): ...
        found = team.gather(counts)           # process 0: what each has found, all rows now in its output

The others write to files beside the output (`<output>.partial.1`, ...), which process 0 takes into its journal:
at the end, and at the start those of a run that was stopped, however many processes that had. The messages go
by gloo over the network that the launcher has set up; no GPU is needed for them. Leaves out training, where
Trainer sees to all of this.
"""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

from cai.data.outputs import Output


class Team:
    """The processes of this run. One alone talks to nobody.

    Attributes:
        rank: number of this process from 0, count: how many there are.
    """

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def first(self) -> bool:
        """Whether this is the process that reads, writes and tells of the output."""
        return self.rank == 0

    def share(self, rows: Iterable) -> Iterator:
        """Every `count`-th of the rows, from this process' own number."""
        return islice(rows, self.rank, None, self.count)

    def tell(self, value=None):
        """What process 0 says, in all of them."""
        if self.count == 1:
            return value
        said = [value]
        self._network().broadcast_object_list(said, src=0)
        return said[0]

    def begin(self, output: Output | None):
        """Where this process writes its rows: the output itself, or a file beside it; None if it is complete.

        output: entered, in process 0; None in the others.
        """
        if self.first:
            if output.resuming:
                _take_in(output)
            elif not output.complete:
                for path in _beside(output):  # of a run with other settings
                    os.unlink(path)
            said = self.tell(None if output.complete else (str(output.path), sorted(output.done)))
            return None if said is None else output
        said = self.tell()
        return None if said is None else _Beside(Path(f"{said[0]}.partial.{self.rank}"), frozenset(said[1]))

    def gather(self, journal, value) -> list | None:
        """Process 0 takes in what the others have written, and gets the value of each; None in the others."""
        if self.count == 1:
            return [value]
        if not self.first:
            journal.file.close()
        found = [None] * self.count if self.first else None
        self._network().gather_object(value, found, dst=0)
        if self.first:
            _take_in(journal)
        return found

    def _network(self):
        from torch import distributed

        if not distributed.is_initialized():
            # One process may have the longest rows: the others wait for it, and the launcher ends them if it dies.
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        return distributed


class _Beside:
    """The rows of a process that is not the first."""

    def __init__(self, path: Path, done: frozenset[str]):
        self.done = done
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115, closed when all is gathered

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _beside(output: Output) -> list[str]:
    """The files of the other processes, whose ends are numbers."""
    return sorted(glob.glob(f"{glob.escape(str(output.path))}.partial.[0-9]*"))


def _take_in(output: Output) -> None:
    """The rows of the files beside the output into its journal; a line without its end was torn."""
    for path in _beside(output):
        with open(path, "rb") as file:
            for raw in file:
                if raw.endswith(b"\n") and (row := json.loads(raw))["id"] not in output.done:
                    output.write(row)
        os.unlink(path)
