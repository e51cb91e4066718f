"""Outputs that survive being killed: a journal, a manifest, a lock.

    with Output("responses.jsonl", command="generate", fingerprint={"input": source.digest}) as output:
        for row in source:
            if row["id"] not in output.done:
                output.write({**row, "response": "..."})
        output.finish(source.ids, counts={"rows": source.count})

An `Output` appends to a journal, `<path>.partial`, and becomes `<path>` only when it is finished; `<path>.run.json`
records what it was made from. Leaves out editing in place: every step writes a new file.
"""

import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

from cai.base import cli, engine_options, requests, run_settings
from cai.base.errors import CaiError, InputError, shorten
from cai.base.files import expand_patterns, replace_file
from cai.base.hashing import sha256_file
from cai.data.locks import OutputLock
from cai.data.readers import PathName, Row, type_name


def write_jsonl(path: PathName, rows: Iterable[Row]) -> None:
    """Write the rows whole or not at all."""
    with replace_file(path) as file:
        file.writelines(map(dump_row, rows))


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def dump_row(row: Row) -> bytes:
    """A row as one line of JSON Lines."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def amend_line(line: bytes, amend: Callable[[Row], Row]) -> bytes:
    """A line with its row amended; the very same bytes where the row stays as it is."""
    row = json.loads(line)
    amended = amend(row)
    return line if amended is row else dump_row(amended)


def read_manifest(path: PathName) -> dict[str, Any] | None:
    """The manifest of an output (`<path>.run.json`), or None if it has none. InputError if it is damaged."""
    manifest = Path(f"{os.fspath(path).rstrip('/')}.run.json")
    if not manifest.exists():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        types = {"fingerprint": dict, "status": str, "counts": dict, "resumed": int, "started": str, "inputs": list}
        if not isinstance(content, dict) or "fingerprint" not in content:
            raise ValueError("no fingerprint in it")
        for name, type_ in types.items():
            if not isinstance(content.get(name, type_()), type_):
                raise ValueError(f"its {name} is a {type_name(content[name])}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"not a manifest ({error})", where=manifest, remedy="Delete it with its output") from error
    return content


def _installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "datasets", "accelerate", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


RECORD_EVERY = 5.0  # seconds between two records of the requests so far


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Claim:
    """What outputs of both kinds share: the manifest, the lock, and the decision whether to continue.

    Creating a claim reads only; entering it (`with`) takes the lock and writes the manifest.
    """

    main = True  # False in the other processes of a distributed run: they neither lock nor write
    foreign_remedy: ClassVar[str]  # what to do about an output that no manifest describes

    def __init__(
        self,
        path: PathName,
        *,
        command: str,
        fingerprint: dict[str, Any],
        overwrite: bool = False,
        inputs: Sequence[str] = (),
    ):
        self.path = Path(os.fspath(path))
        self.manifest_path = Path(f"{os.fspath(path).rstrip('/')}.run.json")
        self.command, self.overwrite = command, overwrite
        self.fingerprint = json.loads(json.dumps(fingerprint))
        for name in expand_patterns(inputs):
            if os.path.realpath(name) == os.path.realpath(self.path):
                raise InputError("the output is one of the inputs", where=path, remedy="Name another output")
        self._lock = OutputLock(path)
        if self.main:
            self._lock.check()
        self._read_state()

    # What a file and a folder do differently.

    def _check_kind(self) -> None:
        """Raise InputError if the path is a folder where a file is expected, or the reverse."""
        raise NotImplementedError

    def _exists(self) -> bool:
        return self.path.exists()

    def _delete(self) -> None:
        raise NotImplementedError

    def _open(self) -> None: ...

    def _close(self) -> None: ...

    def _read_state(self) -> None:
        """Set `complete`, `resuming` and `counts` from what is on disk; refuse the output of another run."""
        self._check_kind()
        self.complete, self.resuming = False, False
        self.counts: dict[str, Any] = {}
        self._manifest: dict[str, Any] = {}
        manifest = None if self.overwrite else read_manifest(self.path)
        self.fingerprint |= run_settings.identify(manifest["fingerprint"] if manifest else {})
        self.fingerprint |= engine_options.identify()
        if self.overwrite:
            return
        if manifest is None:
            if self._exists():
                raise self._foreign_error()
            return
        self._compare(manifest)
        self._manifest = manifest
        self.complete = manifest.get("status") == "done" and self._exists()
        self.resuming = manifest.get("status") == "running"
        self.counts = manifest.get("counts", {}) if self.complete else {}

    def _foreign_error(self) -> InputError:
        return InputError(
            "it exists, and no manifest says how it was made", where=self.path, remedy=self.foreign_remedy
        )

    def _compare(self, manifest: dict[str, Any]) -> None:
        before = {"command": manifest.get("command"), **manifest["fingerprint"]}
        now = {"command": self.command, **self.fingerprint}
        differences = [
            f"{key} was {shorten(json.dumps(before.get(key)))}, now {shorten(json.dumps(now.get(key)))}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if differences:
            raise InputError(
                f"made by a run that differs: {'; '.join(differences)}",
                where=self.path,
                remedy="Run it as before, name another --output, or start again with --overwrite",
            )

    def __enter__(self) -> Self:
        if not self.main:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise InputError(f"cannot write ({error})", where=self.path, remedy="Check --output") from error
        try:
            self._read_state()  # again: another process may have written it before we had the lock
            if self.overwrite:
                self._delete()
            if not self.complete:
                self._open()
                self._start_manifest()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.main and not self.complete:
            self._record_requests()
        self._close()
        if self.main:
            self._lock.release()

    def _start_manifest(self) -> None:
        earlier = self._manifest if self.resuming else {}
        self._started = self._recorded = time.monotonic()
        self._report = requests.request_report()  # kept: rows may be written by another thread
        self._before = replace(self._report.counts)
        earlier_counts = earlier.get("requests") or earlier.get("counts", {}).get("requests")
        self._earlier = replace(requests.RequestCounts.read(earlier_counts), waiting=0)
        self._manifest = {
            "status": "running",
            "command": self.command,
            "command_line": cli.command_line(),
            "fingerprint": self.fingerprint,
            "versions": _installed_versions(),
            "started": earlier.get("started", _now()),
            "resumed": earlier.get("resumed", -1) + 1,
            **{name: earlier[name] for name in ("reproducible_sampling",) if name in earlier},
            **({"requests": asdict(self._earlier)} if self._earlier else {}),
        }
        self._write_manifest()

    def _count_requests(self) -> requests.RequestCounts:
        """The requests to servers for this output, in this run and in those that it resumes."""
        if self._report.unseeded:
            self._manifest["reproducible_sampling"] = f"no: {self._report.unseeded}"
        return self._earlier + (self._report.counts - self._before)

    def _record_requests(self) -> None:
        """Put the requests so far into the manifest, where a run that is killed leaves them."""
        self._recorded = time.monotonic()
        counts = asdict(self._count_requests())
        if any(counts.values()) and counts != self._manifest.get("requests"):
            self._manifest["requests"] = counts
            with suppress(OSError):  # a full disk is reported where a row is lost by it
                self._write_manifest()

    def _finish_manifest(self, counts: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        report = cli.row_report()
        self._manifest.pop("requests", None)
        total = requests.sum_counts([counts, {"requests": asdict(self._count_requests())}])
        counts = {**cli.qualification_counts(), **counts, **total, **report.counts}
        info = {**info, **({"skipped_rows": list(report.skipped.values())} if report.skipped else {})}
        self._manifest |= {
            "status": "done",
            "inputs": [self._relative_input(entry) for entry in report.inputs],
            "counts": counts,
            "finished": _now(),
            "seconds": round(time.monotonic() - self._started, 2),
            **info,
        }
        self._write_manifest()
        self.complete, self.counts = True, counts
        return self._manifest

    def _relative_input(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What a `Source` read, its files named from the folder of the manifest: both can be moved together."""
        folder = os.path.realpath(self.manifest_path.parent)
        files = {
            os.path.relpath(os.path.realpath(name), folder) if os.path.exists(name) else name: digest
            for name, digest in entry["files"].items()
        }
        return {**entry, "files": files}

    def _write_manifest(self) -> None:
        with replace_file(self.manifest_path) as file:
            file.write(f"{json.dumps(self._manifest, indent=1, ensure_ascii=False)}\n".encode())


class Output(_Claim):
    """One JSONL output with its manifest: `<path>.partial` while it grows, `<path>` when it is finished.

    Args:
        path: the file. Its folder is created on entering; nothing is written before that.
        command: name of the command.
        fingerprint: everything that decides the rows (model, seed, sampling, hashes of template,
            constitution and input). The same fingerprint continues, or is complete; another is refused.
        overwrite: delete what is there and start again.
        inputs: paths that the output must not be.

    Attributes:
        complete: whether a run with this fingerprint finished it.
        done: ids of the rows that are in the journal.
        counts: the counts of the finished run.

    Raises InputError for another run's output, a foreign file, or a second process.
    """

    foreign_remedy = "Name another --output, or replace it with --overwrite"

    def _check_kind(self) -> None:
        if self.path.is_dir():
            raise InputError("a folder", where=self.path, expected="a file", remedy="Add a file name")

    @property
    def journal(self) -> Path:
        return Path(f"{self.path}.partial")

    @property
    def done(self) -> Set[str]:
        return self._offsets.keys()

    def _read_state(self) -> None:
        super()._read_state()
        self._offsets: dict[str, int] = {}  # where the line of each id begins in the journal
        self._end = 0  # where its last whole line ends
        if self.resuming and self.journal.exists():
            self._read_journal()

    def _read_journal(self) -> None:
        with open(self.journal, "rb") as file:
            for line, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    return  # torn: the process was killed while it wrote
                try:
                    self._offsets[json.loads(raw)["id"]] = self._end
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise InputError(
                        f"a damaged row in the journal: {shorten(raw)!r}",
                        where=self.journal,
                        line=line,
                        remedy="Delete this line and those after it, or start again with --overwrite",
                    ) from error
                self._end += len(raw)

    def _delete(self) -> None:
        for path in (self.manifest_path, self.journal, self.path, Path(f"{self.path}.tmp")):
            path.unlink(missing_ok=True)

    def _open(self) -> None:
        if not self.resuming:
            self.journal.unlink(missing_ok=True)
        elif self.journal.exists() and self.journal.stat().st_size > self._end:
            cli.warn(f"{self.journal}: the last line was torn off when the run was stopped; it is done again")
            os.truncate(self.journal, self._end)
        # Unbuffered: a row is out of our hands once written, and closing the file on a full disk cannot fail again.
        self._file = open(self.journal, "ab", buffering=0)  # noqa: SIM115, closed by _close

    def _close(self) -> None:
        if not self.complete and self.main:
            self._file.close()

    def reopen(self) -> None:
        """Continue a finished output, which is entered: rows can be added, and its own stay until `finish`."""
        shutil.copyfile(self.path, self.journal)
        self.complete, self.resuming = False, True
        self._read_journal()
        self._open()
        self._start_manifest()

    def write(self, row: Row) -> None:
        """Append one row, which has a new `id`, to the journal; it survives a kill from here on."""
        if row["id"] in self._offsets:
            raise ValueError(f"row {row['id']!r} was written before")
        line = dump_row(row)
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _full_disk(self.journal, error) from error
        self._offsets[row["id"]] = self._end
        self._end += len(line)
        if time.monotonic() - self._recorded > RECORD_EVERY:
            self._record_requests()

    def finish(
        self, order: Iterable[str], counts: dict[str, Any], amend: Callable[[Row], Row] | None = None, **info: Any
    ) -> dict[str, Any]:
        """Put the journal's rows into `order` as `<path>`, write the manifest, and return it.

        Args:
            order: ids; one that has no row is skipped (the caller counts it as failed).
            counts: numbers for the manifest, returned as `counts` when the command is run again. `requests` are those
                of other outputs, to which the requests for this one are added.
            amend: what each row becomes now that all are there; the same row if nothing changes. The journal keeps the
                rows as they were, so that a run that is stopped meanwhile ends with the same ones.
            info: more entries of the manifest.
        """
        try:
            self._file.close()
            with open(self.journal, "rb") as journal, replace_file(self.path) as file:
                for row_id in order:
                    if row_id in self._offsets:
                        journal.seek(self._offsets[row_id])
                        line = journal.readline()
                        file.write(amend_line(line, amend) if amend else line)
        except OSError as error:
            raise _full_disk(self.path, error) from error
        manifest = self._finish_manifest(counts, info)
        self.journal.unlink()
        return manifest


class WholeOutput(_Claim):
    """One JSONL output that is written at once, with its manifest; its rows need no ids."""

    foreign_remedy = Output.foreign_remedy

    def _check_kind(self) -> None:
        if self.path.is_dir():
            raise InputError("a folder", where=self.path, expected="a file", remedy="Add a file name")

    def _delete(self) -> None:
        self.manifest_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def finish(self, files: dict[PathName, Iterable[Row]], counts: dict[str, Any], **info: Any) -> dict[str, Any]:
        """Write the files, the output among them, and the manifest with the SHA-256 of each; returns the manifest."""
        for path, rows in files.items():
            try:
                write_jsonl(path, rows)
            except OSError as error:
                raise _full_disk(Path(path), error) from error
        digests = {Path(path).name: sha256_file(path) for path in files}
        return self._finish_manifest(counts, {"files": digests, **info})


class LinesOutput(WholeOutput):
    """One JSONL output that is written at once, from lines of rows that have ids: what `Output` would have written."""

    def _delete(self) -> None:
        super()._delete()
        Path(f"{self.path}.partial").unlink(missing_ok=True)

    def finish(  # type: ignore[override]
        self, lines: Iterable[bytes], count: Callable[[PathName], dict[str, Any]], **info: Any
    ) -> dict[str, Any]:
        """Write the lines whole or not at all, and the manifest with the counts of the written file; returns it."""
        try:
            with replace_file(self.path) as file:
                file.writelines(lines)
        except InputError:
            self.manifest_path.unlink(missing_ok=True)  # bad input leaves nothing behind
            raise
        except OSError as error:
            raise _full_disk(self.path, error) from error
        return self._finish_manifest(count(self.path), info)


def _full_disk(path: Path, error: OSError) -> CaiError:
    return CaiError(f"{path}: cannot write ({error}). Make room and run it again.")


class TrainingOutput(_Claim):
    """The same contract for a checkpoint folder: `<folder>.run.json`, a lock, the same refusals.

    `complete`: it was trained with this fingerprint; `resuming`: a run with this fingerprint was stopped,
    and checkpoints in the folder may be continued. `overwrite` deletes a folder only if its manifest says that it
    is ours. Under a distributed launch only rank 0 locks, deletes and writes: let the others wait for it.
    """

    foreign_remedy = "Name another --output (a folder this program did not make is never deleted)"

    def __init__(self, path: PathName, **arguments: Any):
        self.main = int(os.environ.get("RANK", "0")) == 0
        super().__init__(path, **arguments)

    def _check_kind(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError("a file", where=self.path, expected="a folder", remedy="Name another --output")
        if self.overwrite and self._exists() and not self.manifest_path.exists():
            raise self._foreign_error()

    def _exists(self) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def _delete(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        self.manifest_path.unlink(missing_ok=True)

    def finish(self, counts: dict[str, Any], **info: Any) -> dict[str, Any]:
        """Mark the folder as done; returns the manifest ({} in the other processes of a distributed run)."""
        return self._finish_manifest(counts, info) if self.main else {}


class WholeFolder(TrainingOutput):
    """A folder that is built beside its place, in `<folder>.partial`, and renamed when all of it is there."""

    def build(self, write: Callable[[Path], None], counts: dict[str, Any], **info: Any) -> dict[str, Any]:
        """Have `write` fill an empty folder, put it in its place, and write the manifest, which is returned.

        The manifest has the SHA-256 of every file but weights.
        """
        partial = Path(f"{os.fspath(self.path).rstrip('/')}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            if self.path.exists():  # empty, or by a run that was stopped before it wrote the manifest
                shutil.rmtree(self.path)
            os.replace(partial, self.path)
        except OSError as error:
            raise _full_disk(partial, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        written = sorted(path for path in self.path.rglob("*") if path.is_file() and path.suffix != ".safetensors")
        digests = {str(path.relative_to(self.path)): sha256_file(path) for path in written}
        return self.finish(counts, files=digests, **info)


claim_folder = TrainingOutput  # the name that the commands use
