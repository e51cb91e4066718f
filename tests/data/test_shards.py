"""Rows divided over shards: each in one, whatever the order, the format or the faults of the file."""

import gzip
import json
import shutil

import pytest

from cai.base.errors import InputError
from cai.data.readers import read_jsonl
from cai.data.reading import Reading
from cai.data.shards import Shard, Spool
from cai.data.sources import Source, read_shards

COUNT = 5
READING = Reading(skip_invalid=True)


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def rows(count=60):
    """Ids in front, at the end, as numbers, escaped, and none; one text twice."""
    kinds = (
        lambda n: {"id": f"r{n}", "prompt": f"Say {n}."},
        lambda n: {"prompt": f"Say {n}.", "id": f"é{n}"},
        lambda n: {"id": n, "prompt": f"Say {n}."},
        lambda n: {"prompt": f"Say {n % 8}."},
    )
    return [kinds[n % 4](n) for n in range(count)]


def shards(inputs, **arguments):
    return [Source(inputs, shard=Shard(k, COUNT), **arguments) for k in range(1, COUNT + 1)]


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "1/3/5", "-1/3", "1/3 "])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(InputError, match="is not a shard"):
        Shard.parse(text)


def test_shards_have_each_row_once_with_the_id_it_has_in_the_whole(tmp_path):
    inputs = [write(tmp_path / "in.jsonl", rows())]
    whole, parts = Source(inputs), shards(inputs)
    assert sorted(row_id for part in parts for row_id in part.ids) == sorted(whole.ids)
    assert {part.digest for part in parts} == {whole.digest}
    by_id = {row["id"]: row for part in parts for row in part}
    assert [by_id[row["id"]] for row in whole] == list(whole)
    for part in parts:  # in the order of the input, in each pass
        assert [row["id"] for row in part] == part.ids == [row_id for row_id in whole.ids if row_id in set(part.ids)]
    assert min(part.count for part in parts) > 0


def test_the_order_of_the_rows_changes_no_shard(tmp_path):
    inputs = [write(tmp_path / "in.jsonl", rows())]
    turned = [write(tmp_path / "turned.jsonl", rows()[::-1])]
    assert [set(part.ids) for part in shards(inputs)] == [set(part.ids) for part in shards(turned)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".csv", ".parquet"])
def test_a_shard_is_the_same_in_every_format(tmp_path, suffix):
    plain = [{"id": f"r{n}", "prompt": f"Say {n}."} for n in range(40)]
    jsonl, other = write(tmp_path / "in.jsonl", plain), tmp_path / f"other{suffix}"
    if suffix == ".json":
        other.write_text(json.dumps(plain))
    elif suffix == ".csv":
        write(other, ["id,prompt", *(f"{row['id']},{row['prompt']}" for row in plain)])
    elif suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(plain), other)
    else:
        with open(jsonl, "rb") as file, gzip.open(other, "wb") as packed:
            shutil.copyfileobj(file, packed)
    assert [list(part) for part in shards([str(other)])] == [list(part) for part in shards([jsonl])]


BAD = ['{"id": "r1", "prompt": 3}', '{"id": "torn", "pro', "[]", '{"prompt": ""}', '{"id": [1], "prompt": "x"}', ""]


def test_a_bad_row_is_left_out_by_one_shard(tmp_path):
    lines = [line for pair in zip(rows(len(BAD)), BAD, strict=True) for line in pair]
    inputs = [write(tmp_path / "in.jsonl", [*lines, *rows()[len(BAD) :]])]
    whole, parts = Source(inputs, reading=READING), shards(inputs, reading=READING)
    assert sorted(str(error) for part in parts for error in part.bad_rows) == sorted(map(str, whole.bad_rows))
    assert sorted(row_id for part in parts for row_id in part.ids) == sorted(whole.ids)
    refused = 0
    for number in range(1, COUNT + 1):
        try:
            Source(inputs, shard=Shard(number, COUNT))
        except InputError:
            refused += 1
    assert refused == sum(bool(part.bad_rows) for part in parts) > 1


def test_a_limit_is_of_the_whole_input(tmp_path):
    inputs = [write(tmp_path / "in.jsonl", rows())]
    ids = [row_id for part in shards(inputs, limit=17) for row_id in part.ids]
    assert sorted(ids) == sorted(Source(inputs, limit=17).ids)


def test_an_id_that_occurs_twice_is_refused_by_its_shard(tmp_path):
    inputs = [write(tmp_path / "in.jsonl", [*rows(), {"prompt": "Again.", "id": "r4"}])]
    [number] = [number for number in range(1, COUNT + 1) if Shard(number, COUNT).has("r4")]
    with pytest.raises(InputError, match="the id 'r4' again"):
        Source(inputs, shard=Shard(number, COUNT))


def test_a_shard_may_be_empty(tmp_path):
    inputs = [write(tmp_path / "in.jsonl", [{"id": "a", "prompt": "One?"}])]
    assert sorted(len(list(part)) for part in shards(inputs)) == [0, 0, 0, 0, 1]


def test_shards_are_found_without_sources(tmp_path):
    inputs = [write(tmp_path / "in.jsonl", [*rows(), *BAD[1:4]]), write(tmp_path / "more.jsonl", rows(9))]
    found = list(read_shards(inputs, COUNT, require=("prompt",), limit=64, reading=READING))
    parts = shards(inputs, limit=64, reading=READING)
    for number, part in enumerate(parts, 1):
        positions = [(name, line) for name, line, _, owner in found if owner == number]
        bad = {(str(error.where), error.line) for error in part.bad_rows}
        assert [position for position in positions if position not in bad] == [p[:2] for p in part.positions()]


def test_a_spool_is_read_by_several_passes_at_once():
    spool = Spool()
    for n in range(3):
        spool.append({"n": n})
    assert [(a["n"], b["n"]) for a, b in zip(spool, spool, strict=True)] == [(n, n) for n in range(3)]
    assert list(spool) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_what_is_known_of_a_shard_is_followed_back(tmp_path, invoke):
    from cai.data import lineage

    source, output = write(tmp_path / "in.jsonl", rows(12)), tmp_path / "out.jsonl"
    result = invoke("generate", "--input", source, "--model", "tiny", "--output", output, "--shard", "1/2",
                    "--max-new-tokens", 2)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    traced = lineage.trace(Source([str(output)]))
    assert len(traced.entries) == len(list(read_jsonl(output))) and not [e for e in traced.entries if e.outcome]
