"""Commands in several processes, as a launcher starts them."""

import os
import subprocess
import sys

import psutil
from conftest import ROOT


def launch(script, *line, processes=2, **options):
    """Run a step under `accelerate launch` on the CPU, one thread per process."""
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    # --multi_gpu is how accelerate is told to start several; --device cpu is what makes them use the CPU.
    return subprocess.run(
        [*start, str(ROOT / "scripts" / f"{script}.py"), *map(str, line)],
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **options,
    )


def launch_sharded(script, *line, config="fsdp2", **options):
    """Start a training command under a configuration of templates/accelerate, in two CPU processes; returns Popen."""
    start = ["accelerate.commands.launch", "--config_file", str(ROOT / "templates" / "accelerate" / f"{config}.yaml")]
    start += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    command = [str(ROOT / "tests" / "sharded_on_cpu.py"), str(ROOT / "scripts" / f"{script}.py"), "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", *start, *command, *map(str, line)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **options,
    )


def kill(process):
    """Kill a launcher and its processes, which have sessions of their own."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    return process.communicate()
