"""The shapes in which rows are published: prompts and responses are those that went in, or exit 2 names the line.

pytest tests/data/test_shapes.py                               # a fast share of the drawn rows
SHAPES_EXAMPLES=10000 pytest tests/data/test_shapes.py         # the long run
"""

import csv
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.base.errors import InputError
from cai.data import preferences
from cai.data.dialogue import as_messages, split_transcript
from cai.data.outputs import write_jsonl
from cai.data.reading import Reading
from cai.data.shapes import parse_messages
from cai.data.sources import Source

PAIR = ("prompt", "chosen", "rejected")
ANSWERED = ("prompt", "response")


def say(*contents, system=None, sharegpt=False):
    """Turns of user and assistant, the user first."""
    names = ("from", "value", "human", "gpt") if sharegpt else ("role", "content", "user", "assistant")
    turns = [{names[0]: names[2 + number % 2], names[1]: content} for number, content in enumerate(contents)]
    return [*([{names[0]: "system", names[1]: system}] if system else []), *turns]


def answer(content):
    return [{"role": "assistant", "content": content}]


def transcript(*contents):
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {content}" for n, content in enumerate(contents))


@pytest.fixture
def read(tmp_path):
    def from_rows(*rows, require=PAIR, **options):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        return list(Source([tmp_path / "rows.jsonl"], require=require, **options))

    return from_rows


# --- pairs --------------------------------------------------------------------------------------------------

TURNS = ("How do I fold a kite?", "With care.", "And in the wind?")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS[0], "chosen": say(*TURNS, "Hold it."), "rejected": say(*TURNS, "Don't.")},
        {"prompt": TURNS[2], "chosen": say(*TURNS, "Hold it."), "rejected": say(*TURNS, "Don't.")},
        {"prompt": say(*TURNS), "chosen": say(*TURNS, "Hold it."), "rejected": say(*TURNS, "Don't.")},
        {"prompt": say(*TURNS), "chosen": answer("Hold it."), "rejected": answer("Don't.")},
        {"prompt": say(*TURNS), "chosen": "Hold it.", "rejected": "Don't."},
        {"chosen": say(*TURNS, "Hold it."), "rejected": say(*TURNS, "Don't.")},
        {"chosen": transcript(*TURNS, "Hold it."), "rejected": transcript(*TURNS, "Don't.")},
        {
            "prompt": transcript(*TURNS) + "\n\nAssistant:",
            "chosen": transcript(*TURNS, "Hold it."),
            "rejected": transcript(*TURNS, "Don't."),
        },
        {"prompt": transcript(*TURNS) + "\n\nAssistant:", "chosen": " Hold it.", "rejected": "Don't."},
        {"messages": say(*TURNS), "chosen": answer("Hold it."), "rejected": answer("Don't.")},
        {
            "conversations": say(*TURNS, sharegpt=True),
            "chosen": {"from": "gpt", "value": "Hold it."},
            "rejected": {"from": "gpt", "value": "Don't."},
        },
        {
            "prompt": TURNS[0],
            "messages": say(*TURNS, "Hold it."),
            "chosen": say(*TURNS, "Hold it."),
            "rejected": say(*TURNS, "Don't."),
        },
        {"chosen": json.dumps(say(*TURNS, "Hold it.")), "rejected": repr(say(*TURNS, "Don't."))},
        {
            "chosen": [
                {"role": t["role"], "content": [{"type": "text", "text": t["content"]}]}
                for t in say(*TURNS, "Hold it.")
            ],
            "rejected": say(*TURNS, "Don't."),
        },
        {"chosen": [{**t, "tool_calls": None} for t in say(*TURNS, "Hold it.")], "rejected": say(*TURNS, "Don't.")},
    ],
)
def test_a_pair_in_every_published_shape(read, row):
    """UltraFeedback-binarized (text prompt, whole conversations, `messages` beside them), TRL's dataset_formats page
    (explicit and implicit prompt), HH-RLHF, LLaMA-Factory's data/README (ShareGPT preferences: one message per side),
    OpenAI's content parts, and rows of a chat API whose messages have further keys."""
    [pair] = read(row)
    assert [m["content"] for m in as_messages(pair["prompt"])] == list(TURNS)
    assert (pair["chosen"].strip(), pair["rejected"]) == ("Hold it.", "Don't.")


def test_a_system_message_stays_in_the_prompt(read):
    for row in (
        {"chosen": say("Q?", "A.", system="Be kind."), "rejected": say("Q?", "B.", system="Be kind.")},
        {"prompt": say("Q?", system="Be kind."), "chosen": say("Q?", "A."), "rejected": say("Q?", "B.")},
    ):
        [pair] = read(row)
        assert pair["prompt"] == say("Q?", system="Be kind.") and pair["chosen"] == "A."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "Another?", "chosen": say("Q?", "A."), "rejected": say("Q?", "B.")},
            "the prompt is not in the conv",
        ),
        ({"chosen": say("Q?", "A."), "rejected": say("P?", "B.")}, "do not begin with the same turns"),
        ({"chosen": say("Q?", "A.", system="x"), "rejected": say("Q?", "B.")}, "do not begin with the same turns"),
        ({"prompt": "Q?", "chosen": say("Q?", "A."), "rejected": answer("B.")}, "'chosen' is a whole conversation"),
        ({"prompt": "Q?", "chosen": say("Q?", "A."), "rejected": "B."}, "and 'rejected' is not"),
        ({"chosen": say("Q?", "A.", "P?", "C."), "rejected": say("Q?", "B.", "P?", "D.")}, "'chosen' has 3 turns"),
        ({"chosen": say("Q?", "A.", "P?"), "rejected": say("Q?", "B.", "P?")}, "'chosen' has 2 turns"),
        ({"prompt": "Q?", "chosen": "Q? A.", "rejected": "Q? B."}, r"both responses begin with the prompt 'Q\?'"),
        ({"prompt": "Q?", "chosen": "[{'role': 'user', 'content': 'Q?'}", "rejected": "B."}, "looks like a list of"),
        (
            {"prompt": "Q?", "chosen": [{"role": "tool", "content": "x"}], "rejected": answer("B.")},
            "'chosen' is a list",
        ),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "a row without 'prompt'"),
        (
            {"input": {"messages": say("Q?")}, "preferred_output": answer("A."), "non_preferred_output": answer("B.")},
            "The row has: input, preferred_output, non_preferred_output",
        ),
    ],
)
def test_what_is_not_clear_is_refused(read, row, reason):
    """TRL's implicit prompt of plain texts (dataset_formats) has no border between prompt and response; OpenAI's
    preference fine-tuning format names its columns otherwise: both are refused, with the columns."""
    good = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{reason}"):
        read(good, row)


def test_rows_of_the_judge_stay_as_they_are(read):
    """A model may answer with a transcript, with a list of messages, or with the prompt: that is text."""
    texts = ("Q? Yes.", transcript("Q?", "A."), json.dumps(say("Q?", "A.")), "Q? No.")
    for a, b in zip(texts, texts[::-1], strict=True):
        row = {"prompt": "Q?", "response_a": a, "response_b": b, "chosen": a, "rejected": b, "p_a": 0.9, "verdicts": []}
        [pair] = read(row)
        assert (pair["chosen"], pair["rejected"]) == (a, b)


# --- one response -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": say(*TURNS, "Hold it.")},
        {"conversations": say(*TURNS, "Hold it.", sharegpt=True)},
        {"prompt": TURNS[0], "messages": say(*TURNS, "Hold it.")},
        {"prompt": say(*TURNS), "response": answer("Hold it.")},
        {"response": say(*TURNS, "Hold it.")},
        {"messages": say(*TURNS), "response": "Hold it."},
        {"messages": repr(say(*TURNS, "Hold it."))},
        {"conversations": json.dumps(say(*TURNS, "Hold it.", sharegpt=True))},
    ],
)
def test_a_response_in_every_published_shape(read, row):
    """UltraChat (`prompt` is the first turn of `messages`), ShareGPT as in FastChat's and Axolotl's documentation, and
    TRL's prompt-completion (dataset_formats)."""
    [one] = read(row, require=ANSWERED)
    assert [m["content"] for m in as_messages(one["prompt"])] == list(TURNS) and one["response"] == "Hold it."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": say("Q?")}, "the conversation ends without an answer"),
        ({"prompt": "P?", "messages": say("Q?", "A.")}, "the prompt is not in the conversation"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "'conversations' is not a conversation"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}, "ends without an answer"),
        ({"conversations": say("Q?", "A.", sharegpt=True)[::-1] + answer("B.")}, "the role 'assistant' after None"),
        ({"prompt": "Q?", "response": say("Q?")}, "'response' is a list"),
        ({"messages": "[{'role': 'user', 'content': 'Q?'}\n {'role': 'assistant', 'content': 'A.'}]"}, "saved as text"),
    ],
)
def test_a_response_that_is_not_clear_is_refused(read, row, reason):
    """The last one is how numpy prints what pandas reads from Parquet (datasets issue 387): no commas in between."""
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: .*{reason}"):
        read(row, require=ANSWERED)


def test_a_prompt_of_a_conversation_is_what_comes_before_the_last_answer(read):
    rows = [{"messages": say(*TURNS, "Hold it.")}, {"conversations": say(*TURNS, sharegpt=True)}]
    for row in read(*rows, require=("prompt",)):
        assert [m["content"] for m in row["prompt"]] == list(TURNS)


def test_the_prompt_of_a_row_wins_over_what_it_carries_along(read):
    pair = {"chosen": say("P?", "A."), "rejected": say("R?", "B.")}
    [row] = read({"prompt": "Q?", **pair}, require=("prompt",))
    assert row["prompt"] == "Q?"
    [row] = read({"prompt": "Q?", "response": "Yes.", "messages": say("P?", "A."), **pair}, require=ANSWERED)
    assert (row["prompt"], row["response"]) == ("Q?", "Yes.")


# --- messages as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [json.dumps, repr, lambda turns: json.dumps(turns, indent=1), lambda t: f" {t}\n"])
def test_messages_in_a_cell_of_a_csv_file(tmp_path, write):
    """pandas' to_csv writes a list of messages as Python prints it (pandas issue 58906), others as JSON."""
    turns = say("It's \"odd\",\nisn't it?", "Is it\u2028? 100 %", "Sí…")
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt"], [write(turns)]])
    [row] = Source([tmp_path / "rows.csv"])
    assert row["prompt"] == turns


@pytest.mark.parametrize(
    "text",
    [
        "[{x}] is a set in a list?",
        '[{"name": "a"}]: how do I read it?',
        "[1, 2]",
        "{'role': 'user', 'content'",
        "What does [{'role': 'user'}] mean?",
        '[{"a": 1}]',
    ],
)
def test_other_text_is_not_taken_for_messages(text):
    assert parse_messages(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'x'}",
        "[{'role': 'user', 'content': __import__('os').system('x')}]",
        "[{'role': 'user', 'content': 'x'}, {'a': 1}]",
        "[{'role': 'user', 'role': 'assistant', 'content': 'x'}]",
        "[{'role': 'user', 'content': '\\ud800'}]",
        "[{'role': 'user', 'content': 1e999}]",
        "[{'role': 'user', 'content': " + "[" * 5000,
        "[{'content': 'x', 'role': 'user'}\n {'content': 'y', 'role': 'assistant'}]",
        "[{'content': array(['x'], dtype=object), 'role': 'user'}]",
    ],
)
def test_text_that_is_nearly_messages_is_refused(text):
    """Nothing is evaluated; the last two are what numpy prints (datasets issue 387)."""
    with pytest.raises(ValueError):
        parse_messages(text)


# --- drawn rows ---------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("SHAPES_EXAMPLES", "80"))

drawn = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == 80,
    suppress_health_check=list(HealthCheck),
)

PIECES = st.sampled_from(
    ["a", "Q?", "b c", "Human", ":", "\n", " ", "'", '"', "\\", "[{", "}]", "role", "é", "\u2028", "{"]
)
TEXT = (
    st.lists(PIECES, min_size=1, max_size=6)
    .map("".join)
    .filter(lambda text: text.strip() and "\n\n" not in text and not text.strip().startswith("Human:"))
)
CONVERSATION = st.lists(TEXT, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2)
SYSTEM = st.one_of(st.none(), TEXT)


def in_words(turns: list[dict]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in turns]


def shape_turns(draw, turns: list[dict]):
    """The turns as messages, as ShareGPT's, with content parts, or as text."""
    form = draw(st.sampled_from(["messages", "sharegpt", "parts", "json", "python"]))
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    if form == "parts":
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return {"json": json.dumps, "python": repr}.get(form, list)(turns)


def shape_side(draw, form: str, before: list[dict], text: str):
    whole = [*before, {"role": "assistant", "content": text}]
    if form == "transcript":
        return transcript(*(turn["content"] for turn in whole))
    if form == "text":
        return text
    if form == "repeated":
        return f"{before[-1]['content']} {text}"
    return shape_turns(draw, whole if form == "whole" else whole[-1:])


@st.composite
def pairs(draw):
    """(row, the turns of its prompt, chosen, rejected) in a mixture of shapes."""
    contents, system = draw(CONVERSATION), draw(SYSTEM)
    before = say(*contents, system=system)
    chosen, rejected = draw(TEXT), draw(TEXT)
    form = draw(st.sampled_from(["transcript", "text", "repeated", "whole", "answer"]))
    other = form if form == "repeated" else draw(st.sampled_from([form, form, form, "text", "whole", "answer"]))
    if form == "transcript":
        before = say(*contents)
    row = {"chosen": shape_side(draw, form, before, chosen), "rejected": shape_side(draw, other, before, rejected)}
    column = draw(st.sampled_from(["none", "last", "first", "messages", "conversations", "prompt", "transcript"]))
    if form == "repeated" and column == "first":
        column = "last"
    if column in ("messages", "conversations"):
        row[column] = shape_turns(draw, before)
    elif column == "prompt":
        row["prompt"] = shape_turns(draw, before)
    elif column == "transcript":
        row["prompt"] = transcript(*(turn["content"] for turn in before if turn["role"] != "system")) + "\n\nAssistant:"
    elif column != "none":
        row["prompt"] = contents[-1 if column == "last" else 0]
    # A prompt of one turn beside bare answers is all that there is to know of a longer conversation.
    if {form, other} <= {"text", "repeated", "answer"} and column in ("first", "last", "transcript"):
        before = say(row["prompt"]) if column != "transcript" else [t for t in before if t["role"] != "system"]
    return row, before, chosen, rejected


def refused_or_read(tmp_path_factory, row, require):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, [row])
    try:
        [read] = Source([path], require=require)
    except InputError as error:
        assert "rows.jsonl:1: " in str(error)
        return None
    return read


@drawn
@given(pairs())
def test_whatever_shape_a_pair_has_it_is_what_went_in_or_refused(tmp_path_factory, drawn_pair):
    row, before, chosen, rejected = drawn_pair
    read = refused_or_read(tmp_path_factory, row, PAIR)
    if read is not None:
        assert in_words(as_messages(read["prompt"])) == in_words(before)
        assert (read["chosen"].strip(), read["rejected"].strip()) == (chosen.strip(), rejected.strip())


@st.composite
def responses(draw):
    contents, text = draw(CONVERSATION), draw(TEXT)
    before = say(*contents, system=draw(SYSTEM))
    whole = [*before, {"role": "assistant", "content": text}]
    row: dict = {}
    form = draw(st.sampled_from(["messages", "conversations", "response", "whole", "text"]))
    if form in ("messages", "conversations"):
        row[form] = shape_turns(draw, whole)
    elif form == "text":
        row["response"] = text
    else:
        row["response"] = shape_turns(draw, whole if form == "whole" else whole[-1:])
    column = draw(st.sampled_from(["none", "prompt", "first"]))
    if column == "prompt":
        row["prompt"] = shape_turns(draw, before)
    elif column == "first":
        row["prompt"] = contents[0]
        before = before if form in ("messages", "conversations", "whole") else say(contents[0])
    return row, before, text


@drawn
@given(responses())
def test_whatever_shape_a_response_has_it_is_what_went_in_or_refused(tmp_path_factory, drawn_response):
    row, before, text = drawn_response
    read = refused_or_read(tmp_path_factory, row, ANSWERED)
    if read is not None:
        assert in_words(as_messages(read["prompt"])) == in_words(before)
        assert read["response"].strip() == text.strip()


@drawn
@given(st.lists(st.dictionaries(st.sampled_from(["role", "content", "name"]), TEXT), max_size=3), st.booleans(), TEXT)
def test_text_is_messages_or_text_or_refused(messages, as_json, more):
    text = json.dumps(messages) if as_json else repr(messages)
    are_messages = bool(messages) and all({"role", "content"} <= set(message) for message in messages)
    if are_messages:
        assert parse_messages(text) == messages
    for other in (text, f"{text} {more}"):
        try:
            read = parse_messages(other)
        except ValueError:
            assert any({"role", "content"} <= set(message) for message in messages) or "role" in other
        else:
            assert read is None or (are_messages and read == messages)


# --- HH-RLHF stays as it was --------------------------------------------------------------------------------


def test_ids_and_pairs_of_transcripts_stay_the_same(shared_data):
    """The ids decide every draw: these two were computed before the other shapes were read."""
    file = shared_data / "hh-rlhf" / "harmless-base.test.first1500.jsonl.gz"
    source = Source([file], require=PAIR)
    assert source.ids[:2] == ["5e58d9fc9b70ac4c", "3f12c3a790db6e55"]
    pairs, _, _ = preferences.read_pairs([str(file)], "hard", None, reading=Reading(skip_invalid=True))
    assert len(pairs) == 1500 and not any(split_transcript(pair["chosen"]) for pair in pairs)
