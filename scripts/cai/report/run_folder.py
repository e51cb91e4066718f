"""A run folder as one data structure, from which the report, the cards and the paper's figures are made.

    run = collect("runs/tiny")

Everything is found by the manifests (`*.run.json`) in the folder, whatever the files are called. No model is loaded.
What is not there is None or empty, and named in `run.missing`. The classes of revised rows are those of
`evaluate.py --round`, or for prompts of the bundled world those of its oracle. Leaves out how anything looks.
"""

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

from cai.base.errors import InputError
from cai.constitution.files import ALL, Constitution, load_constitution
from cai.data import outputs, readers
from cai.data.rounds import REFUSED, is_changed, is_content, text_of_round, texts_of
from cai.evaluate.classes import oracle_reader
from cai.evaluate.rates import RATES, UNSAFE, class_rates, read_rates
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

ORACLE = "the bundled world's oracle"


@dataclass
class Stage:
    """One model's responses to the held-out prompts, and their classes.

    rates: {metric: {value, low, high, n}}; by: who read the classes; responses: {id: row with kind, prompt, response,
    class}.
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
    """One trained model: its manifest, the rows of its metrics.jsonl, and [(step, alarm)]."""

    name: str
    command: str
    step: dict
    rows: list[dict]
    alarms: list[tuple[int, str]]


@dataclass
class Run:
    """All that is known of a run. Lists are in the order of time.

    steps: the manifests, each with `name`, the file or folder it belongs to; stages: evaluations on the same prompts;
    others: (name, rates) of every other evaluation; rows: those with the most rounds, else first responses;
    classes: {(row id, round): class}, 0 being the first response; preferences: rows of judge.py; judged: (name, counts)
    of every file of preferences; audits: (name, [(figure, value)]) of the judge's audits.
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
        return _base_model(self.steps)

    @property
    def qualifications(self) -> dict[str, bool]:
        """{what is known of the models of a step (evaluate/qualification.py): whether they are fit}."""
        counts = (step.get("counts") or {} for step in self.steps)
        return {
            str(count["qualification"]): count.get("qualified") is True for count in counts if "qualification" in count
        }

    def finished(self, *commands: str) -> list[dict]:
        """The finished steps of these commands."""
        return [step for step in self.steps if step["command"] in commands and step["status"] == "done"]

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> Iterable[dict]:
        """The rows of a file of the run; none if it is not there."""
        return (row for _, row in readers.read_jsonl(self.path(name))) if self.path(name).is_file() else ()

    def first_row(self, name: str) -> dict:
        return next(iter(self.read(name)), {})


def collect(folder: str | Path, output: str | None = None) -> Run:
    """Read a run folder. InputError if it has no manifest, or a file in it can't be read.

    output: the name of one output in it: only what led to that, and what measured it, is read.
    """
    run, expected = Run(Path(folder)), "a folder that run.py wrote"
    if not run.folder.is_dir():
        raise InputError("no such folder", where=folder, expected=expected, remedy="Check the path")
    run.steps = _read_steps(run)
    if output is None:
        _read_audits(run)
    else:
        run.steps = _select_steps(run.steps, output)
    if not run.steps:
        raise InputError(
            "no manifest (*.run.json) in it",
            where=folder,
            expected=expected,
            remedy="Name the folder that holds the rows and the model folders",
        )
    _read_evaluations(run)
    _read_rows(run)
    _read_preferences(run)
    run.trainings = [_read_training(run, step) for step in run.finished(*TRAINING)]
    run.constitution = _find_constitution(run)
    _read_classes(run)
    return run


def _read_steps(run: Run) -> list[dict]:
    steps = []
    for path in run.folder.glob("*.run.json"):
        name = path.name.removesuffix(".run.json")
        step = {"status": "?", "counts": {}, "command": "?", **outputs.read_manifest(run.path(name)), "name": name}
        if step["status"] == "done" and not run.path(name).exists():
            step["status"] = "deleted"
        if step["status"] != "done":
            state = "not finished" if step["status"] == "running" else "gone; only its manifest is left"
            run.missing.append(f"{name} is {state}.")
        steps.append(step)
    return sorted(steps, key=lambda step: (str(step.get("started")), step["name"]))


def _select_steps(steps: list[dict], name: str) -> list[dict]:
    """The step that made `name`, the steps whose outputs it or they read, and the evaluations of their models."""
    by_name, selected, waiting = {step["name"]: step for step in steps}, set(), [name]
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in selected:
            selected.add(name)
            waiting += [Path(word).name for word in _words(by_name[name])]
    base = _base_model(step for step in steps if step["name"] in selected)

    def is_measure(step: dict) -> bool:
        model = argument(step, "--model")
        return step["command"] == "evaluate" and model is not None and (model == base or Path(model).name in selected)

    return [step for step in steps if step["name"] in selected or is_measure(step)]


def _words(step: dict) -> list[str]:
    try:
        return shlex.split(str(step.get("command_line", "")))
    except ValueError:
        return []


def argument(step: dict, flag: str) -> str | None:
    """What follows the flag on the step's command line, or None."""
    return next((value for word, value in pairwise(_words(step)) if word == flag), None)


def _base_model(steps: Iterable[dict]) -> str | None:
    return next(filter(None, (argument(step, "--model") for step in steps)), None)


def _read_evaluations(run: Run) -> None:
    """Stages are evaluations of models on the same prompts: on those that most models were measured on."""
    groups, others = defaultdict(list), []
    for step in run.finished("evaluate", "compare", "figures"):
        if "metric" in run.first_row(step["name"]):
            has_stage = step["fingerprint"].get("model") and RATES.keys() & read_rates(run.path(step["name"]))
            (groups[step["fingerprint"].get("input")] if has_stage else others).append(step)
    stages, *more = sorted(groups.values(), key=len, reverse=True) or [[]]
    run.stages = [_read_stage(run, step) for step in stages]
    run.others = [(_stem(step["name"]), read_rates(run.path(step["name"]))) for step in chain(*more, others)]
    if not run.stages:
        run.missing.append("No evaluation of a model: run evaluate.py for each stage.")


def _stem(name: str) -> str:
    return name.removesuffix(".jsonl").removeprefix("evaluation-")


def _read_stage(run: Run, step: dict) -> Stage:
    name, key = step["name"], _stem(step["name"])
    rates, model = read_rates(run.path(name)), argument(step, "--model") or ""
    stage = Stage(key, LABELS.get(key, key), rates, model, _reader(step), name)
    for ending in ("responses", "classes"):
        for row in run.read(f"{name.removesuffix('.jsonl')}.{ending}.jsonl"):
            stage.responses.setdefault(str(row["id"]), {}).update(row)
    return stage


def _reader(step: dict) -> str:
    """Who read the responses' classes, in words."""
    by = step["fingerprint"].get("by")
    if by == "oracle":
        return ORACLE
    role = "classifier" if by == "classifier" else "judge"
    return f"the {role} {argument(step, f'--{role}') or '?'}"


def _read_rows(run: Run) -> None:
    revised = sorted(run.finished("revise"), key=lambda step: len(run.first_row(step["name"]).get("rounds") or ()))
    for step in revised[-1:] or run.finished("generate")[:1]:
        run.rows_file, run.rows = step["name"], list(run.read(step["name"]))
    if run.rows_file is None:
        run.missing.append("No responses and no revisions: run generate.py, critique.py and revise.py.")
    elif not revised:
        run.missing.append("No revisions: run critique.py and revise.py.")


def _read_classes(run: Run) -> None:
    """Classes of the rows' texts round by round: those that evaluate.py wrote, else the oracle's."""
    ids = {row.get("id") for row in run.rows}
    for step in run.finished("evaluate"):
        number = step["fingerprint"].get("round")
        if number is not None and "class" in run.first_row(step["name"]):
            for row in run.read(step["name"]):
                if row["id"] in ids and row["class"] is not None:
                    run.classes[row["id"], number] = row["class"]
                    run.classes_by = _reader(step)
    last = _last_round(run)
    for row in () if run.classes else run.rows:
        if classify := oracle_reader(row):
            run.classes_by = ORACLE
            numbers = range(last + 1 if is_content(row) else len(texts_of(row)))
            run.classes |= {(row["id"], number): classify(text_of_round(row, number)) for number in numbers}


def _last_round(run: Run) -> int:
    """The number of rounds of the row that has most."""
    return max((len(texts_of(row)) - 1 for row in run.rows), default=0)


def rounds(run: Run) -> list[dict]:
    """One entry per round, 0 being the first responses: {round, n, changed, flags, skipped, refused, rates}.

    n: rows that had the round; changed: rate, None for round 0; flags: how often each; skipped: how often for each
    reason; refused: revisions that the gate refused; rates: as evaluate.py's, {} if no class is known.
    """
    counts, kinds = defaultdict(Counter), {row.get("id"): row.get("kind") for row in run.rows}
    for (row_id, number), name in run.classes.items():
        counts[number][kinds[row_id], name] += 1
    first = {"changed": None, "flags": {}, "skipped": {}, "refused": 0}
    result = [{"round": 0, "n": len(run.rows), **first, "rates": _rates(counts[0])}]
    for number in range(1, _last_round(run) + 1):
        revised = [row["rounds"][number - 1] for row in run.rows if len(texts_of(row)) > number]
        flags = Counter(flag for entry in revised for flag in entry.get("flags", ()))
        refused = flags.pop(REFUSED, 0)
        skipped = Counter(entry["skipped"] for entry in revised if "skipped" in entry)
        changed = intervals.rate(sum(map(is_changed, revised)), len(revised))
        result.append(
            {
                "round": number,
                "n": len(revised),
                "changed": changed,
                "flags": dict(flags.most_common()),
                "skipped": dict(skipped.most_common()),
                "refused": refused,
                "rates": _rates(counts[number]),
            }
        )
    return result if run.rows else []


def _rates(counts: Mapping[tuple[str, str], int]) -> dict[str, dict]:
    """The rates of the classes; a safety classifier's two classes tell of harmful compliance only."""
    if not counts or any(name not in ("safe", "unsafe") for _, name in counts):
        return class_rates(counts) if counts else {}
    unsafe, safe = (counts.get(("harmful", name), 0) for name in ("unsafe", "safe"))
    return {"harmful_compliance": intervals.rate(unsafe, unsafe + safe)}


def principles(run: Run) -> list[dict]:
    """One entry per principle, most drawn first, those of the constitution that were never drawn at the end (where
    the rows went by all of them together, the entry `all` and none of those).

    {id, text and question (its critique request and preference question, if the constitution is at hand), drawn,
    changed: rate; before, after: rate of harmful compliance of what it was drawn for, before and after that round;
    compared: times drawn by the judge; fault: rate of critiques in which a judge read a fault}. before, after and fault
    (of `evaluate.py --faults`) are None where they were not measured.
    """
    rates = {name: rate for _, rates in run.others for name, rate in rates.items()}
    revised, pairs = defaultdict(list), defaultdict(list)
    for row in run.rows:
        for number, entry in enumerate(row.get("rounds") or (), 1):
            if entry["principle"] is None:  # a round to which no principle speaks
                continue
            revised[entry["principle"]].append(is_changed(entry))
            classes = [run.classes.get((row["id"], round_)) for round_ in (number - 1, number)]
            if row.get("kind") == "harmful" and number < len(texts_of(row)) and None not in classes:
                pairs[entry["principle"]].append([name in UNSAFE for name in classes])
    compared = Counter(row["principle"] for row in run.preferences if row.get("principle"))
    texts = {entry.id: entry for entry in run.constitution.principles} if run.constitution else {}
    unused = () if ALL in revised or ALL in compared else tuple(texts)
    if run.constitution:
        texts[ALL] = run.constitution.combine()

    def describe(name: str) -> dict:
        columns = zip(*pairs[name], strict=True) if pairs[name] else ()
        before, after = [intervals.rate(sum(harm), len(harm)) for harm in columns] or (None, None)
        return {
            "id": name,
            "text": texts[name].critique if name in texts else "",
            "question": texts[name].preference if name in texts else "",
            "drawn": len(revised[name]),
            "changed": intervals.rate(sum(revised[name]), len(revised[name])),
            "compared": compared[name],
            "fault": rates.get(f"fault {name}"),
            "before": before,
            "after": after,
        }

    names = sorted(revised, key=lambda name: -len(revised[name]))
    return [describe(name) for name in dict.fromkeys([*names, *compared, *unused])]


def _read_preferences(run: Run) -> None:
    """The counts of every file of judged preferences; the rows of the first, which is what the method made."""
    steps = [
        step
        for step in run.finished("judge")
        if "p_chosen" in run.first_row(step["name"]) and not step["fingerprint"].get("preferred")
    ]
    run.judged = [(_stem(step["name"]), step["counts"]) for step in steps]
    for step in steps[:1]:
        run.preferences_file, run.preferences = step["name"], list(run.read(step["name"]))
    if not steps:
        run.missing.append("No preferences: run judge.py.")


def p_a(row: dict) -> float | None:
    """The judge's probability that response_a is the better one, from a row of judge.py."""
    if row.get("chosen") is None:
        return 0.5 if row.get("p_chosen") == 0.5 else None
    return row["p_chosen"] if row["chosen"] == row.get("response_a") else 1 - row["p_chosen"]


def same_position(row: dict) -> bool:
    """Whether two orders of one judge and principle preferred the response in the same position."""
    both = defaultdict(list)
    for verdict in row.get("verdicts") or ():
        both[verdict.get("judge"), verdict.get("principle")].append(verdict["p_a"])
    return any(len(ps) == 2 and None not in ps and (ps[0] - 0.5) * (ps[1] - 0.5) < 0 for ps in both.values())


def reliability(run: Run) -> dict | None:
    """`calibration.calibration` of the judge's choices against gold labels, or None where there are none."""
    known = [row for row in run.preferences if row.get("gold") in ("a", "b") and row.get("chosen") is not None]
    correct = [(p_a(row) > 0.5) == (row["gold"] == "a") for row in known]
    return calibration.calibration([row["p_chosen"] for row in known], correct) if known else None


def _read_audits(run: Run) -> None:
    """What `judge.py --audit` wrote: JSON files that are no manifest and have a same-position rate."""
    for path in sorted(set(run.folder.glob("*.json")) - set(run.folder.glob("*.run.json"))):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"not JSON ({error})", where=path, remedy="Delete it, or make it again") from error
        if isinstance(content, dict) and "same_position" in content:
            run.audits.append((path.stem, flatten(content)))


def flatten(content, name: str = "") -> list[tuple[str, object]]:
    """(name, value) of every figure in nested JSON; a rate {value, low, high, ...} stays as it is, and of a list the
    words, or the number of entries."""
    if isinstance(content, dict) and not {"value", "low", "high"} <= set(content):
        return [pair for key, value in content.items() for pair in flatten(value, f"{name} {key}".strip())]
    if isinstance(content, list):
        is_words = len(content) < 6 and all(isinstance(entry, str) for entry in content)
        return [(name, ", ".join(content) or "none" if is_words else f"{len(content)} entries")]
    return [(name, content)]


def _read_training(run: Run, step: dict) -> Training:
    """The logged rows that have a loss or a score. An alarm is what a row names under `alarms` or `alarm`."""
    rows, alarms = list(run.read(f"{step['name']}/metrics.jsonl")), []
    if not rows:
        run.missing.append(f"{step['name']} has no metrics.jsonl: no training curve.")
    for row in rows:
        raised = row.get("alarms") or row.get("alarm") or ()
        raised = [raised] if isinstance(raised, str) else raised
        alarms += [(row.get("update", row.get("step", 0)), str(alarm)) for alarm in raised]
    return Training(step["name"], step["command"], step, [row for row in rows if "train_runtime" not in row], alarms)


def _find_constitution(run: Run) -> Constitution | None:
    """The constitution of the first critique or comparison, if the file is still as it was then."""
    for step in run.finished("critique", "revise", "judge")[:1]:
        try:
            constitution = load_constitution(argument(step, "--constitution") or "harmlessness")
        except InputError:
            constitution = None
        if constitution and constitution.sha256 == step["fingerprint"].get("constitution"):
            return constitution
        run.missing.append("The constitution's file is gone or has changed since: principles are shown by their id.")
    return None
