"""report.py: what it counts, what it writes, and the page in a real browser."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import bench_report
import conftest
import pytest
import run_folders as runs

from cai.data.kinds import KINDS
from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl
from cai.evaluate.classes import oracle_reader
from cai.report import pages, run_folder, transcripts
from cai.report.escaping import markdown, visible
from cai.stats import intervals
from cai.world import language, oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with its report: 12 plain rows and those with hostile text."""
    from click.testing import CliRunner

    made = runs.make_run(tmp_path_factory.mktemp("report") / "my-run")
    result = CliRunner().invoke(conftest.load_command("report"), [str(made), "--json"])
    assert result.exit_code == 0, result.output
    (made / "summary.json.txt").write_text(result.stdout)
    return made


def data_of(page: str) -> dict:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


# --- what is collected --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rounds_and_principles_are_counted(folder):
    run = run_folder.collect(runs.make_run(folder.parent / "counted", rows=12, hostile=False))
    first, one, two = run_folder.rounds(run)
    assert (first["changed"], one["changed"]["value"], two["changed"]["value"]) == (None, 4 / 12, 0)
    assert one["flags"] == {"copy": 8} and two["flags"] == {"copy": 12}
    assert one["rates"] == {}, "no class was measured"
    table = {entry["id"]: entry for entry in run_folder.principles(run)}
    assert table["harm"]["drawn"] == 12 and table["harm"]["changed"]["value"] == 4 / 12
    assert table["harm"]["before"] is None, "not measured is not 0 %"
    assert table["care"]["drawn"] == 0 and table["care"]["compared"] == 12
    assert table["harm"]["text"].startswith("Point out")
    assert len(table) == 16, "principles that were never drawn are listed too"


def skipping_rows() -> list[dict]:
    """A row without a principle in its first round, one that is content, and one whose revision the gate refused."""
    revised = runs.one_round("care", "It harms.", "I won't, because it hurts people.")
    unmatched = {"principle": None, "critique": "", "skipped": "unmatched"}
    content = {"principle": "harm", "critique": "No fault.", "skipped": "content"}
    first = "Sure, here is deed 2 done in three steps."
    refused = {**runs.one_round("harm", "It harms.", first, ["gate"]), "refused": "Get lost.", "gate": {}}
    given = [[unmatched, revised], [content], [refused, revised]]
    return [runs.row(number, "harmful", rounds_) for number, rounds_ in enumerate(given)]


def test_rounds_that_were_skipped_or_refused_are_in_the_report(tmp_path, invoke):
    path = runs.make_run(tmp_path / "run", rows=4, hostile=False)
    write_jsonl(path / "05-revision-2.jsonl", skipping_rows())
    write_jsonl(path / "03-revision-1.jsonl", skipping_rows())
    result = invoke("report", path)
    assert result.exit_code == 0, result.stderr
    data = data_of((path / "report.html").read_text())
    items = {item["id"]: item for item in data["items"] if item["set"] == "training"}
    unmatched, content, refused = (items[row["id"]]["rounds"] for row in skipping_rows())
    assert (unmatched[0]["principle"], unmatched[0]["skipped"]) == (None, "unmatched")
    assert [entry["skipped"] for entry in content] == ["content"]
    assert data["texts"][refused[0]["refused"]] == "Get lost." and refused[0]["flags"] == ["gate"]
    run = run_folder.collect(path)
    assert [(entry["n"], entry["changed"] and entry["changed"]["value"]) for entry in run_folder.rounds(run)] == [
        (3, None),
        (3, 0),
        (2, 1),
    ]
    table = {entry["id"]: (entry["drawn"], entry["changed"]["value"]) for entry in run_folder.principles(run)[:2]}
    assert table == {"care": (2, 1.0), "harm": (2, 0.0)}


def test_where_all_principles_were_used_together_none_is_called_unused(tmp_path):
    path = runs.make_run(tmp_path / "run", rows=4, hostile=False)
    rows = [runs.row(n, "harmful", [runs.one_round("all", "It harms.", "I won't.")]) for n in range(4)]
    write_jsonl(path / "05-revision-2.jsonl", rows)
    run = run_folder.collect(path)
    first, *others = run_folder.principles(run)
    assert first["id"] == "all" and first["drawn"] == 4 and "1. " in first["text"]
    assert all(entry["compared"] for entry in others)


def test_classes_of_rounds_come_from_evaluations_of_the_rounds(folder):
    path = runs.make_run(folder.parent / "measured", rows=12, hostile=False)
    rows = runs.revised_rows(12)
    for number, found in ((0, "comply"), (1, "good"), (2, "good")):
        name = f"round-{number}.classes.jsonl"
        classes = [
            {
                "id": row["id"],
                "kind": row["kind"],
                "prompt": row["prompt"],
                "response": "",
                "class": found if row["kind"] == "harmful" else "helpful",
            }
            for row in rows
        ]
        write_jsonl(path / name, classes)
        runs.manifest(path, name, "evaluate", "--judge my-judge", {"round": number, "by": "judge"}, 20)
    run = run_folder.collect(path)
    assert run.classes_by == "the judge my-judge"
    assert [one["rates"]["harmful_compliance"]["value"] for one in run_folder.rounds(run)] == [1, 0, 0]
    harm = next(one for one in run_folder.principles(run) if one["id"] == "harm")
    assert (harm["before"]["value"], harm["after"]["value"], harm["before"]["n"]) == (1, 0, 4)


def test_rounds_that_were_skipped_and_all_principles_at_once(tmp_path, invoke):
    """A skipped round changed nothing, and one without a principle is none of a principle."""
    path = runs.make_run(tmp_path / "run", rows=4, hostile=False)
    skipped = {"principle": None, "critique": "", "skipped": "unmatched"}
    content = {"principle": "care", "critique": "No fault.", "skipped": "content"}
    rows = runs.revised_rows(4)
    for row, first, second in zip(rows, (skipped, None, None, None), (None, None, content, skipped), strict=True):
        row["rounds"] = [first or {**row["rounds"][0], "principle": "all"}, second or row["rounds"][1]]
    write_jsonl(path / "05-revision-2.jsonl", rows)
    run = run_folder.collect(path)
    drawn = {entry["id"]: entry["drawn"] for entry in run_folder.principles(run) if entry["drawn"]}
    assert drawn["all"] == 3 and drawn["care"] == 1 and None not in drawn
    before, first, second = run_folder.rounds(run)
    assert (before["n"], first["n"], second["n"]) == (4, 4, 4)
    assert invoke("report", path).exit_code == 0


def test_flags_skipped_rounds_and_refused_revisions_are_in_both_pages(tmp_path, invoke):
    """Rounds counted by hand: two copies, one bare refusal, a skipped round of each kind, and a refused revision."""
    path = runs.make_run(tmp_path / "run", rows=6, hostile=False)
    first = runs.row(0, "harmful", [])["response"]
    unmatched = {"principle": None, "critique": "", "skipped": "unmatched"}
    content = {"principle": "care", "critique": "No fault.", "skipped": "content"}
    refused = {**runs.one_round("harm", "It harms.", first, ["gate"]), "refused": "Get lost.", "gate": {}}
    bare = runs.one_round("harm", "It harms.", "I can't.", ["bare_refusal"])
    copied = runs.one_round("harm", "No fault.", first, ["copy"])
    rounds = [unmatched, content, refused, bare, copied, copied]
    rows = [runs.row(number, "harmful", [entry]) for number, entry in enumerate(rounds)]
    for name in ("03-revision-1.jsonl", "05-revision-2.jsonl"):
        write_jsonl(path / name, rows)
    _, first_round = run_folder.rounds(run_folder.collect(path))
    assert first_round["flags"] == {"copy": 2, "bare_refusal": 1}
    assert first_round["skipped"] == {"unmatched": 1, "content": 1} and first_round["refused"] == 1
    assert invoke("report", path).exit_code == 0
    cells = ["copy 2, bare refusal 1", "unmatched 1, content 1", "1"]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in (path / "report.html").read_text()
    assert " | ".join(cells) + " |\n" in (path / "report.md").read_text()


def test_a_safety_classifier_tells_of_compliance_alone(tmp_path, invoke):
    """`unsafe` counts as compliance, as `comply` does; what the classifier can't tell is not 0 %."""
    path = runs.make_run(tmp_path / "run", rows=12, hostile=False)
    for number in range(3):
        name = f"round-{number}.classes.jsonl"
        classes = [
            {"id": row["id"], "kind": row["kind"], "class": "safe" if number or i % 4 else "unsafe"}
            for i, row in enumerate(runs.revised_rows(12))
        ]
        write_jsonl(path / name, classes)
        runs.manifest(path, name, "evaluate", "--classifier my-guard", {"round": number, "by": "classifier"}, 20)
    run = run_folder.collect(path)
    assert run.classes_by == "the classifier my-guard"
    harm = next(entry for entry in run_folder.principles(run) if entry["id"] == "harm")
    assert (harm["before"]["value"], harm["after"]["value"], harm["before"]["n"]) == (0.25, 0, 4)
    rates = [entry["rates"] for entry in run_folder.rounds(run)]
    assert [list(each) for each in rates] == [["harmful_compliance"]] * 3
    assert [each["harmful_compliance"]["value"] for each in rates] == [0.25, 0, 0]
    assert invoke("report", path).exit_code == 0
    text = (path / "report.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| harm |")]
    assert "| 25.0 % (4.6–69.9) | 0.0 % (0.0–49.0) |" in line
    assert "| after | rows | changed | complied (in part counts) |" in text


def test_the_oracle_reads_rows_of_the_bundled_world_and_no_others(tmp_path):
    path = runs.make_run(tmp_path / "run", rows=3, hostile=False)
    [prompt] = language.prompt_rows("harmful", "train", 3, 1)
    row = {**prompt, "response": "It is a fine day.", "rounds": []}
    assert oracle_reader(row)("It is a fine day.") == oracle.classify(row, "It is a fine day.")
    write_jsonl(path / "05-revision-2.jsonl", [row, *runs.revised_rows(3)])
    run = run_folder.collect(path)
    assert set(run.classes) == {(row["id"], 0)}
    assert oracle_reader({**row, "category": "no such"}) is None


def test_stages_are_models_on_the_same_prompts_in_order(folder):
    run = run_folder.collect(folder)
    assert [(stage.key, stage.label) for stage in run.stages] == [
        ("base", "before"),
        ("sft", "after SFT"),
        ("ppo", "after RL (PPO)"),
    ]
    assert run.stages[1].rates["good_refusal"]["value"] == 0.7
    assert run.stages[0].responses["h-harmful-0"]["class"] == "comply"
    path = runs.make_run(folder.parent / "other", hostile=False)
    runs.evaluation(path, "fresh", "my-model", {"harmful": ["good"]}, 30)
    manifest = path / "evaluation-fresh.jsonl.run.json"
    manifest.write_text(manifest.read_text().replace('"input": "held-out"', '"input": "others"'))
    run = run_folder.collect(path)
    assert len(run.stages) == 3 and [name for name, _ in run.others] == ["fresh"]


def test_stress_stands_beside_the_plain_rates(tmp_path, invoke):
    path = runs.make_run(tmp_path / "run", hostile=False)
    for stage, complied in (("base", 9), ("ppo", 3)):
        file = path / f"evaluation-{stage}.jsonl"
        found = {
            "harmful_compliance_under_role_play": intervals.rate(complied, 10),
            "harmful_compliance_under_safety": intervals.rate(1, 10),
            "benign_helpful_under_safety": intervals.rate(6, 8),
        }
        write_jsonl(
            file,
            [
                *(row for _, row in read_jsonl(file)),
                *({"id": name, "metric": name, **one} for name, one in found.items()),
            ],
        )
    assert invoke("report", path).exit_code == 0
    page = (path / "report.html").read_text()
    title = r"harmful prompts under stress: role play \(n = 10\)"
    [group] = re.findall(rf"<tbody>\s*<tr><th class=\"kind\"[^>]*>{title}.*?</tbody>", page, re.DOTALL)
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", group)]
    assert [cell.split()[0] for cell in cells] == ["90.0", "–", "30.0"], "SFT was not put under stress"
    # Each kind with its own number of prompts.
    titles = re.findall(r">(\w+ prompts[^<]*\(n = [^<]*\))<", page)
    assert titles == [
        "harmful prompts (n = 20)",
        "benign prompts (n = 20)",
        "borderline prompts (n = 10)",
        "harmful prompts under stress: role play (n = 10)",
        "harmful prompts under stress: safety (n = 10)",
        "benign prompts under stress: safety (n = 8)",
    ]
    assert "harmful prompts under stress: role play" in (path / "report.md").read_text()


def test_frames_stand_below_with_the_worst_first_and_single_ones_left_out(tmp_path, invoke):
    path = runs.make_run(tmp_path / "run", hostile=False)
    file = path / "evaluation-ppo.jsonl"
    of_worst = {"frame": "rex", "frame_kind": "role_play", "frame_split": "seen"}
    figures = [
        {"metric": "harmful_compliance_under_frame_rex", **intervals.rate(4, 10), **of_worst},
        {"metric": "harmful_compliance_under_seen_role_play_frames", **intervals.rate(5, 30)},
        {"metric": "harmful_compliance_under_seen_frames", **intervals.rate(6, 40)},
        {"metric": "harmful_compliance_under_worst_seen_frame", **intervals.rate(4, 10), **of_worst},
    ]
    write_jsonl(file, [*(row for _, row in read_jsonl(file)), *({"id": row["metric"], **row} for row in figures)])
    assert invoke("report", path).exit_code == 0
    page = (path / "report.html").read_text()
    assert re.findall(r">(\w+ prompts in [^<]*\(n = [^<]*\))<", page) == [
        "harmful prompts in the worst seen frame (n = 10)",
        "harmful prompts in seen frames (n = 40)",
        "harmful prompts in seen role play frames (n = 30)",
    ]
    assert "frame rex" not in page and "In the worst frame that is seen in training it complied with" in page


def test_a_held_out_prompt_in_a_frame_is_shown_as_the_model_read_it(tmp_path):
    path = runs.make_run(tmp_path / "run", hostile=False)
    file = path / "evaluation-ppo.responses.jsonl"
    rows = [row for _, row in read_jsonl(file)]
    conversation = [{"role": "system", "content": "You play Rex."}, {"role": "user", "content": "How?"}]
    about = {"frame": "rex", "frame_kind": "role_play", "frame_split": "seen", "conversation": conversation}
    write_jsonl(file, [*rows, {**rows[0], "id": "x@frame:rex", "prompt_id": rows[0]["id"], **about}])
    items = {item["id"]: item for item in transcripts.transcripts(run_folder.collect(path))}
    assert items["x@frame:rex"]["prompt"] == conversation
    assert "frame: role play" in items["x@frame:rex"]["outcomes"]
    assert all(not outcome.startswith("frame") for outcome in items[str(rows[0]["id"])]["outcomes"])


def test_audits_and_reliability(tmp_path):
    path = runs.make_run(tmp_path / "run", hostile=False)
    rate = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 12}
    (path / "audit.json").write_text(json.dumps({"same_position": rate, "principles": {"harm": {"win_rate": rate}}}))
    (path / "other.json").write_text("{}")
    rows = [
        {**runs.preference(row, "yes", "no", 0.8, 0.8, "harm"), "gold": gold}
        for row, gold in zip(runs.revised_rows(4), "aaab", strict=True)
    ]
    write_jsonl(path / "07-preferences.jsonl", rows)
    run = run_folder.collect(path)
    assert run.audits == [("audit", [("same_position", rate), ("principles harm win_rate", rate)])]
    assert pages.judge_table(*run.audits[0]) == (
        "audit",
        [("same position in both orders", rate)],
        [("harm win rate", rate)],
    ), "a fold of its own on the page"
    assert run_folder.flatten({"alarms": [], "raised": ["kl", "eos"], "bins": [{}]}) == [
        ("alarms", "none"),
        ("raised", "kl, eos"),
        ("bins", "1 entries"),
    ]
    [full] = [one for one in run_folder.reliability(run)["bins"] if one["outcome"]["n"]]
    assert full["probability"] == pytest.approx(0.8) and full["outcome"]["value"] == 0.75
    assert not run_folder.same_position(rows[0])
    assert run_folder.same_position(runs.preference(rows[0], "yes", "no", 0.9, 0.2, "harm"))


# --- transcripts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a b c", "a x c"),
        ("a b", "a b c d"),
        ("", "new"),
        ("one two", ""),
        ("ä 😀 b", "ä 😀😀 b"),
        ("  x\n y ", "x\ny"),
    ],
)
def test_changes_lead_from_one_text_to_the_other(before, after):
    old, new, i, j = before, after, 0, 0
    made = ""
    for kept, deleted, inserted in transcripts.changes(before, after):
        assert old[i : i + kept] == new[j : j + kept]
        made += old[i : i + kept] + new[j + kept : j + kept + inserted]
        i, j = i + kept + deleted, j + kept + inserted
    assert made + old[i:] == after and old[i:] == new[j:]


def test_changes_are_words_and_long_texts_are_not_compared():
    assert transcripts.changes("do the harm now", "do the good now") == [[7, 5, 5]]
    assert transcripts.changes("same", "same") == []
    assert transcripts.changes("a " * 5000, "b " * 5000) is None


@pytest.mark.slow
def test_a_run_too_large_is_drawn_from_evenly_within_the_limit(tmp_path, invoke):
    path = runs.make_run(tmp_path / "large", rows=10_000, hostile=False)
    result = invoke("report", path, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    page = (path / "report.html").read_text()
    assert summary["bytes"] == len(page.encode()) < 5_000_000
    assert summary["of"] == 10_000 + 50 and 3_000 < summary["transcripts"] < summary["of"]
    data = data_of(page)
    assert len(data["items"]) == summary["transcripts"]
    assert f"{summary['transcripts']:,} of 10,050 transcripts are in this page" in " ".join(page.split())
    shares = [sum(item["kind"] == kind and item["set"] == "training" for item in data["items"]) for kind in KINDS]
    assert max(shares) - min(shares) < 0.3 * max(shares), "every kind has its share"


@pytest.mark.slow
def test_the_benchmark_of_the_report_runs():
    from click.testing import CliRunner

    done = CliRunner().invoke(bench_report.main, ["--rows", "20"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["rows"] == 20 and said["transcripts"] == said["of"] == 20 + 750


def test_what_is_embedded_fits_and_says_what_was_cut():
    items = [
        {
            "id": str(i),
            "set": "training",
            "kind": "harmful",
            "category": None,
            "rounds": [],
            "pairs": [],
            "outcomes": [],
            "prompt": [{"role": "user", "content": f"{i} <&'> " * 50}],
            "responses": [("response", "x" * 70_000 if i == 0 else f"{i} é😀" * 20, None)],
        }
        for i in range(50)
    ]
    everything = transcripts.embed(items, 10**7)
    assert everything["shown"] == 50 and any("[cut here: 10,000 more" in text for text in everything["texts"])
    few = transcripts.embed(items, 20_000)
    assert 0 < few["shown"] < 50 == few["total"]
    assert few == transcripts.embed(items, 20_000), "the same ones each time"
    escaped = json.dumps(few, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(escaped) + 5 * sum(escaped.count(mark) for mark in b"<>&'") < 20_000 + 100
    used = {one[1] for item in few["items"] for one in [*item["prompt"], *item["responses"]]}
    assert used == set(range(len(few["texts"]))), "no text of a row that is left out"


# --- the command --------------------------------------------------------------------------------------------


def test_files_and_summary(folder):
    summary = json.loads((folder / "summary.json.txt").read_text())
    assert summary["stages"] == 3 and summary["rows"] == 12 + len(runs.HOSTILE)
    assert summary["transcripts"] == summary["of"] == summary["rows"] + 50
    names = ["stages", "plane", "rounds", "judge", "training-sft", "training-reward-model", "training-ppo"]
    assert summary["figures"] == len(names)
    for name in names:
        root = ElementTree.parse(folder / "figures" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "complied with 100.0\u00a0% before, 30.0\u00a0% after SFT, 10.0\u00a0% after RL (PPO)" in page
    assert "no clear change" in page, "of the benign prompts"
    assert "update 7" in page or "step 7" in page, "the alarm"
    assert not list(folder.rglob("*.tmp"))


def test_the_report_for_a_pull_request(folder):
    text = (folder / "report.md").read_text()
    assert "| harmful prompts (n = 20): complied (in part counts) | 100.0 % (83.9–100.0) | 30.0 %" in text
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (folder / picture).is_file()
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(javascript", text) and "\u202e" not in text
    assert "\\<script\\>window.pwned = 1" in text


@pytest.mark.slow
def test_again_replaces_its_own_and_never_another_file(tmp_path, invoke):
    path = runs.make_run(tmp_path / "run", hostile=False)
    assert invoke("report", path).exit_code == 0
    assert invoke("report", path).exit_code == 0
    (path / "report.md").write_text("my own notes")
    refused = invoke("report", path)
    assert refused.exit_code == 2 and "report.md: it exists" in refused.stderr
    assert (path / "report.md").read_text() == "my own notes"
    assert invoke("report", path, "--overwrite").exit_code == 0
    assert "my own notes" not in (path / "report.md").read_text()


@pytest.mark.slow
def test_elsewhere_and_dry(tmp_path, invoke):
    path = runs.make_run(tmp_path / "run", hostile=False)
    before = sorted(path.rglob("*"))
    result = invoke("report", path, "--output", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    files = json.loads(result.stdout)["files"]
    assert invoke("report", path, "--output", tmp_path / "out").exit_code == 0
    assert sorted(path.rglob("*")) == before
    assert all(Path(name).is_file() for name in files)


@pytest.mark.parametrize(("make", "said"), [(False, "no such folder"), (True, "no manifest")])
def test_what_is_no_run_is_refused(tmp_path, invoke, make, said):
    if make:
        (tmp_path / "run").mkdir()
    result = invoke("report", tmp_path / "run")
    assert result.exit_code == 2 and said in result.stderr


def test_what_is_missing_or_unfinished_is_said(tmp_path, invoke):
    path = runs.make_run(tmp_path / "run", hostile=False, stages=False)
    for name in ("07-preferences.jsonl",):
        manifest = path / f"{name}.run.json"
        manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    (path / "ppo" / "metrics.jsonl").unlink()
    assert invoke("report", path).exit_code == 0
    page = (path / "report.html").read_text()
    for said in (
        "07-preferences.jsonl is not finished",
        "No preferences",
        "No evaluation of a model",
        "ppo has no metrics.jsonl",
    ):
        assert said in page


def test_a_damaged_row_is_named(tmp_path, invoke):
    path = runs.make_run(tmp_path / "run", hostile=False)
    (path / "07-preferences.jsonl").write_text('{"id": "a", "p_chosen": 1}\n{broken\n')
    result = invoke("report", path)
    assert result.exit_code == 2 and "07-preferences.jsonl:2: not JSON" in result.stderr
    assert not (path / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("07-preferences.jsonl", "p_chosen", {}),
        ("05-revision-2.jsonl", "response", 5),
        ("05-revision-2.jsonl", "rounds", [[{}]]),
        ("05-revision-2.jsonl", "prompt", 5),
    ],
)
def test_a_value_of_another_kind_is_an_error_and_no_traceback(tmp_path, invoke, file, name, value):
    path = runs.make_run(tmp_path / "run", rows=4, hostile=False)
    row, *rest = (path / file).read_text().splitlines()
    (path / file).write_text("\n".join([json.dumps({**json.loads(row), name: value}), *rest]) + "\n")
    result = invoke("report", path)
    assert result.exit_code == 2 and str(path) in result.stderr
    assert not (path / "report.html").exists()


# --- hostile text, without a browser ------------------------------------------------------------------------


def test_no_text_can_close_the_block_of_data(folder):
    page = (folder / "report.html").read_text()
    assert page.count("<script") == 2 and page.count("</script") == 2
    texts = set(data_of(page)["texts"])
    assert set(runs.HOSTILE) <= texts, "character for character"
    assert "<img" not in page and "onerror=" not in page.replace("onerror=&#39;", "").replace("onerror=\\u0027", "")


def test_hidden_characters_are_made_visible():
    assert visible("a\u202eb\x00c\td\n\u200be") == "aU+202EbU+0000c\td\nU+200Be"
    assert visible("שלום\u200f 😀\u200d") == "שלום\u200f 😀\u200d"
    assert markdown("a|b\n<script> `x` *y*") == "a\\|b \\<script\\> \\`x\\` \\*y\\*"


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium; skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def opened(browser, folder):
    """`opened(fragment, **context)` opens the report; what goes wrong in it, or leaves it, fails the test."""
    contexts, wrong = [], []

    def call(fragment="", path=folder / "report.html", **settings):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **settings})
        contexts.append(context)
        context.set_default_timeout(120_000)  # a slow machine is no failure
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(path.as_uri()) else None)
        page.goto(path.as_uri() + fragment)
        return page

    yield call
    for context in contexts:
        context.close()
    assert not wrong


def count(page) -> str:
    return page.locator("#count").inner_text()


def wait(page, selector: str, begins: str) -> None:
    """Until the element's text begins so. (An expression to poll would need eval, which the page's policy forbids.)"""
    page.locator(selector).filter(has_text=re.compile("^" + re.escape(begins))).wait_for()


def total(page) -> int:
    return page.evaluate("JSON.parse(document.getElementById('data').textContent).items.length")


def test_filters_and_clear(opened):
    page = opened()
    every = total(page)
    assert count(page) == f"{every} of {every} transcripts"
    page.select_option("#f-kind", "harmful")
    assert count(page) == f"24 of {every} transcripts", "4 rows and 20 held-out prompts"
    page.select_option("#f-set", "training")
    assert count(page) == f"4 of {every} transcripts"
    page.select_option("#f-principle", "hurt")
    page.select_option("#f-outcome", "revised")
    page.select_option("#f-category", "errands")
    assert count(page) == f"2 of {every} transcripts"
    assert page.locator("#list a").count() == 2
    page.select_option("#f-outcome", "left as it was")
    assert count(page) == f"0 of {every} transcripts"
    page.click("#controls button")
    wait(page, "#count", f"{every} of")


def test_search_reads_every_text_of_a_row(opened):
    page = opened()
    for words, n in (
        ("LOOKED deed at", 12),
        ("rather not deed 11", 1),
        ("ppo answers harmful 19", 1),
        ("p0003", 1),
        ("nothing says this", 0),
    ):
        page.fill("#q", words)
        wait(page, "#count", f"{n} of")


def test_a_deep_link_opens_its_row_and_a_missing_one_is_said(opened):
    page = opened("#t=training%3Ap0003%2F0")
    assert page.locator("#detail h3").inner_text() == "p0003/0"
    assert page.evaluate("document.activeElement.id") == "detail"
    assert page.locator("#detail").is_visible() and page.locator("[aria-current]").count() == 1
    page.evaluate("location.hash = 't=held-out%3Ah-harmful-19'")
    wait(page, "#detail h3", "h-harmful-19")
    assert "ppo answers harmful 19." in page.locator("#detail").inner_text()
    page.evaluate("location.hash = 't=training%3Agone'")
    wait(page, "#count", "The transcript training:gone is not in this page")
    page.evaluate("location.hash = 't=%E0%A4%A'")
    wait(page, "#count", "The transcript %E0%A4%A is not")


def test_a_round_shows_principle_critique_and_the_words_changed(opened):
    page = opened("#t=training%3Ap0003%2F0")
    text = page.locator("#detail").inner_text()
    assert "Principle harm – Point out everything" in text and "Deed 3 looked at." in text
    assert "Sure" in "".join(page.locator("#detail del").all_inner_texts())
    assert "will not do" in "".join(page.locator("#detail ins").all_inner_texts())
    assert "the text was left as it was" in text
    assert "Principle care – Which response" in text
    assert "Prefers A with probability 0.800" in text and text.count("preferred") == 1
    page.evaluate("location.hash = 't=training%3Ap0002%2F0'")
    wait(page, "#detail h3", "p0002/0")
    assert "same place in both orders" in page.locator("#detail").inner_text()


def test_a_principle_in_the_table_filters_the_transcripts(opened):
    page = opened()
    page.click("#principles a >> text=hurt")
    assert page.input_value("#f-principle") == "hurt"
    assert count(page).startswith("12 of")


def test_by_keyboard(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"
    page.focus("#f-outcome")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Clear"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    link = page.evaluate("document.activeElement.hash")
    assert link == "#t=training%3Ap0001%2F0"
    page.keyboard.press("Enter")
    wait(page, "#detail h3", "p0001/0")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait(page, "#detail h3", "p0002/0")


def test_the_list_is_shown_in_pages(opened):
    page = opened()
    every = total(page)
    assert page.locator("#list a").count() == 50
    page.click("#more")
    assert page.locator("#list a").count() == every and not page.locator("#more").is_visible()
    assert page.evaluate("[...document.querySelectorAll('#list a')].indexOf(document.activeElement)") == 50


def test_dark_mode_changes_paper_and_ink_of_page_and_figures(opened):
    seen = {}
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        seen[scheme] = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " getComputedStyle(document.querySelector('#stages svg text')).fill]"
        )
        paper, ink, figure_ink = seen[scheme]
        assert figure_ink == ink != paper
    assert not set(seen["light"]) & set(seen["dark"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_accessible_and_no_wider_than_the_screen(opened, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = opened("#t=training%3Ap0003%2F0", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (one["id"], [node["html"] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_printed_without_controls_and_with_every_detail(opened):
    page = opened("#t=training%3Ap0003%2F0")
    page.emulate_media(media="print")
    assert not page.locator("#controls").is_visible() and not page.locator("#list").is_visible()
    assert page.locator("#detail").is_visible() and page.locator("#stages table").is_visible()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_hostile_text_is_shown_and_does_nothing(opened):
    page = opened()
    for number, text in enumerate(runs.HOSTILE, 12):
        page.evaluate("key => { location.hash = 't=' + encodeURIComponent(key) }", f"training:{text}/{number}")
        page.wait_for_function(
            "title => document.querySelector('#detail h3').textContent === title", arg=visible(f"{text}/{number}")
        )
        blocks = page.locator("#detail .text").all_text_contents()
        assert all(visible(text) in block for block in blocks), text
        assert len(blocks) == 6  # prompt, response, critique, revision, two sides
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, iframe, textarea, object, embed").count() == 0
    assert page.locator("body script").count() == 2
    assert "\u202e" not in page.locator("body").inner_text()
    assert page.locator("#principles th bdi, #principles th a").count() >= len(runs.HOSTILE)


def test_fifty_kilobytes_on_one_line(tmp_path, invoke, opened):
    path = runs.make_run(tmp_path / "long", rows=3, hostile=False)
    rows = runs.revised_rows(3)
    rows[0] |= {"response": "x" * 50_000, "prompt": "y" * 50_000}
    rows[0]["rounds"][0] |= {"critique": "z" * 50_000, "revision": "w" * 50_000}
    write_jsonl(path / "05-revision-2.jsonl", rows)
    assert invoke("report", path).exit_code == 0
    page = opened("#t=training%3Ap0000%2F0", path=path / "report.html", viewport={"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#detail .text").nth(1).text_content() == "x" * 50_000
    boxes = page.locator("#detail .text.long")
    assert boxes.count() >= 4 and all(box.bounding_box()["height"] < 500 for box in boxes.all())
    assert boxes.first.get_attribute("tabindex") == "0"
