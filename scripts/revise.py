"""Have a model revise responses after their critique: the second half of a round.

    python scripts/revise.py --input critiques.jsonl --model tiny --output revisions.jsonl

Rules check the form of each revision (steps/flags.py) and flag what is wrong with it. Flagged revisions stay in the
file, and sft.py skips them. With --gate a judge decides whether a revision replaces the text before it, and with
--stop-when-content a row whose critique finds no fault is not revised. Leaves out the critique (critique.py), and a
second try for flagged revisions.
"""

from collections import Counter

import click

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.constitution import files, templates
from cai.data import rounds, sources
from cai.steps import content, gating, text
from cai.steps.flags import REASONS, flags


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "constitution")
@click.option("--template", metavar="NAME|FILE", default="revise", show_default=True, help="The prompt template.")
@click.option(
    "--gate",
    metavar="JUDGE",
    help="A revision replaces the text before it only if this judge (a model, or openai:NAME@URL) prefers it in both "
    "orders, and does not find it worse under the principles of earlier rounds.",
)
@content.stop_option
@text.options
def main(inputs, output, model, constitution, template, gate, stop_when_content, settings):
    """Have a model revise responses after their critique.

    \b
    Example:
      python scripts/revise.py --input critiques.jsonl --model tiny \\
          --constitution harmlessness --output revisions.jsonl
    """
    template, constitution = templates.load_template(template), files.load_constitution(constitution)
    gate = gating.read_gate(gate, settings.endpoints, constitution, settings.seed) if gate else None

    def check(row, where, line):
        rounds.check_rounds(row, where, line, critiqued=True)
        if rounds.is_skipped(row):
            return
        if gate:
            gate.check_row(row, where, line)
        if (name := row["rounds"][-1]["principle"]) not in constitution:
            raise InputError(
                f"no principle {shorten(name)!r} in the constitution {constitution.name}",
                where=where,
                line=line,
                expected="the constitution of the critique",
                remedy="Give the same --constitution again",
            )

    fields = ("prompt", "response", "rounds")
    source = sources.Source(inputs, require=fields, limit=settings.limit, check=check, reading=settings.reading)

    def render(row):
        last = row["rounds"][-1]
        return template.render(
            principle=constitution[last["principle"]],
            prompt=row["prompt"],
            response=rounds.text_of_round(row),
            critique=last["critique"],
        )

    def answer(row, generation):
        revision_flags = flags(rounds.text_of_round(row), generation.text, generation.finish)
        last = {**row["rounds"][-1], "revision": generation.text, "flags": revision_flags}
        return {**row, "rounds": [*row["rounds"][:-1], last]}

    def tally(answered):
        flagged, reasons = 0, Counter({reason: 0 for reason in REASONS})
        for row in answered:
            flagged += bool(row["rounds"][-1].get("flags"))
            reasons.update(row["rounds"][-1].get("flags", ()))
        saved = content.tally(answered, model, render, rounds.text_of_round) if stop_when_content else {}
        return {"flagged": flagged, "flags": dict(reasons), **saved}

    step = text.Step("revise", model, source, source.ids, render, answer, settle=pass_on)
    fingerprint = {"input": source.digest, "constitution": constitution.sha256, "template": template.sha256}
    text.run(
        content.stop_when_content(step) if stop_when_content else step,
        settings,
        tally=tally,
        inputs=inputs,
        output=output,
        fingerprint=fingerprint | (content.fingerprint() if stop_when_content else {}),
        gate=gate,
        # A critique that finds no fault leads to a copy of the response; without copies SFT learns only to refuse.
        next_command=["sft", "--input", output, "--model", model, "--keep", "copy", "--output", "SFT"],
    )


def pass_on(row):
    """The row itself if its round was skipped: there is nothing to revise."""
    return row if rounds.is_skipped(row) else None


if __name__ == "__main__":
    main()
