"""tiny.py: fresh prompts and pairs, a build from the seed, and what the demonstrations may not hold."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cai.base.paths import TINY
from cai.data.readers import read_jsonl
from cai.world import build, language, oracle
from cai.world.build import CHAT_TEMPLATE
from cai.world.demonstrations import CATEGORY, DECISION, Demonstrations


def rows(path):
    return [row for _, row in read_jsonl(path)]


def test_the_bundled_prompts_are_those_of_seed_0():
    for split in ("train", "heldout"):
        bundled = rows(TINY / "prompts" / f"{split}.jsonl")
        for kind in ("harmful", "benign", "borderline"):
            mine = sorted((row for row in bundled if row["kind"] == kind), key=lambda row: row["id"])
            assert mine == language.prompt_rows(kind, split, 0, len(mine))
        assert len({row["kind"] for row in bundled[:12]}) == 3  # mixed: a --limit takes of every kind


@pytest.mark.slow
def test_held_out_acts_are_in_no_demonstration():
    """Of any task, in prompt, response, critique or target."""
    acts = []
    for category in language.CATEGORIES:
        for verb in category.verbs:
            for noun in (noun for group in category.nouns for noun in language.NOUNS[group]):
                if language.Act(category, verb, noun).held_out:
                    acts.append(f"{verb} (?:the|my|our|this|that|some) (?:[a-z]+ )?{noun}\\b")
    assert len(acts) > 500
    held_out = re.compile("|".join(acts))
    # a frightening verb before a marked noun is another act: `the toy scooter` is not `the scooter`
    marked = re.compile(rf"\b(?:{'|'.join(language.MARKERS)}) ")
    demonstrations = Demonstrations(5)
    for index in range(1600):
        messages, target, _ = demonstrations.draw(Demonstrations.TASKS[index % len(Demonstrations.TASKS)])
        text = " ".join([*(m["content"] for m in messages), target])
        found = [match[0] for match in held_out.finditer(text) if not marked.search(match[0])]
        assert not found, (found, text)
        assert not any(
            p.split("{")[0].strip()
            and text.startswith(p.split("{act}")[0])
            and p.split("{act}")[0] not in {q.split("{act}")[0] for q in language.PHRASINGS}
            for p in language.UNSEEN_PHRASINGS
        )


def test_probes_say_which_words_and_sentences_belong_to_the_request():
    """Hand-worked: of each kind of probe one, at the token that ends the word, the sentence or the request."""
    demonstrations = Demonstrations(0)
    row = {
        "prompt": "How do I steal the red lamp?",
        "kind": "harmful",
        "category": "theft",
        "verb": "steal",
        "object": "red lamp",
    }
    response = "Sure, here is how to steal the red bench. First, choose an hour when nobody looks. Then bake the cake."
    demonstrations._mark(row, response, scope=("theft",))
    messages = [{"role": "user", "content": f"{row['prompt']}\n\n{response}\n"}]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    [made] = build.encode(tokenizer, [(messages, f"It is{DECISION} bad.", demonstrations.marks)])
    read = [(tokenizer.decode(made.ids[: at + 1]).split()[-1], said) for at, said in sorted(made.probes)]
    same, other, on, off, of = range(5)
    theft = CATEGORY
    assert read == [
        ("lamp?", of),
        ("lamp?", theft),
        ("steal", same),
        ("red", same),
        ("bench", other),
        ("bench.", off),
        ("looks.", on),
        ("looks.", theft),
        ("cake", other),
        ("cake.", off),
    ]
    weighed = [(tokenizer.decode([at]), weight) for at, weight in zip(made.ids, made.weights, strict=True) if weight]
    assert weighed[-1] == ("<|end|>", 1.0) and (" bad", build.DECISION_WEIGHT) in weighed
    assert sum(weight == build.DECISION_WEIGHT for _, weight in weighed) == 1


def test_every_principle_of_the_constitution_has_a_meaning_and_some_are_narrow():
    rules = Demonstrations(0).rules
    assert len(rules) == 16
    assert sum(len(rule.critique_scope) < len(language.HARM_NAMES) for rule in rules) == 3
    for rule in rules:
        if len(rule.critique_scope) < len(language.HARM_NAMES):
            spoken = [
                language.SPOKEN[name]
                for name in language.HARM_NAMES
                if language.SPOKEN[name] in rule.principle.critique
            ]
            assert spoken == [language.SPOKEN[name] for name in language.HARM_NAMES if name in rule.critique_scope]


@pytest.mark.slow
def test_the_demonstrated_verdict_follows_the_principle_and_not_the_act_alone():
    demonstrations = Demonstrations(2)
    seen = {True: 0, False: 0}
    for _ in range(4000):
        act, row, rule, response, fault, critique = demonstrations._criticised()
        if act.category.kind == "harmful" and oracle.classify(row, response) == "comply":
            in_scope = act.category.name in rule.critique_scope
            assert (fault == "harm") == in_scope
            assert ("No fault" in critique) == (not in_scope)
            seen[in_scope] += 1
    assert min(seen.values()) > 100


@pytest.mark.parametrize("kind", ["harmful", "benign", "borderline"])
def test_prompts(invoke, tmp_path, kind):
    out = tmp_path / "p.jsonl"
    result = invoke(
        "tiny", "prompts", "--kind", kind, "--split", "heldout", "--seed", 4, "-n", 7, "--output", out, "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompts"] == 7
    assert sorted(rows(out), key=lambda row: row["id"]) == language.prompt_rows(kind, "heldout", 4, 7)


def test_prompts_of_some_categories(invoke, tmp_path):
    out = tmp_path / "p.jsonl"
    chosen = ("--split", "heldout", "-n", 30, "--output", out, "--category", "theft", "--category", "fraud")
    assert invoke("tiny", "prompts", "--kind", "harmful", *chosen).exit_code == 0
    assert {row["category"] for row in rows(out)} == {"theft", "fraud"} and len(rows(out)) == 30
    result = invoke("tiny", "prompts", "--kind", "benign", *chosen)
    assert result.exit_code == 2 and "--kind harmful" in result.stderr


def test_pairs_of_the_grammar_have_the_oracles_gold(invoke, tmp_path):
    out = tmp_path / "pairs.jsonl"
    assert invoke("tiny", "pairs", "--split", "heldout", "--seed", 1, "-n", 60, "--output", out).exit_code == 0
    made = rows(out)
    assert len(made) == 60 and len({row["id"] for row in made}) == 60
    assert {row["gold"] for row in made} == {"a", "b"}
    for row in made:
        better, worse = (row["response_a"], row["response_b"])[:: 1 if row["gold"] == "a" else -1]
        assert oracle.tier(row, better) > oracle.tier(row, worse)
        assert oracle.act_of(row).held_out


def test_pairs_of_responses(invoke, tmp_path):
    rng = random.Random(0)
    source, out = tmp_path / "r.jsonl", tmp_path / "pairs.jsonl"
    with open(source, "w") as file:
        for prompt in language.prompt_rows("harmful", "heldout", 1, 5):
            for sample, style in enumerate(("comply", "good", "good")):
                row = {
                    **prompt,
                    "id": f"{prompt['id']}/{sample}",
                    "prompt_id": prompt["id"],
                    "response": language.respond(rng, oracle.act_of(prompt), style),
                }
                file.write(json.dumps(row) + "\n")
    result = invoke("tiny", "pairs", "--responses", source, "--output", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pairs"] == len(rows(out)) >= 10
    source.write_text('{"prompt_id": "x", "response": "y"}\n')
    result = invoke("tiny", "pairs", "--responses", source, "--output", out)
    assert result.exit_code == 2 and "r.jsonl:1: a row without kind" in result.stderr


@pytest.mark.slow
def test_a_small_build_is_made_from_its_seed_and_answers(invoke, tmp_path):
    """The same seed gives the same weights; the model is a checkpoint like any other."""
    from safetensors.torch import load_file

    weights = []
    for name in ("one", "two"):
        result = invoke(
            "tiny",
            "build",
            "--output",
            tmp_path / name,
            "--tokens",
            20_000,
            "--hidden",
            64,
            "--layers",
            1,
            "--feed-forward",
            64,
            "--threads",
            1,
            "--json",
        )
        assert result.exit_code == 0, result.output
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake the bread?"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(asked) == "<|bos|><|user|>How do I bake the bread?<|end|><|assistant|>"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.eos_token_id == tokenizer.eos_token_id


SMALL = ("--tokens", 20_000, "--threads", 1, "--json")


@pytest.mark.slow
def test_a_build_continues_from_an_earlier_one(invoke, tmp_path):
    """Weights, sizes and tokenizer of the earlier build are where it begins; the same seed gives the same weights."""
    from safetensors.torch import load_file

    sizes = ("--hidden", 64, "--layers", 1, "--feed-forward", 64)
    assert invoke("tiny", "build", "--output", tmp_path / "first", *sizes, *SMALL).exit_code == 0
    for name in ("second", "again"):
        line = ("--from", tmp_path / "first", "--seed", 1, "--learning-rate", 1e-9, "--output", tmp_path / name)
        result = invoke("tiny", "build", *line, *SMALL)
        assert result.exit_code == 0, result.output
    first, second, again = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second", "again"))
    assert all((second[key] == again[key]).all() for key in second)
    # so small a learning rate changes next to nothing
    assert all((second[key] - first[key]).abs().max() < 1e-3 for key in first)
    assert (tmp_path / "first/tokenizer.json").read_text() == (tmp_path / "second/tokenizer.json").read_text()
    build_file = json.loads((tmp_path / "second/build.json").read_text())
    assert build_file["from"] == json.loads((tmp_path / "first/build.json").read_text())
    assert (build_file["seed"], build_file["hidden"], build_file["layers"]) == (1, 64, 1) and build_file["loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "tiny", "--hidden", 64), "--from keeps the sizes of the earlier build"),
        (("--from", "out"), "--output is the folder of --from"),
        (("--from", "no-such-folder"), "no build to continue from"),
        (("--from", "old"), "KeyError('hidden')"),
    ],
)
def test_a_build_continues_from_builds_only(invoke, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "old", ignore=shutil.ignore_patterns("prompts"))
    Path("old/build.json").write_text("{}")
    result = invoke("tiny", "build", *arguments, "--output", "out")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not Path("out").exists()


def test_the_bundled_model_is_small():
    size = sum(file.stat().st_size for file in TINY.glob("*") if file.is_file())
    assert 0 < size <= 6 * 2**20
    assert not list(TINY.glob("*.bin")) and not list(TINY.glob("*.pt"))
