"""Answer prompts with a model: the first responses, or samples for the judge to compare.

    python scripts/generate.py --input prompts.jsonl --model tiny --output responses.jsonl

Leaves out any judgement of the answers, and few-shot prompting: a chat model is asked as a chat model.
"""

import click

from cai.base import cli
from cai.data.dialogue import as_messages
from cai.data.sources import Source
from cai.steps import text


class Samples:
    """The rows of a source, each as many times as it is sampled, with ids `<prompt id>/<sample>`."""

    def __init__(self, source: Source, samples: int):
        self.source, self.samples = source, samples

    @property
    def ids(self) -> list[str]:
        return [f"{row_id}/{n}" for row_id in self.source.ids for n in range(self.samples)]

    def __iter__(self):
        for row in self.source:
            row.pop("rounds", None)  # those of an earlier response
            for n in range(self.samples):
                yield {**row, "id": f"{row['id']}/{n}", "prompt_id": row["id"], "sample": n}


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Responses for each prompt.")
@click.option("--system", metavar="TEXT", help="A system message in front of every prompt.")
@text.options
def main(inputs, output, model, samples, system, **options):
    """Answer prompts with a model.

    \b
    Example:
      python scripts/generate.py --input scripts/cai/tiny/prompts/train.jsonl \\
          --model tiny --limit 100 --output responses.jsonl
    """
    source = Source(inputs, limit=options["limit"])
    rows = Samples(source, samples)
    before = [{"role": "system", "content": system}] if system else []

    def answer(row, made):
        return {**row, "response": made.text, "model": model, "finish": made.finish}

    def tally(done):
        unfinished = empty = 0
        for row in done:
            unfinished += row["finish"] == "length"
            empty += not row["response"]
        return {"prompts": source.count, "unfinished": unfinished, "empty": empty}

    text.run(
        "generate",
        rows,
        rows.ids,
        lambda row: before + as_messages(row["prompt"]),
        answer,
        inputs=inputs,
        output=output,
        model=model,
        tally=tally,
        fingerprint={"input": source.digest, "samples": samples, "system": system},
        next_command=["critique", "--input", output, "--model", model, "--output", "CRITIQUES"],
        **options,
    )


if __name__ == "__main__":
    main()
