"""Chat templates: Jinja programs that come with a model, run in a sandbox."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Render a conversation the way Hugging Face's `apply_chat_template` does.

    Args:
        template: Jinja source from the model's files; it is not trusted.
        messages: Each with `role` and `content`.
        add_generation_prompt: End with the start of the assistant's answer.
        special_tokens: Names such as `bos_token`.

    Raises:
        ValueError: malformed messages, or the template refuses or breaks.
        TypeError: content that is no text.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"a message needs role and content; got {message!r:.80}")
        if not isinstance(content := message["content"], str):
            raise TypeError(
                f"content of a message must be text, not None or a list of parts; "
                f"got {content!r:.80}"
            )
    if not messages:
        raise ValueError("a conversation needs at least one message; got none")
    try:
        return _compile(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **(special_tokens or {}),
        )
    except Exception as error:  # besides Jinja's own errors, whatever its expressions raise
        raise ValueError(f"the model's chat template failed: {error}") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str):
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
