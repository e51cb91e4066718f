"""Rows read and checked, outputs that survive being killed."""

import gzip
import json
import os
import signal
import subprocess
import sys
import tracemalloc

import pytest
from conftest import ROOT

from cai.base.errors import CaiError, InputError
from cai.base.hashing import hashed_seed, identity, sha256_file, sha256_text
from cai.data.outputs import Output, claim_folder, read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.data.sources import Source

TWO = [{"id": "a", "prompt": "One?"}, {"id": "b", "prompt": "Two, “quoted”\nand more?"}]


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def source(tmp_path, text, name="in.jsonl", **arguments) -> Source:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Source([str(path)], **arguments)


# ------------------------------------------------------------------------------------------------ reading


def _csv(path, rows):
    import csv

    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "prompt"])
        writer.writeheader()
        writer.writerows(rows)


def _parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("in.jsonl", lambda p, rows: p.write_text(lines(*rows))),
        ("in.ndjson", lambda p, rows: p.write_text("\ufeff" + lines(*rows) + "\n\n")),
        ("in.json", lambda p, rows: p.write_text(json.dumps(rows, indent=1))),
        ("lines.json", lambda p, rows: p.write_text(lines(*rows))),
        ("in.jsonl.gz", lambda p, rows: p.write_bytes(gzip.compress(lines(*rows).encode()))),
        ("in.csv", _csv),
        ("in.parquet", _parquet),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name, TWO)
    found = Source([str(tmp_path / name)])
    assert list(found) == TWO == list(found), "and a second time"
    assert (found.count, found.ids) == (2, ["a", "b"])


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    found = source(tmp_path, "One?\n\n  Two? \n", "in.txt")
    assert [row["prompt"] for row in found] == ["One?", "Two?"]


def test_parquet_values_become_json(tmp_path):
    import datetime

    prompt = [{"role": "user", "content": "x"}]
    _parquet(tmp_path / "in.parquet", [{"prompt": prompt, "score": float("nan"), "at": datetime.date(2026, 1, 2)}])
    (row,) = Source([str(tmp_path / "in.parquet")])
    assert row["prompt"] == prompt
    assert (row["score"], row["at"]) == (None, "2026-01-02")


def test_unknown_fields_are_carried(tmp_path):
    (row,) = source(tmp_path, lines({"id": 7, "prompt": "x", "kind": "benign", "extra": {"a": [1, None]}}))
    assert row == {"id": "7", "prompt": "x", "kind": "benign", "extra": {"a": [1, None]}}


def test_implied_ids_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = [{"prompt": f"Number {n}?"} for n in range(5)]
    one, other = source(tmp_path, lines(*rows)), source(tmp_path, lines(*rows[::-1]), "other.jsonl")
    by_prompt = {row["prompt"]: row["id"] for row in one}
    assert by_prompt == {row["prompt"]: row["id"] for row in other}
    assert len(set(by_prompt.values())) == 5
    answered = source(tmp_path, lines({**rows[0], "response": "x"}), "answered.jsonl")
    assert answered.ids[0] not in by_prompt.values(), "the response is part of what the id stands for"


def test_repeated_rows_without_an_id_get_suffixes(tmp_path):
    found = source(tmp_path, lines(*[{"prompt": "x"}] * 3))
    first = found.ids[0]
    assert found.ids == [first, f"{first}-2", f"{first}-3"]


def test_the_same_id_in_two_files_is_told_apart(tmp_path):
    for name in ("base", "sft"):
        (tmp_path / f"{name}.jsonl").write_text(lines({"id": "p/0", "prompt": "x", "model": name}))
    both = Source([str(tmp_path / "base.jsonl"), str(tmp_path / "sft.jsonl")])
    assert [(row["id"], row["model"]) for row in both] == [("p/0", "base"), ("p/0-2", "sft")]
    with pytest.raises(InputError, match="same input twice"):
        Source([str(tmp_path / "base.jsonl")] * 2)


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    found = source(tmp_path, lines(*TWO, "not JSON"), limit=2)
    assert found.ids == ["a", "b"]


def test_the_digest_is_of_the_bytes_and_the_limit(tmp_path):
    one = source(tmp_path, lines(*TWO))
    assert source(tmp_path, lines(*TWO), "moved.jsonl").digest == one.digest
    assert source(tmp_path, lines(*TWO), limit=2).digest != one.digest
    assert source(tmp_path, lines(*TWO[::-1]), "turned.jsonl").digest != one.digest


HH = "\n\nHuman: How?\n\nAssistant: So.\n\nAnd so.\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (HH, [("user", "How?"), ("assistant", "So.\n\nAnd so."), ("user", "Why?")]),
        ("Human: How?\n\nAssistant: So.\n\nHuman: Why?", [("user", "How?"), ("assistant", "So."), ("user", "Why?")]),
        (
            "\n\nHuman: How?\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Oh?",
            [("user", "How?\n\nWhy?"), ("assistant", "So."), ("user", "Oh?")],
        ),
        ("\n\nHuman: How?\n\nAssistant:", "How?"),
        ("\n\nHuman: How?", "How?"),
        ("Human: a novel idea?", "Human: a novel idea?"),
        ("Explain:\n\nHuman: hi\n\nAssistant: yo", "Explain:\n\nHuman: hi\n\nAssistant: yo"),
        ("  {{ 7 * 7 }} </response>  ", "  {{ 7 * 7 }} </response>  "),
    ],
)
def test_transcripts_become_messages_with_all_their_turns(tmp_path, prompt, expected):
    (row,) = source(tmp_path, lines({"prompt": prompt}))
    if isinstance(expected, list):
        expected = [{"role": role, "content": content} for role, content in expected]
    assert row["prompt"] == expected


def test_a_pair_of_transcripts_is_split_where_the_shared_turns_end(tmp_path):
    head = "\n\nHuman: How?\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant: "
    rows = [
        {"chosen": f"{head}Because.", "rejected": f"{head}No."},
        {"chosen": f"{head}Because.\n\nHuman: Oh?\n\nAssistant: Yes.", "rejected": f"{head}No."},
    ]
    first, second = source(tmp_path, lines(*rows), require=("prompt", "chosen", "rejected"))
    assert [m["content"] for m in first["prompt"]] == ["How?", "So.", "Why?"]
    assert first["prompt"] == second["prompt"]
    assert (first["chosen"], first["rejected"]) == ("Because.", "No.")
    assert (second["chosen"], second["rejected"]) == ("Because.\n\nHuman: Oh?\n\nAssistant: Yes.", "No.")


def test_real_hh_rows(shared_data):
    found = Source(
        [str(shared_data / "hh-rlhf" / "harmless-base.test.first1500.jsonl.gz")],
        require=("prompt", "chosen", "rejected"),
    )
    several = 0
    for row in found:
        assert row["chosen"] != row["rejected"]
        if isinstance(row["prompt"], list):
            several += 1
            turns = len(row["prompt"])
            assert [m["role"] for m in row["prompt"]] == ["user", "assistant"] * (turns // 2) + ["user"]
    assert found.count == 1500 and len(set(found.ids)) == 1500
    assert 0.65 < several / found.count < 0.75


U, A, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (lines(TWO[0], '{"prompt": '), [":2: not JSON", '{"prompt":', "one JSON object per line"]),
        (lines(TWO[0], "[1, 2]"), [":2: a JSON list", "[1, 2]", "one object"]),
        (lines('{"prompt": "x", "score": NaN}'), [":1: not JSON", "NaN"]),
        (lines('{"prompt": "\\ud800"}'), [":1: half a surrogate pair", "ud800"]),
        (b'{"prompt": "\xff"}\n', [":1: not JSON", "utf-8"]),
        (lines('{"prompt": ' + "[" * 100_000), [":1: not JSON"]),
        (lines(TWO[0], {"id": "c", "text": "x"}), [":2: a row without 'prompt'", "id, text"]),
        (lines({"prompt": None}), [":1: a row without 'prompt'"]),
        (lines({"prompt": "  "}), [":1: the prompt is empty", "a non-empty string"]),
        (lines({"prompt": 5}), [":1: the prompt is a number: '5'"]),
        (lines({"prompt": []}), [":1: the prompt is an empty list"]),
        (lines({"prompt": ["x"]}), [":1: not a message: 'x'"]),
        (lines({"prompt": [{"role": "user", "content": 5}]}), [":1: not a message"]),
        (lines({"prompt": [{"role": "tool", "content": "x"}]}), [":1: the role 'tool'"]),
        (lines({"prompt": [U, A]}), [":1: the prompt ends with the role 'assistant'"]),
        (lines({"prompt": [U, S, U]}), [":1: the role 'system'"]),
        (lines({"prompt": [U, U]}), [":1: the role 'user' after 'user'"]),
        (lines({"prompt": [S, A, U]}), [":1: the role 'assistant' after 'system'"]),
        (lines({"prompt": [U, A, {"role": "user", "content": " "}]}), [":1: the user's last message is empty"]),
        (lines({"prompt": "\n\nHuman: x\n\nAssistant: y"}), [":1: the prompt ends with the role 'assistant'"]),
        (lines(*TWO, TWO[0]), [":3: the id 'a' again, first on line 1"]),
        (lines({"id": True, "prompt": "x"}), [":1: the id is a boolean: 'True'"]),
        (lines({"id": ["x"], "prompt": "x"}), [":1: the id is a list"]),
        ("", ["no rows"]),
    ],
)
def test_bad_rows_are_refused_with_line_value_and_remedy(tmp_path, text, expected):
    with pytest.raises(InputError) as error:
        source(tmp_path, text)
    for part in [str(tmp_path / "in.jsonl"), *expected]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("in.csv", "id,prompt\na,b,c\n", ":2: more cells than the 2 columns: \"['c']\""),
        ("in.csv", 'id,prompt\na,"b\n', "not CSV"),
        ("in.csv", b"id,prompt\na,\xff\n", ":2: not CSV"),
        ("in.json", '[{"prompt": "x"}, 5]', ":2: a JSON number"),
        ("in.json", '[{"prompt": "x"}', "not JSON"),
        ("in.txt", b"x\n\xff\n", ":2: not UTF-8"),
        ("in.parquet", "no", "not Parquet"),
        ("in.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 99, mtime=0)[:-20], "damaged gzip data"),
        ("in.jsonl.gz", "no", "damaged gzip data"),
        ("in.xlsx", "x", "unknown kind of file: '.xlsx'; expected one of .jsonl"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, expected):
    with pytest.raises(InputError) as error:
        source(tmp_path, content, name)
    assert expected in str(error.value) and str(tmp_path / name) in str(error.value)


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("missing.jsonl", "/nowhere/at/all", "../x"):
        with pytest.raises(InputError, match="no such file"):
            Source([name])
    with pytest.raises(InputError, match="a folder"):
        Source([str(tmp_path)])
    with pytest.raises(InputError, match=r"no dataset could be loaded under this id .*give a file"):
        Source(["nobody/no-such-dataset"])


def test_required_fields_and_their_types(tmp_path):
    with pytest.raises(InputError, match=":1: a row without 'response'"):
        source(tmp_path, lines(TWO[0]), require=("prompt", "response"))
    with pytest.raises(InputError, match=":1: 'response' is a number: '5'; expected a string"):
        source(tmp_path, lines({**TWO[0], "response": 5}), require=("prompt", "response"))
    undecided = {**TWO[0], "chosen": None, "rejected": None}
    assert source(tmp_path, lines(undecided), require=("prompt", "chosen", "rejected")).count == 1


def test_a_check_of_the_commands_own_sees_every_row_and_its_place(tmp_path):
    seen = []
    source(tmp_path, lines(*TWO), check=lambda row, where, line: seen.append((row["id"], where, line)))
    assert seen == [("a", str(tmp_path / "in.jsonl"), 1), ("b", str(tmp_path / "in.jsonl"), 2)]


def test_memory_does_not_hold_the_rows(tmp_path):
    count, text = 3000, "x" * 5000
    write_jsonl(tmp_path / "in.jsonl", ({"id": str(n), "prompt": text} for n in range(count)))
    tracemalloc.start()
    found = Source([str(tmp_path / "in.jsonl")])
    with Output(tmp_path / "out.jsonl", command="test", fingerprint={}) as output:
        for row in found:
            output.write(row)
        output.finish(found.ids, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out.jsonl").stat().st_size > count * len(text)
    assert peak < count * len(text) / 4


# ------------------------------------------------------------------------------------------------ writing


def fresh(path, fingerprint=None, **arguments) -> Output:
    return Output(path, command="test", fingerprint=fingerprint or {"seed": 0, "model": "m"}, **arguments)


def fill(output, ids, order=None):
    with output:
        for row_id in ids:
            if row_id not in output.done:
                output.write({"id": row_id, "text": f"text of {row_id} – ü"})
        return output.finish(order or ids, {"rows": len(ids)}, note="n")


def test_an_output_in_order_with_its_manifest(tmp_path):
    path = tmp_path / "deep" / "folder" / "out.jsonl"
    output = fresh(path)
    assert not (tmp_path / "deep").exists(), "nothing is written before entering"
    manifest = fill(output, ["c", "a", "b"], order=["a", "gone", "b", "c"])
    assert [row["id"] for _, row in read_jsonl(path)] == ["a", "b", "c"]
    assert manifest == read_manifest(path)
    assert manifest["status"] == "done" and manifest["counts"] == {"rows": 3} and manifest["note"] == "n"
    assert manifest["fingerprint"] == {"seed": 0, "model": "m"} and manifest["seconds"] >= 0
    assert manifest["versions"]["torch"] and manifest["command"] == "test" and manifest["command_line"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_the_same_fingerprint_is_complete_and_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(fresh(path), ["a"])
    before = path.stat().st_mtime_ns
    with fresh(path) as again:
        assert again.complete and again.counts == {"rows": 1}
    assert path.stat().st_mtime_ns == before
    path.unlink()
    assert not fresh(path).complete, "the manifest alone is no output"


def test_another_fingerprint_is_refused_with_every_difference(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(fresh(path), ["a"])
    with pytest.raises(InputError) as error:
        fresh(path, {"seed": 1, "model": "m", "cot": True})
    assert "seed was 0, now 1; cot was null, now true" in str(error.value)
    assert "model was" not in str(error.value)
    with pytest.raises(InputError, match='command was "test", now "other"'):
        Output(path, command="other", fingerprint={"seed": 0, "model": "m"})
    assert [row["id"] for _, row in read_jsonl(path)] == ["a"]
    fill(fresh(path, {"seed": 1}, overwrite=True), ["b"])
    assert [row["id"] for _, row in read_jsonl(path)] == ["b"]


def test_an_unfinished_output_is_refused_to_another_run_too(tmp_path):
    path = tmp_path / "out.jsonl"
    with fresh(path) as output:
        output.write({"id": "a"})
    with pytest.raises(InputError, match="seed was 0, now 1"):
        fresh(path, {"seed": 1, "model": "m"})
    with fresh(path, {"seed": 1, "model": "m"}, overwrite=True) as output:
        assert not output.done


def test_what_is_not_ours_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("precious\n")
    with pytest.raises(InputError, match="no manifest says how it was made"):
        fresh(path)
    with pytest.raises(InputError, match="the output is one of the inputs"):
        fresh(path, inputs=[str(path)], overwrite=True)
    assert path.read_text() == "precious\n"
    with pytest.raises(InputError, match="a folder"):
        fresh(tmp_path)
    with pytest.raises(InputError, match="cannot write"), fresh(path / "below.jsonl"):
        pass
    (tmp_path / "x.jsonl.run.json").write_text("[]")
    with pytest.raises(InputError, match="not a manifest"):
        fresh(tmp_path / "x.jsonl")


def test_an_interrupted_output_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), fresh(path) as output:
        output.write({"id": "b", "text": "text of b – ü"})
        raise RuntimeError("stopped")
    assert not path.exists() and read_manifest(path)["status"] == "running"
    again = fresh(path)
    assert again.resuming and again.done == {"b"}
    assert fill(again, ["a", "b", "c"])["resumed"] == 1
    fill(fresh(tmp_path / "whole.jsonl"), ["a", "b", "c"])
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [b'{"id": "b", "te', b'{"id": "b", "text": "x"}', b"\0\0\0", b'{"a": "\xc3'])
def test_a_torn_last_line_is_cut_off_and_said(tmp_path, capsys, torn):
    path = tmp_path / "out.jsonl"
    with fresh(path) as output:
        output.write({"id": "a", "text": "text of a – ü"})
    with open(output.journal, "ab") as journal:
        journal.write(torn)
    again = fresh(path)
    assert again.done == {"a"}
    fill(again, ["a", "b"])
    assert "torn off" in capsys.readouterr().err
    assert [row["text"] for _, row in read_jsonl(path)] == ["text of a – ü", "text of b – ü"]


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with fresh(path) as output:
        output.write({"id": "a"})
    output.journal.write_bytes(b'{"id": "a"}\nrubbish\n{"id": "b"}\n')
    with pytest.raises(InputError, match=r"out\.jsonl\.partial:2: a damaged row.*rubbish"):
        fresh(path)


def test_killed_between_the_rename_and_the_manifest(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(fresh(path), ["a", "b"])
    whole = path.read_bytes()
    manifest = read_manifest(path)
    (tmp_path / "out.jsonl.partial").write_bytes(whole)
    (tmp_path / "out.jsonl.run.json").write_text(json.dumps({**manifest, "status": "running"}))
    again = fresh(path)
    assert not again.complete and again.done == {"a", "b"}
    fill(again, ["a", "b"])
    assert path.read_bytes() == whole and not (tmp_path / "out.jsonl.partial").exists()


def test_a_row_is_written_once(tmp_path):
    with fresh(tmp_path / "out.jsonl") as output:
        output.write({"id": "a"})
        with pytest.raises(ValueError, match="'a' was written before"):
            output.write({"id": "a"})


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from cai.data.outputs import Output
with Output(sys.argv[2], command="test", fingerprint={"seed": 0, "model": "m"}) as output:
    output.write({"id": "a", "text": "text of a – ü"})
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "out.jsonl"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ROOT / "scripts"), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another process \({first.pid}\) is writing it"):
            fresh(path)
        with pytest.raises(InputError, match="another process"):
            fresh(path, overwrite=True)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    fill(fresh(path), ["a", "b"])
    assert [row["id"] for _, row in read_jsonl(path)] == ["a", "b"]
    assert not (tmp_path / "out.jsonl.lock").exists()


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from cai.base.errors import CaiError
from cai.data.outputs import Output
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    with Output(sys.argv[2], command="test", fingerprint={"seed": 0, "model": "m"}) as output:
        for n in range(100):
            output.write({"id": str(n), "text": "x" * 100})
except CaiError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


def test_a_full_disk_ends_with_1_and_keeps_what_is_done(tmp_path):
    path = tmp_path / "out.jsonl"
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(ROOT / "scripts"), str(path)], capture_output=True, text=True
    )
    assert ended.stderr.startswith("1 ") and "cannot write" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(fresh(path).done) > 20


def test_write_jsonl_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def broken():
        yield {"a": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert list(read_jsonl(path)) == [(1, {"a": 1})]


# ------------------------------------------------------------------------------------- folders and hashes


def claim(path, **arguments):
    return claim_folder(path, command="sft", **{"fingerprint": {"seed": 0}, **arguments})


def test_a_checkpoint_folder_keeps_the_same_contract(tmp_path):
    path = tmp_path / "model"
    with claim(f"{path}/") as folder:
        assert not folder.complete and not folder.resuming
        path.mkdir()
        (path / "config.json").write_text("{}")
    assert claim(path).resuming
    with claim(path) as folder:
        assert folder.resuming and (path / "config.json").exists()
        folder.finish({"steps": 3}, loss=1.5)
    assert read_manifest(path)["loss"] == 1.5 == read_manifest(f"{path}/")["loss"]
    assert claim(path).complete and claim(path).counts == {"steps": 3}
    with pytest.raises(InputError, match="seed was 0, now 1"):
        claim(path, fingerprint={"seed": 1})
    with claim(path, fingerprint={"seed": 1}, overwrite=True):
        assert not path.exists()


def test_a_folder_that_is_not_ours_is_never_deleted(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    assert not claim(path).complete, "an empty folder may be used"
    (path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no manifest says how it was made"):
            claim(path, overwrite=overwrite)
    assert (path / "thesis.tex").exists()
    with pytest.raises(InputError, match="a file"):
        claim(path / "thesis.tex")


def test_only_rank_0_of_a_distributed_run_locks_and_writes(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with claim(path):
        monkeypatch.setenv("RANK", "1")
        with claim(path) as other:
            assert other.finish({"steps": 1}) == {}
        monkeypatch.delenv("RANK")
        assert read_manifest(path)["status"] == "running"
        with pytest.raises(InputError, match=f"another process \\({os.getpid()}\\)"):
            claim(path)


def test_hashed_seeds():
    assert hashed_seed("a", 1) == hashed_seed("a", "1") == 4742018630964328543
    draws = {hashed_seed("x", n) for n in range(1000)}
    assert len(draws) == 1000 and all(0 <= draw < 2**63 for draw in draws)
    assert max(draws) > 2**62, "all 63 bits are used"
    assert hashed_seed("a", "bc") != hashed_seed("ab", "c")


def test_digests(tmp_path):
    (tmp_path / "x").write_text("ü")
    assert sha256_file(tmp_path / "x") == sha256_text("ü")
    assert sha256_text("").startswith("e3b0c442")


def test_the_identity_of_a_model_is_its_weights_and_not_its_path(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(200_000))
    assert identity(str(tmp_path / "one")) == identity(str(tmp_path / "two"))
    (tmp_path / "two" / "train.log").write_text("not of the model")
    assert identity(str(tmp_path / "one")) == identity(str(tmp_path / "two"))
    (tmp_path / "two" / "model.safetensors").write_bytes(bytes(199_999) + b"x")
    assert identity(str(tmp_path / "one")) != identity(str(tmp_path / "two"))
    assert identity("owner/name") == "owner/name"


def test_errors_have_their_exit_codes():
    assert (CaiError("x").exit_code, InputError("x").exit_code) == (1, 2)
