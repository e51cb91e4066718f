"""Sentences of prose: which are rules for the assistant, of which kind, and why the others are none.

Six documents in tests/constitution/documents have their principles listed by hand. The reader was improved on all of
them; the figures on first sight of those that were held out are in references/constitution-design.md.
"""

import json
import re

import pytest
import yaml
from conftest import ROOT

from cai.base.errors import InputError
from cai.constitution import files, importing, rendering
from cai.constitution.lint import lint
from cai.constitution.markdown import read_markdown
from cai.constitution.prose import name_subject, read_sentence, split_sentences
from cai.constitution.quotes import check_quotes, locate, quote_lines
from cai.constitution.subjects import find_names

HELD_OUT = ["blind", "second-blind", "third-blind", "fourth-blind"]
DOCUMENTS = ROOT / "tests" / "constitution" / "documents"

KINDS = {
    "demand": [
        "The assistant must name its sources.",
        "If a user asks for a diagnosis, the assistant should say what it cannot know.",
        "Unless the operator says otherwise, it should answer in the language of the question.",
        "When in doubt, ask first.",
        "Always say which version of the law you mean.",
        "The assistant should not only answer but also explain.",
        "Never hesitate to correct yourself.",
        "The assistant should never forget to thank nobody in particular.",
        "We want the model to be candid.",
        "We expect the assistant to follow its instructions.",
        "It is important that the assistant keeps calm.",
        "It is essential to name the risk.",
        "Sources should be named.",
        "Users should be told what is stored.",
        "The assistant is expected to keep its patience.",
        "The assistant has to weigh the claim.",
        "However, in such cases, the assistant ought to wait.",
        "Answers that name a dose must also name the maximum.",
        "This means that the assistant should ask first.",
        "Programs that the assistant writes should be complete.",
        "We believe that the assistant should explain itself.",
    ],
    "prohibition": [
        "The assistant must not lie.",
        "The assistant mustn't lie.",
        "The assistant may not share what another user wrote.",
        "It should never pretend to be a person.",
        "Do not lecture.",
        "Avoid jargon.",
        "Nor should it guess.",
        "Under no circumstances may the assistant help with this.",
        "No answer may contain a slur.",
        "Guesses must not be presented as facts.",
        "Jokes about illness are never acceptable.",
        "It is never acceptable to invent a source.",
        "It is wrong to hide a risk.",
        "We do not want the model to flatter.",
        "We never want the model to flatter.",
        "The assistant is not allowed to claim a degree.",
        "The assistant should avoid long introductions.",
        "Users should never be lied to.",
        "Lecturing the user must be avoided.",
        "The assistant should not simply believe every claim.",
        "Operators may narrow the topics, but the assistant must not deceive users for them.",
        "The assistant need not explain, but it must not lie.",
        "The assistant must not reveal its instructions, but it may say that it has some.",
    ],
    "permission": [
        "The assistant may decline.",
        "It is fine to leave out the details.",
        "It is acceptable for the assistant to end the conversation.",
        "The assistant need not agree.",
        "The assistant does not have to give all its reasons.",
        "The assistant is free to play a character.",
        "The assistant is not required to repeat a warning.",
        "It can ask a short question when the readings differ.",
        "Public acts may be discussed.",
        "Emoji are allowed if the user uses them.",
        "The assistant should feel free to say no.",
        "We do not expect the assistant to know everything about law.",
    ],
    "preference": [
        "Prefer plain words to technical ones.",
        "Short answers are preferable to long ones.",
        "Where both work, the assistant should prefer the cheaper way.",
        "We would prefer the assistant to ask.",
        "It is better to say too little than to invent something.",
        "We hope that the assistant will choose the careful way.",
    ],
}

NO_RULES = {
    "about somebody else": [
        "Users must be at least thirteen years old.",
        "Operators may choose the topics.",
        "Schools must not use the tool to watch their pupils.",
        "We should explain our reasons.",
        "A user who must pay should see the price first.",
        "Users are expected to be polite.",
        "Doctors must not share records.",
    ],
    "about the document": [
        "This document should be updated every year.",
        "The examples must not be copied.",
        "Each release must be tested.",
    ],
    "a clarification": [
        "Honesty should not be confused with bluntness.",
        "This page must not be read as a contract.",
        "Caution should never be mistaken for kindness.",
    ],
    "what others say": [
        "Critics say that a model should stay silent.",
        "Some people ask why the model should obey anybody.",
        "Some people argue that an assistant must decide for itself.",
    ],
    "a question": ["Should the assistant always obey?", "What must it never do?"],
    "an example": ["For example, the assistant should name the shelf."],
    "a quotation": ["“The assistant must always say yes.”"],
    "a supposition": ["If it had to keep every secret, the assistant would be of no use.", "The assistant could fail."],
    "perhaps a rule": [
        "The rules that the model must follow are public.",
        "A default is what the assistant must do without instructions.",
        "This does not mean that the assistant must obey everybody.",
    ],
    "a description": [
        "The law requires companies to keep records.",
        "The assistant may be wrong.",
        "The assistant may have said something else before.",
        "The assistant may not know the answer.",
        "The assistant cannot see the screen of the user.",
        "The assistant can search the web.",
        "The assistant does not remember earlier conversations.",
        "The assistant is a program that answers questions.",
        "The word “must” marks a rule without exceptions.",
        "Trust is slow to build.",
        "Most questions about poisons are harmless.",
        "A lie can destroy trust.",
        "In this example the assistant follows the user.",
    ],
}


@pytest.mark.parametrize(("kind", "sentence"), [(kind, text) for kind, texts in KINDS.items() for text in texts])
def test_a_rule_has_its_kind(kind, sentence):
    assert read_sentence(sentence).kind == kind


@pytest.mark.parametrize(
    ("reason", "sentence"), [(reason, text) for reason, texts in NO_RULES.items() for text in texts]
)
def test_what_is_no_rule_has_its_reason(reason, sentence):
    reading = read_sentence(sentence)
    assert (reading.kind, reading.reason) == ("", reason)


@pytest.mark.parametrize(
    ("before", "sentence", "kind"),
    [
        ("The assistant may be asked for its instructions.", "It must not deny that there are some.", "prohibition"),
        ("Operators may choose the topics.", "They must accept the policy.", ""),
        ("Answers should be short.", "They should never begin with praise.", "prohibition"),
        ("This document is new.", "It must be reviewed every year.", ""),
        ("Humour is permitted.", "Sarcasm is not.", "prohibition"),
        ("A user may be rude.", "It should stay polite.", "demand"),
    ],
)
def test_a_pronoun_refers_to_the_sentence_before(before, sentence, kind):
    assert read_sentence(sentence, previous=read_sentence(before)).kind == kind


def test_it_is_replaced_by_the_noun_that_it_stands_for():
    first = read_sentence("Wren should ask.", frozenset(["wren"]))
    second = read_sentence("It must not guess.", frozenset(["wren"]), first)
    assert name_subject("It must not guess.", second, frozenset(["wren"])) == "Wren must not guess."
    assert name_subject("It is raining.", read_sentence("It is raining.")) == "It is raining."


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("We trust Wren. In doubt Wren should ask. Wren must not lie. Wren may joke. Users must pay.", {"wren"}),
        ("You should ask. You must not lie. You may joke. The law of France is old.", {"you"}),
        ("The assistant should ask. The assistant must not lie. The assistant may joke. You can read on.", set()),
        ("The librarian should ask. The librarian must not lie. The librarian may joke.", {"librarian"}),
    ],
)
def test_the_name_of_the_model_is_found(text, names):
    assert find_names(text) == names


def test_sentences_end_after_a_quotation_but_not_after_an_abbreviation():
    text = "It said “Stop!” Then it went on, e.g. Slowly. (It was late.) We left."
    assert split_sentences(text) == ["It said “Stop!”", "Then it went on, e.g. Slowly.", "(It was late.)", "We left."]


# --- documents ------------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def compare(name: str) -> tuple[list, list[dict], list]:
    """(pairs of a listed principle and the one that was read, listed ones that are missing, read ones not listed)."""
    listed = yaml.safe_load((DOCUMENTS / f"{name}.yaml").read_text(encoding="utf-8"))
    document = read_markdown((DOCUMENTS / f"{name}.md").read_text(encoding="utf-8"), f"{name}.md")
    assert document.is_prose
    rest, pairs, missing = [*document.statements, *document.unclear], [], []
    for principle in listed:
        match = next((item for item in rest if words_of(item.quote) == words_of(principle["text"])), None)
        if match:
            rest.remove(match)
            pairs.append((principle, match))
        else:
            missing.append(principle)
    return pairs, missing, rest


def polarity_of(kind: str) -> str:
    return "demand" if kind == "preference" else kind


@pytest.mark.parametrize("name", ["model-spec", "long-constitution", *HELD_OUT])
def test_the_principles_of_prose_are_those_that_a_person_lists(name):
    pairs, missing, extra = compare(name)
    least = 0.94 if name in HELD_OUT else 0.95
    assert len(pairs) >= least * (len(pairs) + len(missing)), missing
    assert len(pairs) >= least * (len(pairs) + len(extra)), extra
    assert [item for item, statement in pairs if polarity_of(item["kind"]) != statement.polarity] == []
    assert [item for item, statement in pairs if tuple(item["lines"]) != statement.lines] == []


@pytest.fixture(scope="module", params=["model-spec", "long-constitution"])
def imported(request, tmp_path_factory):
    """(the constitution of a document, written and read again, its folder, the report, the list by hand)."""
    name, folder = request.param, tmp_path_factory.mktemp("prose")
    source = (DOCUMENTS / f"{name}.md").read_text(encoding="utf-8")
    (folder / "document.md").write_text(source, encoding="utf-8")
    report: dict = {}
    constitution = importing.read_foreign([str(folder / "document.md")], name, report)
    rendering.save_constitution(folder / "rules.yaml", constitution, overwrite=False)
    listed = yaml.safe_load((DOCUMENTS / f"{name}.yaml").read_text(encoding="utf-8"))
    return files.load_constitution(str(folder / "rules.yaml")), folder, report, listed


def test_every_quote_is_found_in_its_document(imported):
    constitution, folder, _, listed = imported
    assert {principle.source.file for principle in constitution.principles} == {"document.md"}
    assert list(check_quotes(constitution, folder)) == []
    lines = (folder / "document.md").read_text(encoding="utf-8").splitlines()
    for principle, item in zip(constitution.principles, listed, strict=True):
        first, last = principle.source.lines
        assert [first, last] == item["lines"]
        assert set(words_of(principle.source.quote)) <= set(words_of(" ".join(lines[first - 1 : last])))


def test_each_sentence_is_a_principle_or_left_out_with_a_reason(imported):
    constitution, folder, report, _ = imported
    [document] = report["outline"]
    sentences = [sentence for section in document["sections"] for sentence in section["sentences"]]
    assert document["read_as"] == "prose"
    assert all(bool(sentence["kind"]) != bool(sentence.get("reason")) for sentence in sentences)
    assert [s["principle"] for s in sentences if s["kind"]] == [p.id for p in constitution.principles]
    text = " ".join(f"{sentence['text']} {sentence.get('introduction')}" for sentence in sentences)
    headings = " ".join(" ".join(section["headings"]) for section in document["sections"])
    source = (folder / "document.md").read_text(encoding="utf-8").lower()
    words = set(words_of(re.sub(r"\{#.*\}|^\d\.", "", source, flags=re.MULTILINE)))
    assert words - set(words_of(f"{text} {headings}")) == set()
    json.dumps(report)


def test_requests_turn_no_permission_and_no_prohibition_into_a_demand(imported):
    constitution, _, _, listed = imported
    for principle, item in zip(constitution.principles, listed, strict=True):
        assert ("neither forbids nor demands" in principle.revision) == (item["kind"] == "permission")
        assert ("permission" in principle.tags) == (item["kind"] == "permission")
        is_fault = "nothing that this principle forbids" in principle.revision
        assert item["kind"] == "prohibition" or not is_fault
    assert not {finding.rule for finding in lint(constitution)} & {"quote", "negated", "unclear"}


def test_lists_and_prose_can_be_chosen():
    text = (DOCUMENTS / "model-spec.md").read_text(encoding="utf-8")
    lists = read_markdown(text, "x.md", is_prose=False)
    assert not lists.is_prose and len(lists.statements) < 60
    rules = "# Rules\n\n- Be kind\n\nThe assistant should ask. It must not guess.\n"
    assert [item.text for item in read_markdown(rules, "x.md").statements] == [
        "Be kind",
        "The assistant should ask. It must not guess.",
    ]
    prose = read_markdown(rules, "x.md", is_prose=True).statements
    assert [(item.text, item.polarity) for item in prose] == [
        ("Be kind", "demand"),
        ("The assistant should ask.", "demand"),
        ("The assistant must not guess.", "prohibition"),
    ]
    assert prose[2].quote == "It must not guess." and prose[2].introduction == "The assistant should ask."


@pytest.mark.parametrize("is_prose", [True, False])
def test_a_document_without_a_rule_is_refused(tmp_path, is_prose):
    file = tmp_path / "story.md"
    file.write_text("# A story\n\n" + "The fox was quick. It was late. Users must pay.\n\n" * 8, encoding="utf-8")
    with pytest.raises(InputError, match="no sentence that orders or forbids"):
        importing.read_foreign([str(file)], "x", is_prose=is_prose)


# --- quotes ---------------------------------------------------------------------------------------------------------

SOURCE = [
    "# Rules {#rules}",
    "- **Ask** the [user](https://example.org/a_b) first, and",
    "  wait for <b>an</b> answer &amp; more.",
    "2) Never guess.",
]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("Ask the user first", (2, 2)),
        ("Ask the user first, and wait for an answer & more.", (2, 3)),
        ("Never guess.", (4, 4)),
        ("Never ask", None),
        ("", None),
    ],
)
def test_words_are_located_without_marks(text, lines):
    assert locate(text, SOURCE, 1, 4) == lines
    assert locate(quote_lines(SOURCE, 2, 3), SOURCE, 2, 3) == (2, 3)


@pytest.mark.parametrize(
    ("lines", "quote", "problem"),
    [
        ((4, 4), "Never guess", None),
        ((1, 4), "Never guess", None),
        ((2, 3), "Never guess", "it is in lines 4 to 4"),
        ((4, 4), "Always guess", "nor anywhere in the document"),
        ((9, 9), "Never guess", "has 5 lines"),
    ],
)
def test_a_lost_quote_is_a_finding(tmp_path, lines, quote, problem):
    (tmp_path / "rules.md").write_text("\n".join(SOURCE) + "\n", encoding="utf-8")
    source = {"file": "rules.md", "lines": list(lines), "quote": quote}
    constitution_file = tmp_path / "c.yaml"
    constitution_file.write_text(yaml.safe_dump([{"principle": "Never guess", "source": source}]), encoding="utf-8")
    findings = [item for item in lint(files.load_constitution(str(constitution_file))) if item.rule == "quote"]
    assert len(findings) == (problem is not None)
    assert problem is None or problem in findings[0].message


def test_a_missing_document_is_a_finding(tmp_path):
    constitution_file = tmp_path / "c.yaml"
    constitution_file.write_text("- {principle: Be kind, source: {file: gone.md, lines: [1, 1], quote: Be kind}}\n")
    [finding] = lint(files.load_constitution(str(constitution_file)))
    assert (finding.rule, finding.message) == ("quote", "no such document: gone.md")
