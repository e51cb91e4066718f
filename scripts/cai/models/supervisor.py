"""A process between a command and the engine that it started: it ends the engine when the command ends.

    python -P supervisor.py PID GRACE COMMAND...

PID is the command's process. The supervisor holds the reading end of a pipe as its stdin: it is closed when the command
closes it, exits, or is killed. Then, or if the command is no longer its parent, the engine and whatever it has started
get SIGTERM, and after GRACE seconds SIGKILL. If the engine ends by itself, the rest of its processes are ended and the
supervisor exits with its code, 128 + n after signal n. If the supervisor itself is killed, Linux kills the engine.

Imports nothing of this project, so that it starts at once. Leaves out starting again (managed.py).
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)

POLL = 0.25  # seconds


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _prepare_engine() -> None:
    """In the engine's process, before its program begins: ordinary signals, and SIGKILL when the supervisor ends."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _children() -> list[int]:
    """Our children, among them what was orphaned below us; [] where the system does not list them."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except (OSError, ValueError):
        return []


def _signal_group(engine: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(engine.pid, number)


def _group_lives(engine: subprocess.Popen[bytes]) -> bool:
    try:
        os.killpg(engine.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # macOS reports it for a group of zombies
    return True


def _end_engine(engine: subprocess.Popen[bytes], grace: float) -> None:
    """End the engine's group, and then what has left the group."""
    _signal_group(engine, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and (engine.poll() is None or _group_lives(engine)):
        _reap(engine)
        time.sleep(0.05)
    _signal_group(engine, signal.SIGKILL)
    engine.wait()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and (orphans := _children()):
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap(engine)
        time.sleep(0.01)


def _reap(engine: subprocess.Popen[bytes]) -> None:
    """Take away orphans that have ended, which would count as members of the group."""
    for pid in _children():
        if pid != engine.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def main() -> int:
    parent, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal: the command decides
        signal.signal(number, signal.SIG_IGN)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        engine = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_prepare_engine)
    except OSError as error:
        print(f"{command[0]} can't be started: {error}", flush=True)
        return 127
    while not stopping and os.getppid() == parent and engine.poll() is None:
        if select.select([0], [], [], POLL)[0]:
            break
    ended = engine.poll()
    _end_engine(engine, grace)
    if ended is None:
        return 0
    return ended if ended >= 0 else 128 - ended


if __name__ == "__main__":
    sys.exit(main())
