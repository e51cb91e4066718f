"""--stop-when-content: rows whose critique finds no fault get no revision and no further round."""

import json

import pytest
from canned_server import CannedServer

from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.steps import content

RULES = "- id: property\n  principle: Respect property.\n- id: truth\n  principle: Tell the truth.\n"
CRITIQUES = ["It harms the owner.", "No fault.", "Hm.", "No fault."]


def row(number, critique):
    rounds = [{"principle": "property", "critique": critique}]
    return {"id": f"r{number}", "prompt": f"How {number}?", "response": f"So {number}.", "rounds": rounds}


def read_critique(question: str) -> str:
    """The letter for what the critique says, in either order of the options."""
    if "Hm." in question:
        return "Maybe."
    no, yes = ("A", "B") if "(A) No:" in question else ("B", "A")
    return no if "No fault." in question else yes


def model_that(reads):
    """A model on loopback that reads critiques by `reads`, and writes one text otherwise."""

    def answer(body):
        question = body["messages"][-1]["content"]
        text = reads(question) if "Does the critique say" in question else "Ask the owner first."
        return {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}

    return CannedServer(answer, {"prompt_tokens": 9, "completion_tokens": 5})


@pytest.fixture
def call(invoke, tmp_path):
    (tmp_path / "rules.yaml").write_text(RULES)

    def run(command, source, output, server, *more):
        paths = ("--input", tmp_path / source, "--output", tmp_path / output)
        model = ("--model", "openai:m", "--endpoint", server.address, "--constitution", tmp_path / "rules.yaml")
        return invoke(command, *paths, *model, "--json", *more)

    return run


def read(path):
    return [row for _, row in read_jsonl(path)]


def test_a_content_row_gets_no_revision_and_no_further_round(call, tmp_path):
    given = [row(number, critique) for number, critique in enumerate(CRITIQUES)]
    write_jsonl(tmp_path / "c1.jsonl", given)
    with model_that(read_critique) as server:
        result = call("revise", "c1.jsonl", "v1.jsonl", server, "--stop-when-content")
        assert result.exit_code == 0, result.stderr
        revisions = [b for b in server.requests if "Does the critique say" not in b["messages"][-1]["content"]]
        assert sum("So " in body["messages"][-1]["content"] for body in revisions) == 2
        summary = json.loads(result.stdout)
        assert (summary["content"], summary["content_unread"], summary["content_undecided"]) == (2, 1, 0)
        harmed, content_row, unread, _ = (row["rounds"] for row in read(tmp_path / "v1.jsonl"))
        skipped = {"principle": "property", "critique": "No fault.", "p_fault": [0.0, 0.0], "skipped": "content"}
        assert content_row == [skipped]
        assert (harmed[0]["p_fault"], unread[0]["p_fault"]) == ([1.0, 1.0], None)
        assert harmed[0]["revision"] == unread[0]["revision"] == "Ask the owner first."

        result = call("critique", "v1.jsonl", "c2.jsonl", server, "--stop-when-content")
        summary = json.loads(result.stdout)
        assert (summary["rows"], summary["content"]) == (4, 2) and summary["tokens_saved_about"] > 0
        before, after = read(tmp_path / "v1.jsonl"), read(tmp_path / "c2.jsonl")
        assert [before[n] == after[n] for n in range(4)] == [False, True, False, True]
        assert [row["rounds"][-1]["principle"] for row in after[::2]] == ["truth", "truth"]

        result = call("revise", "c2.jsonl", "v2.jsonl", server)
        assert result.exit_code == 0, result.stderr
        final = read(tmp_path / "v2.jsonl")
        assert [final[n] == after[n] for n in range(4)] == [False, True, False, True]
        assert len(final[0]["rounds"]) == 2


def test_tokens_saved_are_those_of_the_prompt_and_the_response(call, tmp_path):
    write_jsonl(tmp_path / "c1.jsonl", [row(0, "No fault."), row(1, "It harms the owner.")])
    with model_that(read_critique) as server:
        summary = json.loads(call("revise", "c1.jsonl", "v1.jsonl", server, "--stop-when-content").stdout)
        [asked] = [b["messages"] for b in server.requests if "So 1." in b["messages"][-1]["content"]][-1:]
    # Where the tokenizer is not on disk, four characters are a token, and a message takes four more. The revision of
    # the other row was asked for in a conversation that is longer by its critique.
    characters = len(asked[-1]["content"]) - len("It harms the owner.") + len("No fault.")
    assert summary["tokens_saved_about"] == (characters // 4 + 4) + (len("So 0.") // 4 + 4)


def test_without_the_option_nothing_is_asked_and_a_content_row_is_criticised_again(call, tmp_path):
    write_jsonl(tmp_path / "c1.jsonl", [row(0, "No fault.")])
    with model_that(read_critique) as server:
        summary = json.loads(call("revise", "c1.jsonl", "v1.jsonl", server).stdout)
        assert "content" not in summary and "p_fault" not in read(tmp_path / "v1.jsonl")[0]["rounds"][0]
        skipped = row(0, "No fault.")
        skipped["rounds"][0]["skipped"] = "content"
        write_jsonl(tmp_path / "v1b.jsonl", [skipped])
        assert call("critique", "v1b.jsonl", "c2.jsonl", server).exit_code == 0
    assert len(read(tmp_path / "c2.jsonl")[0]["rounds"]) == 2


def test_a_model_that_prefers_a_letter_stops_nothing_and_is_warned_of(call, tmp_path):
    write_jsonl(tmp_path / "c1.jsonl", [row(number, "No fault.") for number in range(4)])
    with model_that(lambda _: "B") as server:
        result = call("revise", "c1.jsonl", "v1.jsonl", server, "--stop-when-content")
    summary = json.loads(result.stdout)
    assert (summary["content"], summary["content_undecided"], summary["tokens_saved_about"]) == (0, 4, 0)
    assert "4 of 4 critiques read differently with the options in the other order" in result.stderr
    assert all(row["rounds"][0]["revision"] for row in read(tmp_path / "v1.jsonl"))


def test_the_option_is_part_of_what_decides_the_rows(call, tmp_path):
    write_jsonl(tmp_path / "c1.jsonl", [row(0, "No fault.")])
    with model_that(read_critique) as server:
        plan = json.loads(call("revise", "c1.jsonl", "v1.jsonl", server, "--stop-when-content", "--dry-run").stdout)
        assert (plan["fault_calls"], plan["model_calls"]) == (2, 1)
        assert call("revise", "c1.jsonl", "v1.jsonl", server).exit_code == 0
        result = call("revise", "c1.jsonl", "v1.jsonl", server, "--stop-when-content")
    assert result.exit_code == 2 and "stop_when_content was null" in result.stderr
    assert "stop_when_content" not in read_manifest(tmp_path / "v1.jsonl")["fingerprint"]


def test_both_orders_of_the_options_are_in_the_template():
    from cai.constitution.templates import load_template

    texts = {"prompt": "P?", "response": "R.", "critique": "C."}
    straight, swapped = (
        load_template(content.TEMPLATE).render(**texts, order=order)[0]["content"] for order in ((0, 1), (1, 0))
    )
    yes, no = "Yes: it names something that should be changed.", "No: it finds nothing wrong."
    assert f"(A) {yes}\n(B) {no}" in straight and f"(A) {no}\n(B) {yes}" in swapped
    assert straight == load_template(content.TEMPLATE).render(**texts)[0]["content"]
