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
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.data.readers import type_name


def write_jsonl(path, rows: Iterable[dict]) -> None:
    """Write the rows whole or not at all: into a file beside it, which then takes its place."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        for row in rows:
            file.write(dump_row(row))
    os.replace(temporary, path)


def csv_cell(value):
    """A value for a cell of a CSV file: text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def dump_row(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def read_manifest(path) -> dict | None:
    """The manifest of an output (`<path>.run.json`), or None if it has none."""
    manifest = Path(f"{os.fspath(path).rstrip('/')}.run.json")
    if not manifest.exists():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        kinds = {"fingerprint": dict, "status": str, "counts": dict, "resumed": int, "started": str}
        if not isinstance(content, dict) or "fingerprint" not in content:
            problem = "no fingerprint in it"
        elif wrong := [name for name, kind in kinds.items() if not isinstance(content.get(name, kind()), kind)]:
            problem = f"its {wrong[0]} is a {type_name(content[wrong[0]])}"
        else:
            return content
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise InputError(f"not a manifest ({problem})", where=manifest, remedy="Delete it with its output")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "datasets", "accelerate", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Claim:
    """What a file and a folder of output share: the manifest, the lock, and the decision to go on.

    Making one reads only; entering it (`with`) takes the lock and writes the manifest.
    """

    main = True  # False in the other processes of a distributed run: they neither lock nor write

    def __init__(self, path, *, command: str, fingerprint: dict, overwrite: bool = False, inputs: Sequence[str] = ()):
        self.path = Path(os.fspath(path))
        base = os.fspath(path).rstrip("/")
        self.manifest_path, self.lock_path = Path(f"{base}.run.json"), Path(f"{base}.lock")
        self.command, self.overwrite = command, overwrite
        self.fingerprint = json.loads(json.dumps(fingerprint))
        for name in inputs:
            if os.path.realpath(name) == os.path.realpath(self.path):
                raise InputError("the output is one of the inputs", where=path, remedy="Name another output")
        self._lock = None
        if self.main:
            self._refuse_second()
        self._look()

    def _look(self) -> None:
        """Set `complete`, `resuming` and `counts` from what is on disk; refuse another's."""
        self._check_kind()
        self.complete, self.resuming, self.counts = False, False, {}
        self._earlier = {}
        if self.overwrite:
            return
        manifest = read_manifest(self.path)
        if manifest is None:
            if self._exists():
                raise self._foreign()
            return
        self._compare(manifest)
        self.complete = manifest.get("status") == "done" and self._exists()
        self.resuming = manifest.get("status") == "running"
        self.counts = manifest.get("counts", {}) if self.complete else {}
        self._earlier = manifest if self.resuming else {}

    def _foreign(self) -> InputError:
        return InputError(
            "it exists, and no manifest says how it was made", where=self.path, remedy=self._foreign_remedy
        )

    def _compare(self, manifest: dict) -> None:
        before = {"command": manifest.get("command"), **manifest["fingerprint"]}
        now = {"command": self.command, **self.fingerprint}
        differing = [
            f"{key} was {shorten(json.dumps(before.get(key)))}, now {shorten(json.dumps(now.get(key)))}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise InputError(
                f"made by a run that differs: {'; '.join(differing)}",
                where=self.path,
                remedy="Run it as before, name another --output, or start anew with --overwrite",
            )

    def _refuse_second(self) -> None:
        """A running owner is refused at once, before a model is loaded."""
        with suppress(OSError), open(self.lock_path, "rb") as file:
            self._flock(file, fcntl.LOCK_SH)

    def _flock(self, file, kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = self.lock_path.read_text().strip() if self.lock_path.exists() else ""
            raise InputError(
                f"another process ({pid or 'pid unknown'}) is writing it",
                where=self.path,
                remedy="Wait for it or stop it, or name another --output",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            cli.warn(f"{self.path}: this file system has no locks; run one process at a time on it")

    def __enter__(self):
        if not self.main:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise InputError(f"cannot write ({error})", where=self.path, remedy="Check --output") from error
        try:
            self._look()  # again: another process may have been at it before we had the lock
            if self.overwrite:
                self._delete()
            if not self.complete:
                self._open()
                self._started = time.monotonic()
                self._manifest = {
                    "status": "running",
                    "command": self.command,
                    "command_line": cli.command_line(),
                    "fingerprint": self.fingerprint,
                    "versions": _versions(),
                    "started": self._earlier.get("started", _now()),
                    "resumed": self._earlier.get("resumed", -1) + 1,
                }
                self._write_manifest()
        except BaseException:
            self._release()
            raise
        return self

    def _take_lock(self) -> None:
        while True:
            lock = open(self.lock_path, "a+")  # noqa: SIM115, held until _release
            try:
                self._flock(lock, fcntl.LOCK_EX)
                # The owner before us removes its lock file: ours may be that removed one.
                if self.lock_path.exists() and os.fstat(lock.fileno()).st_ino == self.lock_path.stat().st_ino:
                    break
            except BaseException:
                lock.close()
                raise
            lock.close()
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def __exit__(self, *_):
        self._close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self.lock_path.unlink(missing_ok=True)
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def _write_manifest(self) -> None:
        temporary = Path(f"{self.manifest_path}.tmp")
        text = json.dumps(self._manifest, indent=1, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
        os.replace(temporary, self.manifest_path)

    def _finish_manifest(self, counts: dict, info: dict) -> dict:
        self._manifest |= {
            "status": "done",
            "counts": counts,
            "finished": _now(),
            "seconds": round(time.monotonic() - self._started, 2),
            **info,
        }
        self._write_manifest()
        self.complete, self.counts = True, counts
        return self._manifest

    def _open(self) -> None: ...

    def _close(self) -> None: ...


class Output(_Claim):
    """One JSONL output with its manifest: `<path>.partial` while it grows, `<path>` when it is finished.

    Args:
        path: the file. Its folder is made on entering; nothing is written before that.
        command: name of the command.
        fingerprint: everything that decides the rows (model, seed, sampling, hashes of template,
            constitution and input). The same fingerprint continues, or is complete; another is refused.
        overwrite: delete what is there and start anew.
        inputs: paths that the output must not be.

    Attributes:
        complete: whether a run with this fingerprint finished it.
        done: ids of the rows that are in the journal.
        counts: the counts of the finished run.

    Raises InputError for another run's output, a foreign file, or a second process.
    """

    _foreign_remedy = "Name another --output, or replace it with --overwrite"

    def _check_kind(self) -> None:
        if self.path.is_dir():
            raise InputError("a folder", where=self.path, expected="a file", remedy="Add a file name")

    def _exists(self) -> bool:
        return self.path.exists()

    @property
    def journal(self) -> Path:
        return Path(f"{self.path}.partial")

    @property
    def done(self) -> Set[str]:
        return self._offsets.keys()

    def _look(self) -> None:
        super()._look()
        self._offsets, self._end = {}, 0
        if self.resuming:
            self._offsets, self._end = self._read_journal()

    def _read_journal(self) -> tuple[dict[str, int], int]:
        """({id: offset of its line}, offset after the last whole line)."""
        offsets, end = {}, 0
        if not self.journal.exists():
            return offsets, end
        with open(self.journal, "rb") as file:
            for line, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break  # torn: the process was killed while it wrote
                try:
                    offsets[json.loads(raw)["id"]] = end
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise InputError(
                        f"a damaged row in the journal: {shorten(raw)!r}",
                        where=self.journal,
                        line=line,
                        remedy="Delete this line and those after it, or start anew with --overwrite",
                    ) from error
                end += len(raw)
        return offsets, end

    def _delete(self) -> None:
        for path in (self.manifest_path, self.journal, self.path, Path(f"{self.path}.tmp")):
            path.unlink(missing_ok=True)

    def _open(self) -> None:
        if not self.resuming:
            self.journal.unlink(missing_ok=True)
        elif self.journal.exists() and self.journal.stat().st_size > self._end:
            cli.warn(f"{self.journal}: the last line was torn off when the run was stopped; it is done again")
            os.truncate(self.journal, self._end)
        # Unbuffered: a row is out of our hands once written, and closing a full disk's file can't fail again.
        self._file = open(self.journal, "ab", buffering=0)  # noqa: SIM115, closed by _close

    def _close(self) -> None:
        if not self.complete and self.main:
            self._file.close()

    def write(self, row: dict) -> None:
        """Append one row, which has a new `id`, to the journal; it survives a kill from here on."""
        if row["id"] in self._offsets:
            raise ValueError(f"row {row['id']!r} was written before")
        line = dump_row(row)
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise CaiError(f"{self.journal}: cannot write ({error}). Make room and run it again.") from error
        self._offsets[row["id"]] = self._end
        self._end += len(line)

    def finish(self, order: Iterable[str], counts: dict, **info) -> dict:
        """Put the journal's rows into `order` as `<path>`, write the manifest, and return it.

        Args:
            order: ids; one that has no row is passed over (the caller counts it as failed).
            counts: numbers for the manifest, given back as `counts` when the command is run again.
            info: more for the manifest.
        """
        temporary = Path(f"{self.path}.tmp")
        try:
            self._file.close()
            with open(self.journal, "rb") as journal, open(temporary, "wb") as file:
                for row_id in order:
                    if row_id in self._offsets:
                        journal.seek(self._offsets[row_id])
                        file.write(journal.readline())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CaiError(f"{temporary}: cannot write ({error}). Make room and run it again.") from error
        os.replace(temporary, self.path)
        manifest = self._finish_manifest(counts, info)
        self.journal.unlink()
        return manifest


class TrainingOutput(_Claim):
    """The same contract for a checkpoint folder: `<folder>.run.json`, a lock, the same refusals.

    `complete`: it was trained with this fingerprint; `resuming`: a run with this fingerprint was stopped,
    and checkpoints in the folder may be continued. `overwrite` deletes only a folder that a manifest says
    is ours. Under a distributed launch only rank 0 locks, deletes and writes: let the others wait for it.
    """

    _foreign_remedy = "Name another --output (a folder this program did not make is never deleted)"

    def __init__(self, path, **arguments):
        self.main = int(os.environ.get("RANK", "0")) == 0
        super().__init__(path, **arguments)

    def _check_kind(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError("a file", where=self.path, expected="a folder", remedy="Name another --output")
        if self.overwrite and self._exists() and not self.manifest_path.exists():
            raise self._foreign()

    def _exists(self) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def _delete(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
        self.manifest_path.unlink(missing_ok=True)

    def finish(self, counts: dict, **info) -> dict:
        """Mark the folder as done; returns the manifest ({} in the other processes of a distributed run)."""
        return self._finish_manifest(counts, info) if self.main else {}


def claim_folder(
    path, *, command: str, fingerprint: dict, overwrite: bool = False, inputs: Sequence[str] = ()
) -> TrainingOutput:
    """A `TrainingOutput` for the folder; see there."""
    return TrainingOutput(path, command=command, fingerprint=fingerprint, overwrite=overwrite, inputs=inputs)
