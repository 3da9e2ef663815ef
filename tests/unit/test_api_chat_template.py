"""Templates that models bring render as transformers renders them."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.api_server import TINY_CHAT
from transformers import AutoTokenizer

from lockstep_runtime.api.chat_template import Chat, ChatTemplate
from lockstep_runtime.api.errors import ApiError

ORACLE: Any = AutoTokenizer.from_pretrained(TINY_CHAT)
MESSAGES: list[dict[str, object]] = [
    {"role": "system", "content": "be <brief> & 'kind'"},
    {"role": "user", "content": "été 日本\n"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "more"},
]
EACH = "{% for m in messages %}"
SOURCES = {
    "generation": EACH + "{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "generation trims as blocks do": EACH + "{%- generation -%}\n  {{ m.content }}\n{%- endgeneration %}\n{% endfor %}",
    "generation in an if": EACH
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}{% endif %}{% endfor %}",
    "generation has its own scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation around a loop": "{% generation %}" + EACH + "{{ m.content }}{% endfor %}{% endgeneration %}",
    "break": EACH + "{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": EACH + "{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}",
    "tojson ascii": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson indent": "{{ messages | tojson(indent=2) }}",
    "tojson separators": "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
    "tojson positional": "{{ messages | tojson(true, 4) }}",
    "namespace": "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1, b=messages[0].role) | tojson }}{{ dict.fromkeys(['a', 'b'], 3) | tojson }}",
    "macro and filters": "{% macro say(m) %}{{ m.role | upper }}={{ m.content | trim | length }}{% endmacro %}"
    + EACH
    + "{{ say(m) }};{% endfor %}",
    "selectattr": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}",
    "undefined": "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ messages[0].get('x', 'y') }}",
    "strings": "{{ messages[1].content.split(' ')[0].strip() }}{{ 'a' ~ messages[0].content.replace('<', '[') }}",
    "trim and lstrip": "{% if true %}\n  x\n  {% endif %}\n  y\n",
}


def rendered(source: str, messages: list[dict[str, object]] = MESSAGES, **variables: object) -> str:
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    chat = Chat(messages=messages, variables=variables)
    return ChatTemplate(source, tokens).render(chat, seconds=5, limit=100_000)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("count", [2, 4])
def test_templates_render_as_in_transformers(name: str, count: int) -> None:
    messages, source = MESSAGES[:count], SOURCES[name]
    expected = ORACLE.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
    assert rendered(source, messages) == expected


def test_the_day_is_known() -> None:
    source = "{{ strftime_now('%Y-%m-%d') }}"
    before, found, after = (
        ORACLE.apply_chat_template(MESSAGES, chat_template=source, tokenize=False),
        rendered(source),
        ORACLE.apply_chat_template(MESSAGES, chat_template=source, tokenize=False),
    )
    assert found in (before, after)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", "refused the messages"),
        ("{{ 1 // 0 }}", "can't render the messages: ZeroDivisionError"),
        ("{% for i in range(10000000) %}{% endfor %}", "can't render the messages: OverflowError"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_the_clients_to_know(source: str, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        rendered(source)
