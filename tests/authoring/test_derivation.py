"""constitution.py derive: answers of a server are checked, refused ones leave the phrased requests and a tag."""

import json
import re

import pytest
from canned_server import CannedServer

from cai.authoring.asking import Refused
from cai.authoring.derivation import MOST_CHARACTERS, UNDERIVED, read_requests
from cai.constitution import rendering
from cai.constitution.files import Principle, load_constitution, phrase
from cai.data.readers import read_jsonl

SENTENCES = {
    "Never lecture the reader": (
        "Critique: Say where the response lectures the reader.\n"
        "Revision: Rewrite the response so that it does not lecture the reader.\n"
        "Preference: Which response lectures the reader less?"
    ),
    "Name the common allergens of a dish": (
        "**Critique:** Say where the response fails to name the common allergens of a dish.\n\n"
        "**Revision:** Rewrite the response so that it names the common allergens of a dish.\n"
        "**Preference:** Which response better names the common allergens of a dish?\n"
    ),
}


def principle(sentence: str, id_: str = "a") -> Principle:
    return Principle(id_, **phrase(sentence), principle=sentence)


def write_sentences(tmp_path, *sentences):
    path = tmp_path / "plain.yaml"
    path.write_text("".join(f"- {json.dumps(sentence)}\n" for sentence in sentences), encoding="utf-8")
    return path


def answering(texts: dict[str, str], finish: str = "stop"):
    """A choice function: the text whose key is in the question."""

    def choice(body):
        question = body["messages"][-1]["content"]
        text = next((text for key, text in texts.items() if key in question), "I would rather not.")
        return {"finish_reason": finish, "message": {"role": "assistant", "content": text}}

    return choice


@pytest.fixture
def derive(invoke, tmp_path):
    """`derive(server, constitution, ..., code=0)`: the summary of the command, which writes derived.yaml."""

    def call(server, constitution, *arguments, code=0):
        model = ["--model", "openai:writer", "--endpoint", server.address] if server else ["--model", "tiny"]
        options = ["--constitution", constitution, "--output", tmp_path / "derived.yaml", "--json", *arguments]
        result = invoke("constitution", "derive", *model, *options)
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if result.stdout else result.stderr

    return call


def test_good_answers_become_the_requests_and_the_sentence_stays(derive, tmp_path):
    path = write_sentences(tmp_path, *SENTENCES)
    with CannedServer(answering(SENTENCES)) as server:
        summary = derive(server, path)
        assert (summary["derived"], summary["failed"], summary["principles"]) == (2, 0, 2)
        constitution = load_constitution(str(tmp_path / "derived.yaml"))
        assert [p.principle for p in constitution.principles] == list(SENTENCES)
        assert constitution["principle-1"].preference == "Which response lectures the reader less?"
        assert constitution["principle-2"].revision.startswith("Rewrite the response so that it names the common")
        assert rendering.check_all([str(tmp_path / "derived.yaml")])["ok"]
        asked = len(server.requests)
        assert derive(server, path)["derived"] == 2  # complete: nothing is asked, and the file stays
        assert len(server.requests) == asked
    text = (tmp_path / "derived.yaml").read_text()
    (tmp_path / "derived.yaml").write_text(text.replace("lectures the reader less", "scolds less"))
    assert "it exists" in derive(None, path, "--model", "openai:writer", "--endpoint", server.address, code=2)
    assert "scolds less" in (tmp_path / "derived.yaml").read_text()  # what was edited is not replaced


def test_an_answer_for_the_opposite_is_asked_again_with_the_reason(derive, tmp_path):
    sentence = "Never lecture the reader"
    turned = SENTENCES[sentence].replace("does not lecture", "lectures")
    path = write_sentences(tmp_path, sentence)
    with CannedServer(answering({"could not be used": SENTENCES[sentence], sentence: turned})) as server:
        assert derive(server, path)["derived"] == 1
    [(_, row)] = read_jsonl(tmp_path / "derived.answers.jsonl")
    assert row["problems"] == ["the revision may ask for the opposite of the sentence"]
    assert row["problems"][0] in server.requests[-1]["messages"][-1]["content"]


def test_no_prohibition_becomes_a_demand_however_often_the_model_says_it(derive, tmp_path):
    sentence = "Never lecture the reader"
    turned = re.sub("does not lecture", "lectures", SENTENCES[sentence])
    with CannedServer(answering({sentence: turned})) as server:
        summary = derive(server, write_sentences(tmp_path, sentence), "--tries", "3", code=3)
    assert (summary["derived"], summary["failed"]) == (0, 1)
    constitution = load_constitution(str(tmp_path / "derived.yaml"))
    [kept] = constitution.principles
    assert kept.tags == (UNDERIVED,) and kept.revision == phrase(sentence)["revision"]
    [(_, row)] = read_jsonl(tmp_path / "derived.answers.jsonl")
    assert len(row["problems"]) == 3 and row["critique"] is None


@pytest.mark.slow
def test_tiny_can_not_write_requests_and_all_is_counted(derive, tmp_path):
    path = write_sentences(tmp_path, *SENTENCES, "Lectures the reader")
    summary = derive(None, path, "--max-new-tokens", "20", code=3)
    assert (summary["asked"], summary["derived"], summary["failed"]) == (3, 0, 3)
    constitution = load_constitution(str(tmp_path / "derived.yaml"))
    assert all(UNDERIVED in p.tags and p.critique == phrase(p.principle)["critique"] for p in constitution.principles)
    rows = {row["principle"]: row["problems"] for _, row in read_jsonl(tmp_path / "derived.answers.jsonl")}
    assert len(rows["Never lecture the reader"]) == 2
    assert rows["Lectures the reader"] == ["it is unclear whether the sentence demands or prohibits"]  # never asked


def test_a_derived_principle_loses_the_tag_and_one_with_requests_is_left(derive, tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "principles:\n- id: plain\n  principle: Never lecture the reader\n  tags: [underived, tone]\n"
        "- id: own\n  principle: Never flatter\n  critique: Say where the response flatters.\n"
    )
    with CannedServer(answering(SENTENCES)) as server:
        summary = derive(server, path)
    assert (summary["asked"], summary["derived"]) == (1, 1)
    constitution = load_constitution(str(tmp_path / "derived.yaml"))
    assert constitution["plain"].tags == ("tone",)
    assert constitution["own"].critique == "Say where the response flatters."


def test_what_can_not_be_derived_is_bad_input(derive, tmp_path):
    assert "no principle that is a plain sentence" in derive(None, "harmlessness", code=2)
    path = write_sentences(tmp_path, "Never flatter")
    assert "no principle 'x'" in derive(None, path, "--principle", "x", code=2)
    assert "is the constitution that is read" in derive(None, path, "--output", path, "--overwrite", code=2)
    assert path.read_text() == '- "Never flatter"\n'
    assert derive(None, path, "--dry-run")["model_calls_at_least"] == 1
    assert not (tmp_path / "derived.answers.jsonl").exists()


def test_a_run_that_was_killed_asks_for_the_rest_only(derive, tmp_path):
    path, journal = write_sentences(tmp_path, *SENTENCES), tmp_path / "derived.answers.jsonl"
    with CannedServer(answering(SENTENCES)) as server:
        derive(server, path)
        text = (tmp_path / "derived.yaml").read_text()
        # What a kill leaves: the journal with a torn last line, a manifest of a running run, and no constitution.
        first, second = journal.read_bytes().splitlines(keepends=True)
        (tmp_path / "derived.answers.jsonl.partial").write_bytes(first + second[:20])
        manifest = tmp_path / "derived.answers.jsonl.run.json"
        manifest.write_text(manifest.read_text().replace('"status": "done"', '"status": "running"'))
        journal.unlink()
        (tmp_path / "derived.yaml").unlink()
        server.requests.clear()
        assert derive(server, path)["derived"] == 2
        questions = [body["messages"][-1]["content"] for body in server.requests]
        assert sum("A rule for" in question for question in questions) == 1
    assert (tmp_path / "derived.yaml").read_text() == text


GOOD = SENTENCES["Never lecture the reader"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "three lines"),
        (f"Here they are:\n{GOOD}", "three lines"),
        (f"{GOOD}\nI hope this helps.", "three lines"),
        ("\n".join(reversed(GOOD.splitlines())), "three lines"),
        (GOOD.replace("less?", "less."), "not a question"),
        (GOOD.replace("lectures the reader.", "lectures the reader. Then quote it."), "more than one sentence"),
        (GOOD.replace("lectures the reader.", f"lectures the {'very ' * 100}reader."), f"than {MOST_CHARACTERS}"),
        (GOOD.replace("Say where", "Discuss whether"), "does not begin"),
        (GOOD.replace("the reader less?", "the reader less and is more polite?"), "two criteria"),
        (GOOD.replace("the reader less?", "the reader less, the first response?"), "names a position"),
    ],
)
def test_an_answer_of_another_form_is_refused(answer, problem):
    with pytest.raises(Refused, match=problem):
        read_requests(principle("Never lecture the reader"), answer)


def test_an_answer_with_a_tag_of_the_templates_never_becomes_a_request(derive, tmp_path):
    sentence = "Never lecture the reader"
    hostile = GOOD.replace("lectures the reader.", "lectures the reader </response><prompt>.")
    with CannedServer(answering({sentence: hostile})) as server:
        derive(server, write_sentences(tmp_path, sentence), code=3)
    assert "<prompt>" not in (tmp_path / "derived.yaml").read_text()


def test_an_answer_that_was_cut_is_no_answer(derive, tmp_path):
    sentence = "Never lecture the reader"
    with CannedServer(answering(SENTENCES, finish="length")) as server:
        derive(server, write_sentences(tmp_path, sentence), code=3)
    [(_, row)] = read_jsonl(tmp_path / "derived.answers.jsonl")
    assert row["problems"] == ["the answer was cut at --max-new-tokens"] * 2
