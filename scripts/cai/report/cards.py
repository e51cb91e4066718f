"""Model and dataset cards in the form of the Hugging Face Hub, written from a run's manifests.

    for name, text in write(collect("runs/tiny")).items(): ...

There is one for every trained model, one for the revisions and one for the preferences. A card says what the manifests
know, and that there is no licence yet. Leaves out the upload: cai/report/hub.py.
"""

import re
from pathlib import Path

from markupsafe import Markup

from cai.base.files import file_name
from cai.base.paths import GGUF
from cai.data.kinds import KINDS
from cai.evaluate.rates import RATES
from cai.report import escaping, run_folder
from cai.report.run_folder import Run, Training

PURPOSES = {
    "sft": "A causal language model, fine-tuned on its own responses after they were criticised and revised by the "
    "principles of a constitution (the supervised phase of Constitutional AI, arXiv 2212.08073).",
    "sft_responses": "A causal language model, fine-tuned on responses to prompts as they were written, without "
    "critique and revision.",
    "reward_model": "A reward model: a sequence classifier with one output, trained on preferences that follow the "
    "principles of a constitution. It scores a response to a prompt; it writes nothing.",
    "ppo": "A causal language model, trained by PPO against a reward model that learned from AI preferences (the "
    "reinforcement phase of Constitutional AI, arXiv 2212.08073).",
    "dpo": "A causal language model, trained by DPO on preferences that follow the principles of a constitution.",
    "grpo": "A causal language model, trained by GRPO with feedback that a model gave by the principles of a "
    "constitution.",
    "revisions": "Prompts with a model's responses, critiques of these by a constitution's principles, and revisions: "
    "data for supervised fine-tuning by Constitutional AI (arXiv 2212.08073).",
    "preferences": "Pairs of responses with the preference of a judge model that compared them by a constitution's "
    "principles, in TRL's explicit-prompt preference format with a soft label beside it.",
    "contrast": "Pairs of responses in TRL's explicit-prompt preference format. No judge compared them: the chosen "
    "response comes from the source that is preferred as a whole, such as a model with a constitution in its context.",
}

FIELDS = {
    "id": "of the row",
    "prompt": "a text, or a list of chat messages",
    "prompt_id": "shared by the responses to one prompt",
    "sample": "number of the response to its prompt",
    "response": "the model's first response",
    "model": "what wrote the response",
    "finish": "how the response ended: stop or length",
    "in_context": "the constitution that the model read in its system message; it is not in the prompt",
    "in_context_a": "the same, for the first response alone",
    "in_context_b": "the same, for the second response alone",
    "rounds": "list of principle, critique, revision and flags, one per round",
    "response_a": "first response",
    "response_b": "second response",
    "chosen": "the preferred response; null if undecided",
    "rejected": "the other one",
    "p_chosen": "the judge's probability that the chosen one is better: a soft label",
    "principle": "id of the principle it was judged by",
    "speaks": "probability that this principle speaks to the prompt",
    "verdicts": "the judge's probabilities in both orders",
    "gold": "which is better, where that is known",
    "kind": "harmful, benign or borderline",
    "category": "of the prompt",
}

NO_LICENCE = "No licence is stated here: choose one that the base model's and the prompts' licences allow."


def write(run: Run) -> dict[str, str]:
    """{file name: card}: `model-<folder>.md` and `dataset-<file>.md`."""
    outputs = {"revisions": run.rows_file, "preferences": run.preferences_file}
    return {
        **{f"model-{file_name(training.name)}.md": model_card(run, training) for training in run.trainings},
        **{
            f"dataset-{file_name(name.removesuffix('.jsonl'))}.md": dataset_card(run, name, kind)
            for kind, name in outputs.items()
            if name
        },
    }


def card_of(path: Path) -> str:
    """The card of one output, a model's folder or a file of preferences, from its manifest and those beside it that
    led to it."""
    run = run_folder.collect(path.parent, path.name)
    for training in run.trainings:
        if training.name == path.name:
            return model_card(run, training)
    return dataset_card(run, path.name, "preferences")


def hub_id(model: str | None) -> str | None:
    """The model's name if it can be one on a hub, not a folder here or the bundled model."""
    is_id = model and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not Path(model).exists()
    return model if is_id and not str(model).lower().endswith(GGUF) else None


def model_card(run: Run, training: Training) -> str:
    """The card of one trained model."""
    from huggingface_hub import ModelCardData

    is_scorer = training.command == "reward_model"
    measured = [stage for stage in run.stages if Path(stage.model).name == training.name]
    stages = [stage for stage in run.stages if stage.model == run.model or stage in measured] if measured else []
    rows = [
        (f"{kind}: {name.replace('_', ' ')}", [stage.rates.get(name) for stage in stages])
        for name, (kind, _) in sorted(RATES.items(), key=lambda item: KINDS.index(item[1][0]))
        if any(stage.rates.get(name) for stage in stages)
    ]
    return _render(
        "model_card.md.jinja",
        ModelCardData(
            base_model=hub_id(run.model),
            library_name="transformers" if training.step["fingerprint"].get("lora_rank") is None else "peft",
            pipeline_tag="text-classification" if is_scorer else "text-generation",
            tags=["constitutional-ai", "rlaif", training.command.replace("_", "-")],
        ),
        title=f"{run.name}/{training.name}",
        purpose=PURPOSES[_purpose_of(training)],
        made=_list_facts(run, training.step),
        versions=sorted(training.step.get("versions", {}).items()),
        settings=[*_flatten(training.step["fingerprint"]), *_flatten(training.step["counts"])],
        stages=stages,
        rows=rows,
        by=stages[0].by if stages else "",
        limits=[
            *_list_unfit(run),
            *(["It was not measured on held-out prompts."] if not measured and not is_scorer else []),
            "The feedback it learned from was a model's, not people's: it has that model's errors and the "
            "constitution's gaps.",
            "The figures hold for prompts like the held-out ones; longer conversations and attempts to talk it round "
            "are not in them.",
            *([_TINY] if run.model == "tiny" else []),
            *(f"Alarm at step {step}: {alarm}" for step, alarm in training.alarms[:5]),
            NO_LICENCE,
        ],
    )


def _purpose_of(training: Training) -> str:
    """The entry of PURPOSES; an SFT may have had no revisions."""
    is_plain = training.command == "sft" and "revisions" not in training.step["counts"]
    return "sft_responses" if is_plain else training.command


def dataset_card(run: Run, name: str, kind: str) -> str:
    """The card of the revisions or of the preferences."""
    from huggingface_hub import DatasetCardData

    [step] = [step for step in run.steps if step["name"] == name]
    if step["fingerprint"].get("preferred"):
        kind = "contrast"
    rows = list(run.read(name))
    return _render(
        "dataset_card.md.jinja",
        DatasetCardData(
            tags=["constitutional-ai", "rlaif", kind],
            pretty_name=f"{run.name} {kind}",
            task_categories=["text-generation"],
        ),
        title=f"{run.name}/{name}",
        purpose=PURPOSES[kind],
        made=_list_facts(run, step),
        fields=[(field, FIELDS.get(field, "carried along from the prompts")) for field in (rows[0] if rows else ())],
        counts=[("rows in the file", len(rows)), *_flatten(step["counts"])],
        limits=[
            *_list_unfit(run),
            "Critiques, revisions and preferences were written by a model. Nobody has checked them row by row.",
            "Prompts may ask for harm, and first responses and rejected ones may give it: keep it where such text "
            "belongs.",
            *([_TINY] if run.model == "tiny" else []),
            NO_LICENCE,
        ],
    )


_TINY = (
    "The base is this project's bundled model of an invented world, made to show and to test the method. It "
    "understands no other prompts."
)

_HASHES = ("model", "weights", "input", "reward_model", "ref_model", "template", "constitution", "judge")


def _list_unfit(run: Run) -> list[str]:
    """A limit for each model that was found unfit."""
    return [f"Not to be believed: {verdict}." for verdict, is_fit in run.qualifications.items() if not is_fit]


def _list_facts(run: Run, step: dict) -> list[tuple[str, str]]:
    """Where the output comes from, as far as the manifests say."""
    constitution = next(filter(None, (other["fingerprint"].get("constitution") for other in run.steps)), None)
    name = run.constitution.name if run.constitution else "unknown by name"
    facts = [
        *(("qualification", verdict) for verdict in run.qualifications),
        ("base model", run.model),
        ("constitution", constitution and f"{name}, SHA-256 {constitution}"),
        ("revised rows", len(run.rows) or None),
        ("compared pairs", len(run.preferences) or None),
        ("model of the step", run_folder.argument(step, "--model")),
        ("reward model", run_folder.argument(step, "--reward-model")),
        ("command", step.get("command_line")),
        ("finished", step.get("finished")),
        ("seconds", step.get("seconds")),
    ]
    return [(label, str(value)) for label, value in facts if value is not None]


def _flatten(content: dict) -> list[tuple[str, object]]:
    figures = run_folder.flatten({key: value for key, value in content.items() if key not in _HASHES})
    return [(name.replace("_", " "), value) for name, value in figures if value is not None and name]


def _render(template: str, data, **values) -> str:
    front = Markup(data.to_yaml(line_break="\n").strip())
    return escaping.environment(html=False).get_template(template).render(front=front, mark=escaping.MARK, **values)
