"""Fixtures that all tests share: commands through CliRunner, and small real models."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# what a test is about is rarely whether its model is fit: tests/evaluate/test_qualification.py switches it on
os.environ.setdefault("CAI_QUALIFICATION", "off")
# two workers share two cores: more threads would stall each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a shell script starts what it puts in the background with Ctrl-C ignored, and commands that the tests start inherit it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def load_command(name: str):
    """The click command `main` of scripts/<name>.py."""
    module_name = f"command_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name].main


@pytest.fixture
def invoke():
    """`invoke("critique", "--input", path, ...)` runs a command in process and returns its result."""
    from click.testing import CliRunner

    def call(name: str, *args):
        return CliRunner().invoke(load_command(name), [str(a) for a in args])

    return call


@pytest.fixture
def shared_data():
    """The folder of public files beside the project; a test that needs it is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no folder of public files (shared/data) beside the project")
    return SHARED
