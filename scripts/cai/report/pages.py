"""The report of a run as an HTML page and as Markdown for a pull request.

    page, payload = render_html(run, pictures)
    text = render_markdown(run, pictures)

Leaves out the text of the cards (cards.py) and the look of the page (templates/report/).
"""

import base64
import hashlib
import itertools
import re
from collections.abc import Sequence

from markupsafe import Markup

from cai.base.paths import TEMPLATES
from cai.data.kinds import KINDS
from cai.evaluate import framed
from cai.evaluate.rates import RATES
from cai.report import escaping, run_folder, transcripts
from cai.report.run_folder import Run
from cai.stats.drawing import Picture

MAX_BYTES = 4_900_000  # of the page; transcripts get what figures and tables leave

# The words of the report; a rate that is not here is called by its name.
NAMES = {
    "harmful_compliance": "complied (in part counts)",
    "good_refusal": "declined with a reason and an alternative",
    "evasive": "evasive",
    "preachy": "preachy",
    "off_topic": "off topic",
    "benign_helpful": "helped",
    "benign_refused": "refused",
    "benign_off_topic": "off topic",
    "borderline_helpful": "helped",
    "over_refusal": "refused, though harmless",
    "borderline_off_topic": "off topic",
}
JUDGE_NAMES = {
    "undecided": "undecided pairs",
    "same_position": "same position in both orders",
    "mean_margin": "mean margin, 0 unsure to 1 sure",
    "label_mass": "probability on the two labels",
    "a_chosen": "first response preferred",
    "always_a": "accuracy of always the first",
    "longer": "accuracy of always the longer",
    "identical": "identical pairs, not judged",
    "failed": "failed pairs",
    "nulls": "pairs without a readable verdict",
    "empty": "pairs with an empty response",
}
ROUND_RATES = ("harmful_compliance", "good_refusal", "benign_helpful")
SENTENCES = {
    "harmful_compliance": "Of harmful prompts the model complied with",
    "good_refusal": "It declined them openly, with a reason and an alternative, in",
    "benign_helpful": "Of benign prompts it helped with",
    "over_refusal": "Of harmless prompts with frightening words it refused",
    "harmful_compliance_under_worst_seen_frame": "In the worst frame that is seen in training it complied with",
    "harmful_compliance_under_worst_held_out_frame": "In the worst frame that is held out it complied with",
}


def render_html(run: Run, pictures: Sequence[Picture]) -> tuple[str, dict]:
    """(the page, `transcripts.embed`'s payload in it)."""
    script, style = ((TEMPLATES / "report" / f"page.{ending}").read_text(encoding="utf-8") for ending in ("js", "css"))
    values = {
        **_tables(run, pictures),
        "script": Markup(script),
        "style": Markup(style),
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        "reliability": run_folder.reliability(run),
        "files": [*filter(None, (run.rows_file, run.preferences_file)), *(stage.file for stage in run.stages)],
    }
    principles = {entry["id"]: [entry["text"], entry["question"]] for entry in values["principles"]}
    template = escaping.environment(html=True).get_template("page.html.jinja")

    def render(payload: dict) -> str:
        return template.render(**values, payload=payload, data={**payload, "principles": principles})

    items = transcripts.transcripts(run)
    empty = render({"texts": [], "items": [], "total": len(items), "shown": 0})
    payload = transcripts.embed(items, MAX_BYTES - len(empty.encode()))
    return render(payload), payload


def render_markdown(run: Run, pictures: Sequence[Picture]) -> str:
    template = escaping.environment(html=False).get_template("report.md.jinja")
    return re.sub(r"\n{3,}", "\n\n", template.render(**_tables(run, pictures)))


def _tables(run: Run, pictures: Sequence[Picture]) -> dict:
    """What both forms of the report show."""
    rounds, principles = run_folder.rounds(run), run_folder.principles(run)
    return {
        "run": run,
        "mark": escaping.MARK,
        "figures": pictures,
        "summary": [
            *(f"{verdict}." for verdict in run.qualifications),
            *_summarise_stages(run),
            *_summarise_steps(run, rounds, principles),
        ],
        "rounds": rounds,
        "names": NAMES,
        "known_rates": set(RATES),
        "stage_rows": _stage_rows(run),
        "round_rates": [name for name in ROUND_RATES if any(entry["rates"].get(name) for entry in rounds)],
        "principles": principles,
        "judge_tables": [
            *(judge_table(name, run_folder.flatten(counts)) for name, counts in run.judged),
            *(judge_table(name, counts) for name, counts in run.audits),
        ],
    }


def judge_table(name: str, counts: list[tuple[str, object]]) -> tuple[str, list, list]:
    """(name, figures, figures of single principles), each figure as (label, value)."""
    prefix = "principles "
    labels = [(JUDGE_NAMES.get(key, key.replace("_", " ")), value) for key, value in counts]
    general = [(label, value) for label, value in labels if not label.startswith(prefix)]
    return name, general, [(label[len(prefix) :], value) for label, value in labels if label.startswith(prefix)]


def _stage_rows(run: Run) -> list[tuple[str, list]]:
    """[(kind of prompts with n, [(label, a rate for each stage)])]; prompts under stress and in frames come last.

    Single frames are left out: there are many, and the worst is shown.
    """
    measured = {name for stage in run.stages for name, rate in stage.rates.items() if rate}
    measured = {name for name in measured if not framed.is_single(name)}
    ways = sorted({name.partition("_under_")[2] for name in measured}, key=framed.order_of)
    result = []
    for way, kind in itertools.product(ways, KINDS):
        ending = f"_under_{way}" if way else ""
        names = [name for name, (prompts, _) in RATES.items() if prompts == kind and name + ending in measured]
        rates = {name: [stage.rates.get(name + ending) for stage in run.stages] for name in names}
        if names:
            sizes = ", ".join(f"{n:,}" for n in sorted({rate["n"] for rate in rates[names[0]] if rate}))
            stress = framed.describe_way(way) if way else ""
            rows = [(NAMES.get(name, name), rates[name]) for name in names]
            result.append((f"{kind} prompts{stress} (n = {sizes})", rows))
    return result


def _summarise_stages(run: Run) -> list[str]:
    """The change of the main rates over the stages, in sentences."""
    lines = []
    for name, words in SENTENCES.items():
        rates = [(stage.label, rate) for stage in run.stages if (rate := stage.rates.get(name))]
        rates = [(label, rate) for label, rate in rates if rate["value"] is not None]
        if rates:
            values = ", ".join(f"{escaping.percent(rate)} {label}" for label, rate in rates)
            lines.append(f"{words} {values}{_difference(rates)}.")
    if len(run.stages) == 1:
        lines.append("Only one model was measured, so there is no change to report.")
    return lines


def _difference(rates: list[tuple[str, dict]]) -> str:
    """A note if the first and the last interval overlap: a cautious test, since they may do so a little where a
    difference is real."""
    (_, first), (_, last) = rates[0], rates[-1]
    overlap = first["low"] <= last["high"] and last["low"] <= first["high"]
    return " (no clear change: the intervals overlap)" if overlap and len(rates) > 1 else ""


def _summarise_steps(run: Run, rounds: list[dict], principles: list[dict]) -> list[str]:
    """What happened in the other steps, in sentences."""
    lines = []
    if len(rounds) > 1:
        count = "1 round" if len(rounds) == 2 else f"{len(rounds) - 1} rounds"
        lines.append(
            f"{len(run.rows):,} responses went through {count} of critique and revision; the first changed "
            f"{escaping.percent(rounds[1]['changed'])} of them, the last {escaping.percent(rounds[-1]['changed'])}."
        )
        unused = [entry["id"] for entry in principles if not entry["drawn"] and not entry["compared"]]
        if unused:
            more = " …" if len(unused) > 8 else ""
            lines.append(f"Never used: {', '.join(unused[:8])}{more} ({len(unused)} in all).")
    for name, counts in run.judged[:1]:
        lines.append(
            f"The judge compared {counts.get('pairs', 0):,} pairs ({name}); its two orders preferred the same "
            f"place in {escaping.percent(counts.get('same_position'))}."
        )
    if alarms := sum(len(training.alarms) for training in run.trainings):
        lines.append(f"Alarms raised in training: {alarms:,}; see below.")
    # The rows that failed before a gate are in the counts of its output too.
    steps = (step for step in run.steps if not step["command"].endswith("-ungated"))
    if failed := sum(step["counts"].get("failed") or 0 for step in steps):
        lines.append(f"Records that failed: {failed:,}; their steps' manifests name them.")
    return lines
