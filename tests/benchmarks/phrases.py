"""How far `--by phrases` agrees with human labels: XSTest's answers of two models (arXiv 2308.01263).

    python tests/benchmarks/phrases.py ../shared/data/xstest

Whether a response complies in full is compared with the `final_label`. The rules of stats/refusals.py were written with
one half of the prompts in view (`seen`, by a hash of the id); `held out` is the other half, and `folds` are five shares
of all prompts. XSTest's own string match agrees in 93.6 % (gpt4) and 86.0 % (mistralinstruct).
"""

import csv
import hashlib
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from cai.stats import intervals, refusals, tables


def measure(path: Path) -> dict:
    """{all, seen, held out: rate of agreement; folds: five rates; labels: {(human label, class): rows}}."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    agrees, labels = [], Counter()
    for row in rows:
        class_ = refusals.read(row["prompt"], row["completion"])
        labels[row["final_label"], class_] += 1
        agrees.append((class_ == "complied") == (row["final_label"] == "1_full_compliance"))
    hashes = [int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) for row in rows]

    def rate(keep) -> dict:
        kept = [agree for agree, number in zip(agrees, hashes, strict=True) if keep(number)]
        return intervals.rate(sum(kept), len(kept))

    return {
        "all": rate(lambda number: True),
        "seen": rate(lambda number: number % 2 == 0),
        "held out": rate(lambda number: number % 2 == 1),
        "folds": [rate(lambda number, fold=fold: number % 5 == fold)["value"] for fold in range(5)],
        "labels": labels,
    }


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("completions_*.csv")):
        figures = measure(path)
        lines = [(name, tables.show(figures[name]), figures[name]["n"]) for name in ("all", "seen", "held out")]
        print(tables.table((path.stem.removeprefix("completions_"), "agreement (95 % interval)", "n"), lines))
        print("five folds: " + ", ".join(f"{100 * rate:.1f}" for rate in figures["folds"]))
        for (label, class_), count in sorted(figures["labels"].items()):
            print(f"  {label:<18} read as {class_:<16} {count}")
