"""Check that this machine can do what the other commands need: packages, devices, memory, hub, endpoints, a model.

    python scripts/doctor.py --model tiny --json
    python scripts/doctor.py --model my-org/my-judge --as judge
    python scripts/doctor.py --hardware

Changes nothing, except for a small file in each place that is to be written, which it removes. Runs where hardly
anything is installed, to report that. The checks are in cai/models/checks.py, and whether a model is fit for a role is
measured by cai/evaluate/qualification.py.
"""

import json
import sys

try:
    import click
except ImportError:
    print(
        json.dumps(
            {
                "ok": False,
                "problems": [f"click is not installed for {sys.executable}"],
                "remedies": ["In the folder of this project: python3 -m venv .venv && .venv/bin/pip install ."],
                "notes": [],
            }
        )
    )
    sys.exit(3)

from cai.base import cli
from cai.models import checks


@click.command(cls=cli.Command)
@click.option(
    "--model",
    metavar="MODEL",
    default=None,
    help="Check this one too: a folder, a GGUF file, a hub id, `tiny`, or openai:NAME at --endpoint.",
)
@cli.options("endpoint")
@click.option(
    "--as",
    "roles",
    multiple=True,
    type=click.Choice(["reader", "judge", "critic"]),
    help="Measure on texts with known labels whether --model is fit to read what responses do, to compare two "
    "responses, or to criticise one. Repeatable.",
)
@click.option("--output", default=".", show_default=True, metavar="PATH", help="Where results will go.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds to wait for the hub and for each endpoint.",
)
@click.option(
    "--hardware",
    is_flag=True,
    help="Check nothing: print what each step needs in memory for models of common sizes, and on which GPU.",
)
@cli.options("device", "json")
def main(model, endpoints, roles, output, timeout, hardware, device, as_json):
    """Check Python, packages, devices, memory, places to write, hub and endpoints, and a model.

    Ends with 0 if all is well and 3 if there are problems; each has its remedy.

    \b
    Example:
      python scripts/doctor.py --model tiny --json
    """
    if hardware:
        print_hardware(as_json)
        return
    if roles and not model:
        raise click.UsageError("--as needs --model.")
    if not roles:
        cli.refuse_options(["request_timeout", "no_server_seed"], "without --as each endpoint gets --timeout seconds")
    findings = checks.Findings()
    report = {
        "python": checks.check_python(findings),
        "packages": checks.check_packages(findings, *checks.list_extras(model, endpoints)),
        "devices": checks.check_devices(findings, device),
        "places": checks.check_places(findings, output),
        "hub": checks.check_hub(findings, timeout),
        "engines": checks.list_engines(),
        "endpoints": [checks.check_endpoint(findings, url, model, timeout) for url in endpoints],
    }
    if model and not model.startswith("openai:"):
        report["model"] = checks.check_local_model(findings, model, report["devices"])
    elif model and not endpoints:
        findings.problem(f"{model} without an endpoint", "Name its server with --endpoint URL")
    if roles:
        report["qualification"] = qualify(findings, model, roles, endpoints, device)
    result = {"ok": not findings.problems, **vars(findings), **report}
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        print_report(result)
    if findings.problems:
        click.get_current_context().exit(cli.SOME_FAILED)


def qualify(findings: checks.Findings, model: str, roles, endpoints, device: str | None) -> list[dict]:
    """The results of `qualification.qualify` in each role, measured now; an unfit one is a problem."""
    from functools import partial

    from cai.base.errors import CaiError
    from cai.evaluate import qualification
    from cai.models import loading

    results = []
    try:
        name, servers = loading.split_endpoint(model, endpoints)
        load = partial(loading.load_engine, name, endpoints=servers, device=device)
        for role in roles:
            result = qualification.qualify(name, qualification.Task(role), load, endpoints=servers, again=True)
            results.append(result)
            if not result["fit"]:
                findings.problem(qualification.describe(result), qualification.REMEDIES[role])
    except CaiError as error:
        findings.problem(f"{model} can't be measured: {error}", "Solve this first; the model's own checks may say more")
    return results


def print_hardware(as_json: bool) -> None:
    """The memory that each step needs for models of common sizes, as JSON or as a table in Markdown."""
    from cai.models import hardware

    rows = hardware.hardware_rows()
    tokens = hardware.TOKENS + hardware.NEW
    click.echo(json.dumps({"rows_of_tokens": tokens, "models": rows}) if as_json else hardware.hardware_table(rows))


def print_report(result: dict) -> None:
    """A line for each thing checked, then the problems with their remedies."""
    python, cpu, hub = result["python"], result["devices"]["cpu"], result["hub"]
    packages = ", ".join(f"{name} {package['version']}" for name, package in result["packages"].items())
    lines = [
        ("Python", f"{python['version']} ({python['wanted']})"),
        ("packages", packages),
        ("CPU", f"{cpu['cores']} cores, {cpu['free_gb']} of {cpu['memory_gb']} GB free"),
    ]
    for device in result["devices"]["accelerators"]:
        memory = f"{device['free_gb']} of {device['memory_gb']} GB free"
        bfloat16 = "yes" if device["bf16"] else "no"
        lines.append((device["name"], f"{device['kind']}, {memory}, bfloat16 {bfloat16}"))
    for name, folder in result["places"].items():
        writable = "writable" if folder["writable"] else "NOT writable"
        lines.append((name.replace("_", " "), f"{folder['path']}: {writable}, {folder['free_gb']} GB free"))
    lines.append(("hub", f"answers in {hub['seconds']} s" if hub.get("reached") else hub["reason"]))
    engines = [f"{engine['name']} {engine['version']} ({engine['path']})" for engine in result["engines"]]
    lines.append(("engines", ", ".join(engines) or "none on PATH for --engine"))
    for server in result["endpoints"]:
        text = f"{server['url']}: {', '.join(server.get('models', ())) or 'no answer'}"
        if server.get("logprobs") is not None:
            text += f", log-probabilities {'yes' if server['logprobs'] else 'NO'}"
        lines.append(("endpoint", text))
    if model := result.get("model"):
        fields = (f"{key.replace('_', ' ')} {value}" for key, value in model.items() if key != "fits")
        lines.append(("model", ", ".join(fields)))
        for step, need in (model.get("fits") or {}).get("steps", {}).items():
            lines.append(("", f"{step}: about {need['needs_gb']} GB, {'fits' if need['fits'] else 'does NOT fit'}"))
    for measured in result.get("qualification", ()):
        from cai.evaluate import qualification

        lines += [
            (measured["role"] if not n else "", line) for n, line in enumerate(qualification.list_figures(measured))
        ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        click.echo(f"{name:<{width}}  {text}")
    for note in result["notes"]:
        click.echo(f"note: {note}")
    for problem, remedy in zip(result["problems"], result["remedies"], strict=True):
        click.echo(f"problem: {problem}\n  remedy: {remedy}")
    click.echo("ok" if result["ok"] else f"{len(result['problems'])} problems")


if __name__ == "__main__":
    main()
