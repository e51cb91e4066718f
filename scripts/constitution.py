"""Write, check, convert and try constitutions.

    python scripts/constitution.py lint --constitution harmlessness

`lint`, `show`, `new`, `import`, `export` and `schema` need no model. The subcommands that ask a model are in
cai/authoring/commands.py. Leaves out training: `run.py --constitution FILE` does that with any constitution.
"""

import json
import shlex
from pathlib import Path

import click

from cai.authoring import commands
from cai.base import cli, paths
from cai.base.errors import InputError
from cai.constitution import files, importing, rendering

OUTPUT = click.option("--output", required=True, metavar="PATH", help="The YAML file to write.")
NAME = click.option("--name", metavar="NAME", help="The constitution's name.  [default: that of the output]")


@click.group()
def main():
    """Write, check, convert and try constitutions.

    \b
    Example:
      python scripts/constitution.py lint --constitution harmlessness
    """


@main.command(cls=cli.Command)
@click.option(
    "--constitution",
    multiple=True,
    metavar="NAME|FILE",
    help="A YAML file, or the name of one in constitutions/; repeatable.  [default: all bundled]",
)
@cli.options("json")
def lint(constitution, as_json):
    """Check constitutions: schema, duplicates, contradictions, requests that are hard to follow.

    Exits with 0 without findings, 3 with any, 2 if a file can't be read as a constitution.

    \b
    Example:
      python scripts/constitution.py lint --constitution harmlessness --json
    """
    report = rendering.check_all(constitution or sorted(path.stem for path in paths.CONSTITUTIONS.glob("*.yaml")))
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else rendering.findings_as_text(report))
    if report["findings"]:
        is_broken = any(finding["rule"] == "schema" for finding in report["findings"])
        click.get_current_context().exit(InputError.exit_code if is_broken else cli.SOME_FAILED)


@main.command(cls=cli.Command)
@cli.options("constitution", "principle", "json")
def show(constitution, principles, as_json):
    """Show a constitution: what it is for, its principles, and how often each is drawn.

    \b
    Example:
      python scripts/constitution.py show --constitution health-information --principle medicines
    """
    description = rendering.describe(files.load_constitution(constitution), principles)
    click.echo(json.dumps(description, ensure_ascii=False) if as_json else rendering.description_as_text(description))


@main.command(cls=cli.Command)
@OUTPUT
@NAME
@click.option("--description", default="", metavar="TEXT", help="One sentence: what it asks for, and of whom.")
@click.option("--audience", default="", metavar="TEXT", help="Whom it is for; written at the top of the file.")
@click.option("--sentence", "sentences", multiple=True, metavar="TEXT", help="A principle in one sentence; repeatable.")
@click.option(
    "--base", multiple=True, metavar="NAME|FILE", help="Take over the principles of this constitution; repeatable."
)
@cli.options("json", "overwrite")
def new(output, name, description, audience, sentences, base, as_json, overwrite):
    """Write a new constitution from sentences, from other constitutions, or from both.

    The requests of a principle are phrased from its sentence and written out.

    \b
    Example:
      python scripts/constitution.py new --output kitchen.yaml --audience "a cooking assistant" \\
          --base helpful-honest-harmless --sentence "Never play down an allergy"
    """
    bases = [files.load_constitution(base_name) for base_name in base]
    constitution = rendering.compose(name or Path(output).stem, sentences, bases, description, audience)
    _finish_new(output, constitution, overwrite, as_json)


@main.command("import", cls=cli.Command)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="FILE",
    help="The paper's JSON files, llm-swarm's JSON, or a document in Markdown, text, JSON or YAML. Repeatable.",
)
@OUTPUT
@NAME
@click.option("--prose/--lists", "is_prose", default=None, help="Read sentences, or items.  [default: by their number]")
@click.option("--keep-unclear", is_flag=True, help="Keep sentences of unclear polarity verbatim, tagged `unclear`.")
@click.option("--outline", metavar="PATH", help="Also write each document's sections and sentences, as JSON.")
@cli.options("json", "overwrite")
def import_(inputs, output, name, is_prose, keep_unclear, outline, as_json, overwrite):
    """Make a constitution from files in other formats.

    Of a document, list items and orders become principles; of prose, each sentence that is a rule. The rest is listed
    on stderr. Exits with 3 if a sentence was left out because it may be a demand or a prohibition.

    \b
    Example:
      python scripts/constitution.py import --input CritiqueRevisionInstructions.json \\
          --input RLMadisonInstructions.json --output paper.yaml
    """
    report = {}
    rendering.check_free(output, overwrite)
    options = {"keep_unclear": keep_unclear, "is_prose": is_prose}
    constitution = importing.read_foreign(inputs, name or Path(output).stem, report, **options)
    if outline:
        rendering.save(outline, json.dumps(report["outline"], ensure_ascii=False, indent=1) + "\n", overwrite)
    losses = rendering.report_losses(report, keep_unclear, as_json)
    _finish_new(output, constitution, overwrite, as_json, **importing.count_parts(constitution), **losses)


def _finish_new(output, constitution, overwrite, as_json, **counts):
    rendering.save_constitution(output, constitution, overwrite)
    next_command = f"python scripts/constitution.py lint --constitution {shlex.quote(output)}"
    summary = {"output": output, "principles": len(constitution.principles), **counts}
    cli.finish(summary, as_json=as_json, next_command=next_command)


@main.command(cls=cli.Command)
@cli.options("constitution")
@click.option("--format", "kind", required=True, type=click.Choice(importing.FORMATS), help="The format to write.")
@click.option("--output", required=True, metavar="FOLDER", help="The folder to write the files into.")
@cli.options("json", "overwrite")
def export(constitution, kind, output, as_json, overwrite):
    """Write a constitution in another format; what the format can't hold is counted and named.

    \b
    Example:
      python scripts/constitution.py export --constitution harmlessness --format paper --output exported
    """
    contents, left_out = importing.write_foreign(files.load_constitution(constitution), kind)
    cli.finish({"files": rendering.save_all(Path(output), contents, overwrite), "left_out": left_out}, as_json=as_json)


@main.command(cls=cli.Command)
@click.option("--output", default=None, metavar="PATH", help="The file to write.  [default: standard output]")
@cli.options("overwrite")
def schema(output, overwrite):
    """Print the JSON Schema of a constitution, which editors use to complete and check.

    In the YAML file: `# yaml-language-server: $schema=constitution.schema.json`.

    \b
    Example:
      python scripts/constitution.py schema --output constitution.schema.json
    """
    text = json.dumps(files.json_schema(), indent=2)
    if not output:
        return click.echo(text)
    rendering.save(output, f"{text}\n", overwrite)


for _command in commands.COMMANDS:
    main.add_command(_command)

if __name__ == "__main__":
    main()
