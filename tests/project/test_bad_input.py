"""Bad input by the thousand: every reader gives rows or an error that names the file; no traceback, no hang, no loss.

    pytest tests/project/test_bad_input.py                          # a fast share
    python tests/project/test_bad_input.py --examples 10000         # the long run, over all readers together

Inputs are drawn by hypothesis: well-formed ones, ones spoilt byte by byte, and soups of what readers trip over.
Leaves out what a model is asked with the rows, and files that are too large for memory.
"""

import atexit
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import click
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "scripts"), str(HERE.parent)]

from cai.base.errors import InputError
from cai.constitution import importing
from cai.constitution.files import PRINCIPLE_KEYS, TOP_KEYS, load_constitution, to_yaml
from cai.constitution.templates import load_template, neutralise
from cai.data import dialogue, preferences, public_sets, rounds
from cai.data.outputs import Output, write_jsonl
from cai.data.readers import read_jsonl
from cai.data.reading import Reading
from cai.data.sources import Source
from cai.evaluate import benchmarks, gate

EXAMPLES = int(os.environ.get("BAD_INPUT_EXAMPLES", "40"))  # of each property
SEEN: dict[str, Counter] = {}  # what happened, by test


def note(what: str) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::test_")[2].partition(" ")[0]
    SEEN.setdefault(test, Counter())[what] += 1


def summary() -> None:
    """A line for each reader, and one for all."""
    lines = {**SEEN, "all": sum(SEEN.values(), Counter())}
    for name, found in lines.items():
        print(f"{name:<45} {found['examples']:>6} inputs: {found['read']} read, {found['refused']} refused")


if "BAD_INPUT_EXAMPLES" in os.environ:
    atexit.register(summary)

# Generous: what takes this long on a few kilobytes would take for ever on more.
bad_input = settings(
    max_examples=EXAMPLES,
    deadline=timedelta(seconds=20),
    database=None,
    derandomize=EXAMPLES == 40,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)

# --- what is drawn -----------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        "Human:",
        "Assistant:",
        "\n\n",
        "\n",
        "\r\n",
        "\r",
        " ",
        "\t",
        "\0",
        "\ufeff",
        "\u2028",
        "\x85",
        "<",
        "</",
        "response>",
        "<prompt>",
        "{{ 7*7 }}",
        "{% if %}",
        "{{",
        "#",
        "# ",
        "- ",
        "* ",
        "H:",
        "A:",
        "[[[",
        "]]]",
        "{}",
        "&a",
        "*a",
        "!!python",
        "'",
        '"',
        "\\",
        "\\u12",
        "\ud7ff",
        "é",
        "😀",
        "1e999",
        "a" * 300,
        "%YAML 1.",
        "<|im_end|>",
        "=cmd()",
        "../",
        "/etc/",
    ]
)
TEXT = st.one_of(st.text(max_size=12), st.lists(PIECES, max_size=8).map("".join))
SPOKEN = st.lists(
    st.sampled_from(["\n\nHuman: ", "\n\nAssistant: ", "Human:", "\n\n", "\n", " ", "a", "b c"]), max_size=10
).map("".join)
NUMBER = st.one_of(st.integers(), st.sampled_from([2**63, -(2**64), 10**400]), st.floats())
LEAF = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
VALUE = st.recursive(
    LEAF, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=6
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), VALUE),
        "content": st.one_of(TEXT, VALUE),
    },
)
PROMPT = st.one_of(
    TEXT, SPOKEN, st.lists(MESSAGE, max_size=4), VALUE, TEXT.map(lambda text: [{"role": "user", "content": text}])
)
ROUND = st.fixed_dictionaries(
    {},
    optional={
        "principle": st.one_of(st.just("p"), VALUE),
        "critique": st.one_of(TEXT, VALUE),
        "revision": st.one_of(TEXT, st.none(), VALUE),
        "flags": VALUE,
    },
)
SIDE = st.one_of(TEXT, SPOKEN, VALUE, st.lists(MESSAGE, max_size=3))
ROW = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(st.sampled_from(["a", "b", "", 1, "1"]), VALUE),
        "prompt": PROMPT,
        "response": st.one_of(TEXT, VALUE),
        "response_a": SIDE,
        "response_b": SIDE,
        "chosen": SIDE,
        "rejected": SIDE,
        "gold": st.one_of(st.just("a"), VALUE),
        "p_chosen": st.one_of(st.floats(0, 1), VALUE),
        "rounds": st.one_of(st.lists(ROUND, max_size=2), VALUE),
        "corrects": st.one_of(st.lists(TEXT, max_size=2), VALUE),
        "incorrects": st.one_of(st.lists(TEXT, max_size=2), VALUE),
        "text_correct": SIDE,
        "text_incorrect": SIDE,
        "kind": VALUE,
        "more": VALUE,
    },
)
# A row that every command takes, and one with a field that is as it comes.
WHOLE = {
    "prompt": "Why?",
    "response": "So.",
    "response_a": "So.",
    "response_b": "No.",
    "chosen": "So.",
    "rejected": "No.",
    "gold": "a",
    "p_chosen": 0.75,
    "rounds": [{"principle": "p", "critique": "c", "revision": "r", "flags": []}],
    "corrects": [" a"],
    "incorrects": [" b", " c"],
    "text_correct": "\n\nHuman: a\n\nAssistant: b",
    "text_incorrect": "\n\nHuman: a\n\nAssistant: c",
    "kind": "harmful",
}
NEARLY = st.builds(
    lambda name, value: {**WHOLE, name: value},
    st.sampled_from(["id", *WHOLE]),
    st.one_of(TEXT, SPOKEN, VALUE, PROMPT, SIDE, st.lists(ROUND, max_size=2)),
)
# The columns of the public sets, one set or a mixture.
PUBLIC = st.one_of(
    *(
        st.fixed_dictionaries({name: st.one_of(TEXT, VALUE) for name in names})
        for one in public_sets.FORMATS.values()
        for names in (one.needs, one.columns)
    ),
    st.fixed_dictionaries({"prompt": TEXT, "type": TEXT, "label": st.sampled_from(["safe", "unsafe", "x", None])}),
    st.fixed_dictionaries({"prompt": TEXT, "response": TEXT, "is_safe": st.sampled_from([True, "False", 1, None])}),
    st.fixed_dictionaries({"transcript": st.one_of(SPOKEN, VALUE)}),
    st.fixed_dictionaries({"Behavior": TEXT, "ContextString": VALUE, "BehaviorID": VALUE}),
    ROW,
)
GOOD = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1, max_size=20).filter(str.strip)}, optional={"more": st.text(max_size=5)}
)


def as_json(value, ascii_only: bool) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@st.composite
def spoilt(draw, whole):
    """Bytes as `whole` draws them, some of them spoilt."""
    raw = draw(whole)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(raw)))
        piece = draw(
            st.one_of(
                st.binary(max_size=4),
                PIECES.map(lambda s: s.encode("utf-8", "surrogatepass")),
                st.sampled_from(
                    [
                        b"\xef\xbb\xbf",
                        b"\xff",
                        b"\xed\xa0\x80",
                        b"\0",
                        b"\\ud800",
                        b"\r",
                        b"NaN",
                        b"[" * 3000,
                        b'{"a":' * 3000,
                        b"9" * 5000,
                        b'"prompt":"x",',
                        b"\xc3",
                        b"null",
                    ]
                ),
            )
        )
        raw = raw[:at] + piece + raw[at + draw(st.integers(0, 4)) :]
    return raw


@st.composite
def json_lines(draw, rows=ROW):
    ends = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"]))
    return b"".join(as_json(row, draw(st.booleans())) + ends for row in draw(st.lists(rows, max_size=4)))


@st.composite
def json_array(draw):
    return as_json(draw(st.one_of(st.lists(ROW, max_size=4), VALUE)), draw(st.booleans()))


@st.composite
def csv_file(draw):
    names = draw(st.lists(st.one_of(st.sampled_from(["id", "prompt", "response", ""]), TEXT), max_size=3))
    made = io.StringIO()
    writer = csv.writer(made, lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
    writer.writerow([*names, "prompt"])
    for _ in range(draw(st.integers(0, 4))):
        writer.writerow(draw(st.lists(TEXT, min_size=1, max_size=len(names) + 2)))
    return made.getvalue().encode()


# --- what must be so ---------------------------------------------------------------------------------------------


def reading(name: str, raw: bytes, read, beside: dict[str, bytes] | None = None):
    """What `read(path)` gives of a file with these bytes, as a list; None where it refuses them as it should.

    beside: other files in its folder, by name; a refusal may name one of them.
    """
    note("examples")
    files = {**(beside or {}), name: raw}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        for one, content in files.items():
            (Path(folder) / one).write_bytes(content)
        try:
            found = list(read(str(path)))
        except InputError as error:
            said = str(error)
            said.encode()
            assert any(one in said for one in files) and len(said) < 1000 + len(folder) + 400 * said.count("\n"), said
            assert sorted(p.name for p in Path(folder).iterdir()) == sorted(files), "a refusal wrote something"
            note("refused")
            return None
        note("read")
        return found


def same_again(rows: list[dict]) -> None:
    """Rows that were read can be written, and are read as the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "again.jsonl"
        write_jsonl(path, rows)
        assert [row for _, row in read_jsonl(path)] == rows
        assert [*Source([str(path)], require=())] == rows


def source(path: str, **more) -> list[dict]:
    return [*Source([path], **more)]


@bad_input
@given(spoilt(json_lines()))
def test_json_lines(raw):
    rows = reading("in.jsonl", raw, partial(source, require=()))
    if rows is not None:
        assert len(rows) == sum(bool(line.strip()) for line in raw.split(b"\n"))
        same_again(rows)


@bad_input
@given(json_lines(GOOD), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_good_rows_are_all_read(raw, mark):
    lines = [json.loads(line) for line in raw.split(b"\n") if line.strip()]
    rows = reading("in.jsonl", mark + raw, source)
    assert (rows is None) == (not lines)
    assert [row.get("more") for row in rows or ()] == [row.get("more") for row in lines]


@bad_input
@given(spoilt(json_array()))
def test_json(raw):
    rows = reading("in.json", raw, partial(source, require=()))
    if rows is not None:
        same_again(rows)
        if raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            assert len(rows) == len(json.loads(raw.decode("utf-8-sig")))


@bad_input
@given(spoilt(csv_file()))
def test_csv(raw):
    rows = reading("in.csv", raw, partial(source, require=()))
    if rows is not None:
        same_again(rows)
        text = io.StringIO(raw.decode("utf-8-sig"), newline="")
        assert len(rows) == sum(bool(cells) for cells in csv.reader(text)) - 1


@bad_input
@given(spoilt(st.lists(TEXT, max_size=5).map(lambda lines: "\n".join(lines).encode())))
def test_text(raw):
    rows = reading("in.txt", raw, source)
    if rows is not None:
        assert len(rows) == sum(bool(line.strip()) for line in raw.decode("utf-8-sig").split("\n"))
        same_again(rows)


@bad_input
@given(
    st.lists(st.tuples(st.sampled_from(["prompt", "id", "x", "y"]), st.integers(0, 5)), min_size=1, max_size=3),
    st.integers(0, 3),
    spoilt(st.just(b"")),
    st.data(),
)
def test_parquet(columns, count, noise, data):
    import pyarrow
    from pyarrow import parquet

    kinds = [
        (st.text(max_size=5), pyarrow.string()),
        (st.binary(max_size=5), pyarrow.binary()),
        (st.floats(), pyarrow.float64()),
        (st.integers(-(2**62), 2**62), pyarrow.timestamp("us")),
        (st.lists(st.text(max_size=3), max_size=2), pyarrow.list_(pyarrow.string())),
        (
            st.fixed_dictionaries({"role": st.text(max_size=3), "n": st.integers(-9, 9)}),
            pyarrow.struct([("role", pyarrow.string()), ("n", pyarrow.int64())]),
        ),
    ]
    arrays = [
        pyarrow.array(
            data.draw(st.lists(st.one_of(st.none(), kinds[kind][0]), min_size=count, max_size=count)), kinds[kind][1]
        )
        for _, kind in columns
    ]
    made = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=[name for name, _ in columns]), made)
    raw = made.getvalue()
    if noise:
        at = data.draw(st.integers(0, len(raw)))
        raw = raw[:at] + noise[:64] + raw[at + len(noise[:64]) :]
    rows = reading("in.parquet", raw, partial(source, require=()))
    if rows is not None:
        same_again(rows)
        assert noise or len(rows) == count


@bad_input
@given(spoilt(json_lines(GOOD)), st.integers(0, 60), st.sampled_from(["in.jsonl.gz", "in.json.gz", "in.csv.gz"]))
def test_gzip(raw, cut, name):
    import gzip

    packed = gzip.compress(raw)
    reading(name, packed[: len(packed) - cut] if cut < 30 else packed, partial(source, require=()))


@bad_input
@given(SPOKEN, SPOKEN)
def test_transcripts_keep_every_word(one, other):
    note("examples")
    note("read")
    turns = dialogue.split_transcript(one)
    if turns is not None:
        said = "".join(turn["content"] for turn in turns)
        kept = re.sub(r"(?:\A|(?<=\n\n))\s*(Human|Assistant):", "", one.lstrip())
        assert "".join(said.split()) == "".join(kept.split())
    pair = dialogue.split_pair({"chosen": one, "rejected": other})
    if "prompt" in pair:
        shared = pair["prompt"] if isinstance(pair["prompt"], str) else "".join(m["content"] for m in pair["prompt"])
        for side, whole in (("chosen", one), ("rejected", other)):
            words = Counter(re.sub(r"(Human|Assistant):", "", whole).split())
            assert words == Counter(re.sub(r"(Human|Assistant):", "", f"{shared} {pair[side]}").split())


def checks():
    """(name, reader) of what the commands make of their rows."""
    yield (
        "critique",
        partial(source, require=("prompt", "response"), check=partial(rounds.check_rounds, critiqued=False)),
    )
    yield (
        "revise",
        partial(source, require=("prompt", "response", "rounds"), check=partial(rounds.check_rounds, critiqued=True)),
    )
    yield "choice", partial(source, require=benchmarks.FIELDS, check=benchmarks.check)
    yield "transcripts", partial(source, require=benchmarks.FIELDS, check=benchmarks.check_texts)
    yield "pairs", lambda path: preferences.GivenPairs([path], None)
    yield "preferences", lambda path: preferences.read_pairs([path], "soft", None)[0]


@bad_input
@given(
    st.one_of(json_lines(NEARLY), spoilt(json_lines(st.one_of(ROW, NEARLY)))), st.sampled_from(sorted(dict(checks())))
)
def test_rows_of_the_commands_and_evaluation_sets(raw, kind):
    rows = reading("in.jsonl", raw, dict(checks())[kind])
    if rows and kind in ("choice", "transcripts"):
        for row in rows:
            assert isinstance(benchmarks.context(row), str)


@bad_input
@given(spoilt(json_lines(PUBLIC)), st.sampled_from([None, *public_sets.FORMATS]))
def test_public_sets(raw, form):
    rows = reading("in.jsonl", raw, lambda path: Source([path], reading=Reading(form=form), require=()))
    if rows is not None:
        assert len(rows) == sum(bool(line.strip()) for line in raw.split(b"\n"))
        assert all(row.get("prompt") is None or isinstance(row["prompt"], str | list) for row in rows)


RATE = st.fixed_dictionaries(
    {"metric": st.one_of(st.just("harmful_compliance"), VALUE)},
    optional={name: st.one_of(st.floats(0, 1), VALUE) for name in ("value", "low", "high", "n")},
)
CLASS = st.fixed_dictionaries(
    {"id": st.one_of(st.sampled_from("abc"), VALUE)},
    optional={
        "prompt": PROMPT,
        "prompt_id": st.one_of(st.sampled_from("ab"), VALUE),
        "kind": st.one_of(st.sampled_from(["harmful", "benign", "borderline"]), VALUE),
        "class": st.one_of(st.sampled_from(["comply", "good", "helpful", "refused", None]), VALUE),
    },
)
RIGHT = st.fixed_dictionaries({}, optional={"id": VALUE, "right": st.one_of(st.booleans(), VALUE)})


@bad_input
@given(spoilt(json_lines(RATE)), spoilt(json_lines(CLASS)), spoilt(json_lines(RIGHT)))
def test_evaluations_to_compare_with(rates, classes, right):
    beside = {"e.classes.jsonl": classes, "e.choices.jsonl": right}
    reading("e.jsonl", rates, lambda path: [gate.load(path)], beside)


@bad_input
@given(
    spoilt(
        st.one_of(
            VALUE.map(lambda value: as_json(value, True)),
            st.fixed_dictionaries(
                {"fingerprint": st.just({"a": 1}), "command": st.just("test")},
                optional={
                    "status": st.sampled_from(["done", "running", 5]),
                    "counts": st.one_of(st.just({"rows": 1}), VALUE),
                    "resumed": VALUE,
                    "started": VALUE,
                },
            ).map(lambda value: as_json(value, True)),
        )
    ),
    spoilt(json_lines()),
    st.booleans(),
)
def test_manifests_and_journals(manifest, journal, finished):
    def resume(path):
        Path(f"{path[:-9]}.partial").write_bytes(journal)
        if finished:
            Path(path[:-9]).write_bytes(b"{}\n")
        try:
            output = Output(path[:-9], command="test", fingerprint={"a": 1})
            with output:
                if not output.complete:
                    output.write({"id": "one that is new"})
                    output.finish([*output.done], {"rows": len(output.done)})
        finally:  # only the manifest was there before
            for other in (f"{path[:-9]}.partial", path[:-9]):
                Path(other).unlink(missing_ok=True)
        return [output.counts]

    try:
        reading("out.jsonl.run.json", manifest, resume)
    except AssertionError as error:  # a refusal may name the output, the journal or the manifest
        assert "out.jsonl" in str(error)


YAML = st.one_of(
    st.lists(st.one_of(TEXT, VALUE), max_size=3),
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(TOP_KEYS)), TEXT),
        st.one_of(
            VALUE,
            st.lists(
                st.dictionaries(
                    st.one_of(st.sampled_from(sorted(PRINCIPLE_KEYS)), TEXT), st.one_of(TEXT, VALUE), max_size=4
                ),
                max_size=3,
            ),
        ),
        max_size=4,
    ),
    st.lists(
        st.fixed_dictionaries({"principle": TEXT}, optional={"id": TEXT, "weight": NUMBER, "tags": VALUE}), max_size=3
    ),
).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))


@bad_input
@given(spoilt(st.one_of(YAML, st.lists(PIECES, max_size=12).map(lambda pieces: "".join(pieces).encode()))))
def test_constitutions(raw):
    found = reading("rules.yaml", raw, lambda path: [load_constitution(path)])
    if found:
        again = reading("rules.yaml", to_yaml(found[0]).encode(), lambda path: [load_constitution(path)])
        assert again[0].principles == found[0].principles


FOREIGN = st.one_of(
    st.lists(
        st.one_of(TEXT, st.just("\n\nHuman: a\n\nAssistant: b\n\nCritiqueRequest: c\n\nCritique: d"), VALUE), max_size=3
    ),
    st.fixed_dictionaries(
        {
            "constitutions": st.one_of(
                VALUE, st.lists(st.fixed_dictionaries({"critic": TEXT, "revision": TEXT}), max_size=2)
            )
        },
        optional={
            "system_chat": st.one_of(
                VALUE,
                st.lists(st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=6), max_size=2),
            )
        },
    ),
    st.dictionaries(
        TEXT, st.fixed_dictionaries({"prompt": st.lists(TEXT, max_size=1), "edit_request": TEXT}), max_size=2
    ),
    st.lists(st.fixed_dictionaries({"prompt": SPOKEN}, optional={"corrects": VALUE, "incorrects": VALUE}), max_size=2),
    VALUE,
).map(lambda tree: as_json(tree, True))


@bad_input
@given(
    spoilt(st.one_of(FOREIGN, st.lists(PIECES, max_size=12).map(lambda pieces: "".join(pieces).encode()))),
    st.sampled_from(["in.json", "in.md", "in.txt"]),
)
def test_foreign_constitutions(raw, name):
    reading(name, raw, lambda path: [importing.read_foreign([path], "x")])


@bad_input
@given(
    spoilt(
        st.lists(
            st.one_of(
                PIECES,
                st.sampled_from(
                    [
                        "{% block user %}",
                        "{% endblock %}",
                        "{{ prompt }}",
                        "{{ prompt.__class__ }}",
                        "{{ 1/0 }}",
                        "{% for i in range(9**9) %}",
                        "{% endfor %}",
                        "{% include 'x' %}",
                        "{{ nothing }}",
                        "{{ prompt % 5 }}",
                        "{{ prompt + 1 }}",
                        "{{ [][1] }}",
                    ]
                ),
            ),
            max_size=8,
        ).map(lambda pieces: ("{% block user %}" + "".join(pieces) + "{% endblock %}").encode())
    ),
    TEXT,
)
@example(raw=b"{% b" + b"9" * 5000 + b" %}", prompt="")
@example(raw=b"{% block user %}{{ " + b"9" * 5000 + b" }}{% endblock %}", prompt="")
def test_templates(raw, prompt):
    reading("my.jinja", raw, lambda path: load_template(path).render(prompt=prompt))


# --- what once hung ----------------------------------------------------------------------------------------------


def test_long_lines_and_long_runs_of_one_character():
    """Ten megabytes in a line, and texts on which a careless pattern takes the square of their length."""
    row = {"prompt": "x" * 10_000_000}
    assert len(reading("in.jsonl", as_json(row, True), source)[0]["prompt"]) == 10_000_000
    reading("in.csv", b"prompt\n" + b"x" * 10_000_000, source)
    many = 1_000_000
    assert len(dialogue.split_transcript("Human: a" + "\n" * many + "b\n\nAssistant: c")) == 2
    assert len(dialogue.split_transcript("Human: a" + "\n\n " * many + "b\n\nAssistant: c")) == 2
    assert neutralise("<" + " " * many) == "<" + " " * many
    assert reading(
        "in.md", b"# a" + b" " * many + b"x\n- Be kind\n", lambda path: [importing.read_foreign([path], "x")]
    )
    keys = json.dumps({f"k{n}": 1 for n in range(100_000)}).encode()
    assert reading("in.json", keys, lambda path: [importing.read_foreign([path], "x")]) is None
    begins = "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):\n\nH:"
    between = "\n\n{}\n (A) [[[x]]]\n (B) [[[y]]]\n\nAssistant: Let's think step by step: z"
    assert (
        reading(
            "in.json",
            json.dumps([{"prompt": begins + between * 10_000}]).encode(),
            lambda path: [importing.read_foreign([path], "x")],
        )
        is None
    )


def test_a_system_turn_in_an_answer_is_refused_by_name():
    row = {"prompt": "a", "chosen": [{"role": "system", "content": "x"}], "rejected": "y"}
    assert reading("in.jsonl", as_json(row, True), dict(checks())["preferences"]) is None
    turns = [{"role": role, "content": role} for role in ("user", "system", "assistant")]
    row = {"chosen": turns, "rejected": turns[:1] + turns[2:]}
    assert reading("in.jsonl", as_json(row, True), dict(checks())["preferences"]) is None


def test_the_same_name_twice_is_never_the_last_alone():
    """A key or a column that is there twice: one of the two texts would be lost in silence."""
    for name, raw in (
        ("in.jsonl", b'{"prompt": "a", "prompt": "b"}\n'),
        ("in.json", b'[{"prompt": "a", "prompt": "b"}]'),
        ("in.csv", b"prompt,prompt\na,b\n"),
    ):
        assert reading(name, raw, source) is None


@click.command()
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Inputs to draw, over all readers together.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the draws.")
def main(examples, seed):
    """Read so many bad inputs; ends with 1 if one is not refused as it should be."""
    properties = sum(hasattr(one, "hypothesis") for one in globals().values())
    line = ["-n", "0", __file__, f"--hypothesis-seed={seed}", "--timeout=7200", "-p", "no:cacheprovider"]
    environment = {**os.environ, "BAD_INPUT_EXAMPLES": str(-(-examples // properties))}
    ran = subprocess.run([sys.executable, "-m", "pytest", *line], cwd=HERE.parents[1], env=environment)
    raise SystemExit(ran.returncode)


if __name__ == "__main__":
    main()
