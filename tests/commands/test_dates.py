"""Chat templates that write today's date: one date per run, the first day's when it is resumed."""

import json
from datetime import date

import models
import pytest
from conftest import load_command

from cai.base import run_settings
from cai.models import chat
from cai.models.chat import Chat, fix_template_date

PROMPTS = [{"id": name, "prompt": f"How do I oil the hinge of door {name}?"} for name in "abcd"]
DATED = (
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = 'none' %}"
    "{%- endif %}<|begin_of_text|>Today is {{ day }}.{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    folder = models.copy("llama", tmp_path_factory.mktemp("dated") / "model")
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


@pytest.fixture
def on_day(monkeypatch):
    """`on_day(2)` makes today the second of a month."""

    def set_day(number):
        class Day(date):
            @classmethod
            def today(cls):
                return date(2031, 5, number)

        monkeypatch.setattr(run_settings, "date", Day)

    set_day(1)
    return set_day


@pytest.fixture
def rendered(monkeypatch):
    """The texts that were rendered."""
    texts, render = [], Chat.render
    monkeypatch.setattr(Chat, "render", lambda self, talk: texts.append(render(self, talk)) or texts[-1])
    return texts


def generate(invoke, tmp_path, model, *more):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return invoke(
        *("generate", "--input", prompts, "--model", model, "--output", tmp_path / "out.jsonl"),
        *("--max-new-tokens", 4, *more),
    )


def manifest(tmp_path):
    return json.loads((tmp_path / "out.jsonl.run.json").read_text())


def test_the_date_is_in_the_fingerprint(invoke, tmp_path, dated, on_day, rendered):
    """Llama 3.2, Mistral Small 3, gpt-oss and Granite 3 write it (their chat templates; sgl-project/sglang #3296 on
    Llama's default date, oobabooga/textgen #6692 on `strftime_now`)."""
    assert generate(invoke, tmp_path, dated).exit_code == 0
    assert manifest(tmp_path)["fingerprint"]["date"] == "2031-05-01"
    assert rendered and all("Today is 01 May 2031." in text for text in rendered)


def test_a_model_without_a_date_has_none(invoke, tmp_path, on_day):
    assert generate(invoke, tmp_path, models.folder("llama"), "--date", "2030-01-02").exit_code == 0
    assert "date" not in manifest(tmp_path)["fingerprint"]


def test_a_resumed_run_takes_the_first_day(invoke, tmp_path, dated, on_day, rendered):
    assert generate(invoke, tmp_path, dated).exit_code == 0
    # As a run that was killed after two rows leaves it.
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.partial").write_bytes(b"".join(lines[:2]))
    (tmp_path / "out.jsonl.run.json").write_text(json.dumps({**manifest(tmp_path), "status": "running"}))
    on_day(2)
    rendered.clear()
    assert generate(invoke, tmp_path, dated).exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(lines)
    assert rendered and all("Today is 01 May 2031." in text for text in rendered)
    assert manifest(tmp_path)["fingerprint"]["date"] == "2031-05-01" and manifest(tmp_path)["resumed"] == 1


def test_a_finished_run_is_done_on_any_day(invoke, tmp_path, dated, on_day):
    assert generate(invoke, tmp_path, dated).exit_code == 0
    on_day(2)
    result = generate(invoke, tmp_path, dated)
    assert result.exit_code == 0 and "done already" in result.stderr


def test_the_date_is_an_option(invoke, tmp_path, dated, on_day, rendered):
    assert generate(invoke, tmp_path, dated, "--date", "2030-12-24").exit_code == 0
    assert manifest(tmp_path)["fingerprint"]["date"] == "2030-12-24"
    assert all("Today is 24 Dec 2030." in text for text in rendered)
    result = generate(invoke, tmp_path, dated, "--date", "2030-12-25")
    assert result.exit_code == 2 and 'date was "2030-12-24", now "2030-12-25"' in result.stderr
    assert generate(invoke, tmp_path, dated, "--date", "24.12.2030").exit_code == 2


def test_a_new_run_with_overwrite_takes_its_own_day(invoke, tmp_path, dated, on_day):
    assert generate(invoke, tmp_path, dated).exit_code == 0
    on_day(2)
    assert generate(invoke, tmp_path, dated, "--overwrite").exit_code == 0
    assert manifest(tmp_path)["fingerprint"]["date"] == "2031-05-02"


def test_a_damaged_date_is_refused(invoke, tmp_path, dated, on_day):
    assert generate(invoke, tmp_path, dated).exit_code == 0
    damaged = manifest(tmp_path)
    damaged["fingerprint"]["date"] = "yesterday"
    (tmp_path / "out.jsonl.run.json").write_text(json.dumps(damaged))
    result = generate(invoke, tmp_path, dated)
    assert result.exit_code == 2 and "'yesterday'" in result.stderr


def test_training_has_the_date_too(invoke, tmp_path, dated, on_day):
    round_ = {"principle": "p", "critique": "c", "revision": "Two drops.", "flags": []}
    rows = tmp_path / "revised.jsonl"
    rows.write_text(json.dumps({**PROMPTS[0], "response": "No.", "rounds": [round_]}) + "\n")
    arguments = ("sft", "--input", rows, "--model", dated, "--output", tmp_path / "sft")
    assert invoke(*arguments).exit_code == 0
    assert json.loads((tmp_path / "sft.run.json").read_text())["fingerprint"]["date"] == "2031-05-01"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2031-05-01"),  # gpt-oss, Mistral Small 3
        ('{{ strftime_now("%B %d, %Y") }}', "May 01, 2031"),  # Granite 3
        ("{%- set day = strftime_now('%d %b %Y') %}{{ day }}", "01 May 2031"),  # Llama 3.2
        ("{% set layout = '%A' %}{{ strftime_now(layout) }}", "Thursday"),
        ("It's {{ strftime_now('%H:%M') }}", "It's 00:00"),
        ("{% macro say() %}{{ strftime_now('%Y') }}{% endmacro %}{{ say() }}", "2031"),
        ("{% if strftime_now is defined %}yes{% endif %}", "yes"),
        ("\n{{ 'x' }}", "\nx"),
    ],
)
def test_a_template_writes_the_date_it_is_given(template, text):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(fix_template_date(template, date(2031, 5, 1))).render() == text


def test_the_templates_of_trl_are_unchanged_today():
    """Every template of TRL that writes a date, against transformers' own rendering on the same day."""
    from pathlib import Path

    import trl
    from transformers import AutoTokenizer

    folder = Path(trl.__file__).parent / "chat_templates"
    texts = [file.read_text() for file in sorted(folder.glob("*.jinja")) if "strftime_now" in file.read_text()]
    assert len(texts) >= 3
    for text in texts:
        tokenizer = AutoTokenizer.from_pretrained(models.folder("llama"))
        tokenizer.chat_template = text
        talk = [{"role": "user", "content": "Hello"}]
        plain = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert Chat(tokenizer).render(talk) == plain


def test_reasoning_tags_are_cut_and_in_the_fingerprint(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "cai.models.local.LocalEngine._read_answer", lambda self, prompt, tokens, sampling: chat_answer(self, prompt)
    )

    def chat_answer(engine, prompt):
        from cai.models.engine import Generation
        from cai.models.reasoning import strip_thinking

        text = strip_thinking("<<hm>>So.<</hm>>Two drops. </think>" if prompt else "", tags=engine.chat.tags)
        return Generation(text, "stop", 1, 1)

    assert generate(invoke, tmp_path, models.folder("llama"), "--reasoning-tags", "<<hm>>", "<</hm>>").exit_code == 0
    assert manifest(tmp_path)["fingerprint"]["reasoning_tags"] == [["<<hm>>", "<</hm>>"]]


def test_the_options_are_where_they_have_an_effect():
    for name in ("generate", "critique", "revise", "judge", "evaluate", "compare", "run", "sft", "reward_model", "ppo"):
        options = {option for parameter in load_command(name).params for option in parameter.opts}
        assert "--date" in options, name
        assert ("--reasoning-tags" in options) == (name not in ("sft", "reward_model")), name
    assert chat.fix_template_date.cache_info().maxsize is None
