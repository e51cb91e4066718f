"""Peak memory of judge.py over many pairs: ids are held, rows are not.

    python tests/benchmarks/flat_memory.py 20000 200000

Each size is judged in a process of its own, by the command itself, on pairs of two short responses; only the model
is left out (an engine that answers by the length of what it is shown), while its libraries are loaded as they would
be. Prints the peaks in MB and what a further pair adds in bytes.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Counting:
    """Stands for a model: the answer hangs on the conversation's length alone."""

    batch_size, context, scores_choices = 128, None, True

    def score(self, requests, labels):
        for request in requests:
            odd = len(request.conversation[0]["content"]) % 2
            yield request, [-0.1 - odd, -1.1 + odd]


def judge(pairs: int, folder: Path, libraries: bool) -> float:
    """Judge so many pairs and return this process' peak in MB."""
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
    from unittest import mock

    from click.testing import CliRunner
    from conftest import load_command

    from cai.base.paths import TINY

    if libraries:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    rows = folder / "pairs.jsonl"
    with open(rows, "w") as file:
        for n in range(pairs):
            file.write(
                json.dumps(
                    {
                        "id": f"pair-{n:06d}",
                        "prompt": f"How do I open gate number {n}?",
                        "response_a": f"Ask the owner of gate {n}, and wait. " * 12,
                        "response_b": f"Push it {n} times. " * 12,
                    }
                )
                + "\n"
            )
    command = load_command("judge")
    with mock.patch.object(sys.modules["command_judge"], "load_engine", lambda *_, **__: Counting()):
        result = CliRunner().invoke(
            command, ["--input", str(rows), "--model", str(TINY), "--output", str(folder / "out.jsonl"), "--json"]
        )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pairs"] == pairs
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure(pairs: int, libraries: bool = True) -> float:
    """The peak in MB of judging so many pairs, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", str(pairs), folder, str(int(libraries))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return float(done.stdout)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(judge(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1"))
    else:
        sizes = [int(size) for size in sys.argv[1:]] or [20_000, 200_000]
        peaks = [measure(size) for size in sizes]
        for size, peak in zip(sizes, peaks, strict=True):
            print(f"{size:>8} pairs  {peak:7.0f} MB  {100 * (peak / peaks[0] - 1):+.1f} %")
        if len(sizes) > 1:
            print(f"{(peaks[-1] - peaks[0]) * 2**20 / (sizes[-1] - sizes[0]):.0f} bytes for each further pair")
