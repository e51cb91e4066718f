"""templates/ and constitutions/ in a project of somebody else's: plain Jinja and plain YAML are enough."""

import ast
import json
import re
import shutil
import subprocess
import sys

import jinja2
import pytest
import yaml
from conftest import ROOT

from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template

TEMPLATES = sorted(path.stem for path in (ROOT / "templates").glob("*.jinja"))
CONSTITUTIONS = sorted(path.stem for path in (ROOT / "constitutions").glob("*.yaml"))
REFERENCE = (ROOT / "references" / "templates.md").read_text(encoding="utf-8")
TOLD = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", REFERENCE, re.MULTILINE))


def plain(name: str):
    source = (ROOT / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source)


def rendered(template, values: dict) -> dict[str, str]:
    context = template.new_context(values)
    return {role: "".join(block(context)).strip() for role, block in template.blocks.items()}


def test_the_example_runs_with_the_two_folders_alone(tmp_path):
    [example] = re.findall(r"^```python\n(.*?)^```", REFERENCE, re.MULTILINE | re.DOTALL)
    assert sum(bool(line.strip()) for line in example.splitlines() if not re.match("import|from", line)) <= 10
    for folder in ("templates", "constitutions"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "example.py").write_text(f"import sys\n{example}\nassert 'cai' not in sys.modules\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    [message] = ast.literal_eval(done.stdout)
    principle = load_constitution("privacy").principles[0]
    ours = load_template("critique").render(principle=principle, prompt="Who lives next door?", response="Ann Lee, 43.")
    assert [message] == ours


def test_every_template_is_told_of():
    assert sorted(TOLD) == TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_in_plain_jinja_as_in_ours_with_the_variables_told(name):
    tree = yaml.safe_load((ROOT / "constitutions" / "harmlessness.yaml").read_text(encoding="utf-8"))
    principle = tree["principles"][0]
    values = {one: f"the {one}" for one in re.findall(r"`(\w+)`", TOLD[name])}
    values |= {"principle": principle} if "principle" in values else {}
    values |= {"constitution": tree} if "constitution" in values else {}
    values |= {"order": range(5 if name in ("classify", "classify_answer") else 2)} if "order" in values else {}
    made = rendered(plain(name), values)
    made.pop("example_revision", None)  # of worked examples alone
    assert set(made) <= {"system", "user", "prefill"}
    ours = load_template(name, next(iter(made))).render(**values)
    assert list(made.values()) == [message["content"] for message in ours]
    for one, text in values.items():
        assert not isinstance(text, str) or text in str(made), one
    # What is told is all there is: without one of them, strict Jinja says so.
    for one in values:
        if f"optional `{one}`" not in TOLD[name]:
            with pytest.raises(jinja2.UndefinedError):
                rendered(plain(name), {key: value for key, value in values.items() if key != one})


@pytest.mark.parametrize("path", sorted((ROOT / "templates" / "stress").glob("*.jinja")), ids=lambda path: path.stem)
def test_a_stress_template_renders_in_plain_jinja_as_in_ours(path):
    made = rendered(plain(f"stress/{path.stem}"), {"prompt": "the {{ prompt }}"})
    ours = load_template(str(path)).render(prompt="the {{ prompt }}")
    assert list(made.values()) == [message["content"] for message in ours]
    assert "the {{ prompt }}" in made["user"]  # Jinja in a value stays as it is


def test_the_two_answers_of_coverage_change_places():
    values = {"principle": {"critique": "Find harm."}, "prompt": "Why?"}
    straight, swapped = (rendered(plain("coverage"), {**values, "order": one})["user"] for one in ((0, 1), (1, 0)))
    yes, no = "It speaks to the prompt.", "It does not speak to the prompt."
    assert f"(A) {yes}\n(B) {no}" in straight and f"(A) {no}\n(B) {yes}" in swapped
    assert straight == rendered(plain("coverage"), values)["user"]


@pytest.mark.parametrize("name", CONSTITUTIONS)
def test_a_constitution_says_the_same_in_plain_yaml(name):
    tree = yaml.safe_load((ROOT / "constitutions" / f"{name}.yaml").read_text(encoding="utf-8"))
    ours = load_constitution(name)
    assert json.loads(json.dumps(tree)) == tree  # texts, numbers, lists and mappings, no dates
    assert tree["name"] == name and len(tree["principles"]) == len(ours.principles)
    for principle, mine in zip(tree["principles"], ours.principles, strict=True):
        for key in ("id", "critique", "revision", "preference"):
            assert " ".join(principle[key].split()) == getattr(mine, key)
        assert principle.get("weight", 1) == mine.weight
        assert tuple(principle.get("examples", ())) + ours.examples == mine.examples
    messages = rendered(
        plain("preference"),
        {"principle": tree["principles"][-1], "prompt": "a", "response_a": "b", "response_b": "c", "reasoning": ""},
    )
    assert tree["principles"][-1]["preference"] in messages["user"]
