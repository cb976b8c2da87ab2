"""Chat templates: what they can say, and what a bad one cannot do."""

import json

import pytest

from jaxinfer.models.tokenizer.byte import byte_tokenizer
from jaxinfer.models.tokenizer.chat_template import render_chat

TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hé"}]


def test_a_usual_template():
    """ChatML, with the blanks that block tags leave trimmed as Hugging Face does."""
    template = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
    want = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHé<|im_end|>\n"
    assert render_chat(template, TALK) == want + "<|im_start|>assistant\n"
    assert render_chat(template, TALK, add_generation_prompt=False) == want
    assert render_chat(template, TALK[1:]).startswith("<|im_start|>system\nYou help.")


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ("{{ messages | tojson }}", json.dumps(TALK, ensure_ascii=False)),
        ("{{ '<&>' | tojson }}", '"<&>"'),
        ("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{{ bos_token }}", "<s>"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ absent }}", ""),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_what_templates_use(template, want):
    assert render_chat(template, TALK, special_tokens={"bos_token": "<s>"}) == want


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].content.absent.more }}", "absent"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages | nonsense }}", "nonsense"),
        ("{% include 'file' %}", "no loader"),
    ],
)
def test_a_template_that_breaks_is_a_value_error(template, match):
    with pytest.raises(ValueError, match=f"the model's chat template failed: .*{match}"):
        render_chat(template, TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ '%s' | format(messages) | attr('__class__') | attr('__mro__') | list }}",
    ],
)
def test_the_sandbox_holds(template):
    """Nothing beyond the arguments is reached, nothing is changed, nothing runs for ever."""
    talk = [dict(message) for message in TALK]
    try:
        text = render_chat(template, talk)
    except ValueError:
        text = ""
    assert text in ("", "[]")
    assert talk == TALK


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "at least one message; got none"),
        ([{"role": "user"}], r"needs role and content; got \{'role': 'user'\}"),
        ([{"content": "x"}], "needs role and content"),
        (["hello"], "needs role and content; got 'hello'"),
        ("hello", "needs role and content; got 'h'"),
        ([None], "needs role and content; got None"),
    ],
    ids=str,
)
def test_messages_that_are_none(messages, match):
    with pytest.raises(ValueError, match=match):
        render_chat("x", messages)


def test_tokens_of_a_conversation():
    words = byte_tokenizer()
    ids = words.apply_chat_template(TALK)
    assert words.decode(ids) == "system: S\nuser: Hé\nassistant: "
    ids = words.apply_chat_template(TALK, add_generation_prompt=False)
    assert words.decode(ids) == "system: S\nuser: Hé\n"
