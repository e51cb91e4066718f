"""Have a model revise responses after their critique: the second half of a round.

    python scripts/revise.py --input critiques.jsonl --model tiny --output revisions.jsonl

Rules check the form of each revision (steps/flags.py) and flag what is wrong with it. Flagged revisions stay in the
file, and sft.py skips them. Leaves out the critique (critique.py), and a second try for flagged revisions.
"""

from collections import Counter

import click

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.constitution import files, templates
from cai.data import rounds, sources
from cai.steps import text
from cai.steps.flags import REASONS, flags


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "constitution")
@click.option("--template", metavar="NAME|FILE", default="revise", show_default=True, help="The prompt template.")
@text.options
def main(inputs, output, model, constitution, template, settings):
    """Have a model revise responses after their critique.

    \b
    Example:
      python scripts/revise.py --input critiques.jsonl --model tiny \\
          --constitution harmlessness --output revisions.jsonl
    """
    template, constitution = templates.load_template(template), files.load_constitution(constitution)

    def check(row, where, line):
        rounds.check_rounds(row, where, line, critiqued=True)
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
            flagged += bool(row["rounds"][-1]["flags"])
            reasons.update(row["rounds"][-1]["flags"])
        return {"flagged": flagged, "flags": dict(reasons)}

    text.run(
        text.Step("revise", model, source, source.ids, render, answer),
        settings,
        tally=tally,
        inputs=inputs,
        output=output,
        fingerprint={"input": source.digest, "constitution": constitution.sha256, "template": template.sha256},
        # A critique that finds no fault leads to a copy of the response; without copies SFT learns only to refuse.
        next_command=["sft", "--input", output, "--model", model, "--keep", "copy", "--output", "SFT"],
    )


if __name__ == "__main__":
    main()
