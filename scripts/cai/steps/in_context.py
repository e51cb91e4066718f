"""A constitution in context: the system message that shows it to a model while it answers.

    shown = read_in_context("harmlessness", "in_context")
    check_room(shown, shown.text, "tiny", max_new_tokens=96)

What is trained on the answers sees the plain prompt (context distillation, arXiv 2112.00861). Leaves out the pairs that
are made of answers with and without it (contrast.py).
"""

from dataclasses import dataclass

from cai.base.errors import InputError
from cai.constitution import files, templates
from cai.models import loading
from cai.models.chat import Chat


@dataclass(frozen=True)
class InContext:
    """A constitution as the `text` of a system message. fingerprint: hashes of the constitution and of the template."""

    constitution: files.Constitution
    text: str
    fingerprint: dict[str, str]


def read_in_context(constitution_name: str, template_name: str) -> InContext:
    """Render a constitution's system message.

    Args: names or files of the constitution and of the template, which has a block `system` and no other.
    Raises InputError for a bad constitution or template.
    """
    constitution = files.load_constitution(constitution_name)
    template = templates.load_template(template_name, "system")
    system, *others = template.render(constitution=constitution)
    if others:
        raise InputError(
            f"blocks beside `system`: {', '.join(message['role'] for message in others)}",
            where=template.name,
            expected="the block `system` alone",
            remedy="The rest of the conversation comes from the rows",
        )
    hashes = {"constitution": constitution.sha256, "template": template.sha256}
    return InContext(constitution, system["content"], hashes)


def check_room(shown: InContext, system: str, model: str, max_new_tokens: int) -> None:
    """Raise InputError if the system message leaves no token of the model's context to a prompt.

    A server's model is not checked: the server refuses what is too long.

    Args:
        system: the whole system message, of which the constitution is a part.
    """
    if model.startswith("openai:"):
        return
    path = loading.check_model(model)
    context = loading.read_context(path)
    if context is None:
        return
    tokens = len(Chat(loading.load_tokenizer(path), model).encode(system))
    if tokens + max_new_tokens >= context:
        raise InputError(
            f"the system message of {tokens} tokens and {max_new_tokens} new ones leave no room for a prompt in the "
            f"context of {context} tokens of {model}",
            where=shown.constitution.path,
            remedy="Take fewer principles, a lower --max-new-tokens, or a model with a longer context",
        )
