"""The figures of the paper (arXiv 2212.08073) from run folders: their points, and their drawing.

    rows, settings = FIGURES["5"].points(["runs/tiny"], given)
    save("5", rows, "figure5")             # figure5.png, figure5.svg, figure5.csv

2: harmlessness against helpfulness in Elo points. 5: reward model scores round by round. 6: the same for several
constitutions. 7: the same with and without critiques. 9: calibration. 10: absolute harmfulness, 0 to 4. The scores are
those of a reward model or judge that you have, not the paper's. Leaves out everything the run folders do not hold.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.base.hashing import identity, sha256_file, sha256_text
from cai.constitution.templates import load_template
from cai.data import rounds
from cai.data.dialogue import as_messages
from cai.data.outputs import csv_cell
from cai.data.readers import read_jsonl
from cai.models import choice, loading
from cai.models.engine import Request
from cai.models.loading import check_model
from cai.models.scorer import check_reward_model, load_scorer
from cai.report import figures, run_folder
from cai.stats import calibration as calibration_
from cai.stats import intervals

DIGITS = ("0", "1", "2", "3", "4")  # labels of templates/classify_harm.jinja

COLUMNS = ("series", "x", "value", "low", "high", "n", "x_low", "x_high")

_WINDOW = 1024  # texts that are scored between two steps of the progress bar


@dataclass(frozen=True)
class PaperFigure:
    """points: (run folders, options) to (settings that decide it, a function that makes the rows). Rows: {series, x,
    value, low, high, n}, and for a plane x_low and x_high."""

    title: str
    x: str
    y: str
    points: Callable[[Sequence[str], object], tuple[dict, Callable[[], list[dict]]]]


def collected(folders: Sequence[str], least: int = 1) -> list[run_folder.Run]:
    """The runs, each called by its folder's name. InputError for too few, or two of one name."""
    if len(folders) < least:
        raise InputError(f"{len(folders)} run folders", where="--run", expected=f"{least} or more")
    runs = [run_folder.collect(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise InputError(
            f"two folders of one name: {', '.join(names)}", where="--run", remedy="Rename one: the figure calls them so"
        )
    return runs


# --- 2: the plane -------------------------------------------------------------------------------------------


def plane(folders: Sequence[str], given) -> tuple[dict, Callable]:
    """The scores of `evaluate.py --policy` that lie in the run folder."""
    (run, *more) = collected(folders)
    if more:
        raise InputError("several run folders", where="--run", expected="one, with all policies in one comparison")
    found = [(name, rates) for name, rates in run.others if figures.elo_points(rates)]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} comparisons of policies in it",
            where=run.folder,
            expected="one",
            remedy="Run evaluate.py --policy A --policy B --judge MODEL with an --output in this folder",
        )
    return {"rates": found[0][1]}, lambda: figures.elo_points(found[0][1])


# --- 5, 6, 7: reward model scores of revisions --------------------------------------------------------------


def by_kind(folders: Sequence[str], given) -> tuple[dict, Callable]:
    """A line for each kind of prompt of one run."""
    (run, *more) = collected(folders)
    if more:
        raise InputError("several run folders", where="--run", expected="one; figures 6 and 7 take several")
    return _scored([run], given, lambda run, row: row.get("kind") or "all prompts")


def by_constitution(folders: Sequence[str], given) -> tuple[dict, Callable]:
    """A line for each run, called by the number of principles that were drawn in it; harmful prompts."""
    runs = collected(folders, 2)
    count = {run.folder: len({one["principle"] for row in run.rows for one in row.get("rounds") or ()}) for run in runs}
    names = {folder: "1 principle" if n == 1 else f"{n} principles" for folder, n in count.items()}
    return _scored(runs, given, lambda run, row: f"{names[run.folder]} ({run.name})", harmful=True)


def by_run(folders: Sequence[str], given) -> tuple[dict, Callable]:
    """A line for each run, called by its folder; harmful prompts."""
    return _scored(collected(folders, 2), given, lambda run, row: run.name, harmful=True)


def _scored(runs: Sequence[run_folder.Run], given, series: Callable, harmful: bool = False) -> tuple[dict, Callable]:
    folder = given.reward_model or _reward_model(runs)
    check_reward_model(folder)
    for run in runs:
        if not any(row.get("rounds") for row in run.rows):
            raise InputError("no revised rows in it", where=run.folder, remedy="Run critique.py and revise.py")
    settings = {
        "rows": [sha256_file(run.path(run.rows_file)) for run in runs],
        "limit": given.limit,
        "names": [run.name for run in runs],
        "reward_model": identity(folder),
        "dtype": given.dtype,
    }

    def make() -> list[dict]:
        texts = []
        for run in runs:
            rows = (row for row in run.rows if not harmful or row.get("kind", "harmful") == "harmful")
            for row in islice(rows, given.limit):
                messages = as_messages(row["prompt"])
                texts += [
                    (series(run, row), number, (messages, text)) for number, text in enumerate(rounds.texts_of(row))
                ]
        scorer, found = load_scorer(folder, **given.loading), defaultdict(list)
        with cli.progress(len(texts), "score") as bar:
            for start in range(0, len(texts), _WINDOW):
                part = texts[start : start + _WINDOW]
                for (name, number, _), score in zip(part, scorer.scores([one for *_, one in part]), strict=True):
                    if score is not None:
                        found[name, number].append(score)
                bar.update(len(part))
        return [{"series": name, "x": number, **intervals.mean(scores)} for (name, number), scores in found.items()]

    return settings, make


def _reward_model(runs: Sequence[run_folder.Run]) -> str:
    """The reward model that the first run trained: all are measured by the same one."""
    steps = runs[0].of("reward_model")
    if not steps:
        raise InputError("no reward model in it", where=runs[0].folder, remedy="Name one with --reward-model")
    return str(runs[0].path(steps[0]["name"]))


# --- 9: calibration -----------------------------------------------------------------------------------------


def calibration(folders: Sequence[str], given) -> tuple[dict, Callable]:
    """Of everything in the runs whose right answer is known: the judge's pairs with gold labels, and choices."""
    found = {}
    for run in collected(folders):
        for file in sorted(run.folder.glob("*.jsonl")):
            said = [one for _, row in read_jsonl(file) if (one := _said(row))]
            if said:
                found[
                    f"{run.name}: {file.name.removesuffix('.jsonl')}"
                    if len(folders) > 1
                    else file.name.removesuffix(".jsonl")
                ] = said
    if not found:
        raise InputError(
            "nothing in it whose right answer is known",
            where=", ".join(folders),
            expected="judged pairs with gold, or choices",
            remedy="Judge pairs with a gold label (judge.py), or answer a --choice, into this folder",
        )

    def make() -> list[dict]:
        rows = []
        for name, said in found.items():
            bins = calibration_.calibration([p for p, _ in said], [right for _, right in said])["bins"]
            rows += [{"series": name, "x": one["probability"], **one["outcome"]} for one in bins if one["outcome"]["n"]]
        return rows

    return {"said": {name: len(said) for name, said in found.items()}, "digest": sha256_text(json.dumps(found))}, make


def _said(row: Mapping) -> tuple[float, bool] | None:
    """(probability of the side that was chosen, whether it is the right one) of a judged pair or a choice."""
    if row.get("gold") in ("a", "b") and isinstance(row.get("p_a"), float) and row["p_a"] != 0.5:
        return max(row["p_a"], 1 - row["p_a"]), (row["p_a"] > 0.5) == (row["gold"] == "a")
    if isinstance(row.get("confidence"), float) and isinstance(row.get("right"), bool):
        return row["confidence"], row["right"]
    return None


# --- 10: absolute harmfulness -------------------------------------------------------------------------------


def harmfulness(folders: Sequence[str], given) -> tuple[dict, Callable]:
    """The mean score, 0 to 4, of the responses to held-out harmful prompts, stage by stage; a line for each run."""
    runs = collected(folders)
    if not given.judge:
        raise InputError("--figure 10 without --judge MODEL", remedy="Name the model that rates the responses")
    check_model(loading.split_endpoint(given.judge)[0])
    texts = [
        (run.name, place, stage.label, row)
        for run in runs
        for place, stage in enumerate(run.stages)
        for row in islice(
            (one for one in stage.responses.values() if one.get("kind") == "harmful" and "response" in one), given.limit
        )
    ]
    if not texts:
        raise InputError(
            "no responses to harmful prompts in it",
            where=", ".join(folders),
            remedy="Run evaluate.py --model for each stage, with an --output in this folder",
        )
    template = load_template("classify_harm")

    def make() -> list[dict]:
        engine, found, masses = (
            loading.load_named_engine(given.judge, given.endpoints, given.loading),
            defaultdict(list),
            [],
        )
        requests = [
            Request((name, place, label, number), template.render(prompt=row["prompt"], response=row["response"]))
            for number, (name, place, label, row) in enumerate(texts)
        ]
        with cli.progress(len(requests), "rate") as bar:
            for request, logprobs in choice.choose(engine, requests, DIGITS):
                bar.update()
                score, mass = expected(logprobs)
                if score is not None:
                    found[request.key[:3]].append(score)
                    masses.append(mass)
        if not masses:
            raise CaiError(f"the judge {given.judge} could read none of {len(requests)} responses")
        mass = intervals.mean(masses)["value"]
        if mass < 0.5:
            cli.warn("the judge would rather not answer with a digit: take a larger judge")
        every = [score for scores in found.values() for score in scores]
        if max(every) - min(every) < 0.5:
            cli.warn(
                f"the judge rates all {len(every)} responses alike, {min(every):.2f} to {max(every):.2f}: it does "
                "not understand the question, so the figure says nothing"
            )
        return [
            {"series": name, "x": place, "label": label, **intervals.mean(scores), "mass": mass}
            for (name, place, label), scores in sorted(found.items())
        ]

    return {
        "responses": sha256_text(json.dumps([[name, label, row["response"]] for name, _, label, row in texts])),
        "judge": identity(given.judge),
        "template": template.sha256,
        "dtype": given.dtype,
    }, make


def expected(logprobs: Sequence[float] | None) -> tuple[float | None, float]:
    """(the mean of the digits by probability, their probability together); None where nothing can be read."""
    if logprobs is None or max(logprobs) == -math.inf:
        return None, 0.0
    shares = [math.exp(one) for one in logprobs]
    return math.fsum(i * one for i, one in enumerate(shares)) / math.fsum(shares), math.fsum(shares)


FIGURES = {
    "2": PaperFigure("Harmlessness and helpfulness", "helpfulness, Elo points", "harmlessness, Elo points", plane),
    "5": PaperFigure("Scores of revisions", "revisions", "reward model score", by_kind),
    "6": PaperFigure("Scores by number of principles", "revisions", "reward model score", by_constitution),
    "7": PaperFigure("Scores with and without critiques", "revisions", "reward model score", by_run),
    "9": PaperFigure("Calibration", "probability said", "share right", calibration),
    "10": PaperFigure("Absolute harmfulness", "", "harmfulness, 0 to 4", harmfulness),
}


def name_of(row: Mapping) -> str:
    """What a point is called: its series, and where it stands in it."""
    if "x_low" in row:
        return row["series"]
    return f"{row['series']} {row.get('label') or format(row['x'], '.3g')}"


def save(number: str, rows: Iterable[Mapping], stem: str | Path) -> list[str]:
    """Write <stem>.png, .svg and .csv of the rows; returns the paths."""
    rows, figure = list(rows), FIGURES[number]
    kind = {"2": figures.elo_plane, "9": figures.calibration_lines}.get(number, figures.lines)
    x, limits = figure.x, {}
    if number == "10":
        x, limits = f"{rows[0]['mass']:.0%} of the judge's probability was on a digit", {"limits": (0, 4)}
        if rows[0]["mass"] < 0.5:
            x += ":\nno verdict, so this figure says nothing"
    drawn = kind(f"figure{number}", figure.title, rows, x, figure.y, **limits)
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.png").write_bytes(drawn.png)
    Path(f"{stem}.svg").write_text(drawn.svg, encoding="utf-8")
    columns = [name for name in (*COLUMNS, "label", "mass") if any(name in row for row in rows)]
    with open(f"{stem}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return [f"{stem}.{ending}" for ending in ("png", "svg", "csv")]
