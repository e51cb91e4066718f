"""Peak memory and time of a few steps of reward_model.py, sft.py or dpo.py on real pairs, by the command itself.

    python tests/benchmarks/training_memory.py ../shared/data/hh-rlhf/harmless-base.test.first1500.jsonl.gz
    python tests/benchmarks/training_memory.py PAIRS --model MODEL --command sft --rows 64 --full

PAIRS are preferences in any format that the commands read. Without --model it trains random weights of the shape of
SmolLM2-135M, whose texts are bytes (each pair is about five times as long in tokens as with a real tokenizer, so
pairs over --max-length are left out). Prints a line of JSON: the command, peak MB of the whole process, seconds and
seconds per row. What Python and its libraries take without a model (about 700 MB) is included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

SMOLLM2 = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
)
VOCABULARY = 49_152


def build_model(folder: Path) -> str:
    """Random weights of that shape, with a tokenizer of bytes; returns their folder."""
    import models
    from transformers import AutoModelForCausalLM

    models.build("llama", folder, **SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    model.save_pretrained(folder)
    return str(folder)


def write_rows(pairs: str, command: str, rows: int, folder: Path) -> list[str]:
    """The first pairs as a file for the command; returns its arguments."""
    from cai.data.readers import read_rows

    chosen = [row for row, _ in zip((row for _, row in read_rows(pairs)), range(rows), strict=False)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    if command != "sft":
        more = ["--default-label", "1", "--holdout", "0"] if command == "reward_model" else []
        return ["--input", str(file), *more]
    return ["--helpful", str(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--model")
    parser.add_argument("--command", choices=["reward_model", "sft", "dpo"], default="reward_model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="train all weights instead of adapters")
    parser.add_argument("--root", default=str(ROOT), help="another checkout, to compare with")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or build_model(Path(folder) / "model")
        arguments = write_rows(options.pairs, options.command, options.rows, Path(folder))
        line = [sys.executable, f"{options.root}/scripts/{options.command}.py", *arguments, "--model", model]
        line += [
            "--output",
            f"{folder}/out",
            "--device",
            "cpu",
            "--full" if options.full else "--lora",
            "--json",
            *more,
        ]
        start = time.monotonic()
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - start
        if done.returncode:
            sys.exit(done.returncode)
        counts = json.loads(done.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(
        json.dumps(
            {
                "command": options.command,
                "peak_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
                "loss": counts["loss"],
                "steps": counts["steps"],
                "seconds": round(seconds, 1),
                "training_seconds_per_row": round(counts["seconds"] / options.rows, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
