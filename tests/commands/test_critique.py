"""critique.py: the first half of a round."""

import json

import models
import pytest
from canned_server import CannedServer
from launcher import launch
from small_server import SmallServer

from cai.constitution.files import load_constitution
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl


def row(n, **more):
    return {"id": f"r{n}", "prompt": f"How {n}?", "response": f"So {n}.", "kind": "harmful", **more}


@pytest.fixture
def critique(invoke, tmp_path):
    def call(rows, *more, output="out.jsonl"):
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = invoke(
            "critique",
            "--input",
            source,
            "--output",
            tmp_path / output,
            "--model",
            models.folder("llama"),
            "--max-new-tokens",
            8,
            *more,
        )
        written = result.exit_code == 0 and (tmp_path / output).exists()
        return result, [row for _, row in read_jsonl(tmp_path / output)] if written else None

    return call


def test_a_round_is_begun_with_the_drawn_principle(critique):
    result, rows = critique([row(n) for n in range(8)], "--json")
    constitution = load_constitution("harmlessness")
    for before, after in zip([row(n) for n in range(8)], rows, strict=True):
        (one,) = after.pop("rounds")
        assert after == before
        assert set(one) == {"principle", "critique"} and isinstance(one["critique"], str)
        assert one["principle"] == constitution.draw(0, before["id"], 0).id
    assert json.loads(result.stdout)["rows"] == 8
    assert json.loads(result.stdout)["next"].startswith("python scripts/revise.py --input ")


def test_the_principle_depends_on_seed_and_round(critique):
    done = {"principle": "x", "critique": "c", "revision": "r"}
    names = {}
    for name, rows, seed in [
        ("first", [row(n) for n in range(20)], 0),
        ("seed", [row(n) for n in range(20)], 1),
        ("second", [row(n, rounds=[done]) for n in range(20)], 0),
    ]:
        _, made = critique(rows, "--seed", seed, "--max-new-tokens", 1, output=f"{name}.jsonl")
        names[name] = [row["rounds"][-1]["principle"] for row in made]
        assert [row["rounds"][:-1] for row in made] == [row.get("rounds", []) for row in rows]
    assert names["first"] != names["seed"] and names["first"] != names["second"]


def test_what_the_model_is_asked(critique, monkeypatch):
    """The last revision and not the first response, through the template that was named."""
    from cai.models.local import LocalEngine

    asked = []
    generate = LocalEngine.generate

    def listening(self, requests, *others):
        requests = list(requests)
        asked.extend(request.conversation for request in requests)
        return generate(self, requests, *others)

    monkeypatch.setattr(LocalEngine, "generate", listening)
    done = {"principle": "x", "critique": "c", "revision": "the REVISED one {{ 7 * 7 }}"}
    critique([row(0, rounds=[done])])
    critique([row(0, rounds=[done])], "--cot", output="cot.jsonl")
    plain, cot = (messages[-1]["content"] for messages in asked)
    assert "the REVISED one {{ 7 * 7 }}" in plain and "So 0." not in plain and "How 0?" in plain
    principle = load_constitution("harmlessness").draw(0, "r0", 1)
    assert principle.critique in plain and principle.critique in cot and plain != cot


def test_options_that_exclude_each_other(critique):
    result, _ = critique([row(0)], "--cot", "--template", "critique")
    assert result.exit_code == 2 and "not both" in result.stderr


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (
            row(1, rounds=[{"principle": "x", "critique": "c"}]),
            ":2: round 1 has a critique and no revision; expected rows whose rounds are complete. Run revise.py",
        ),
        (row(1, response=None), ":2: a row without 'response'"),
        (row(1, response=["x"]), ":2: 'response' is a list"),
        (row(1, rounds="x"), ":2: `rounds` is 'x'"),
    ],
)
def test_rows_that_are_not_to_be_critiqued(critique, tmp_path, bad, part):
    result, _ = critique([row(0), bad])
    assert result.exit_code == 2 and part in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_another_constitution_or_template_is_another_run(critique, tmp_path):
    critique([row(0)])
    result, _ = critique([row(0)], "--constitution", "property-only")
    assert result.exit_code == 2 and "constitution was" in result.stderr
    result, _ = critique([row(0)], "--cot")
    assert result.exit_code == 2 and "template was" in result.stderr and "constitution was" not in result.stderr
    result, rows = critique([row(0)], "--constitution", "property-only", "--overwrite", "--json")
    assert rows[0]["rounds"][0]["principle"] in load_constitution("property-only")
    assert "--constitution property-only" in json.loads(result.stdout)["next"]
    assert read_manifest(tmp_path / "out.jsonl")["fingerprint"]["constitution"]


# --- the modes of --principles -----------------------------------------------------------------------------------


def completed(rows):
    """The rows after a revision that changed nothing."""
    for one in rows:
        last = one["rounds"][-1]
        if "skipped" not in last:
            last |= {"revision": one["response"], "flags": ["copy"]}
    return rows


def test_no_principle_comes_twice_in_a_row_while_another_is_unused(critique):
    rows = [row(n) for n in range(20)]
    for number in range(3):
        _, rows = critique(completed(rows) if number else rows, "--max-new-tokens", 1, output=f"{number}.jsonl")
    assert all(len({round_["principle"] for round_ in one["rounds"]}) == 3 for one in rows)


def test_match_takes_the_principle_that_best_speaks_to_the_prompt(critique, tmp_path):
    planned, _ = critique([row(n) for n in range(9)], "--principles", "match", "--dry-run", "--json")
    assert json.loads(planned.stdout)["match_calls"] == 2 * 16 * 9 and not (tmp_path / "out.matches.jsonl").exists()
    result, rows = critique([row(n) for n in range(9)], "--principles", "match", "--json")
    assert result.exit_code == 0, result.output
    by = {match["prompt"]: match["by"] for _, match in read_jsonl(tmp_path / "out.matches.jsonl")}
    constitution = load_constitution("harmlessness")
    for one in rows:
        [last] = one["rounds"]
        best, p = next(iter(by[one["prompt"]].items()))
        if p >= 0.5:
            assert (last["principle"], last["speaks"]) == (best, p)
        else:
            assert (last["principle"], last["speaks"]) == (constitution.draw(0, one["id"], 0).id, None)
    unmatched = sum(one["rounds"][0]["speaks"] is None for one in rows)
    assert json.loads(result.stdout)["unmatched"] == unmatched
    # The second round shares the file, and takes the next best.
    before = (tmp_path / "out.matches.jsonl").read_bytes()
    matches = ("--principles", "match", "--matches", tmp_path / "out.matches.jsonl")
    _, second = critique(completed(rows), *matches, output="second.jsonl")
    for one in second:
        speaking = [name for name, p in by[one["prompt"]].items() if p >= 0.5]
        first, last = (round_["principle"] for round_ in one["rounds"])
        assert last != first and (last == speaking[1] if len(speaking) > 1 else last not in speaking[:1])
    assert (tmp_path / "out.matches.jsonl").read_bytes() == before


def test_rows_to_which_no_principle_speaks_are_kept_as_they_are(critique, tmp_path, invoke):
    constitution = tmp_path / "rules.yaml"
    constitution.write_text("- id: property\n  principle: Be kind.\n")
    options = ("--principles", "match", "--unmatched", "keep", "--constitution", constitution)
    prompts = [f"{'Why? ' * (n % 4)}How {7 * n}?" for n in range(12)]
    result, rows = critique([row(n, prompt=prompt) for n, prompt in enumerate(prompts)], *options, "--json")
    speaks = {
        match["prompt"]: match["by"]["property"] >= 0.5 for _, match in read_jsonl(tmp_path / "out.matches.jsonl")
    }
    assert {True, False} == set(speaks.values()), "the small model should find both"
    for one in rows:
        [last] = one["rounds"]
        if not speaks[one["prompt"]]:
            assert last == {"principle": None, "critique": "", "skipped": "unmatched"}
        else:
            assert last["principle"] == "property" and "skipped" not in last
    summary = json.loads(result.stdout)
    kept = sum(not known for known in speaks.values())
    assert (summary["rows"], summary["unmatched"], summary["empty"]) == (12, kept, 0)
    revise = ("revise", "--input", tmp_path / "out.jsonl", "--output", tmp_path / "revised.jsonl", "--json")
    model = ("--model", models.folder("llama"), "--max-new-tokens", 8)
    revised = invoke(*revise, *model, "--constitution", constitution)
    assert revised.exit_code == 0 and json.loads(revised.stdout)["skipped"] == {"unmatched": kept}
    after = [one for _, one in read_jsonl(tmp_path / "revised.jsonl")]
    assert [one for one in after if not speaks[one["prompt"]]] == [one for one in rows if not speaks[one["prompt"]]]
    assert all("revision" in one["rounds"][0] for one in after if speaks[one["prompt"]])
    # Everything matches what it had, so a second round keeps every row.
    _, second = critique(after, *options, "--matches", tmp_path / "out.matches.jsonl", output="second.jsonl")
    assert all(one["rounds"][1]["skipped"] == "unmatched" for one in second)


def test_all_principles_are_one_critique_and_one_revision(critique, tmp_path, invoke):
    constitution = tmp_path / "rules.yaml"
    constitution.write_text("- principle: Respect property.\n- principle: Tell the truth.\n")
    options = ("--principles", "all", "--constitution", constitution)
    _, rows = critique([row(n) for n in range(3)], *options)
    assert all(set(one["rounds"][0]) == {"principle", "critique"} for one in rows)
    assert [one["rounds"][0]["principle"] for one in rows] == ["all"] * 3
    result, rows = critique([row(n) for n in range(3)], *options, "--cot", "--json", output="cot.jsonl")
    unread = [one["rounds"][0]["violated"] for one in rows].count(None)
    assert json.loads(result.stdout).get("violations_unread", 0) == unread == 3, "it knows nothing of the form"
    revise = ("revise", "--input", tmp_path / "cot.jsonl", "--output", tmp_path / "revised.jsonl")
    model = ("--model", models.folder("llama"), "--max-new-tokens", 8, "--constitution", constitution)
    assert invoke(*revise, *model).exit_code == 0
    assert all(set(one["rounds"][0]) > {"revision", "violated"} for _, one in read_jsonl(tmp_path / "revised.jsonl"))


def test_the_answers_that_break_each_rule_are_counted(invoke, tmp_path):
    """By hand: of four answers two help to steal, one with a lie too; one critique ends without the line."""

    def critic(body):
        asked = body["messages"][-1]["content"]
        line = {"Take it.": "Violated: 1", "Take it, and lie.": "Violated: 1, 2", "Ask.": "Violated: none"}
        said = next((line[text] for text in line if f"<response>{text}</response>" in asked), "No line.")
        return {"finish_reason": "stop", "message": {"role": "assistant", "content": f"One by one.\n{said}"}}

    rules, source, output = tmp_path / "rules.yaml", tmp_path / "log.jsonl", tmp_path / "critiques.jsonl"
    rules.write_text("- id: property\n  principle: Respect property.\n- id: truth\n  principle: Tell the truth.\n")
    answers = ["Take it.", "Take it, and lie.", "Ask.", "Well."]
    write_jsonl(source, [{"prompt": "How do I get the bike?", "response": answer} for answer in answers])
    with CannedServer(critic) as server:
        asked = ("--model", "openai:critic", "--endpoint", server.address, "--constitution", rules, "--output", output)
        result = invoke("critique", "--input", source, *asked, "--principles", "all", "--cot", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["violated"], summary["violations_unread"]) == ({"property": 2, "truth": 1}, 1)
    broken = [line for line in output.read_text().splitlines() if '"violated": ["' in line]  # as cot-critique.md greps
    assert [json.loads(line)["response"] for line in broken] == answers[:2]


def many_principles(path, count=200):
    path.write_text("".join(f"- id: p{n}\n  principle: Respect what is called thing {n}.\n" for n in range(count)))
    return path


def test_all_that_do_not_fit_the_context_are_refused_before_anything_is_written(critique, tmp_path, invoke):
    constitution = many_principles(tmp_path / "rules.yaml")
    result, _ = critique([row(0)], "--principles", "all", "--constitution", constitution)
    assert result.exit_code == 2 and "the 200 principles of rules take" in result.stderr
    assert "and with 8 new ones exceed the model's context of 2048" in result.stderr and "match" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "rules.yaml"}
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row(0, rounds=[{"principle": "all", "critique": "c"}])) + "\n")
    revise = ("revise", "--input", source, "--output", tmp_path / "out.jsonl", "--model", models.folder("llama"))
    result = invoke(*revise, "--constitution", constitution)
    assert result.exit_code == 2 and "the 200 principles of rules take" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "rules.yaml"}


@pytest.mark.slow
def test_two_hundred_principles_work_in_every_mode(critique, tmp_path):
    constitution = many_principles(tmp_path / "rules.yaml")
    long = models.build("llama", tmp_path / "long", max_position_embeddings=32768)
    for mode in ("draw", "match", "all"):
        options = ("--principles", mode, "--constitution", constitution, "--model", long)
        result, rows = critique([row(n) for n in range(3)], *options, output=f"{mode}.jsonl")
        assert result.exit_code == 0 and len(rows) == 3, result.output


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--unmatched", "keep"), "needs --principles match"),
        (("--matches", "m.jsonl"), "--matches without --principles match"),
        (("--principles", "match", "--matches", "{folder}/in.jsonl"), "the output is one of the inputs"),
        (("--principles", "match", "--matches", "{folder}/out.jsonl"), "the output is one of the inputs"),
    ],
)
def test_options_of_matches_that_do_not_go_together(critique, tmp_path, options, part):
    result, _ = critique([row(0)], *(option.format(folder=tmp_path) for option in options))
    assert result.exit_code == 2 and part in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.slow
def test_two_processes_match_as_one_does(invoke, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row(n)) + "\n" for n in range(9)))
    model = ("--model", models.folder("llama"), "--max-new-tokens", 4, "--device", "cpu")
    for name, run in (("one", invoke), ("two", launch)):
        run("critique", "--input", source, "--output", tmp_path / f"{name}.jsonl", *model, "--principles", "match")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    one, two = ([match["id"] for _, match in read_jsonl(tmp_path / f"{n}.matches.jsonl")] for n in ("one", "two"))
    assert one == two and len(one) == 9
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("gives_logprobs", [True, False], ids=["log-probabilities", "written letters"])
def test_a_server_is_asked_for_matches_and_shown_all_examples(invoke, tmp_path, gives_logprobs):
    constitution = tmp_path / "rules.yaml"
    example = "{prompt: How so, response: So, critique: It lies}"
    constitution.write_text(f"principles: [Be kind, Tell the truth]\nexamples: [{example}]\n")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row(n)) + "\n" for n in range(2)))
    refuses = {} if gives_logprobs else {"logprobs": "logprobs are not supported"}
    with SmallServer(models.folder("llama"), refuses=refuses, context=2048) as server:
        line = (
            "--input",
            source,
            "--output",
            tmp_path / "out.jsonl",
            "--model",
            "openai:x",
            "--endpoint",
            server.address,
        )
        options = ("--constitution", constitution, "--principles", "match", "--max-new-tokens", 4, "--json")
        result = invoke("critique", *line, *options)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    matches = read_manifest(tmp_path / "out.matches.jsonl")["counts"]
    assert matches["prompts"] + matches["unanswered"] == 2 and summary["examples_shown"] == {"1": 2}
    assert "unmatched" in summary and f"--endpoint {server.address}" in summary["next"]
