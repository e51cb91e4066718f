"""The figures of the paper (arXiv 2212.08073) from run folders: their points, and their drawing.

    settings, make = FIGURES["5"].points(["runs/tiny"], options)
    save("5", make(), "figure5")             # figure5.png, figure5.svg, figure5.csv

2: harmlessness against helpfulness in Elo points. 5: reward model scores round by round. 6: the same for several
constitutions. 7: the same with and without critiques. 9: calibration. 10: absolute harmfulness, 0 to 4. The scores are
those of a reward model or judge of yours, not the paper's. Leaves out everything that the run folders do not hold.
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
from cai.data import dialogue, outputs, readers, rounds
from cai.models import choice, loading, scorer
from cai.models.engine import RowRequest
from cai.report import figures, run_folder
from cai.stats import calibration, drawing, intervals

DIGITS = ("0", "1", "2", "3", "4")  # labels of templates/classify_harm.jinja

COLUMNS = ("series", "x", "value", "low", "high", "n", "x_low", "x_high", "label", "mass")  # of the CSV, as they occur

_WINDOW = 1024  # texts that are scored between two steps of the progress bar

Points = tuple[dict, Callable[[], list[dict]]]


@dataclass(frozen=True)
class PaperFigure:
    """points: (run folders, options of figures.py) to (settings that decide the figure, a function that makes the
    rows). Rows: {series, x, value, low, high, n}, and for a plane x_low and x_high."""

    title: str
    x: str
    y: str
    points: Callable[[Sequence[str], object], Points]


def _collect(folders: Sequence[str], least: int = 1, most: int | None = None) -> list[run_folder.Run]:
    """The runs. InputError for too few, too many, or two whose folders have the same name, by which the figure names
    them."""
    if not least <= len(folders) <= (most or len(folders)):
        expected = "one; figures 6, 7, 9 and 10 take several" if most else f"{least} or more"
        raise InputError(f"{len(folders)} run folders", where="--run", expected=expected)
    runs = [run_folder.collect(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        remedy = "Rename one: the figure names runs by their folders"
        raise InputError(f"two folders of one name: {', '.join(names)}", where="--run", remedy=remedy)
    return runs


# --- 2: the plane -------------------------------------------------------------------------------------------


def plane(folders: Sequence[str], options) -> Points:
    """The Elo scores of compare.py that lie in the run folder."""
    [run] = _collect(folders, most=1)
    comparisons = [rates for _, rates in run.others if figures.elo_points(rates)]
    if len(comparisons) != 1:
        raise InputError(
            f"{len(comparisons)} comparisons of policies in it",
            where=run.folder,
            expected="one",
            remedy="Run compare.py --policy A --policy B --judge MODEL with an --output in this folder",
        )
    return {"rates": comparisons[0]}, lambda: figures.elo_points(comparisons[0])


# --- 5, 6, 7: reward model scores of revisions --------------------------------------------------------------


def scores_by_kind(folders: Sequence[str], options) -> Points:
    """One line per kind of prompt of one run."""
    return _score_rounds(_collect(folders, most=1), options, lambda run, row: row.get("kind") or "all prompts")


def scores_by_constitution(folders: Sequence[str], options) -> Points:
    """One line per run, named by how many principles were drawn in it; harmful prompts."""
    runs, names = _collect(folders, 2), {}
    for run in runs:
        count = len({entry["principle"] for row in run.rows for entry in row.get("rounds") or ()} - {None})
        names[run.name] = f"{count} principle{'' if count == 1 else 's'} ({run.name})"
    return _score_rounds(runs, options, lambda run, row: names[run.name], harmful=True)


def scores_by_run(folders: Sequence[str], options) -> Points:
    """One line per run, named by its folder; harmful prompts."""
    return _score_rounds(_collect(folders, 2), options, lambda run, row: run.name, harmful=True)


def _score_rounds(runs: Sequence[run_folder.Run], options, series: Callable, harmful: bool = False) -> Points:
    reward_model = options.reward_model or _find_reward_model(runs[0])
    scorer.check_reward_model(reward_model)
    for run in runs:
        if not any(row.get("rounds") for row in run.rows):
            raise InputError("no revised rows in it", where=run.folder, remedy="Run critique.py and revise.py")

    def make() -> list[dict]:
        texts = []
        for run in runs:
            rows = (row for row in run.rows if not harmful or row.get("kind", "harmful") == "harmful")
            for row in islice(rows, options.limit):
                prompt, name = dialogue.as_messages(row["prompt"]), series(run, row)
                texts += [((name, number), (prompt, text)) for number, text in enumerate(rounds.texts_of(row))]
        reward_scorer, scores = scorer.load_scorer(reward_model, **options.loading), defaultdict(list)
        with cli.progress(len(texts), "score") as bar:
            for start in range(0, len(texts), _WINDOW):
                points, pairs = zip(*texts[start : start + _WINDOW], strict=True)
                for point, score in zip(points, reward_scorer.scores(pairs), strict=True):
                    if score is not None:
                        scores[point].append(score)
                    bar.update()
        return [{"series": name, "x": number, **intervals.mean(each)} for (name, number), each in scores.items()]

    settings = {
        "rows": [sha256_file(run.path(run.rows_file)) for run in runs],
        "limit": options.limit,
        "names": [run.name for run in runs],
        "reward_model": identity(reward_model),
        "dtype": options.dtype,
    }
    return settings, make


def _find_reward_model(run: run_folder.Run) -> str:
    """The reward model that the first run trained: all runs are measured by the same one."""
    for step in run.finished("reward_model"):
        return str(run.path(step["name"]))
    raise InputError("no reward model in it", where=run.folder, remedy="Name one with --reward-model")


# --- 9: calibration -----------------------------------------------------------------------------------------


def calibration_points(folders: Sequence[str], options) -> Points:
    """Of everything in the runs whose right answer is known: the judge's pairs with gold labels, and choices."""
    answers = {}
    for run in _collect(folders):
        for file in sorted(run.folder.glob("*.jsonl")):
            known = [answer for _, row in readers.read_jsonl(file) if (answer := _read_answer(row))]
            if known:
                answers[f"{run.name}: {file.stem}" if len(folders) > 1 else file.stem] = known
    if not answers:
        raise InputError(
            "nothing in it whose right answer is known",
            where=", ".join(folders),
            expected="judged pairs with gold, or choices",
            remedy="Judge pairs with a gold label (judge.py), or answer a --choice, into this folder",
        )

    def make() -> list[dict]:
        bins = {name: calibration.calibration(*zip(*known, strict=True))["bins"] for name, known in answers.items()}
        return [
            {"series": name, "x": entry["probability"], **entry["outcome"]}
            for name, entries in bins.items()
            for entry in entries
            if entry["outcome"]["n"]
        ]

    counts = {name: len(known) for name, known in answers.items()}
    return {"said": counts, "digest": sha256_text(json.dumps(answers))}, make


def _read_answer(row: Mapping) -> tuple[float, bool] | None:
    """(probability of the side that was chosen, whether it is the right one) of a judged pair or a choice."""
    if row.get("gold") in ("a", "b") and isinstance(row.get("p_a"), float) and row["p_a"] != 0.5:
        return max(row["p_a"], 1 - row["p_a"]), (row["p_a"] > 0.5) == (row["gold"] == "a")
    if isinstance(row.get("confidence"), float) and isinstance(row.get("right"), bool):
        return row["confidence"], row["right"]
    return None


# --- 10: absolute harmfulness -------------------------------------------------------------------------------


def harmfulness(folders: Sequence[str], options) -> Points:
    """The mean score, 0 to 4, of the responses to held-out harmful prompts, stage by stage; one line per run."""
    runs = _collect(folders)
    if not options.judge:
        raise InputError("--figure 10 without --judge MODEL", remedy="Name the model that rates the responses")
    loading.check_model(loading.split_endpoint(options.judge)[0])
    rows = [
        {"prompt": row["prompt"], "response": row["response"], "point": (run.name, number, stage.label)}
        for run in runs
        for number, stage in enumerate(run.stages)
        for row in islice(_harmful(stage), options.limit)
    ]
    if not rows:
        raise InputError(
            "no responses to harmful prompts in it",
            where=", ".join(folders),
            remedy="Run evaluate.py --model for each stage, with an --output in this folder",
        )
    template = load_template("classify_harm")
    texts = [[row["point"][0], row["point"][2], row["response"]] for row in rows]
    settings = {
        "responses": sha256_text(json.dumps(texts)),
        "judge": identity(options.judge),
        "template": template.sha256,
        "dtype": options.dtype,
    }
    return settings, lambda: _rate_harm(rows, template, options)


def _harmful(stage: run_folder.Stage) -> Iterable[dict]:
    return (row for row in stage.responses.values() if row.get("kind") == "harmful" and "response" in row)


def _rate_harm(rows: Sequence[dict], template, options) -> list[dict]:
    engine = loading.load_named_engine(options.judge, options.endpoints, options.loading)
    scores, masses = defaultdict(list), []
    requests = [
        RowRequest(number, template.render(prompt=row["prompt"], response=row["response"]), row=row)
        for number, row in enumerate(rows)
    ]
    with cli.progress(len(rows), "rate") as bar:
        for request, logprobs in choice.choose(engine, requests, DIGITS):
            bar.update()
            score, mass = mean_digit(logprobs)
            if score is not None:
                scores[request.row["point"]].append(score)
                masses.append(mass)
    if not masses:
        raise CaiError(f"the judge {options.judge} could read none of {len(rows)} responses")
    mass = intervals.mean(masses)["value"]
    if mass < 0.5:
        cli.warn("the judge would rather not answer with a digit: take a larger judge")
    low, high = min(map(min, scores.values())), max(map(max, scores.values()))
    if high - low < 0.5:
        cli.warn(
            f"the judge rates all {len(masses)} responses alike, {low:.2f} to {high:.2f}: it does not understand the "
            "question, so the figure says nothing"
        )
    return [
        {"series": name, "x": number, "label": label, **intervals.mean(each), "mass": mass}
        for (name, number, label), each in sorted(scores.items())
    ]


def mean_digit(logprobs: Sequence[float] | None) -> tuple[float | None, float]:
    """(the mean of the digits by probability, the sum of their probabilities); None where nothing can be read."""
    if logprobs is None or max(logprobs) == -math.inf:
        return None, 0.0
    probabilities = [math.exp(logprob) for logprob in logprobs]
    mass = math.fsum(probabilities)
    return math.fsum(digit * p for digit, p in enumerate(probabilities)) / mass, mass


FIGURES = {
    "2": PaperFigure("Harmlessness and helpfulness", "helpfulness, Elo points", "harmlessness, Elo points", plane),
    "5": PaperFigure("Scores of revisions", "revisions", "reward model score", scores_by_kind),
    "6": PaperFigure("Scores by number of principles", "revisions", "reward model score", scores_by_constitution),
    "7": PaperFigure("Scores with and without critiques", "revisions", "reward model score", scores_by_run),
    "9": PaperFigure("Calibration", "stated probability", "share right", calibration_points),
    "10": PaperFigure("Absolute harmfulness", "", "harmfulness, 0 to 4", harmfulness),
}


def name_of(row: Mapping) -> str:
    """The name of a point: its series, and its position in it."""
    if "x_low" in row:
        return row["series"]
    return f"{row['series']} {row.get('label') or format(row['x'], '.3g')}"


def save(number: str, rows: Iterable[Mapping], stem: str | Path) -> list[str]:
    """Write <stem>.png, .svg and .csv of the rows; returns the paths."""
    rows, figure = list(rows), FIGURES[number]
    name, x, limits = f"figure{number}", figure.x, None
    if number == "10":
        x, limits = f"{rows[0]['mass']:.0%} of the judge's probability was on a digit", (0, 4)
        if rows[0]["mass"] < 0.5:
            x += ":\nno verdict, so this figure says nothing"
    if number == "2":
        picture = figures.elo_plane(name, figure.title, rows)
    elif number == "9":
        picture = drawing.calibration_lines(name, figure.title, rows, x=x, y=figure.y)
    else:
        picture = drawing.lines(name, figure.title, rows, x=x, y=figure.y, limits=limits)
    picture.save(Path(stem).parent, Path(stem).name)
    with open(f"{stem}.csv", "w", encoding="utf-8", newline="") as file:
        columns = [name for name in COLUMNS if any(name in row for row in rows)]
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: outputs.csv_cell(value) for name, value in row.items()} for row in rows)
    return [f"{stem}.{ending}" for ending in ("png", "svg", "csv")]
