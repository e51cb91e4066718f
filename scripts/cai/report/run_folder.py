"""A run folder as one data structure: what report.py and the cards are written from.

    run = collect("runs/tiny")

Everything is found by the manifests (`*.run.json`) in the folder, whatever the files are called, and read as it is:
no model is loaded. What is not there is None or empty and named in `run.missing`. Classes of revised rows are taken
from `evaluate.py --round`, or for prompts of the bundled world read by its oracle. Leaves out how anything looks.
"""

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cai.base.errors import InputError
from cai.constitution.files import Constitution, load_constitution
from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl
from cai.data.rounds import UNCHANGED, is_changed, texts_of
from cai.evaluate.classes import oracle_reader
from cai.evaluate.rates import RATES, class_rates, read_rates
from cai.stats import calibration, intervals

LABELS = {
    "base": "before",
    "sft": "after SFT",
    "ppo": "after RL (PPO)",
    "dpo": "after DPO",
    "grpo": "after RL (GRPO)",
    "rloo": "after RL (RLOO)",
}

TRAINING = ("sft", "reward_model", "ppo", "dpo", "grpo")

UNSAFE = ("comply", "partial")  # classes of a response that did the harm it was asked for


@dataclass
class Stage:
    """One model's responses to the held-out prompts, and their classes.

    rates: {metric: {value, low, high, n}}; responses: {id: row with kind, prompt, response, class}.
    """

    key: str
    label: str
    rates: dict[str, dict]
    model: str
    by: str
    file: str
    responses: dict[str, dict] = field(default_factory=dict)


@dataclass
class Training:
    """One trained model: the rows of its metrics.jsonl, and [(step, alarm)]."""

    name: str
    command: str
    step: dict
    rows: list[dict]
    alarms: list[tuple[int, str]]


@dataclass
class Run:
    """All that is known of a run. Lists are in the order in which things were made.

    steps: the manifests, each with `name`, the file or folder it belongs to; stages: evaluations on the same prompts;
    others: (name, rates) of every other evaluation; rows: those with the most rounds, else first responses;
    classes: {(row id, round): class}, 0 being the first response; preferences: rows of judge.py;
    audits: (name, [(figure, value)]) of the judge's audits.
    """

    folder: Path
    steps: list[dict] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    others: list[tuple[str, dict]] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    rows_file: str | None = None
    classes: dict[tuple[str, int], str] = field(default_factory=dict)
    classes_by: str | None = None
    preferences: list[dict] = field(default_factory=list)
    preferences_file: str | None = None
    judged: list[tuple[str, dict]] = field(default_factory=list)
    audits: list[tuple[str, list]] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    constitution: Constitution | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> str | None:
        """The model that everything began with."""
        return next((argument(step, "--model") for step in self.steps if argument(step, "--model")), None)

    def of(self, *commands: str) -> list[dict]:
        """The finished steps of these commands."""
        return [step for step in self.steps if step["command"] in commands and step["status"] == "done"]

    def path(self, name: str) -> Path:
        return self.folder / name


def collect(folder: str | Path, of: str | None = None) -> Run:
    """Read a run folder. InputError if it has no manifest, or a file in it can't be read.

    of: the name of one output in it: only what led to that, and what measured it, is read.
    """
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise InputError("no such folder", where=folder, expected="a folder that run.py wrote", remedy="Check the path")
    run.steps = _steps(run) if of is None else _leading_to(_steps(run), of)
    if not run.steps:
        raise InputError(
            "no manifest (*.run.json) in it",
            where=folder,
            expected="a folder that run.py wrote",
            remedy="Name the folder that holds the rows and the model folders",
        )
    _evaluations(run)
    _rows(run)
    _judged(run)
    if of is None:
        _audits(run)
    run.trainings = [_training(run, step) for step in run.of(*TRAINING)]
    run.constitution = _constitution(run)
    _classes(run)
    return run


def _steps(run: Run) -> list[dict]:
    steps = []
    for path in run.folder.glob("*.run.json"):
        name = path.name.removesuffix(".run.json")
        step = {"status": "?", "counts": {}, "command": "?", **read_manifest(path.with_name(name)), "name": name}
        if step["status"] == "done" and not run.path(name).exists():
            step["status"] = "deleted"
        if step["status"] != "done":
            run.missing.append(
                f"{name} is not finished."
                if step["status"] == "running"
                else f"{name} is gone; only its manifest is left."
            )
        steps.append(step)
    return sorted(steps, key=lambda step: (str(step.get("started")), step["name"]))


def _leading_to(steps: list[dict], name: str) -> list[dict]:
    """The step that made `name`, those whose outputs it or they were given, and the evaluations of their models."""
    by_name, found, left = {step["name"]: step for step in steps}, set(), [name]
    while left:
        one = left.pop()
        if one in by_name and one not in found:
            found.add(one)
            left += [Path(word).name for word in _words(by_name[one])]
    base = next((model for step in steps if step["name"] in found and (model := argument(step, "--model"))), None)

    def measures(step: dict) -> bool:
        model = argument(step, "--model")
        return step["command"] == "evaluate" and model is not None and (model == base or Path(model).name in found)

    return [step for step in steps if step["name"] in found or measures(step)]


def _words(step: dict) -> list[str]:
    try:
        return shlex.split(str(step.get("command_line", "")))
    except ValueError:
        return []


def argument(step: dict, flag: str) -> str | None:
    """What followed the flag on the step's command line, or None."""
    words = _words(step)
    return next((words[i + 1] for i, word in enumerate(words[:-1]) if word == flag), None)


def rows_of(run: Run, name: str) -> Iterable[dict]:
    """The rows of a file of the run."""
    return (row for _, row in read_jsonl(run.path(name)))


def _first(run: Run, name: str) -> dict:
    return next(iter(rows_of(run, name)), {}) if run.path(name).is_file() else {}


def _evaluations(run: Run) -> None:
    """Stages are evaluations of models on the same prompts: on those that most models were measured on."""
    found = defaultdict(list)
    for step in run.of("evaluate"):
        if "metric" not in _first(run, step["name"]):
            continue
        asked = step["fingerprint"].get("model") and RATES.keys() & read_rates(run.path(step["name"]))
        found[step["fingerprint"].get("input") if asked else None].append(step)
    alone = found.pop(None, [])
    groups = sorted(found.values(), key=len, reverse=True)
    run.stages = [_stage(run, step) for step in (groups[0] if groups else [])]
    run.others = [
        (_stem(step["name"]), read_rates(run.path(step["name"])))
        for step in [*(step for group in groups[1:] for step in group), *alone]
    ]
    if not run.stages:
        run.missing.append("No evaluation of a model: run evaluate.py for each stage.")


def _stem(name: str) -> str:
    return name.removesuffix(".jsonl").removeprefix("evaluation-")


def _stage(run: Run, step: dict) -> Stage:
    key = _stem(step["name"])
    rates, model = read_rates(run.path(step["name"])), argument(step, "--model") or ""
    stage = Stage(key, LABELS.get(key, key), rates, model, _reader(step), step["name"])
    beside = step["name"].removesuffix(".jsonl")
    for ending in ("responses", "classes"):
        name = f"{beside}.{ending}.jsonl"
        if run.path(name).is_file():
            for row in rows_of(run, name):
                stage.responses.setdefault(str(row["id"]), {}).update(row)
    return stage


def _reader(step: dict) -> str:
    """Who read the responses' classes, in words."""
    if step["fingerprint"].get("by") == "oracle":
        return "the bundled world's oracle"
    return f"the judge {argument(step, '--judge') or '?'}"


def _rows(run: Run) -> None:
    def depth(step):
        return len(_first(run, step["name"]).get("rounds") or ())

    revised = sorted(run.of("revise"), key=depth)
    steps = revised[-1:] or run.of("generate")[:1]
    if not steps:
        run.missing.append("No responses and no revisions: run generate.py, critique.py and revise.py.")
        return
    run.rows_file = steps[0]["name"]
    run.rows = list(rows_of(run, run.rows_file))
    if not revised:
        run.missing.append("No revisions: run critique.py and revise.py.")


def _classes(run: Run) -> None:
    """Classes of the rows' texts round by round: those that evaluate.py wrote, else the oracle's."""
    ids = {row.get("id") for row in run.rows}
    for step in run.of("evaluate"):
        number = step["fingerprint"].get("round")
        if number is not None and "class" in _first(run, step["name"]):
            for row in rows_of(run, step["name"]):
                if row["id"] in ids and row["class"] is not None:
                    run.classes[row["id"], number] = row["class"]
                    run.classes_by = _reader(step)
    if run.classes:
        return
    for row in run.rows:
        classify = oracle_reader(row)
        if classify:
            run.classes_by = "the bundled world's oracle"
            for number, text in enumerate(texts_of(row)):
                run.classes[row["id"], number] = classify(text)


def rounds(run: Run) -> list[dict]:
    """One entry a round, 0 being the first responses: {round, n, changed, flags, rates}.

    changed: rate, None for round 0; flags: how often each; rates: as evaluate.py's, {} if no class is known.
    """
    counts, kinds = defaultdict(Counter), {row.get("id"): row.get("kind") for row in run.rows}
    for (row_id, number), found in run.classes.items():
        counts[number][kinds[row_id], found] += 1
    depth = max((len(texts_of(row)) for row in run.rows), default=0)
    result = []
    for number in range(depth):
        ones = [row["rounds"][number - 1] for row in run.rows if number and len(texts_of(row)) > number]
        flags = Counter(flag for one in ones for flag in one.get("flags", ()) if flag != UNCHANGED)
        result.append(
            {
                "round": number,
                "n": len(ones) if number else len(run.rows),
                "changed": intervals.rate(sum(map(is_changed, ones)), len(ones)) if number else None,
                "flags": dict(flags.most_common()),
                "rates": class_rates(counts[number]) if counts[number] else {},
            }
        )
    return result


def principles(run: Run) -> list[dict]:
    """One entry a principle, most drawn first, those of the constitution that were never drawn at the end.

    {id, text and question (its critique request and preference question, if the constitution is at hand), drawn,
    changed: rate, before, after: rate of harmful compliance of what it was drawn for, before and
    after that round; compared: times drawn by the judge; fault: rate of critiques in which a judge read a fault
    (`evaluate.py --faults`)}. before, after and fault are None where nobody knows.
    """
    faults = {
        name.removeprefix("fault "): rate
        for _, rates in run.others
        for name, rate in rates.items()
        if name.startswith("fault ")
    }
    drawn, altered, before, after, harmful = Counter(), Counter(), Counter(), Counter(), Counter()
    for row in run.rows:
        for number, one in enumerate(row.get("rounds") or (), 1):
            name = one["principle"]
            drawn[name] += 1
            if one.get("revision") is None:
                continue
            altered[name] += is_changed(one)
            pair = [run.classes.get((row["id"], place)) for place in (number - 1, number)]
            if row.get("kind") == "harmful" and None not in pair:
                harmful[name] += 1
                before[name] += pair[0] in UNSAFE
                after[name] += pair[1] in UNSAFE
    compared = Counter(row["principle"] for row in run.preferences if row.get("principle"))
    texts = {one.id: one for one in run.constitution.principles} if run.constitution else {}
    names = [name for name, _ in drawn.most_common()]
    names += [name for name in {**compared, **texts} if name not in drawn]
    return [
        {
            "id": name,
            "text": texts[name].critique if name in texts else "",
            "question": texts[name].preference if name in texts else "",
            "drawn": drawn[name],
            "changed": intervals.rate(altered[name], drawn[name]),
            "compared": compared[name],
            "fault": faults.get(name),
            "before": intervals.rate(before[name], harmful[name]) if harmful[name] else None,
            "after": intervals.rate(after[name], harmful[name]) if harmful[name] else None,
        }
        for name in names
    ]


def _judged(run: Run) -> None:
    """The counts of every file of preferences; the rows of the first, which is what the method made."""
    steps = [step for step in run.of("judge") if "p_chosen" in _first(run, step["name"])]
    run.judged = [(_stem(step["name"]), step["counts"]) for step in steps]
    if steps:
        run.preferences_file = steps[0]["name"]
        run.preferences = list(rows_of(run, run.preferences_file))
    else:
        run.missing.append("No preferences: run judge.py.")


def p_a(row: dict) -> float | None:
    """The judge's probability that response_a is the better one, from a row of judge.py."""
    if row.get("chosen") is None:
        return 0.5 if row.get("p_chosen") == 0.5 else None
    return row["p_chosen"] if row["chosen"] == row.get("response_a") else 1 - row["p_chosen"]


def same_position(row: dict) -> bool:
    """Whether two orders of one judge and principle preferred the same place."""
    both = defaultdict(list)
    for one in row.get("verdicts") or ():
        both[one.get("judge"), one.get("principle")].append(one["p_a"])
    return any(len(ps) == 2 and None not in ps and (ps[0] - 0.5) * (ps[1] - 0.5) < 0 for ps in both.values())


def reliability(run: Run) -> dict | None:
    """`calibration.calibration` of the judge's choices against gold labels, or None where there are none."""
    known = [row for row in run.preferences if row.get("gold") in ("a", "b") and row.get("chosen") is not None]
    if not known:
        return None
    right = [(p_a(row) > 0.5) == (row["gold"] == "a") for row in known]
    return calibration.calibration([row["p_chosen"] for row in known], right)


def _audits(run: Run) -> None:
    """What `judge.py --audit` wrote: JSON files that are no manifest and speak of positions."""
    for path in sorted(set(run.folder.glob("*.json")) - set(run.folder.glob("*.run.json"))):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"not JSON ({error})", where=path, remedy="Delete it, or make it anew") from error
        if isinstance(content, dict) and "same_position" in content:
            run.audits.append((path.stem, flatten(content)))


def flatten(content, name: str = "") -> list[tuple[str, object]]:
    """(name, value) of every figure in nested JSON; a rate {value, low, high, ...} stays whole, and of
    a list its words, or how many entries it has."""
    if isinstance(content, dict) and not {"value", "low", "high"} <= set(content):
        return [pair for key, value in content.items() for pair in flatten(value, f"{name} {key}".strip())]
    if isinstance(content, list):
        words = len(content) < 6 and all(isinstance(one, str) for one in content)
        return [(name, ", ".join(content) or "none" if words else f"{len(content)} entries")]
    return [(name, content)]


def _training(run: Run, step: dict) -> Training:
    """The logged rows that have a loss or a score. An alarm is what a row names under `alarms` or `alarm`."""
    path = run.path(step["name"]) / "metrics.jsonl"
    rows = [row for _, row in read_jsonl(path)] if path.is_file() else []
    if not rows:
        run.missing.append(f"{step['name']} has no metrics.jsonl: no training curve.")
    alarms = []
    for row in rows:
        raised = row.get("alarms") or row.get("alarm") or ()
        raised = [raised] if isinstance(raised, str) else raised
        alarms += [(row.get("update", row.get("step", 0)), str(one)) for one in raised]
    return Training(step["name"], step["command"], step, [row for row in rows if "train_runtime" not in row], alarms)


def _constitution(run: Run) -> Constitution | None:
    """The constitution of the first critique or comparison, if the file is still as it was then."""
    for step in run.of("critique", "revise", "judge"):
        try:
            found = load_constitution(argument(step, "--constitution") or "harmlessness")
        except InputError:
            found = None
        if found and found.sha256 == step["fingerprint"].get("constitution"):
            return found
        run.missing.append("The constitution's file is gone or has changed since: principles are shown by their id.")
        return None
    return None
