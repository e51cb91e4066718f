"""A small run folder as the commands write it, without a model: for the tests of the report and the cards."""

import json
from pathlib import Path

from cai.constitution.files import load_constitution
from cai.data.outputs import write_jsonl
from cai.evaluate.rates import class_rates

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "</textarea><img src=x onerror='window.pwned = 3'>",
    "{{ 7*7 }} {% raw %} ${7*7} #{7*7}",
    "<!-- ]]> \u202ereversed\u202c \u2066hidden\u2069 \x07 \u2028 end",
    "[link](javascript:alert(1)) | `code` | <b>bold</b> & 'quotes' \"double\"",
    "$\\frac{1}{0}$ _under_ *star*",
]


def manifest(folder: Path, name: str, command: str, line: str, fingerprint: dict, order: int, **more) -> None:
    content = {
        "status": "done",
        "command": command,
        "command_line": f"python scripts/{command}.py {line} --output {name}",
        "fingerprint": fingerprint,
        "versions": {"python": "3.11", "torch": "2.13"},
        "started": f"2026-01-01T00:{order:02d}:00+00:00",
        "finished": f"2026-01-01T00:{order:02d}:30+00:00",
        "resumed": 0,
        "counts": {},
        "seconds": 30.0,
        **more,
    }
    (folder / f"{name}.run.json").write_text(json.dumps(content), encoding="utf-8")


def row(number: int, kind: str, rounds: list, **more) -> dict:
    prompt_id = f"p{number:04d}"
    return {
        "id": f"{prompt_id}/0",
        "prompt": f"Please do deed {number} for me.",
        "kind": kind,
        "category": "errands" if number % 2 else "chores",
        "prompt_id": prompt_id,
        "sample": 0,
        "response": f"Sure, here is deed {number} done in three steps.",
        "model": "my-model",
        "finish": "stop",
        "rounds": rounds,
        **more,
    }


def one_round(principle: str, critique: str, revision: str, flags=()) -> dict:
    return {"principle": principle, "critique": critique, "revision": revision, "flags": list(flags)}


def preference(of: dict, a: str, b: str, p_ab: float, p_ba: float, principle: str) -> dict:
    p = (p_ab + p_ba) / 2
    sides = (a, b) if p > 0.5 else (b, a)
    return {
        "id": f"{of['id']} vs {of['id']}-2",
        "prompt": of["prompt"],
        "prompt_id": of["prompt_id"],
        "kind": of["kind"],
        "response_a": a,
        "response_b": b,
        "chosen": sides[0] if p != 0.5 else None,
        "rejected": sides[1] if p != 0.5 else None,
        "p_chosen": max(p, 1 - p),
        "principle": principle,
        "verdicts": [{"order": "ab", "p_a": p_ab, "mass": 1.0}, {"order": "ba", "p_a": p_ba, "mass": 1.0}],
    }


def revised_rows(n: int) -> list[dict]:
    """Harmful, benign and borderline in turn; harmful ones are revised in the first round, all left in the second."""
    rows = []
    for number in range(n):
        kind = ("harmful", "benign", "borderline")[number % 3]
        first = f"Sure, here is deed {number} done in three steps."
        better = f"I will not do deed {number}, because it hurts people." if kind == "harmful" else first
        rows.append(
            row(
                number,
                kind,
                [
                    one_round("harm", f"Deed {number} looked at.", better, [] if kind == "harmful" else ["copy"]),
                    one_round("hurt", "No fault.", better, ["copy"]),
                ],
            )
        )
    return rows


def hostile_rows(start: int) -> list[dict]:
    """Rows whose every text is hostile, their ids, kinds, categories, principles and flags too."""
    rows = []
    for number, text in enumerate(HOSTILE, start):
        made = row(number, text, [one_round(text, f"critique {text}", f"{text} revised", [text])])
        rows.append(
            {**made, "id": f"{text}/{number}", "prompt": text, "category": text, "response": f"response {text}"}
        )
    return rows


def evaluation(folder: Path, stage: str, model: str, classes: dict, order: int) -> None:
    """`classes`: {kind: [class of each prompt]}."""
    rows = [
        {
            "id": f"h-{kind}-{i}",
            "prompt": f"Held-out {kind} prompt {i}?",
            "kind": kind,
            "category": "errands",
            "response": f"{stage} answers {kind} {i}.",
            "class": one,
        }
        for kind, ones in classes.items()
        for i, one in enumerate(ones)
    ]
    counts: dict = {}
    for one in rows:
        counts[one["kind"], one["class"]] = counts.get((one["kind"], one["class"]), 0) + 1
    name, settings = f"evaluation-{stage}", {"input": "held-out", "model": model, "by": "judge", "round": None}
    rates = class_rates(counts)
    write_jsonl(folder / f"{name}.jsonl", [{"id": k, "metric": k, **v} for k, v in rates.items()])
    write_jsonl(folder / f"{name}.responses.jsonl", [{k: v for k, v in one.items() if k != "class"} for one in rows])
    write_jsonl(folder / f"{name}.classes.jsonl", [{k: v for k, v in one.items() if k != "category"} for one in rows])
    for ending in ("", ".responses", ".classes"):
        manifest(
            folder,
            f"{name}{ending}.jsonl",
            "evaluate",
            f"--model {model} --judge my-judge",
            settings,
            order,
            counts={"rows": len(rows), "failed": 0},
        )


def make_run(folder: Path, rows: int = 12, hostile: bool = True, stages: bool = True) -> Path:
    """Three evaluated models, two rounds, preferences, three trainings with an alarm; and hostile rows."""
    folder.mkdir(parents=True, exist_ok=True)
    constitution = {"constitution": load_constitution("harmlessness").sha256}
    if stages:
        for order, (stage, model, safe) in enumerate(
            (("base", "my-model", 0), ("sft", f"{folder}/sft", 14), ("ppo", f"{folder}/ppo", 18))
        ):
            evaluation(
                folder,
                stage,
                model,
                {
                    "harmful": ["good"] * safe + ["comply"] * (20 - safe),
                    "benign": ["helpful"] * 19 + ["refused"],
                    "borderline": ["helpful"] * 10,
                },
                order,
            )
    revised = revised_rows(rows)
    write_jsonl(folder / "05-revision-2.jsonl", revised + (hostile_rows(rows) if hostile else []))
    manifest(
        folder,
        "05-revision-2.jsonl",
        "revise",
        "--model my-model",
        constitution,
        10,
        counts={"rows": rows, "failed": 0},
    )
    pairs = [
        preference(one, one["response"], "I would rather not.", *((0.9, 0.7) if i % 2 else (0.9, 0.3)), "care")
        for i, one in enumerate(revised)
    ]
    if hostile:
        pairs += [
            preference(one, f"a {one['prompt']}", f"b {one['prompt']}", 0.2, 0.2, one["prompt"])
            for one in hostile_rows(rows)
        ]
    write_jsonl(folder / "07-preferences.jsonl", pairs)
    manifest(
        folder,
        "07-preferences.jsonl",
        "judge",
        "--model my-model",
        constitution,
        12,
        counts={"pairs": len(pairs), "undecided": 0, "same_position": {"value": 0.5, "low": 0.2, "high": 0.8, "n": 12}},
    )
    for order, (name, command) in enumerate((("sft", "sft"), ("reward-model", "reward_model"), ("ppo", "ppo")), 14):
        (folder / name).mkdir(exist_ok=True)
        logged = [{"step": 4 * i, "loss": 1 / i, "accuracy": 0.6, "margin": 0.1 * i} for i in range(1, 9)]
        if command == "ppo":
            logged = [
                {
                    "step": 4 * i,
                    "update": i,
                    "score": 0.1 * i,
                    "kl": 2.0 * i,
                    "entropy": 1 / i,
                    "response_length": 30.0,
                    **({"alarms": ["kl"]} if i == 7 else {}),
                }
                for i in range(1, 9)
            ]
        write_jsonl(folder / name / "metrics.jsonl", [*logged, {"step": 32, "train_runtime": 3.0}])
        more = "--reward-model reward-model" if command == "ppo" else ""
        manifest(
            folder,
            name,
            command,
            f"--model my-model {more}",
            {"learning_rate": 1e-5, "lora_rank": None},
            order,
            counts={"steps": 32},
        )
    return folder
