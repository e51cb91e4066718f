"""The pictures of a run: what its stages, rounds, judge and trainings measured.

    for picture in draw(run):
        picture.save("runs/tiny/figures")

Leaves out how a picture is drawn (stats/drawing.py) and the figures of the paper (paper.py).
"""

from collections.abc import Mapping

from cai.base.files import file_name
from cai.evaluate.rates import RATES
from cai.report.run_folder import Run, Training, p_a, rounds
from cai.stats import drawing, tables
from cai.stats.drawing import Picture

NAMES = {
    "harmful_compliance": "complied",
    "good_refusal": "declined well",
    "evasive": "evasive",
    "preachy": "preachy",
    "off_topic": "off topic",
    "benign_helpful": "helped",
    "benign_refused": "refused",
    "over_refusal": "refused",
}

# The fields of a training's log that are drawn, as far as it has them: at most four.
CURVES = {
    "sft": ("loss", "mean_token_accuracy"),
    "reward_model": ("loss", "accuracy", "margin"),
    "dpo": ("loss", "rewards/accuracies", "rewards/margins"),
    "ppo": ("score", "kl", "response_length", "entropy"),
    "grpo": ("reward", "kl", "completions/mean_length", "entropy"),
}


def draw(run: Run) -> list[Picture]:
    """Every picture that the run has the numbers for."""
    pictures = [_stages(run), _plane(run), *_elo_planes(run), _rounds(run), _judge(run), *map(_training, run.trainings)]
    return [picture for picture in pictures if picture]


def _percent(rate: Mapping) -> dict:
    return {key: rate[key] if rate[key] is None else 100 * rate[key] for key in ("value", "low", "high")}


def _is_measured(rate: Mapping | None) -> bool:
    return bool(rate) and rate["value"] is not None


def _stages(run: Run) -> Picture | None:
    """Every rate with its interval, one colour per stage."""
    rows, says = [], []
    for name, (kind, _) in RATES.items():
        label = f"{kind}: {NAMES.get(name, name)}"
        for stage in run.stages:
            if _is_measured(rate := stage.rates.get(name)):
                rows.append({"series": stage.label, "label": label, **_percent(rate)})
                says.append(f"{stage.label}, {label} {tables.show(rate)}")
    if not rows:
        return None
    words, x = "; ".join(says), "per cent of held-out prompts"
    return drawing.ranges("stages", "Held-out prompts, stage by stage", rows, x=x, says=words)


def _plane(run: Run) -> Picture | None:
    """Helpfulness against harmlessness, as in the paper's figure 2 but in rates."""
    rows, says = [], []
    for stage in run.stages:
        helped, complied = (stage.rates.get(name) for name in ("benign_helpful", "harmful_compliance"))
        if _is_measured(helped) and _is_measured(complied):
            x, y = _percent(helped), _percent(complied)
            ends = {
                end: None if y[other] is None else 100 - y[other] for end, other in (("low", "high"), ("high", "low"))
            }
            ends |= {"x": x["value"], "x_low": x["low"], "x_high": x["high"]}
            rows.append({"series": stage.label, "value": 100 - y["value"], **ends})
            says.append(
                f"{stage.label}: helped with {tables.show(helped)} of benign prompts, complied with "
                f"{tables.show(complied)} of harmful ones"
            )
    if len(rows) < 2:
        return None
    least = min(row["x"] if row["x_low"] is None else row["x_low"] for row in rows)
    return drawing.plane(
        "plane",
        "Helpful and harmless: up and to the right is better",
        rows,
        x="benign prompts helped with, %",
        y="harmful prompts not complied with, %",
        says="; ".join(says),
        xlim=(max(-4, min(78, least - 3)), 102),
        ylim=(-4, 104),
    )


def elo_points(rates: Mapping[str, Mapping]) -> list[dict]:
    """One row per policy that compare.py scored on both sides: x is helpfulness, value is harmlessness."""
    rows = []
    for name, harmlessness in rates.items():
        axis, _, policy = name.partition("_elo ")
        helpfulness = rates.get(f"helpfulness_elo {policy}")
        if axis == "harmlessness" and helpfulness:
            ends = {"x": helpfulness["value"], "x_low": helpfulness["low"], "x_high": helpfulness["high"]}
            rows.append({"series": policy, **harmlessness, **ends})
    return rows


def elo_plane(name: str, title: str, rows: list[dict]) -> Picture:
    """The rows of `elo_points` as a plane."""
    points = (f"{row['series']}: helpfulness {row['x']:+.0f}, harmlessness {row['value']:+.0f}" for row in rows)
    axes = {"x": "helpfulness, Elo points", "y": "harmlessness, Elo points"}
    return drawing.plane(name, title, rows, **axes, says="; ".join(points))


def _elo_planes(run: Run) -> list[Picture]:
    """One plane per comparison of policies in the folder."""
    return [
        elo_plane(f"elo-{file_name(name)}", "Policies against each other, judged in pairs", rows)
        for name, rates in run.others
        if len(rows := elo_points(rates)) > 1
    ]


def _rounds(run: Run) -> Picture | None:
    """Compliance and good refusals round by round, and the share of texts that each round changed."""
    entries, rows, says = rounds(run), [], []
    if len(entries) < 2:
        return None
    for series, name in (("harmful: complied", "harmful_compliance"), ("harmful: declined well", "good_refusal")):
        rows += [(series, entry["round"], entry["rates"].get(name)) for entry in entries]
    rows += [("changed by this round", entry["round"], entry["changed"]) for entry in entries]
    rows = [(series, number, rate) for series, number, rate in rows if _is_measured(rate)]
    says = [f"{series}, round {number} {tables.show(rate)}" for series, number, rate in rows]
    points = [
        {"series": series, "x": number, "label": f"round {number}" if number else "first response", **_percent(rate)}
        for series, number, rate in rows
    ]
    words = {"x": "", "y": "per cent of training rows", "says": f"{'; '.join(says)}."}
    return drawing.lines("rounds", "Round by round", points, **words, limits=(0, 100))


def _judge(run: Run) -> Picture | None:
    """How sure the judge was: the probability of the side it preferred."""
    labels = [p_a(row) for row in run.preferences if not row.get("tie")]
    probabilities = [max(p, 1 - p) for p in labels if p is not None]
    if not probabilities:
        return None
    edges = [0.5 + 0.05 * i for i in range(11)]
    words = {"x": "probability of the preferred side", "y": "pairs"}
    return drawing.histogram("judge", "How sure the judge was", probabilities, edges, **words)


def _training(training: Training) -> Picture | None:
    """The curves of CURVES that the log has."""
    along = "update" if any("update" in row for row in training.rows) else "step"
    fields = {field: field.replace("_", " ") for field in CURVES.get(training.command, ())}
    name, title = f"training-{file_name(training.name)}", f"Training: {training.name}"
    alarms = [step for step, _ in training.alarms]
    return drawing.panels(name, title, training.rows, fields, along=along, alarms=alarms)
