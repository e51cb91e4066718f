"""Write, check, convert and try constitutions.

    python scripts/constitution.py lint --constitution harmlessness

`lint`, `show`, `new`, `import`, `export` and `schema` need no model; `coverage` and `ablate` ask one. Leaves out
training: `run.py --constitution FILE` does that with whatever this writes.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.base.hashing import identity
from cai.base.paths import CONSTITUTIONS, SCRIPTS
from cai.constitution.files import Constitution, Principle, json_schema, load_constitution, phrase, to_yaml
from cai.constitution.importing import PHRASED, read_foreign, write_foreign
from cai.constitution.lint import NOT_JUDGED, is_english
from cai.constitution.lint import lint as find_faults
from cai.constitution.templates import load_template
from cai.data.outputs import Output, read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.data.rounds import check_rounds
from cai.data.sources import Source
from cai.evaluate.ablation import check_drawn, coverage_counts, differences, redo, without_each
from cai.evaluate.ablation import coverage as ask_coverage
from cai.models.engine import Sampling
from cai.models.loading import check_model, load_engine
from cai.models.local import fast_path
from cai.stats import tables

NAME = click.option("--name", metavar="NAME", help="The constitution's name.  [default: that of the output]")
PRINCIPLE = click.option(
    "--principle", "principles", multiple=True, metavar="ID", help="Only this principle; repeatable.  [default: all]"
)


@click.group()
def main():
    """Write, check, convert and try constitutions.

    \b
    Example:
      python scripts/constitution.py lint --constitution harmlessness
    """


# --- what needs no model ------------------------------------------------------------------------------------


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

    Ends with 0 if nothing was found, 3 if something was, 2 if a file can't be read as a constitution. What no rule
    over words can judge it says.

    \b
    Example:
      python scripts/constitution.py lint --constitution harmlessness --json
    """
    names = constitution or sorted(path.stem for path in CONSTITUTIONS.glob("*.yaml"))
    findings, broken, read = [], 0, 0
    for name in names:
        problems: list[InputError] = []
        try:
            loaded = load_constitution(name, problems)
        except InputError as error:
            problems.append(error)
            loaded = None
        broken += bool(problems)
        findings += [{"rule": "schema", "message": str(problem)} for problem in problems]
        if loaded:
            read += len(loaded.principles)
            if not is_english(loaded):
                cli.warn(f"{name}: not in English, as it seems: only what is the same to the letter is found")
            findings += [
                {
                    "rule": one.rule,
                    "file": loaded.path,
                    "line": one.line,
                    "principles": one.principles,
                    "message": one.message,
                    "remedy": one.remedy,
                }
                for one in find_faults(loaded)
            ]
    result = {
        "ok": not findings,
        "constitutions": len(names),
        "principles": read,
        "findings": findings,
        "not_judged": NOT_JUDGED,
    }
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        for one in findings:
            place = f"{one['file']}:{one['line']}: " if "file" in one else ""
            click.echo(f"{place}{one['rule']}: {one['message']}{'. ' + one['remedy'] if 'remedy' in one else ''}")
        click.echo(f"{len(findings)} findings in {read} principles of {len(names)} constitutions")
        click.echo("not judged: " + "; ".join(NOT_JUDGED))
    if findings:
        click.get_current_context().exit(InputError.exit_code if broken else cli.SOME_FAILED)


@main.command(cls=cli.Command)
@cli.options("constitution")
@PRINCIPLE
@cli.options("json")
def show(constitution, principles, as_json):
    """Show a constitution: what it is for, its principles, and how often each is drawn.

    \b
    Example:
      python scripts/constitution.py show --constitution health-information --principle medicines
    """
    loaded = load_constitution(constitution)
    chosen = _chosen(loaded, principles)
    total = sum(p.weight for p in loaded.principles)
    listed = [
        {
            "id": p.id,
            "drawn": p.weight / total,
            "critique": p.critique,
            "revision": p.revision,
            "preference": p.preference,
            "tags": p.tags,
            "examples": p.examples,
        }
        for p in chosen
    ]
    head = {
        "name": loaded.name,
        "file": loaded.path,
        "description": loaded.description,
        "for": loaded.audience,
        "source": loaded.source,
        "duties": loaded.duties,
    }
    if as_json:
        click.echo(json.dumps({**head, "principles": listed}, ensure_ascii=False))
        return
    for name, value in head.items():
        if isinstance(value, dict):
            for duty, text in value.items():
                click.echo(f"  duty {duty}: {text}")
        elif value:
            click.echo(f"{name}: {value}")
    for one in listed:
        tags = f"  [{', '.join(one['tags'])}]" if one["tags"] else ""
        click.echo(f"\n{one['id']}  ({one['drawn']:.1%} of draws){tags}")
        for name in ("critique", "revision", "preference"):
            click.echo(f"  {name}: {one[name]}")
        if one["examples"]:
            click.echo(f"  examples: {len(one['examples'])}")


@main.command(cls=cli.Command)
@click.option("--output", required=True, metavar="PATH", help="The YAML file to write.")
@NAME
@click.option("--description", default="", metavar="TEXT", help="One sentence: what it asks for, and of whom.")
@click.option("--audience", default="", metavar="TEXT", help="Whom it is for; it stands on top of the file.")
@click.option(
    "--sentence",
    "sentences",
    multiple=True,
    metavar="TEXT",
    help="A principle in one sentence; repeatable. Its requests are phrased from it and written out.",
)
@click.option(
    "--base", multiple=True, metavar="NAME|FILE", help="Take over the principles of this constitution; repeatable."
)
@cli.options("json", "overwrite")
def new(output, name, description, audience, sentences, base, as_json, overwrite):
    """Write a new constitution from sentences, from others, or both; it asks nothing.

    \b
    Example:
      python scripts/constitution.py new --output kitchen.yaml --audience "a cooking assistant" \\
          --base helpful-honest-harmless --sentence "Never play down an allergy"
    """
    if not sentences and not base:
        raise InputError("no principles", expected="--sentence or --base, or both")
    if any(not one.strip() for one in sentences):
        raise InputError("an empty sentence", where="--sentence", expected="a principle in one sentence")
    bases = [load_constitution(one) for one in base]
    principles = [p for one in bases for p in one.principles]
    taken = {p.id for p in principles}
    for sentence in sentences:
        number = next(n for n in range(1, len(taken) + 2) if f"principle-{n}" not in taken)
        taken.add(f"principle-{number}")
        principles.append(Principle(f"principle-{number}", **phrase(sentence)))
    duties = {key: text for one in bases for key, text in one.duties.items()}
    source = f"principles of {', '.join(one.name for one in bases)}" if bases else ""
    made = Constitution(name or Path(output).stem, "", "", tuple(principles), description, audience, source, duties)
    _save_constitution(output, made, overwrite)
    cli.finish({"output": output, "principles": len(principles)}, as_json=as_json, next_command=_next("lint", output))


@main.command("import", cls=cli.Command)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="FILE",
    help="The paper's JSON files, llm-swarm's JSON, or a list in .md, .txt or .json. Repeatable.",
)
@click.option("--output", required=True, metavar="PATH", help="The YAML file to write.")
@NAME
@cli.options("json", "overwrite")
def import_(inputs, output, name, as_json, overwrite):
    """Make a constitution of files in other formats, without losing a word.

    The paper's files belong together: critiques, preference questions and few-shot examples in one call. What a
    format lacks (preference questions) is phrased and counted.

    \b
    Example:
      python scripts/constitution.py import --input CritiqueRevisionInstructions.json \\
          --input RLMadisonInstructions.json --output paper.yaml
    """
    made = read_foreign(inputs, name or Path(output).stem)
    _save_constitution(output, made, overwrite)
    phrased = sum(PHRASED in p.tags for p in made.principles)
    cli.finish(
        {
            "output": output,
            "principles": len(made.principles),
            "examples": len(made.examples),
            "phrased_preferences": phrased,
        },
        as_json=as_json,
        next_command=_next("lint", output),
    )


@main.command(cls=cli.Command)
@cli.options("constitution")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["paper", "llm-swarm", "markdown"]),
    required=True,
    help="The paper's JSON files, llm-swarm's JSON, or a Markdown list.",
)
@click.option("--output", required=True, metavar="FOLDER", help="The folder to write the files into.")
@cli.options("json", "overwrite")
def export(constitution, kind, output, as_json, overwrite):
    """Write a constitution in another format; what that can't hold is counted and named.

    \b
    Example:
      python scripts/constitution.py export --constitution harmlessness --format paper --output exported
    """
    files, left_out = write_foreign(load_constitution(constitution), kind)
    texts = {
        Path(output) / name: content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        for name, content in files.items()
    }
    for path in texts:
        _check_free(path, overwrite)
    for path, text in texts.items():
        _save(path, text, overwrite)
    cli.finish({"files": [str(path) for path in texts], "left_out": left_out}, as_json=as_json)


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
    text = json.dumps(json_schema(), indent=2) + "\n"
    if output:
        _save(output, text, overwrite)
    else:
        click.echo(text, nl=False)


def _chosen(constitution: Constitution, ids: tuple[str, ...]) -> list[Principle]:
    for one in ids:
        if one not in constitution:
            raise InputError(
                f"no principle {one!r}",
                where=constitution.path,
                expected=f"one of: {', '.join(p.id for p in constitution.principles)}",
            )
    return [p for p in constitution.principles if not ids or p.id in ids]


def _check_free(path, overwrite: bool) -> None:
    if Path(path).exists() and not overwrite:
        raise InputError("it exists", where=path, remedy="Name another --output, or replace it with --overwrite")


def _save(path, text: str, overwrite: bool) -> None:
    """Write the text whole or not at all."""
    _check_free(path, overwrite)
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write ({error})", where=path, remedy="Check --output") from error


def _save_constitution(path, made: Constitution, overwrite: bool) -> None:
    """Write a constitution, once it is read back as the same."""
    _check_free(path, overwrite)
    draft = Path(f"{path}.draft")
    _save(draft, to_yaml(made), overwrite=True)
    try:
        read = load_constitution(str(draft))
        if read.principles != made.principles or read.examples != made.examples:
            raise InputError("the file would not say the same", where=path, remedy="Please report what it was made of")
        os.replace(draft, path)
    except InputError as error:
        raise InputError(str(error).replace(f"{draft}:", f"{path}:").rstrip(".")) from error
    finally:
        draft.unlink(missing_ok=True)


def _next(command: str, path: str) -> str:
    return shlex.join(["python", "scripts/constitution.py", command, "--constitution", str(path)])


# --- what asks a model --------------------------------------------------------------------------------------


@main.command(cls=cli.Command)
@cli.options("input", "output", "model", "endpoint", "constitution")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="A principle speaks to a prompt at this probability or above.",
)
@cli.options("limit", "batch_size", "device", "dtype", "json", "dry_run", "overwrite")
def coverage(
    inputs,
    output,
    model,
    endpoints,
    constitution,
    threshold,
    limit,
    batch_size,
    device,
    dtype,
    as_json,
    dry_run,
    overwrite,
):
    """Find the prompts that no principle speaks to, by a judge model.

    Each prompt is asked about with each principle, in both orders of the answers. OUTPUT has a row for each
    prompt, with `covered` and the probability for every principle.

    \b
    Example:
      python scripts/constitution.py coverage --input prompts.jsonl --model tiny \\
          --constitution harmlessness --output coverage.jsonl
    """
    check_model(model)
    loaded = load_constitution(constitution)
    source = Source(inputs, limit=limit)
    fingerprint = {
        "model": model,
        "weights": identity(model),
        "input": source.digest,
        "limit": limit,
        "constitution": loaded.sha256,
        "template": load_template("coverage").sha256,
        "threshold": threshold,
        "dtype": dtype,
    }
    journal = Output(output, command="coverage", fingerprint=fingerprint, overwrite=overwrite, inputs=inputs)
    summary = {"command": "coverage", "output": output}
    if dry_run:
        calls = 2 * len(loaded.principles) * (source.count - len(journal.done)) * (not journal.complete)
        cli.finish({**summary, "prompts": source.count, "model_calls": calls}, as_json=as_json)
        return
    engine = None
    if not journal.complete:
        engine = load_engine(model, endpoints=endpoints, batch_size=batch_size, device=device, dtype=dtype)
    with journal:
        if not journal.complete:
            with cli.progress(source.count, "coverage") as bar:
                bar.update(len(journal.done))
                for window in _windows((row for row in source if row["id"] not in journal.done), 16 * batch_size):
                    for row in ask_coverage(engine, window, loaded, threshold):
                        journal.write(row)
                        bar.update(1)
            rows = (row for _, row in read_jsonl(journal.journal))
            journal.finish(source.ids, coverage_counts(rows, loaded, threshold), **fast_path(engine))
    counts = journal.counts
    if counts["label_mass"] is not None and counts["label_mass"] < 0.5:
        cli.warn(
            f"the judge would rather not answer with a letter (they have {counts['label_mass']:.0%} of its "
            "probability): take a larger judge before you rely on this"
        )
    cli.finish({**summary, **counts}, as_json=as_json)


@main.command(cls=cli.Command)
@cli.options("input", "output", "model", "endpoint", "constitution")
@PRINCIPLE
@click.option(
    "--by",
    type=click.Choice(["oracle", "judge"]),
    default="judge",
    show_default=True,
    help="Who reads the responses: the rules of the bundled world, or a judge model.",
)
@click.option("--judge", metavar="MODEL", help="The judge model: a folder, a hub id, or `tiny`.")
@cli.options(
    "temperature",
    "top_p",
    "max_new_tokens",
    "seed",
    "limit",
    "batch_size",
    "device",
    "dtype",
    "json",
    "dry_run",
    "overwrite",
)
def ablate(
    inputs,
    output,
    model,
    endpoints,
    constitution,
    principles,
    by,
    judge,
    temperature,
    top_p,
    max_new_tokens,
    seed,
    limit,
    batch_size,
    device,
    dtype,
    as_json,
    dry_run,
    overwrite,
):
    """Leave one principle out at a time, and show what changes on the figures of the revisions.

    Reads rows of revise.py, made with this model, constitution and sampling. The rows that drew a principle are
    revised again without it and measured by evaluate.py; the others would stay as they are. The constitutions
    without it lie beside OUTPUT, for `run.py` to train with.

    \b
    Example:
      python scripts/constitution.py ablate --input revisions.jsonl --model tiny \\
          --constitution harmlessness --by oracle --output ablation.jsonl
    """
    check_model(model)
    if by == "judge" and not judge:
        raise InputError(
            "--by judge without --judge MODEL", remedy="Name the judge, or for prompts of tiny.py say --by oracle"
        )
    if judge:
        check_model(judge)
    loaded = load_constitution(constitution)
    left_out = [p.id for p in _chosen(loaded, principles)]
    reduced = {name: loaded.without(name) for name in left_out}

    def check(row, where, line):
        check_rounds(row, where, line, critiqued=False)
        check_drawn(row, loaded, where, line)

    source = Source(inputs, require=("prompt", "kind", "response", "rounds"), limit=limit, check=check)
    rows = list(without_each(source, left_out))
    sampling = Sampling(max_new_tokens, temperature, top_p)
    _warn_if_other(
        inputs,
        {
            "model": model,
            "constitution": loaded.sha256,
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
    )
    fingerprint = {
        "model": model,
        "weights": identity(model),
        "input": source.digest,
        "limit": limit,
        "constitution": loaded.sha256,
        "left_out": left_out,
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "templates": [load_template(name).sha256 for name in ("critique", "revise")],
    }
    stem = Path(output).with_suffix("")
    final = Output(
        output,
        command="ablate",
        fingerprint={**fingerprint, "by": by, "judge": judge},
        overwrite=overwrite,
        inputs=inputs,
    )
    redone = Output(f"{stem}.rows.jsonl", command="ablate", fingerprint=fingerprint, overwrite=overwrite, inputs=inputs)
    summary = {"command": "ablate", "output": output, "rows": source.count, "redone": len(rows)}
    if dry_run:
        rounds = sum(row["wanted"] - len(row["rounds"]) for row in rows)
        cli.finish({**summary, "model_calls": 2 * rounds, "measured": source.count + len(rows)}, as_json=as_json)
        return
    if not final.complete:
        loading = {"endpoints": endpoints, "batch_size": batch_size, "device": device, "dtype": dtype}
        _redo(redone, rows, reduced, model, sampling, seed, loading)
        for name, constitution_without in reduced.items():
            _save_constitution(f"{stem}.without-{_file_name(name)}.yaml", constitution_without, overwrite=True)
        classes = _classes(stem, source, redone, by, judge, batch_size, device, dtype, overwrite)
        with final:
            _write_differences(final, classes, redone, left_out)
    measured = [row for _, row in read_jsonl(output)]
    if not as_json:
        click.echo(_table(measured))
    cli.finish({**summary, **final.counts, **({"principles": measured} if as_json else {})}, as_json=as_json)


def _windows(rows, size: int):
    window = []
    for row in rows:
        window.append(row)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _warn_if_other(inputs, now: dict) -> None:
    """Say where the rows were made with other settings: the difference would then be no principle's."""
    for name in inputs:
        made = (read_manifest(name) or {}).get("fingerprint", {})
        for key, value in now.items():
            if key in made and made[key] != value:
                what = "another constitution file" if key == "constitution" else f"{key} {made[key]}, not {value}"
                cli.warn(f"{name} was made with {what}: what changes is not due to the principle alone")


def _redo(journal: Output, rows: list[dict], constitutions, model: str, sampling: Sampling, seed: int, loading) -> None:
    """Revise again, window by window (resumable)."""
    if journal.complete:
        return
    engine = load_engine(model, **loading) if rows else None
    with journal, cli.progress(len(rows), "revise again") as bar:
        left = [row for row in rows if row["id"] not in journal.done]
        bar.update(len(rows) - len(left))
        for window in _windows(left, 16 * loading["batch_size"]):
            for row in redo(engine, window, constitutions, sampling, seed):
                journal.write(row)
                bar.update(1)
        short = sum(len(row["rounds"]) < row["wanted"] for _, row in read_jsonl(journal.journal))
        journal.finish([row["id"] for row in rows], {"rows": len(rows), "failed": short}, **fast_path(engine))


def _classes(stem, source: Source, redone: Output, by, judge, batch_size, device, dtype, overwrite) -> dict:
    """{row id: (kind, class)} of the given rows and the redone ones, by evaluate.py in a process of its own."""
    everything = f"{stem}.measured.jsonl"
    whole = (row for _, row in read_jsonl(redone.path) if len(row["rounds"]) == row["wanted"])
    write_jsonl(everything, [*source, *whole])
    words = [
        sys.executable,
        str(SCRIPTS / "evaluate.py"),
        "--responses",
        everything,
        "--by",
        by,
        "--output",
        f"{stem}.evaluation.jsonl",
        "--batch-size",
        str(batch_size),
        "--dtype",
        dtype,
        *(["--judge", judge] if judge else []),
        *(["--device", device] if device else []),
        *(["--overwrite"] if overwrite else []),
    ]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, cli.SOME_FAILED):
        error = CaiError(f"evaluate.py ended with exit code {done.returncode}; what is done is kept")
        error.exit_code = done.returncode
        raise error
    return {row["id"]: (row["kind"], row["class"]) for _, row in read_jsonl(f"{stem}.evaluation.classes.jsonl")}


def _write_differences(output: Output, classes: dict, redone: Output, left_out: list[str]) -> None:
    replaced: dict[str, dict[str, str]] = {name: {} for name in left_out}
    for _, row in read_jsonl(redone.path):
        replaced[row["left_out"]][row["original"]] = row["id"]
    again = {row_id for one in replaced.values() for row_id in one.values()}
    first = {row_id: found for row_id, found in classes.items() if row_id not in again}
    ids = []
    for name, places in replaced.items():
        both = {**first, **{row_id: classes[row_id] for row_id in places.values() if row_id in classes}}
        for row in differences(both, places):
            ids.append(f"{name} {row['metric']}")
            if ids[-1] not in output.done:
                output.write({"id": ids[-1], "left_out": name, "redone": len(places), **row})
    unmeasured = sum(found is None for _, found in classes.values()) + len(again - set(classes))
    output.finish(ids, {"failed": unmeasured})


def _table(rows: list[dict]) -> str:
    """A line for each principle and figure that changed."""
    changed = [
        (
            f"without {row['left_out']}",
            row["metric"].replace("_", " "),
            f"{row['redone']}",
            f"{100 * row['full']:.1f} → {100 * row['without']:.1f} %",
            f"{100 * row['difference']:+.1f} ({_points(row['low'])} to {_points(row['high'])})",
        )
        for row in rows
        if row["difference"]
    ]
    if not changed:
        return "no figure changed, whichever principle was left out"
    return tables.table(("", "figure", "redone", "full → without", "points (95 % interval)"), changed)


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}"  # one row has no spread to measure


def _file_name(principle: str) -> str:
    """A principle's id as part of a file name: letters of ids come from a file, and must not be a path."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in principle)[:60]


if __name__ == "__main__":
    main()
