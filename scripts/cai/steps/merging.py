"""Shards of one run (`--shard K/N`) put together as the output that one run over all rows would have written.

    merger = Merger(["shards/1.jsonl", "shards/2.jsonl"])
    merger.rows(); merger.count()

The input is read again, row by row, and says which row of which shard comes next: nothing is held in memory but the
failed rows. Leaves out texts that are repeated: each shard has looked for them among its own rows.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, BinaryIO

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.base.hashing import sha256_file
from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl
from cai.data.reading import Reading
from cai.data.shards import Shard, read_first_id, shard_number
from cai.data.sources import read_shards
from cai.stats import intervals
from cai.steps import judging, pairs

MERGED = ("generate", "critique", "revise", "judge")

# Entries of a manifest that are of one run: the merged output has its own, or none.
_OF_ONE_RUN = {
    *("status", "command", "command_line", "fingerprint", "versions", "started", "resumed", "inputs", "counts"),
    *("finished", "seconds", "failed_rows", "skipped_rows", "most_repeated", "tokens"),
}


class Merger:
    """The shards of one run.

    Attributes:
        command, fingerprint: those of the run over all rows.
        info: entries of the manifest that all shards share, and the sums of tokens.
        failed: {row id: why it failed}.

    Raises InputError unless the files are finished shards of one run, and each of them is there once; and if the input
    of that run is gone, or has changed.
    """

    def __init__(self, paths: Sequence[str]):
        self._shards = sorted((_Shard(path) for path in paths), key=lambda shard: shard.number)
        first = self._shards[0]
        self.command, self.fingerprint = first.command, first.settings
        self._check_agreement()
        self._check_numbers(first.count)
        self._sources = self._find_inputs(first)
        manifests = [shard.manifest for shard in self._shards]
        self.failed = {row_id: reason for each in manifests for row_id, reason in each.get("failed_rows", {}).items()}
        self.skipped = list(dict.fromkeys(chain.from_iterable(each.get("skipped_rows", ()) for each in manifests)))
        self.info = {
            **{name: entry for name, entry in manifests[0].items() if name not in _OF_ONE_RUN},
            **({"tokens": _add([each["tokens"] for each in manifests])} if "tokens" in manifests[0] else {}),
            "shards": [shard.path for shard in self._shards],
        }

    def _check_agreement(self) -> None:
        """Raise InputError if shards were made by runs that differ; warn of other versions of packages."""
        first = self._shards[0]
        for shard in self._shards[1:]:
            for name in dict.fromkeys([*first.agreed, *shard.agreed]):
                ours, theirs = first.agreed.get(name), shard.agreed.get(name)
                if ours != theirs:
                    raise InputError(
                        f"the shards differ: {name} is {shorten(json.dumps(theirs))}, and "
                        f"{shorten(json.dumps(ours))} in {first.path}",
                        where=shard.path,
                        expected="shards of one run",
                        remedy="Run this shard again with the settings of the others",
                    )
        versions: dict[str, list[str]] = {}
        for shard in self._shards:
            versions.setdefault(json.dumps(shard.manifest.get("versions")), []).append(shard.path)
        if len(versions) > 1:
            described = "; ".join(f"{files[0]} ({len(files)} shards): {text}" for text, files in versions.items())
            cli.warn(f"the shards were made with different versions of packages: {shorten(described, 600)}")

    def _check_numbers(self, count: int) -> None:
        by_number: dict[int, str] = {}
        for shard in self._shards:
            if shard.number in by_number:
                raise InputError(
                    f"shard {shard.number} of {count} twice, first in {by_number[shard.number]}",
                    where=shard.path,
                    remedy="Name each shard once",
                )
            by_number[shard.number] = shard.path
        missing = sorted({*range(1, count + 1)} - by_number.keys())
        if missing:
            raise InputError(
                f"{len(missing)} of {count} shards are missing: {shorten(', '.join(map(str, missing)))}",
                where="--input",
                expected="all shards of the run",
                remedy="Run the missing ones, and name them too",
            )

    def _find_inputs(self, shard: "_Shard") -> list[dict[str, Any]]:
        """What the run read: {files: absolute paths with their SHA-256, require, limit, reading}."""
        folder, entries = os.path.dirname(os.path.realpath(shard.path)), []
        for entry in shard.inputs:
            files = {_locate(folder, name): digest for name, digest in entry["files"].items()}
            for name, digest in files.items():
                if os.path.isfile(name) and sha256_file(name) == digest:
                    continue
                if os.path.isfile(name):
                    raise InputError("it changed since the shards were made", where=name, remedy="Put it back")
                if os.path.isabs(name) and not os.path.exists(name):
                    raise InputError(
                        "the input of the shards is not here, and it gives the order of the rows",
                        where=name,
                        expected=f"the file at the place that {shard.path}.run.json names",
                        remedy="Move the shards together with their input",
                    )
            entries.append({**entry, "files": files})
        return entries

    def report_inputs(self) -> None:
        """Note what the run read, and what it left out, for the manifest and the summary."""
        for entry in self._sources:
            cli.report_input(**entry)
        cli.row_report().skipped.update({reason: reason for reason in self.skipped})

    # --- the rows ---------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[bytes]:
        """The lines of all shards, in the order of the input; each is the very line of its shard.

        Raises InputError for a row that is missing, that is there twice, or that no row of the input explains.
        """
        samples = self.fingerprint.get("samples") if self.command == "generate" else None
        endings = [""] if samples is None else [f"/{n}" for n in range(samples)]
        with ExitStack() as stack:
            heads = [_Head(stack.enter_context(open(shard.path, "rb")), shard) for shard in self._shards]
            for row_id, number in self._order():
                for ending in endings:
                    line = heads[number - 1].take(row_id, ending)
                    if line is not None:
                        yield line
            for head in heads:
                head.check_end()

    def _order(self) -> Iterator[tuple[str, int]]:
        """(id without the suffix of a repeated one, number of its shard) of each row that the shards have or failed."""
        first, *others = self._sources
        reading, count = Reading(**first["reading"], skip_invalid=True), len(self._shards)
        inputs = list(first["files"])
        if self.command == "judge" and "response" in first["require"]:
            against = next(iter(others[0]["files"])) if self.fingerprint.get("against") else None
            most, seed = (self.fingerprint[name] for name in ("pairs_per_prompt", "seed"))
            comparisons, _ = pairs.read_comparisons(inputs, against, most, seed, first["limit"], reading)
            yield from ((row_id, shard_number(row_id, count)) for row_id in comparisons.ids)
            return
        positions = {match.groups() for text in self.skipped if (match := re.match(r"(?:.*?/)?([^/]+?):(\d+): ", text))}
        for name, line, row_id, number in read_shards(
            inputs, count, require=first["require"], limit=first["limit"], reading=reading
        ):
            if not positions or (os.path.basename(name), str(line)) not in positions:
                yield row_id, number

    # --- the counts -------------------------------------------------------------------------------------------

    def count(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The counts of the run over all rows. A judge's rates are measured again, on the merged file."""
        counts = [shard.manifest.get("counts", {}) for shard in self._shards]
        total = _add([{n: c for n, c in each.items() if n not in ("skipped_rows", "unpaired")} for each in counts])
        if self.command == "judge":
            total |= judging.summary(row for _, row in read_jsonl(path))
            total |= {"unpaired": counts[0]["unpaired"]} if "unpaired" in counts[0] else {}  # each shard counts all
        return total


class _Shard:
    """One finished output of `--shard`, by its manifest.

    agreed: what all shards of a run have in common.
    """

    def __init__(self, path: str):
        self.path, manifest = path, read_manifest(path)
        if manifest is None or not os.path.isfile(path):
            raise InputError("no output of --shard", where=path, expected="a finished output and its .run.json")
        self.manifest = manifest
        self.settings = dict(manifest["fingerprint"])
        self.command, shard = manifest.get("command"), self.settings.pop("shard", None)
        if shard is None or self.command not in MERGED:
            raise InputError(
                "its manifest names no shard",
                where=path,
                expected=f"an output of {', '.join(MERGED)} with --shard K/N",
                remedy="Leave it out",
            )
        self.number, self.count = (parsed := Shard.parse(str(shard))).number, parsed.count
        if manifest.get("status") != "done":
            raise InputError(
                f"shard {shard} is not finished", where=path, remedy=f"Run it again: {manifest.get('command_line')}"
            )
        try:
            self.inputs = [
                {name: value for name, value in entry.items() if name != "shard"} for entry in manifest["inputs"]
            ]
            digests = [[list(entry["files"].values()), entry["require"], entry["limit"]] for entry in self.inputs]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError("its manifest does not name its inputs", where=path) from error
        self.agreed = {"command": self.command, "number of shards": self.count, "inputs": digests, **self.settings}


class _Head:
    """The next row of a shard, whose rows are in the order of the input."""

    def __init__(self, file: BinaryIO, shard: _Shard):
        self._file, self._shard, self._number = file, shard, 0
        self._failed: dict[str, str] = dict(shard.manifest.get("failed_rows", {}))
        self._advance()

    def _advance(self) -> None:
        self._line, self._number = self._file.readline(), self._number + 1
        self._id: str | None = None
        if self._line:
            first = read_first_id(self._line)
            try:
                self._id = str(json.loads(self._line)["id"]) if first is None else first.decode()
            except (ValueError, LookupError, TypeError) as error:
                raise self._error("a row without an id, or no JSON") from error

    def take(self, row_id: str, ending: str) -> bytes | None:
        """The line of the row with this id, perhaps numbered (`-2`), in front of the ending; None if it failed."""
        wanted = row_id + ending
        if self._id == wanted:
            line = self._line
            self._advance()
            return line
        if self._failed.pop(wanted, None) is not None:
            return None
        numbered = re.compile(rf"{re.escape(row_id)}-([0-9]+){re.escape(ending)}")
        numbers = {int(match[1]): name for name in self._failed if (match := numbered.fullmatch(name))}
        here = numbered.fullmatch(self._id or "")
        if here and int(here[1]) < min(numbers, default=int(here[1]) + 1):
            line = self._line
            self._advance()
            return line
        if not numbers:
            raise self._error(f"the row {shorten(wanted)!r} is missing, or is there twice or in another order")
        del self._failed[numbers[min(numbers)]]
        return None

    def check_end(self) -> None:
        """Raise InputError for a row that is left."""
        if self._line:
            raise self._error(f"the row {shorten(self._id)!r} is there twice, or is not in the input")
        if self._failed:
            raise self._error(f"the failed row {shorten(next(iter(self._failed)))!r} is not in the input")

    def _error(self, problem: str) -> InputError:
        return InputError(
            problem,
            where=self._shard.path,
            line=self._number,
            expected="the rows of the shard as they were written",
            remedy="Delete the shard with its manifest, and run it again",
        )


def _locate(folder: str, name: str) -> str:
    """The path of an input that a manifest in the folder names; a dataset id as it is."""
    path = os.path.normpath(os.path.join(folder, name))
    return path if os.path.exists(path) or name.startswith(os.pardir) or os.path.splitext(name)[1] else name


def _add(values: Iterable[Any]) -> Any:
    """The sum of counts: numbers are added, rates are of all their rows, and the same text stays."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    first = values[0]
    if all(isinstance(value, bool) for value in values):
        return all(values)
    if all(isinstance(value, int | float) for value in values):
        return sum(values)
    if all(isinstance(value, Mapping) for value in values):
        if all({"value", "n"} <= value.keys() for value in values):
            n = sum(value["n"] for value in values)
            return intervals.rate(round(sum((value["value"] or 0) * value["n"] for value in values)), n)
        names = dict.fromkeys(chain.from_iterable(values))
        return {name: _add([value.get(name) for value in values]) for name in names}
    if all(isinstance(value, str) for value in values):
        return " | ".join(dict.fromkeys(values))
    return first if all(value == first for value in values) else None
