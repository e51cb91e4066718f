"""How rows are read: other names of columns, kinds, bad rows that are skipped, repeated prompts, kinds of files."""

import gzip
import json
import os
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import TWO, lines, source

from cai.base.errors import InputError
from cai.base.files import expand_patterns
from cai.data.outputs import Output
from cai.data.readers import read_rows
from cai.data.reading import Reading
from cai.data.sources import MOST_ERRORS, Source


def zstd(raw: bytes) -> bytes:
    """One frame."""
    import pyarrow

    return pyarrow.compress(raw, codec="zstd", asbytes=True)


# --- columns ------------------------------------------------------------------------------------------------


def test_columns_with_other_names(tmp_path):
    """openai/gsm8k has `question` and `answer`; yahma/alpaca-cleaned has `instruction` and `output`."""
    rows = lines({"question": "Why?", "answer": "So.", "type": "benign"})
    reading = Reading(prompt_field="question", response_field="answer", kind_field="type")
    [row] = source(tmp_path, rows, require=("prompt", "response", "kind"), reading=reading)
    assert (row["prompt"], row["response"], row["kind"]) == ("Why?", "So.", "benign")
    assert row["question"] == "Why?", "carried along"
    [row] = source(tmp_path, rows, require=("prompt", "kind"), reading=Reading(prompt_field="question", kind="harmful"))
    assert row["kind"] == "harmful"


@pytest.mark.parametrize(
    ("reading", "row", "reason"),
    [
        (Reading(prompt_field="query"), {"text": "a", "n": 1}, "no column 'query'; .*--prompt-field.* has: text, n"),
        (Reading(prompt_field="text"), {"text": None}, "nothing in the column 'text'"),
        (Reading(prompt_field="text"), {"text": " "}, "the prompt is empty"),
        (Reading(), {"text": "a", "n": 1}, "a row without 'prompt'.* has: text, n.*--prompt-field COLUMN"),
        (Reading(kind="benign"), {"prompt": "a", "kind": "harmful"}, "the kind 'harmful', and --kind is benign"),
    ],
)
def test_a_column_that_is_missing_lists_those_that_are_there(tmp_path, reading, row, reason):
    with pytest.raises(InputError, match=rf"in\.jsonl:1: .*{reason}"):
        source(tmp_path, lines(row), reading=reading)


def test_names_of_columns_are_part_of_the_digest(tmp_path):
    rows = lines({"prompt": "a", "question": "b"})
    plain, other = (source(tmp_path, rows, reading=Reading(prompt_field=name)) for name in (None, "question"))
    assert plain.digest != other.digest
    assert plain.digest == source(tmp_path, rows, reading=Reading(skip_invalid=True)).digest


# --- bad rows -----------------------------------------------------------------------------------------------

BAD = [{"prompt": "  "}, "not JSON", {"prompt": 5}, {"id": "a", "prompt": "x"}]


def test_every_bad_row_is_named(tmp_path):
    with pytest.raises(InputError) as error:
        source(tmp_path, lines(TWO[0], *BAD, TWO[1]))
    text = str(error.value)
    assert text.startswith("4 bad rows:\n") and "--skip-invalid" in text and error.value.exit_code == 2
    for line, reason in ((2, "the prompt is empty"), (3, "not JSON"), (4, "a number"), (5, "the id 'a' again")):
        assert f"in.jsonl:{line}: {reason}" in text or f"in.jsonl:{line}: the prompt is {reason}" in text


def test_no_more_than_twenty_are_named(tmp_path):
    with pytest.raises(InputError, match=f"the first {MOST_ERRORS} bad rows") as error:
        source(tmp_path, lines(*[{"prompt": ""}] * 1000))
    assert str(error.value).count("the prompt is empty") == MOST_ERRORS


@pytest.mark.parametrize("limit", [None, 3, 5])
def test_skipped_rows_leave_the_others_as_they_are(tmp_path, limit):
    plain = list(source(tmp_path, lines(*TWO)))
    skipping = source(tmp_path, lines(TWO[0], *BAD[:3], TWO[1]), limit=limit, reading=Reading(skip_invalid=True))
    expected = plain if limit in (None, 5) else plain[:1]
    assert list(skipping) == expected == list(skipping) and skipping.count == len(expected)


GOOD_LINE = st.builds(lambda text: json.dumps({"prompt": f"Is it {text}?"}), st.text(max_size=5))
BAD_LINE = st.sampled_from(["no", "[1]", '{"prompt": " "}', '{"prompt": []}', '{"q": "x"}', '{"prompt": NaN}', '"x"'])


@settings(
    max_examples=int(os.environ.get("SHAPES_EXAMPLES", "100")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(st.tuples(st.booleans(), GOOD_LINE, BAD_LINE), min_size=1, max_size=12))
def test_bad_rows_among_good_ones_never_change_these(tmp_path_factory, drawn):
    """With --skip-invalid exactly the good rows are read; without it exactly the bad lines are named."""
    folder = tmp_path_factory.mktemp("rows")
    good = [line for is_good, line, _ in drawn if is_good]
    bad = [number for number, (is_good, _, _) in enumerate(drawn, 1) if not is_good]
    text = "\n".join(line if is_good else spoilt for is_good, line, spoilt in drawn)
    if good:
        alone = source(folder, "\n".join(good), "good.jsonl")
        assert list(source(folder, text, reading=Reading(skip_invalid=True))) == list(alone)
    if bad:
        with pytest.raises(InputError) as error:
            source(folder, text)
        assert sorted(map(int, re.findall(r"in\.jsonl:(\d+):", str(error.value)))) == bad


def test_rows_that_are_all_bad_are_no_rows(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        source(tmp_path, lines(*BAD[:3]), reading=Reading(skip_invalid=True))


def test_bad_cells_and_values_of_other_formats_are_skipped_too(tmp_path):
    skip = Reading(skip_invalid=True)
    assert [r["prompt"] for r in source(tmp_path, 'prompt\na\nb,c\n"d"\n', "in.csv", reading=skip)] == ["a", "d"]
    assert [r["prompt"] for r in source(tmp_path, b"a\n\xff\nb\n", "in.txt", reading=skip)] == ["a", "b"]
    assert source(tmp_path, '[{"prompt": "x"}, 5]', "in.json", reading=skip).count == 1
    with pytest.raises(InputError, match="damaged gzip"):  # what comes after the damage is lost: never skipped
        source(tmp_path, gzip.compress(lines(*TWO).encode())[:-9], "in.jsonl.gz", reading=skip)


def test_repeated_prompts_are_counted(tmp_path, capsys):
    rows = [{"id": str(n), "prompt": prompt} for n, prompt in enumerate(["a", "b", "a", "a"])]
    assert source(tmp_path, lines(*rows)).count == 4
    assert "2 prompts of" in capsys.readouterr().err
    source(tmp_path, lines(*({**row, "response": "x"} for row in rows)), require=("prompt", "response"))
    assert not capsys.readouterr().err, "several responses to one prompt are usual"


# --- files --------------------------------------------------------------------------------------------------


def test_an_empty_line_of_a_csv_file_with_one_column_is_an_empty_row(tmp_path):
    """It was skipped without a word. At the end of a file, and among several columns, it is no row."""
    text = 'question\nIs it late?\n\n"Is it\nlate?"\n\n\n'
    reading = Reading(prompt_field="question")
    with pytest.raises(InputError, match=r"in\.csv:3: the prompt is empty.*--skip-invalid"):
        source(tmp_path, text, "in.csv", reading=reading)
    rows = source(tmp_path, text, "in.csv", reading=replace(reading, skip_invalid=True))
    assert [row["prompt"] for row in rows] == ["Is it late?", "Is it\nlate?"]
    assert [(error.line, "empty" in str(error)) for error in rows.bad_rows] == [(3, True)]
    assert [(line, row_id) for _, line, row_id in rows.positions()] == list(zip([2, 5], rows.ids, strict=True))
    assert [row["prompt"] for row in source(tmp_path, "id,prompt\na,One?\n\nb,Two?\n", "two.csv")] == ["One?", "Two?"]


@pytest.mark.parametrize("name", ["in.jsonl.zst", "in.json.zst", "in.csv.zst", "in.txt.zst", "in.ndjson.gz"])
def test_compressed_files(tmp_path, name):
    text = {"csv": "id,prompt\na,One?\n", "txt": "One?\n"}.get(name.split(".")[1], lines(TWO[0]))
    pack = gzip.compress if name.endswith(".gz") else zstd
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert [row["prompt"] for row in Source([tmp_path / name])] == ["One?"]


def test_zstd_files_of_several_frames_and_damaged_ones(tmp_path):
    """Frames one after the other are one file (zstd's format, section 3.1; pzstd and `cat` write such files). A file
    that was cut off must not be taken for a shorter one, which python-zstandard's stream_reader does (issue 196)."""
    rows = [{"prompt": f"Number {number} of many?"} for number in range(3000)]
    first, second = zstd(lines(*rows[:10]).encode()), zstd(lines(*rows[10:]).encode())
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(first + second)
    assert [row["prompt"] for row in Source([path])] == [row["prompt"] for row in rows]
    for damaged in ((first + second)[:-5], first + second[: len(second) // 2], first + b"junk", b"junk", second[:3]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"in\.jsonl\.zst:\d+: damaged zstd data"):
            Source([path])


def test_patterns_of_names(tmp_path):
    """Shards as `datasets` and LLM pipelines write them: part-00000-of-00003.jsonl and so on."""
    for number in (2, 0, 1):
        (tmp_path / f"part-{number:05d}-of-00003.jsonl").write_text(lines({"prompt": f"Number {number}?"}))
    shards = Source([str(tmp_path / "part-*.jsonl")])
    assert [row["prompt"] for row in shards] == ["Number 0?", "Number 1?", "Number 2?"]
    with pytest.raises(InputError, match="no file matches the pattern"):
        Source([str(tmp_path / "shard-*.jsonl")])
    with pytest.raises(InputError, match="the same input twice"):
        Source([str(tmp_path / "part-*.jsonl"), str(tmp_path / "part-00001-of-00003.jsonl")])
    with pytest.raises(InputError, match="the output is one of the inputs"):
        Output(
            tmp_path / "part-00001-of-00003.jsonl",
            command="test",
            fingerprint={},
            overwrite=True,
            inputs=[str(tmp_path / "part-*.jsonl")],
        )
    (tmp_path / "odd[1].jsonl").write_text(lines({"prompt": "x"}))
    assert expand_patterns([tmp_path / "odd[1].jsonl"]) == [str(tmp_path / "odd[1].jsonl")]


@pytest.fixture
def saved(tmp_path):
    """Saves rows as save_to_disk does, in splits if they are given by name."""
    datasets = pytest.importorskip("datasets")

    def save(rows, **settings):
        if isinstance(rows, dict):
            whole = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in rows.items()})
        else:
            whole = datasets.Dataset.from_list(rows)
        whole.save_to_disk(tmp_path / "saved", **settings)
        return str(tmp_path / "saved")

    return save


@pytest.mark.slow
def test_folders_of_save_to_disk(saved, tmp_path):
    """Dataset and DatasetDict, in one shard or in several (datasets, "Process: save")."""
    rows = [{"id": str(n), "prompt": [{"role": "user", "content": f"Number {n}?"}]} for n in range(5)]
    folder = saved(rows, num_shards=2)
    read = Source([folder])
    assert list(read) == rows == list(read)
    with pytest.raises(InputError, match="no split 'train'"):
        Source([f"{folder}:train"])
    next((tmp_path / "saved").glob("data-00001*.arrow")).unlink()
    with pytest.raises(InputError, match="a folder of `datasets` that can't be loaded"):
        Source([folder])


@pytest.mark.slow
def test_splits_of_a_saved_folder(saved):
    folder = saved({"train": [{"prompt": "One?"}], "test": [{"prompt": "Two?"}, {"prompt": " "}]})
    assert [row["prompt"] for row in Source([f"{folder}:train"])] == ["One?"]
    with pytest.raises(InputError, match=r"several splits; expected .*:SPLIT with one of train, test"):
        Source([folder])
    with pytest.raises(InputError, match=r"saved:test:2: the prompt is empty"):
        Source([f"{folder}:test"])
    assert Source([f"{folder}:test"], reading=Reading(skip_invalid=True)).count == 1


def test_a_folder_of_something_else_is_refused_with_advice(tmp_path):
    with pytest.raises(InputError, match=r"a folder; expected .*save_to_disk.*'.*/\*\.jsonl'"):
        Source([str(tmp_path)])


def test_a_reader_stops_at_the_first_bad_line_by_default(tmp_path):
    (tmp_path / "in.jsonl").write_text(lines(TWO[0], "no", json.dumps(TWO[1])))
    with pytest.raises(InputError, match=":2: not JSON"):
        list(read_rows(str(tmp_path / "in.jsonl")))
    errors = []
    assert [line for line, _ in read_rows(str(tmp_path / "in.jsonl"), errors.append)] == [1, 3] and len(errors) == 1
