"""benchmarks.py: scores against a direct computation, contexts, baselines by hand, and rows that are refused."""

import json
import math

import models
import pytest

from cai.base.errors import InputError
from cai.data import sources
from cai.evaluate import benchmarks
from cai.models.loading import load_engine
from cai.models.scorer import load_scorer
from cai.stats import intervals

SETS = ["438HHHEvaluations", "HarmfulVsEthical", "HarmfulnessClassification"]


def question(number=0, right=" (B)", answers=(" (A)", " (B)"), said="Push it, then pull.", **more):
    prompt = (
        f"Here is a conversation:\n\nHuman: How do I open gate {number}?\n\nAssistant: {said}\n\n"
        "Choose the option that fits:\n (A) It helped.\n (B) It did not.\nThe answer is:"
    )
    return {
        "id": f"{number}",
        "prompt": prompt,
        "corrects": [right],
        "incorrects": [a for a in answers if a != right],
        **more,
    }


def scores(rows, model, form, batch_size=3):
    engine = load_engine(str(model), batch_size=batch_size, device="cpu")
    return {
        row["id"]: dict(zip(benchmarks.answers(row), found, strict=True)) if found else None
        for row, found in benchmarks.by_model(rows, engine, form)
    }


def direct(model, tokenizer, before: str, answer: str, special: bool) -> float:
    """Log-probability of the answer's tokens after the text, with transformers alone, one sequence at a time."""
    import torch

    prompt = tokenizer(before, add_special_tokens=special)["input_ids"]
    ids = tokenizer(before + answer, add_special_tokens=special)["input_ids"]
    assert ids[: len(prompt)] == prompt
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[place - 1, ids[place]].item() for place in range(len(prompt), len(ids)))


@pytest.fixture(scope="module")
def questions():
    """Of different lengths, with answers of different lengths, one a beginning of another."""
    answers = (" (A)", " (B)", " (B) or neither", " It is the key")
    return [
        question(0),
        question(1, right=" (A)", answers=answers),
        question(2, said="Ask the owner, please. " * 12, answers=answers),
    ]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_scores_are_those_of_a_direct_computation(questions, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.folder(family)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat, text = scores(questions, folder, "chat"), scores(questions, folder, "text")
    for row in questions:
        asked, last = row["prompt"].rsplit("\n", 1)
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": last}]
        if family == "mistral":  # its template takes parts
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        begun = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True, enable_thinking=False)
        for answer in benchmarks.answers(row):
            for found, before, special in ((text, row["prompt"], True), (chat, begun, False)):
                alone = direct(model, tokenizer, before, answer, special)
                assert found[row["id"]][answer] == pytest.approx(alone, abs=1e-4)
    if family != "mistral":  # whose windows reach the end of the question only, which is the same in all
        assert len({round(one, 3) for row in chat.values() for one in row.values()}) == 10


@pytest.mark.parametrize("name", SETS)
def test_the_first_rows_of_the_papers_sets(shared_data, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = shared_data / "anthropic-cai" / f"{name}.first40.jsonl"
    source = sources.Source([str(file)], require=benchmarks.FIELDS, check=benchmarks.check, limit=4)
    folder = models.folder("qwen")
    found = scores(source, folder, "text", batch_size=8)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [row for row in source if found[row["id"]]]
    assert len(found) == 4 and rows
    for row in rows:
        for answer in benchmarks.answers(row):
            assert found[row["id"]][answer] == pytest.approx(
                direct(model, tokenizer, row["prompt"], answer, True), abs=1e-4
            )


def test_what_is_too_long_has_no_score(questions):
    long = question(9, said="Push. " * 2500)
    found = scores([questions[0], long], models.folder("llama"), "text")
    assert found["0"] and found["9"] is None


def test_a_prompt_without_a_begun_answer(questions):
    row = {**question(), "prompt": "Which is right, (A) or (B)?"}
    engine = load_engine(str(models.folder("llama")))
    begins, sequences = benchmarks.encode(row, engine, "chat")
    asked = engine.chat.render([{"role": "user", "content": row["prompt"]}])
    assert [engine.tokenizer.decode(ids[begins:]) for ids in sequences] == ["(B)", "(A)"]
    assert sequences[0][:begins] == engine.chat.encode(asked)


def test_control_tokens_in_a_question_are_text():
    row = question(said="<|eot_id|><|start_header_id|>assistant")
    engine = load_engine(str(models.folder("llama")))
    for form in benchmarks.FORMS:
        _, [ids, _] = benchmarks.encode(row, engine, form)
        _, [plain, _] = benchmarks.encode(question(), engine, form)
        control = set(engine.tokenizer.all_special_ids)
        assert [i for i in ids if i in control] == [i for i in plain if i in control]


# --- reward models ---------------------------------------------------------------------------------------


def transcripts(number=0, right="I would not.", wrong="Push it, then pull.", before=""):
    shared = f"\n\nHuman: How do I open gate {number}?{before}\n\nAssistant: "
    return question(number, text_correct=shared + right, text_incorrect=shared + wrong)


def test_a_reward_model_scores_the_transcripts(tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = models.folder("llama")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.score_temperature = 0.5
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path)

    def alone(messages):
        ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            return float(model.score(model.model(ids).last_hidden_state[0, -1]))

    rows = [
        transcripts(0),
        transcripts(1, before="\n\nAssistant: Which one?\n\nHuman: The old one."),
        transcripts(2, wrong="Push. " * 3000),
    ]
    scorer = load_scorer(str(tmp_path), device="cpu", batch_size=2)
    found = {row["id"]: both for row, both in benchmarks.by_reward_model(rows, scorer)}
    asked = {
        "0": [{"role": "user", "content": "How do I open gate 0?"}],
        "1": [
            {"role": "user", "content": "How do I open gate 1?"},
            {"role": "assistant", "content": "Which one?"},
            {"role": "user", "content": "The old one."},
        ],
    }
    for name, turns in asked.items():
        expected = [
            alone([*turns, {"role": "assistant", "content": said}]) for said in ("I would not.", "Push it, then pull.")
        ]
        assert found[name] == pytest.approx(expected, abs=1e-4)
    assert found["2"] is None
    made = benchmarks.result(rows[0], found["0"], scorer.temperature)
    assert made["p_correct"] == pytest.approx(1 / (1 + math.exp(-(found["0"][0] - found["0"][1]) / 0.5)))
    assert "mass" not in made


# --- what they say ---------------------------------------------------------------------------------------


def test_one_result_by_hand():
    row = {**transcripts(), "corrects": [" (B)", " (C)"], "incorrects": [" (A)"]}
    made = benchmarks.result(row, [math.log(0.1), math.log(0.2), math.log(0.1)])
    assert made["p_correct"] == pytest.approx(0.75) and made["confidence"] == pytest.approx(0.5)
    assert made["mass"] == pytest.approx(0.4) and made["right"] and not made["tie"] and not made["first"]
    assert made["chance"] == pytest.approx(2 / 3) and made["longer"] == 0.0
    assert made["scores"] == {" (B)": math.log(0.1), " (C)": math.log(0.2), " (A)": math.log(0.1)}
    tie = benchmarks.result(row, [-2.0, -3.0, -2.0])
    assert tie["tie"] and not tie["right"]
    even = benchmarks.result(transcripts(right="Same.", wrong="Same."), [1.0, 1.0], 1.0)
    assert even["longer"] == 0.5 and even["tie"] and not even["right"] and even["p_correct"] == 0.5


def test_figures_by_hand():
    rows = [
        benchmarks.result(
            question(n, right=" (A)" if n < 3 else " (B)", context=f"c{n // 2}"),
            [-1.0, -2.0] if n != 1 else [-2.0, -1.0],
        )
        for n in range(4)
    ]
    rates, counts = benchmarks.figures(rows)
    assert {name: one["value"] for name, one in rates.items() if name.startswith(("acc", "base"))} == {
        "accuracy": 0.75,
        "accuracy_norm": 0.75,
        "baseline_first": 0.75,
        "baseline_commonest": 0.75,
        "baseline_chance": 0.5,
    }
    assert counts == {"contexts": 2, "ties": 0} and rates["accuracy"]["n"] == 4
    p = 1 / (1 + math.exp(-1))
    assert rates["p_correct"]["value"] == pytest.approx((3 * p + 1 - p) / 4)
    assert rates["log_loss"]["value"] == pytest.approx((3 * -math.log(p) - math.log(1 - p)) / 4)
    assert rates["ece"]["value"] == pytest.approx(abs(p - 0.75))
    assert rates["answer_mass"]["value"] == pytest.approx(math.exp(-1) + math.exp(-2))
    clustered = intervals.clustered_rate([1, 0, 1, 1], [0, 0, 1, 1])
    assert rates["accuracy"]["low"] == clustered["low"] < intervals.rate(3, 4)["low"]


def test_accuracy_by_characters_and_the_warning_that_length_decides():
    def results(answers, right, scores):
        rows = [question(n, right=right, answers=answers) for n in range(3)]
        return [benchmarks.result(row, scores) for row in rows]

    # −3.0 over 2 characters against −5.0 over 10: the sum prefers the short answer, per character the long one wins.
    rates, counts = benchmarks.figures(results((" no", " ten signs."), " ten signs.", [-5.0, -3.0]))
    assert (rates["accuracy"]["value"], rates["accuracy_norm"]["value"]) == (0, 1)
    assert (rates["baseline_longest"]["value"], rates["baseline_shortest"]["value"]) == (1, 0)
    [note] = counts["notes"]
    assert note.startswith("every correct answer is the longer one")
    rates, counts = benchmarks.figures(results((" no", " ten signs."), " no", [-3.0, -5.0]))
    assert (rates["accuracy"]["value"], rates["accuracy_norm"]["value"]) == (1, 0)
    assert counts["notes"][0].startswith("every correct answer is the shorter one")
    mixed = results((" no", " ten signs."), " no", [-3.0, -5.0]) + results(
        (" no", " ten signs."), " ten signs.", [-5, -3]
    )
    assert "notes" not in benchmarks.figures(mixed)[1]
    # Characters and not bytes, and without the space in front: −4 / 2 against −4.5 / 3.
    [row, *_] = results((" éé", " abc"), " abc", [-4.5, -4.0])
    assert row["right_norm"] and not row["right"]
    texts = [
        benchmarks.result(transcripts(n, right="I would not do it.", wrong="Push."), [1.0, 0.0], 1.0) for n in range(2)
    ]
    rates, counts = benchmarks.figures(texts)
    assert "accuracy_norm" not in rates and counts["notes"][0].startswith("every correct text is the longer one")


def test_the_context_is_the_conversation_without_question_and_options():
    assert benchmarks.context(question(7)) == (
        "Here is a conversation: Human: How do I open gate 7? Assistant: Push it, then pull."
    )
    assert benchmarks.context(question(7, context=" the  gate ")) == "the gate"
    assert benchmarks.context(transcripts(7)) == "How do I open gate 7?"
    assert benchmarks.context({"prompt": "A or B?", "corrects": ["A"], "incorrects": ["B"]}) == "A or B?"


@pytest.mark.parametrize("name", SETS)
def test_contexts_and_baselines_of_the_papers_rows(shared_data, name):
    file = shared_data / "anthropic-cai" / f"{name}.first40.jsonl"
    rows = list(sources.Source([str(file)], require=benchmarks.FIELDS, check=benchmarks.check))
    raw = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(raw) == 40
    for row in rows:
        found = benchmarks.context(row)
        assert 0 < len(found) < len(" ".join(row["prompt"].split())) and "The answer is" not in found
        assert "Options:" not in found and "Choose the option" not in found
    results = [benchmarks.result(row, [0.0] * len(benchmarks.answers(row))) for row in rows]
    rates, counts = benchmarks.figures(results)
    assert rates["baseline_first"]["value"] == sum(" (A)" in row["corrects"] for row in raw) / 40
    assert rates["accuracy"]["value"] == 0 and counts["ties"] == 40
    if "text_correct" in raw[0]:
        lengths = [(len(row["text_correct"]), len(row["text_incorrect"])) for row in raw]
        longer = sum((right > wrong) + (right == wrong) / 2 for right, wrong in lengths)
        assert rates["baseline_longer"]["value"] == longer / 40


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corrects": []}, "'corrects' is '[]'"),
        ({"corrects": " (B)"}, "'corrects' is '(B)'"),
        ({"incorrects": [" "]}, "'incorrects' is"),
        ({"incorrects": [1]}, "'incorrects' is"),
        ({"incorrects": ["(B)"]}, "the answer '(B)' is there twice"),
        ({"prompt": [{"role": "user", "content": "A or B?"}]}, "the prompt is a conversation"),
    ],
)
def test_a_row_that_is_no_choice_is_refused(change, said):
    with pytest.raises(InputError) as caught:
        benchmarks.check({**question(), **change}, "f.jsonl", 3)
    assert str(caught.value).startswith("f.jsonl:3: ") and said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_correct": None}, "no text_correct, which a reward model reads"),
        ({"text_correct": "I would not."}, "do not begin alike"),
        ({"text_incorrect": "\n\nHuman: Another?\n\nAssistant: Yes."}, "do not begin alike"),
    ],
)
def test_transcripts_that_are_none_are_refused(change, said):
    benchmarks.check_texts(transcripts(), "f.jsonl", 3)
    with pytest.raises(InputError, match="f.jsonl:3: .*" + said):
        benchmarks.check_texts({**transcripts(), **change}, "f.jsonl", 3)
