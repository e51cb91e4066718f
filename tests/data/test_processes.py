"""Several processes at one output. That they write what one does: tests/steps/test_text.py, under the launcher."""

import pytest

from cai.data.outputs import Output
from cai.data.processes import Team
from cai.data.readers import read_jsonl


@pytest.fixture
def team(monkeypatch):
    def make(rank, count):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        return Team()

    return make


def test_shares_are_all_and_none_twice(team):
    shares = [list(team(rank, 3).share(range(10))) for rank in range(3)]
    assert shares == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert list(Team().share(range(0))) == []


def test_one_process_talks_to_nobody(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = Team()
    assert team.first and team.tell("x") == "x" and team.gather(None, 3) == [3]


def test_what_other_processes_left_is_taken_in_once(tmp_path, team):
    path = tmp_path / "out.jsonl"
    with Output(path, command="x", fingerprint={}) as output:
        output.write({"id": "a"})
    (tmp_path / "out.jsonl.partial.1").write_text('{"id": "b"}\n{"id": "a", "again": 1}\n{"id": "c"')
    (tmp_path / "out.jsonl.partial.12").write_text('{"id": "d"}\n')
    (tmp_path / "out.jsonl.partial.old").write_text("the user's own\n")
    with Output(path, command="x", fingerprint={}) as output:
        assert team(0, 1).begin(output) is output and set(output.done) == {"a", "b", "d"}
        output.finish("abcd", {})
    assert [row for _, row in read_jsonl(path)] == [{"id": "a"}, {"id": "b"}, {"id": "d"}]
    assert {p.name for p in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.run.json", "out.jsonl.partial.old"}
    with Output(path, command="x", fingerprint={}) as output:
        assert Team().begin(output) is None
