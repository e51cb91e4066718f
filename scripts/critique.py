"""Have a model criticise responses by a principle of the constitution: the first half of a round.

    python scripts/critique.py --input responses.jsonl --model tiny --output critiques.jsonl

A principle is drawn for each row and round (paper, section 3.1). Run it on revised rows for another round.
Leaves out the revision (revise.py) and any check of the critique's text.
"""

from collections import Counter

import click

from cai.base import cli
from cai.constitution import files, templates
from cai.data import rounds, sources
from cai.models.reasoning import has_reasoning_tag
from cai.steps import content, text


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "constitution")
@click.option("--template", metavar="NAME|FILE", help="The prompt template.  [default: critique]")
@click.option("--cot", is_flag=True, help="Think step by step first: the template critique_cot.")
@content.stop_option
@text.options
def main(inputs, output, model, constitution, template, cot, stop_when_content, settings):
    """Have a model criticise responses by a drawn principle.

    \b
    Example:
      python scripts/critique.py --input responses.jsonl --model tiny \\
          --constitution harmlessness --output critiques.jsonl
    """
    if cot and template:
        raise click.UsageError("--cot is the template critique_cot: give --cot or --template, not both.")
    template = templates.load_template(template or ("critique_cot" if cot else "critique"))
    constitution_option = [] if constitution == "harmlessness" else ["--constitution", constitution]
    constitution = files.load_constitution(constitution)
    source = sources.Source(
        inputs,
        require=("prompt", "response"),
        limit=settings.limit,
        reading=settings.reading,
        check=lambda row, where, line: rounds.check_rounds(row, where, line, critiqued=False),
    )

    def draw_principle(row):
        return constitution.draw(settings.seed, row["id"], len(row.get("rounds") or ()))

    def render(row):
        return template.render(principle=draw_principle(row), prompt=row["prompt"], response=rounds.text_of_round(row))

    def answer(row, generation):
        new_round = {"principle": draw_principle(row).id, "critique": generation.text}
        return {**row, "rounds": [*(row.get("rounds") or ()), new_round]}

    def tally(answered):
        counts = Counter(empty=0)
        for row in answered:
            critique = row["rounds"][-1]["critique"]
            counts["empty"] += not critique
            if has_reasoning_tag(critique):
                counts["leaked_tag"] += 1
        if not stop_when_content:
            return dict(counts)
        return {**counts, **content.tally(answered, model, render, lambda row: row["rounds"][-1]["critique"])}

    def pass_on(row):
        return row if stop_when_content and rounds.is_content(row) else None

    fingerprint = {"input": source.digest, "constitution": constitution.sha256, "template": template.sha256}
    text.run(
        text.Step("critique", model, source, source.ids, render, answer, settle=pass_on),
        settings,
        tally=tally,
        inputs=inputs,
        output=output,
        fingerprint=fingerprint | ({"stop_when_content": True} if stop_when_content else {}),
        next_command=["revise", "--input", output, "--model", model, *constitution_option, "--output", "REVISIONS"],
    )


if __name__ == "__main__":
    main()
