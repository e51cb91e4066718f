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

NAMES = {
    "harmful_compliance": "complied",
    "good_refusal": "declined well",
    "evasive": "evasive",
    "preachy": "preachy",
    "off_topic": "off topic",
    "benign_helpful": "helped",
    "benign_refused": "refused",
    "benign_off_topic": "off topic",
    "borderline_helpful": "helped",
    "over_refusal": "refused",
    "borderline_off_topic": "off topic",
}

# The fields of a training's log that are drawn, as far as it has them: at most four.
CURVES = {
    "sft": ("loss", "mean_token_accuracy"),
    "reward_model": ("loss", "accuracy", "margin"),
    "dpo": ("loss", "rewards/accuracies", "rewards/margins"),
    "ppo": ("score", "kl", "response_length", "entropy"),
    "grpo": ("reward", "kl", "completions/mean_length", "entropy"),
}


def draw(run: Run) -> list[drawing.Picture]:
    """Every picture that the run has the numbers for."""
    pictures = (_stages(run), _plane(run), *_elo_planes(run), _rounds(run), _judge(run), *map(_training, run.trainings))
    return [picture for picture in pictures if picture]


def _percent(rate: Mapping) -> dict:
    return {key: rate[key] if rate[key] is None else 100 * rate[key] for key in ("value", "low", "high")}


def _on_x_axis(rate: Mapping) -> dict:
    return {"x": rate["value"], "x_low": rate["low"], "x_high": rate["high"]}


def _is_measured(rate: Mapping | None) -> bool:
    return bool(rate) and rate["value"] is not None


def _stages(run: Run) -> drawing.Picture | None:
    """Every rate with its interval, one colour per stage."""
    measured = [
        (stage.label, f"{kind}: {NAMES.get(name, name)}", rate)
        for name, (kind, _) in RATES.items()
        for stage in run.stages
        if _is_measured(rate := stage.rates.get(name))
    ]
    if not measured:
        return None
    rows = [{"series": series, "label": label, **_percent(rate)} for series, label, rate in measured]
    says = "; ".join(f"{series}, {label} {tables.show(rate)}" for series, label, rate in measured)
    return drawing.ranges(
        "stages", "Held-out prompts, stage by stage", rows, x="per cent of held-out prompts", says=says
    )


def _plane(run: Run) -> drawing.Picture | None:
    """Helpfulness against harmlessness, as in the paper's figure 2 but in rates."""
    rows, says = [], []
    for stage in run.stages:
        helped, complied = (stage.rates.get(name) for name in ("benign_helpful", "harmful_compliance"))
        if _is_measured(helped) and _is_measured(complied):
            y = _percent(complied)
            ends = (("value", "value"), ("low", "high"), ("high", "low"))
            y = {end: None if y[other] is None else 100 - y[other] for end, other in ends}
            rows.append({"series": stage.label, **y, **_on_x_axis(_percent(helped))})
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
    helpfulness = {policy: rate for name, rate in rates.items() if (policy := _policy(name, "helpfulness"))}
    return [
        {"series": policy, **rate, **_on_x_axis(helpfulness[policy])}
        for name, rate in rates.items()
        if (policy := _policy(name, "harmlessness")) in helpfulness
    ]


def _policy(name: str, axis: str) -> str | None:
    """The policy whose Elo score on the axis the rate is, if it is one."""
    return name.partition(f"{axis}_elo ")[2] or None


def elo_plane(name: str, title: str, rows: list[dict]) -> drawing.Picture:
    """The rows of `elo_points` as a plane."""
    points = (f"{row['series']}: helpfulness {row['x']:+.0f}, harmlessness {row['value']:+.0f}" for row in rows)
    x, y = "helpfulness, Elo points", "harmlessness, Elo points"
    return drawing.plane(name, title, rows, x=x, y=y, says="; ".join(points))


def _elo_planes(run: Run) -> list[drawing.Picture]:
    """One plane per comparison of policies in the folder."""
    return [
        elo_plane(f"elo-{file_name(name)}", "Policies against each other, judged in pairs", rows)
        for name, rates in run.others
        if len(rows := elo_points(rates)) > 1
    ]


def _rounds(run: Run) -> drawing.Picture | None:
    """Compliance and good refusals round by round, and the share of texts that each round changed."""
    entries = rounds(run)
    if len(entries) < 2:
        return None
    names = {"harmful: complied": "harmful_compliance", "harmful: declined well": "good_refusal"}
    rates = [(series, entry["round"], entry["rates"].get(name)) for series, name in names.items() for entry in entries]
    rates += [("changed by this round", entry["round"], entry["changed"]) for entry in entries]
    rates = [(series, number, rate) for series, number, rate in rates if _is_measured(rate)]
    rows = [
        {"series": series, "x": number, "label": f"round {number}" if number else "first response", **_percent(rate)}
        for series, number, rate in rates
    ]
    says = "; ".join(f"{series}, round {number} {tables.show(rate)}" for series, number, rate in rates)
    return drawing.lines(
        "rounds", "Round by round", rows, x="", y="per cent of training rows", says=f"{says}.", limits=(0, 100)
    )


def _judge(run: Run) -> drawing.Picture | None:
    """How sure the judge was: the probability of the side it preferred."""
    labels = [p_a(row) for row in run.preferences if not row.get("tie")]
    probabilities = [max(p, 1 - p) for p in labels if p is not None]
    if not probabilities:
        return None
    edges = [0.5 + 0.05 * i for i in range(11)]
    return drawing.histogram(
        "judge", "How sure the judge was", probabilities, edges, x="probability of the preferred side", y="pairs"
    )


def _training(training: Training) -> drawing.Picture | None:
    """The curves of CURVES that the log has."""
    along = "update" if any("update" in row for row in training.rows) else "step"
    fields = {field: field.replace("_", " ") for field in CURVES.get(training.command, ())}
    return drawing.panels(
        f"training-{file_name(training.name)}",
        f"Training: {training.name}",
        training.rows,
        fields,
        along=along,
        alarms=[step for step, _ in training.alarms],
    )
