"""Commands killed at random instants and run again: a fast share of what tests/benchmarks/crash.py does at length."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_killed_at_random_instants_nothing_is_lost_and_nothing_twice():
    only = [part for name in ("generate", "revise", "judge", "sft") for part in ("--only", name)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "benchmarks/crash.py"), "--kills", "24", "--json", *only],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert not found["failures"] and found["total"]["kills"] == 24
    assert found["total"]["killed with rows written"], "no kill fell on the work: draw other instants"
    assert found["total"]["runs"] >= 4


def test_help_loads_no_torch():
    code = "import sys; sys.argv = ['crash', '--help']; import crash\ntry: crash.main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'models' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/tests{os.pathsep}{ROOT}/tests/benchmarks"},
    )
    assert done.returncode == 0 and "--kills" in done.stdout, done.stderr


def test_what_a_long_run_found_is_set_against_the_promises():
    import long_run

    step = {"growth": 0.1, "last_tenth_per_row_to_second": 1.5, "seconds_to_first_new_row": 9.9, "same_bytes": True}
    assert all(held for _, held in long_run.promises([step, step]).values())
    worse = {"growth": 0.11, "last_tenth_per_row_to_second": 1.6, "seconds_to_first_new_row": 10, "same_bytes": False}
    for name, value in worse.items():
        kept = long_run.promises([step, {**step, name: value}])
        assert [figure for figure, held in kept.values() if not held] == [value]
