"""The lock beside an output. A second process and a killed one are tested in test_sources.py."""

import errno
import os

import filelock
import pytest

from cai.base.errors import InputError
from cai.data.kinds import AXES, KINDS, axis_of
from cai.data.locks import OutputLock


def test_the_lock_file_has_the_pid_and_is_removed(tmp_path):
    lock = OutputLock(tmp_path / "out.jsonl")
    lock.acquire()
    assert lock.path.read_text() == str(os.getpid()) and lock.path.name == "out.jsonl.lock"
    with pytest.raises(InputError, match=rf"another process \({os.getpid()}\) is writing it"):
        OutputLock(tmp_path / "out.jsonl").acquire()
    with pytest.raises(InputError, match="another process"):
        OutputLock(f"{tmp_path}/out.jsonl/").check()
    lock.release()
    assert not lock.path.exists()
    lock.release()


def test_a_lock_file_that_a_killed_process_left_is_no_obstacle(tmp_path):
    (tmp_path / "out.jsonl.lock").write_text("999999")
    lock = OutputLock(tmp_path / "out.jsonl")
    lock.check()
    lock.acquire()
    assert lock.path.read_text() == str(os.getpid())
    lock.release()
    assert not lock.path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    def acquire(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    lock = OutputLock(tmp_path / "out.jsonl")
    lock.acquire()
    lock.release()
    assert "this file system has no locks; run one process at a time on it" in capsys.readouterr().err
    assert not lock.path.exists()


def test_every_kind_is_on_one_axis():
    assert [axis_of(kind) for kind in KINDS] == ["harmlessness", "helpfulness", "helpfulness"]
    assert sorted(kind for kinds in AXES.values() for kind in kinds) == sorted(KINDS)
