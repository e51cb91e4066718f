"""A lock file beside an output, so that one process at a time writes it.

    lock = OutputLock("responses.jsonl")
    lock.acquire()
    lock.release()

The library `filelock` takes the lock, on any system that Python runs on. A process that is killed loses its lock, so
the file that it leaves behind is no obstacle. Leaves out waiting: a second process is refused at once.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cai.base import cli
from cai.base.errors import InputError


class OutputLock:
    """`<output>.lock`, held by one process, whose pid it contains."""

    def __init__(self, output: str | os.PathLike[str]):
        self.output = os.fspath(output)
        self.path = Path(f"{self.output.rstrip('/')}.lock")
        self._lock = FileLock(self.path, thread_local=False, fallback_to_soft=False)
        self._held = False

    def check(self) -> None:
        """Raise InputError if another process holds the lock."""
        with suppress(OSError):
            if self.path.exists():
                self._acquire(seconds=0.1)  # another process may be checking at this moment
                self._lock.release()

    def acquire(self) -> None:
        """Take the lock and write our pid into its file.

        Raises InputError if another process holds it, OSError if the file cannot be written.
        """
        self._acquire()
        self._held = True
        with suppress(PermissionError):  # Windows: nobody writes to a locked file
            self.path.write_text(str(os.getpid()), encoding="utf-8")

    def release(self) -> None:
        """Remove the lock file and release the lock; nothing if it is not held."""
        if self._held:
            self._held = False
            with suppress(PermissionError):  # Windows: `filelock` removes the file
                self.path.unlink(missing_ok=True)
            self._lock.release()

    def _acquire(self, seconds: float = 0) -> None:
        try:
            self._lock.acquire(timeout=seconds, poll_interval=0.02)
        except Timeout as error:
            if not self.path.exists():  # its holder has just finished
                return self._acquire(seconds)
            pid = ""
            with suppress(OSError):
                pid = self.path.read_text(encoding="utf-8").strip()
            raise InputError(
                f"another process ({pid or 'pid unknown'}) is writing it",
                where=self.output,
                remedy="Wait for it or stop it, or name another --output",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            cli.warn(f"{self.output}: this file system has no locks; run one process at a time on it")
