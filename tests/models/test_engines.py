"""The engine on small random models of five architectures, each with its family's real chat template."""

import copy
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import trl
from conftest import ROOT

from cai.base.errors import CaiError, InputError
from cai.models import decoding, local
from cai.models.chat import Chat, strip_thinking
from cai.models.engine import Generation, Sampling
from cai.models.loading import load_engine

PREFILL = "The answer is ("
TEMPLATES = sorted(
    p for p in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if not p.stem.endswith("_training")
)
WORDS = ["open", "the", "old", "gate", "with", "a", "key", "and", "lift", "the", "bar"]


def engine_of(family, **options):
    return load_engine(str(models.folder(family)), **{"device": "cpu", **options})


def conversation(n: int, prefill: str | None = None, system: str = "Be brief and answer with one letter."):
    """Conversations that begin alike and differ in length and words."""
    user = f"Question {n}: " + " ".join(WORDS[i % len(WORDS)] for i in range(n, n + 1 + n * 5 % 17))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return messages + ([{"role": "assistant", "content": prefill}] if prefill else [])


def answers(engine, conversations, sampling, seeds):
    """Generations in the order of their conversations."""
    found = models.generate(engine, conversations, sampling, list(seeds))
    assert len(found) == len(conversations)
    return found


def plain_logprobs(engine, ids):
    """Log-probabilities of the next token by one forward pass over one row, without padding or cache."""
    import torch

    with torch.inference_mode():
        return engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)


def special_count(engine, text):
    return sum(token in engine.tokenizer.all_special_ids for token in engine.chat.encode(text))


# --- the chat -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.FAMILIES)
def test_render_keeps_everything_once(family):
    engine = engine_of(family)
    text = engine.chat.render(conversation(3))
    assert text.count("Be brief and answer with one letter.") == 1 and text.count("Question 3:") == 1
    ids = engine.chat.encode(text)
    bos = engine.tokenizer.bos_token_id
    if bos is not None:
        assert engine.tokenizer("x")["input_ids"][0] == bos  # the tokenizer would write one by itself
        written = family != "mistral"  # the one template here that leaves it out
        assert ids.count(bos) == written and (ids[0] == bos) == written


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("prefill", [PREFILL, "Answer: ", "\n\nOne\n"])
def test_prefill_is_continued_to_the_letter(family, prefill):
    """Also where the template trims its messages, and with no end of turn after it."""
    chat = engine_of(family).chat
    text = chat.render(conversation(1, prefill))
    assert text.endswith(prefill.lstrip() if family in ("qwen", "llama", "gemma2", "gemma3") else prefill)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_that_trl_ships(path):
    """All turns and the system message are in the text once, the prefill is its end, and an end is known."""
    tokenizer = copy.deepcopy(engine_of("llama").tokenizer)
    tokenizer.chat_template = path.read_text()
    chat = Chat(tokenizer)
    turns = [("system", "BE BRIEF."), ("user", "FIRST?"), ("assistant", "SECOND."), ("user", "THIRD?")]
    talk = [{"role": role, "content": content} for role, content in turns]
    for text in (chat.render(talk), chat.render([*talk, {"role": "assistant", "content": PREFILL}])):
        assert all(text.count(content) == 1 for _, content in turns)
    assert text.endswith(PREFILL)
    assert chat.stop_text or chat.stop_id is not None or path.stem == "glm4moe"  # which writes no end
    again = chat.render([*talk, {"role": "assistant", "content": PREFILL + " "}])
    assert again == text + " "


def test_system_goes_into_the_user_turn_where_the_template_refuses_it():
    text = engine_of("gemma2").chat.render(conversation(1, system="Be brief."))
    assert "<start_of_turn>user\nBe brief.\n\nQuestion 1:" in text
    assert "system\nBe brief." in engine_of("qwen").chat.render(conversation(1, system="Be brief."))


def test_neighbours_of_one_role_are_joined():
    talk = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    assert "user\nOne.\n\nTwo.<end_of_turn>" in engine_of("gemma2").chat.render(talk)


def test_a_conversation_that_the_template_refuses_is_named():
    with pytest.raises(InputError, match="refuses a conversation of assistant, user"):
        engine_of("gemma2").chat.render(
            [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Hello."}]
        )


@pytest.mark.parametrize("family", models.FAMILIES)
def test_control_tokens_in_a_message_stay_text(family):
    engine = engine_of(family)
    tokens = sorted({*engine.tokenizer.all_special_tokens, "<think>", "</think>"})
    # Also cut up and nested, so that taking one apart would put another together.
    nested = [t[:2] + other + t[2:] for t in tokens for other in tokens]
    for content in [*tokens, "".join(tokens), *nested]:
        harmless = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        hostile = [{"role": "user", "content": content}, {"role": "assistant", "content": f"y{content}"}]
        assert special_count(engine, engine.chat.render(hostile)) == special_count(
            engine, engine.chat.render(harmless)
        ), content


def test_ends_of_every_kind_are_known(tmp_path):
    folder = models.copy("llama", tmp_path / "m")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 77}))
    llama = load_engine(str(folder), device="cpu")
    # generation_config's, the tokenizer's, and the template's end of a turn, which neither calls an end.
    ends = [llama.tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|eot_id|>")]
    assert set(llama.stop_ids) == {77, *ends}


def test_an_end_of_turn_in_plain_letters_is_a_stop_string():
    tokenizer = engine_of("llama").tokenizer
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### end\n{% endfor %}"
            "{% if add_generation_prompt %}### assistant\n{% endif %}"
        )
        chat = Chat(tokenizer)
        assert chat.stops(["X"]) == ["X", "### end"]
        ids = chat.encode("Fine.\n### end\nMore")
        assert chat.answer(ids, continued=False) == ("Fine.", True)
    finally:
        tokenizer.chat_template = kept


@pytest.mark.parametrize(
    ("text", "opened", "left"),
    [
        ("<think>why</think>Yes", None, "Yes"),
        ("<think>a</think>One <think>b\nc</think>two", None, "One two"),
        ("Before <think>never closed", None, "Before "),
        ("why</think>\n\nYes", "</think>", "\n\nYes"),
        ("why, still thinking", "</think>", ""),
        ("why</think>Yes<think>again", "</think>", "Yes"),
        ("[THINK]why[/THINK]Yes", None, "Yes"),
        ("<|channel|>analysis<|message|>why<|end|><|channel|>final<|message|>Yes", None, "Yes"),
        ("<|channel|>final<|message|>Yes", None, "Yes"),
        ("I think so", None, "I think so"),
    ],
)
def test_strip_thinking(text, opened, left):
    assert strip_thinking(text, opened) == left


def test_thinking_that_the_template_opens_is_cut():
    engine = engine_of("thinker")
    assert engine.chat.render(conversation(1)).endswith("<think>\n")
    ids = engine.chat.encode("They ask for a key.\n</think>\n\nAsk the owner.")
    assert engine.chat.answer(ids, continued=False)[0] == "Ask the owner."
    assert engine.chat.answer(ids[:5], continued=False)[0] == ""
    # Continued answers begin after the thinking.
    assert engine.chat.answer(engine.chat.encode("A) it is"), continued=True)[0] == "A) it is"
    [cut] = answers(engine, [conversation(1)], Sampling(max_new_tokens=5), [1])
    assert (cut.text, cut.finish, cut.tokens) == ("", "length", 5)


def test_thinking_is_switched_off_where_the_template_can():
    text = engine_of("qwen").chat.render(conversation(1))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


# --- generate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.ARCHITECTURES)
def test_greedy_is_the_plain_argmax(family):
    """Padding, cache, and the checkpoint's own sampling settings change nothing."""
    engine = engine_of(family, batch_size=3)
    talks = [conversation(n) for n in range(5)]
    found = answers(engine, talks, Sampling(max_new_tokens=6, temperature=0), range(5))
    for talk, answer in zip(talks, found, strict=True):
        ids = engine.chat.encode(engine.chat.render(talk))
        assert answer.prompt_tokens == len(ids)
        new = []
        while len(new) < 6 and (not new or new[-1] not in engine.stop_ids):
            new.append(int(plain_logprobs(engine, ids + new).argmax()))
        ended = new[-1] in engine.stop_ids
        assert answer.tokens == len(new) and answer.finish == ("stop" if ended else "length")
        assert answer.text == engine.chat.answer(new[:-1] if ended else new, continued=False)[0]


@pytest.mark.parametrize("family", models.ARCHITECTURES)
def test_a_row_is_the_same_in_any_batch(family):
    talks = [conversation(n, PREFILL if n % 2 else None) for n in range(7)]
    seeds = [100 + n for n in range(7)]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9)
    whole = answers(engine_of(family, batch_size=7), talks, sampling, seeds)
    small = answers(engine_of(family, batch_size=2), talks[::-1], sampling, seeds[::-1])[::-1]
    alone = [answers(engine_of(family, batch_size=1), [t], sampling, [s])[0] for t, s in zip(talks, seeds, strict=True)]
    assert whole == small == alone
    assert len({g.text for g in whole}) > 1


def test_seeds_decide():
    engine = engine_of("llama")
    talks = [conversation(2)] * 4
    first = answers(engine, talks, Sampling(max_new_tokens=12, temperature=1.0), [1, 2, 1, 3])
    assert first[0] == first[2] and len({g.text for g in first}) == 3


def test_a_longer_answer_begins_like_a_shorter_one():
    engine = engine_of("mistral")
    short, long = (
        answers(engine, [conversation(4)], Sampling(max_new_tokens=n, temperature=0.7), [5])[0] for n in (8, 16)
    )
    assert long.text.startswith(short.text[:6]) and long.tokens > short.tokens


def test_draw_follows_the_distribution():
    import torch

    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log()
    grid = (torch.arange(1000) + 0.5).unsqueeze(1) / 1000
    drawn = decoding.draw(logits.expand(1000, 4), grid, 1.0, 1.0)[:, 0].bincount(minlength=4)
    assert drawn.tolist() == pytest.approx([100, 200, 400, 300], abs=1)
    # At temperature 0.5 the probabilities are squared: 1, 4, 16, 9 of 30.
    drawn = decoding.draw(logits.expand(1000, 4), grid, 0.5, 1.0)[:, 0].bincount(minlength=4)
    assert drawn.tolist() == pytest.approx([33, 133, 533, 300], abs=1)
    # top-p 0.6: 0.4 alone does not reach it, 0.4 + 0.3 does.
    drawn = decoding.draw(logits.expand(1000, 4), grid, 1.0, 0.6)[:, 0].bincount(minlength=4)
    assert drawn.tolist() == pytest.approx([0, 0, 571, 429], abs=1)
    edges = decoding.draw(logits.expand(2, 4), torch.tensor([[0.0], [1.0]]), 1.0, 1.0)[:, 0]
    assert edges.tolist() == [0, 3]


def test_every_step_and_row_draws_anew():
    import torch

    sampler = decoding.RowSampler(Sampling(max_new_tokens=200, temperature=1.0), [1, 2], width=3)
    drawn = [
        sampler(torch.zeros(2, 3 + step, dtype=torch.long), torch.zeros(2, 1000)).argmax(-1).tolist()
        for step in range(200)
    ]
    first, second = zip(*drawn, strict=True)
    for row in (first, second):
        assert len(set(row)) > 150 and 400 < sum(row) / 200 < 600
    assert sum(a == b for a, b in drawn) < 5


def test_stops_at_every_end_id(tmp_path):
    """A token that only generation_config calls an end ends the answer, and is not part of it."""
    import torch

    engine = engine_of("llama")
    sampling = Sampling(max_new_tokens=10, temperature=1.0)
    talk = conversation(3)
    ids = engine.chat.encode(engine.chat.render(talk))
    sampler = decoding.RowSampler(sampling, [8], len(ids))
    new = []
    for _ in range(10):
        row = torch.tensor([ids + new])
        new.append(int(sampler(row, plain_logprobs(engine, ids + new)[None]).argmax()))
    end = next(t for t in new[2:] if new.index(t) >= 2)
    folder = models.copy("llama", tmp_path / "m")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": end}))
    [short] = answers(load_engine(str(folder), device="cpu"), [talk], sampling, [8])
    assert (short.finish, short.tokens) == ("stop", new.index(end) + 1)
    assert short.text == engine.chat.answer(new[: new.index(end)], continued=False)[0]


def test_stop_strings_end_their_row_only():
    engine = engine_of("llama")
    talks, seeds = [conversation(2), conversation(9)], [1, 2]
    free = answers(engine, talks, Sampling(max_new_tokens=24, temperature=1.0), seeds)
    stop = next(c for c in free[0].text[6:] if c not in free[1].text and c != "\ufffd")
    cut = answers(engine, talks, Sampling(max_new_tokens=24, temperature=1.0, stop=(stop,)), seeds)
    assert cut[0].finish == "stop" and cut[0].text == free[0].text.split(stop)[0].strip()
    assert cut[1] == free[1]


def test_too_long_is_said_a_row(tmp_path):
    folder = models.build("qwen", tmp_path / "short", max_position_embeddings=96)
    engine = load_engine(str(folder), device="cpu")
    short, long = conversation(1, system="Hm."), conversation(1, system="word " * 90)
    found = answers(engine, [long, short], Sampling(max_new_tokens=4), [1, 2])
    assert found[0] == Generation("", "too_long", found[0].prompt_tokens, 0) and found[0].prompt_tokens > 96
    assert found[1].finish in ("stop", "length") and found[1].tokens
    # The prompt fits, but not with so many new tokens.
    [full] = answers(engine, [short], Sampling(max_new_tokens=97 - found[1].prompt_tokens), [1])
    assert full.finish == "too_long"
    [fits] = answers(engine, [short], Sampling(max_new_tokens=96 - found[1].prompt_tokens), [1])
    assert fits.finish != "too_long"
    talks = [conversation(1, PREFILL, "word " * 90), conversation(1, PREFILL, "Hm.")]
    scores = models.score(engine, talks, "AB")
    assert scores[0] is None and len(scores[1]) == 2


def test_memory_that_runs_out_halves_the_batch(capsys):
    import torch

    engine = engine_of("llama", batch_size=8)
    talks = [conversation(n, PREFILL) for n in range(6)]
    expected = models.score(engine, talks, "AB")

    def full(_module, _args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    hook = engine.model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        found = models.score(engine, talks, "AB")
        assert engine.batch_tokens < 3 * 200
        engine.set_batches(8, None)
        made = answers(engine, talks, Sampling(max_new_tokens=3), range(6))
    finally:
        hook.remove()
    assert "--batch-tokens" in capsys.readouterr().err
    assert made == answers(engine_of("llama", batch_size=8), talks, Sampling(max_new_tokens=3), range(6))
    for n in range(6):
        assert found[n] == pytest.approx(expected[n], abs=1e-4)


def test_logits_that_are_no_numbers_are_an_error(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = models.copy("llama", tmp_path / "nan")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    model.save_pretrained(folder)
    engine = load_engine(str(folder), device="cpu")
    with pytest.raises(CaiError, match="not numbers"):
        models.generate(engine, [conversation(1)], Sampling(max_new_tokens=2))
    with pytest.raises(CaiError, match="not numbers"):
        models.score(engine, [conversation(1, PREFILL)], "AB")


# --- score --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*models.ARCHITECTURES, "thinker"])
def test_score_is_the_plain_forward_pass(family):
    """Shared prefix, right padding, sliding windows shorter than the prefix, soft caps: all to 1e-4."""
    engine = engine_of(family, batch_size=4)
    talks = [conversation(n, PREFILL) for n in range(9)]
    found = models.score(engine, iter(talks), ["A", "B"])
    labels = [engine.chat.encode("(" + label)[-1] for label in "AB"]
    for n, talk in enumerate(talks):
        ids = engine.chat.encode(engine.chat.render(talk))
        assert found[n] == pytest.approx(plain_logprobs(engine, ids)[labels].tolist(), abs=1e-4)
    assert len({tuple(v) for v in found}) == 9


def test_the_shared_prefix_is_computed_once():
    engine = engine_of("gemma3", batch_size=4)
    talks = [conversation(n, PREFILL) for n in range(9)]
    rows = [engine.chat.encode(engine.chat.render(talk)) for talk in talks]
    shared = next(n for n in range(999) if len({tuple(r[: n + 1]) for r in rows}) > 1)
    assert shared > engine.model.config.sliding_window
    seen = []
    hook = engine.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        assert len(models.score(engine, talks, "AB")) == 9
    finally:
        hook.remove()
    assert seen[0] == shared and len(seen) == 1 + 3
    assert sum(seen) < sum(map(len, rows)) - 6 * shared


def test_one_conversation_and_none():
    engine = engine_of("llama")
    assert list(engine.score([], "AB")) == [] and list(engine.generate([], Sampling())) == []
    [logprobs] = models.score(engine, [conversation(1, PREFILL)], "AB")
    assert all(value < 0 for value in logprobs)
    same = models.score(engine, [conversation(1, PREFILL)] * 2, "AB")
    assert same[0] == pytest.approx(logprobs, abs=1e-5) and same[1] == same[0]


def test_labels_that_join_what_precedes_them():
    """After "is " the tokenizer writes " A" as one token: that one is asked for, not a lone "A"."""
    engine = engine_of("qwen")
    encode = engine.chat.encode
    assert len(encode("is A")) == len(encode("is")) + 1 == len(encode("is B"))
    text = engine.chat.render(conversation(1, "The answer is "))
    [found] = models.score(engine, [conversation(1, "The answer is ")], "AB")
    labels = [encode(" A")[0], encode(" B")[0]]
    assert found == pytest.approx(plain_logprobs(engine, encode(text[:-1]))[labels].tolist(), abs=1e-4)


@pytest.mark.parametrize("labels", [["A", "A"], ["A", "Bxq"], ["zqxj", "A"]])
def test_labels_must_be_single_different_tokens(labels):
    with pytest.raises(InputError, match="labels are not single, different tokens after 'The answer is \\('"):
        models.score(engine_of("llama"), [conversation(1, PREFILL)], labels)


# --- loading ------------------------------------------------------------------------------------------------


def test_folders_that_lack_something_are_refused_before_torch_is_loaded(tmp_path):
    whole = models.folder("llama")
    cases = {
        "config": ["config.json"],
        "weights": ["model.safetensors"],
        "tokenizer": ["tokenizer.json"],
        "chat template": ["chat_template.jinja"],
    }
    for name, gone in cases.items():
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(*gone))
    classifier = shutil.copytree(whole, tmp_path / "classifier")
    config = json.loads((whole / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    broken = shutil.copytree(whole, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    cases |= {"classifier": [], "broken": [], "missing": []}
    code = (
        "import sys\nfrom cai.models.loading import load_engine\nfrom cai.base.errors import InputError\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_engine(path)\n"
        "    except InputError as error: print(error.exit_code, error)\n"
        "assert 'torch' not in sys.modules"
    )
    folders = [str(tmp_path / name.replace(" ", "-")) for name in cases]
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for line, folder, name in zip(lines, folders, cases, strict=True):
        assert line.startswith(f"2 {folder}") and line.count(". ") >= (name not in ("classifier",)), line
    assert "no chat template" in lines[3] and "chat_template.jinja" in lines[3]
    assert "reward model" in lines[4]


def test_what_only_loading_can_find_out(tmp_path):
    torn = models.copy("llama", tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="can't be loaded"):
        load_engine(str(torn), device="cpu")
    with pytest.raises(InputError, match="can't be loaded"):
        load_engine("nobody/no-such-model-anywhere", device="cpu")
    part = models.copy("llama", tmp_path / "part")
    from safetensors.torch import load_file, save_file

    weights = load_file(part / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights lack 1 tensors, lm_head\.weight"):
        load_engine(str(part), device="cpu")
    with pytest.raises(InputError, match="'abacus' can't be used"):
        engine_of("llama", device="abacus")


def test_remote_code_is_not_run(tmp_path):
    folder = models.copy("llama", tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="can't be loaded"):
        load_engine(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_the_last_engine_is_kept_until_its_folder_changes(tmp_path):
    folder = models.copy("llama", tmp_path / "kept")
    first = load_engine(str(folder), device="cpu", batch_size=4)
    assert load_engine(str(folder), device="cpu", batch_size=8) is first and first.batch_size == 8
    assert load_engine(str(folder), device="cpu", dtype="bfloat16") is not first
    first = load_engine(str(folder), device="cpu")
    models.build("llama", folder, seed=1)
    second = load_engine(str(folder), device="cpu")
    assert second is not first
    before, after = (models.score(e, [conversation(1, PREFILL)], "AB")[0] for e in (first, second))
    assert before != pytest.approx(after, abs=1e-3)


def test_dtypes():
    import torch

    assert engine_of("qwen").model.dtype == torch.float32
    assert engine_of("qwen", dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_adapter_folder_answers_like_its_merged_model(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = str(models.folder("llama"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
    adapter, merged, plain = (
        models.score(load_engine(str(folder), device="cpu"), [conversation(1, PREFILL)], "AB")[0]
        for folder in (tmp_path / "adapter", tmp_path / "merged", base)
    )
    assert adapter == pytest.approx(merged, abs=1e-4) and adapter != pytest.approx(plain, abs=1e-3)


def test_batches_are_bounded_by_rows_and_by_tokens():
    engine = engine_of("llama", batch_size=4, batch_tokens=300)
    seen = []
    hook = engine.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    talks = [conversation(n, system="word " * (1 + n * 7 % 40)) for n in range(12)]
    try:
        assert len(answers(engine, talks, Sampling(max_new_tokens=4, temperature=0), range(12))) == 12
    finally:
        hook.remove()
    lengths = sorted((len(engine.chat.encode(engine.chat.render(talk))) for talk in talks), reverse=True)
    assert lengths[0] > 80 and {rows for rows, columns in seen if columns > 1} - {1} < {2, 3, 4}
    expected, left = [], lengths
    while left:
        fits = max(1, min(4, 300 // (left[0] + 4)))
        expected.append(len(left[:fits]))
        left = left[fits:]
    ours = [rows for rows, columns in seen if columns > 1]
    assert ours[-len(expected) :] == expected  # what precedes is the shared beginning
    size = local.tokens_that_fit(engine.model)
    assert size == 1 << (size.bit_length() - 1) and engine_of("llama").batch_tokens == size


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize(
    ("environment", "fewer"),
    [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}, False)],
)
def test_freed_memory_is_kept(environment, fewer):
    """Counted in pages that the system had to give: 40 times the same 4 MB are asked for and freed."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    code = (
        "import resource, sys, ctypes\n"
        "from cai.models.loading import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "lib = ctypes.CDLL(None); lib.malloc.restype = ctypes.c_void_p\n"
        "lib.malloc.argtypes = [ctypes.c_size_t]; lib.free.argtypes = [ctypes.c_void_p]\n"
        "def once():\n"
        "    at = lib.malloc(1 << 22); ctypes.memset(at, 1, 1 << 22); lib.free(at)\n"
        "once(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(40): once()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    kept = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "scripts"), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=kept)
    pages = int(done.stdout)
    assert (pages < 2000) == fewer  # of 40,960
