"""The rates of a run at each stage, base / after SFT / after RL, as JSON and as tables.

    print(stage_table(read_stages({"evaluate-base": "evaluation-base.jsonl", ...})["stages"]))

Leaves out the report (report/run_folder.py), which shows more.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai.data.kinds import KINDS
from cai.data.outputs import read_manifest
from cai.evaluate import framed
from cai.evaluate.rates import RATES, read_rates
from cai.stats import refusals, tables

STAGES = {"base": "base", "sft": "after SFT", "ppo": "after PPO", "dpo": "after DPO", "grpo": "after GRPO"}

Stages = Mapping[str, Mapping[str, Mapping[str, Any]]]  # stage -> rate -> {value, low, high, n}


def read_stages(outputs: Mapping[str, str]) -> dict[str, Any]:
    """{stages, judge, report} of a finished run; `outputs`: name of each step to what it wrote."""
    stages = {stage: read_rates(outputs[f"evaluate-{stage}"]) for stage in STAGES if f"evaluate-{stage}" in outputs}
    judge = read_manifest(outputs["preferences"]) if "preferences" in outputs else None
    return {"stages": stages, "judge": judge and judge["counts"], "report": outputs["report"]}


def stage_table(stages: Stages) -> str:
    """A column per stage, a row per rate, under a heading per kind of prompt; frames together come last."""

    def rows() -> Iterator[tuple[str, ...]]:
        for kind in KINDS:
            names = [name for name, (of, _) in RATES.items() if of == kind]
            names += [f"{kind}_{name}" for name in refusals.CLASSES]  # of responses read by their phrases
            names = [name for name in names if all(name in rates for rates in stages.values())]
            if not names:
                continue
            n = next(iter(stages.values()))[names[0]]["n"]
            yield (f"{kind} prompts (n = {n})", *([""] * len(stages)))
            for name in names:
                yield (f"  {name.replace('_', ' ')}", *(tables.show(rates[name]) for rates in stages.values()))
        yield from framed.stage_rows(stages)

    return tables.table(("", *(STAGES[stage] for stage in stages)), list(rows()))


def spread_over_seeds(runs: Sequence[Stages]) -> dict[str, dict[str, dict[str, float]]]:
    """{stage: {rate: {mean, lowest, highest, seeds}}} of the same run with several seeds."""

    def spread(stage: str, name: str) -> dict[str, float]:
        values = [stages[stage][name]["value"] for stages in runs]
        return {"mean": sum(values) / len(values), "lowest": min(values), "highest": max(values), "seeds": len(values)}

    return {stage: {name: spread(stage, name) for name in rates} for stage, rates in runs[0].items()}


def spread_table(spread: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A column per stage, a row per rate: mean and range in %."""

    def show(rate: Mapping[str, float]) -> str:
        mean, lowest, highest = (100 * rate[name] for name in ("mean", "lowest", "highest"))
        return f"{mean:.1f} ({lowest:.1f}–{highest:.1f})"

    names = next(iter(spread.values()))
    names = [name for name in names if not framed.is_single(name) and not framed.is_of_kind(name)]
    rows = ((name.replace("_", " "), *(show(rates[name]) for rates in spread.values())) for name in names)
    return tables.table(("", *(STAGES[stage] for stage in spread)), rows)
