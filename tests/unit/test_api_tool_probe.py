"""How a model writes calls is read from what its template makes of one."""

from __future__ import annotations

import pytest
from tests.support.api_server import TINY_CHAT
from tests.support.chat_model import CODER, HERMES, LLAMA, TEXT_ARGUMENTS, THINKING

from lockstep_runtime.api.chat_template import ChatTemplate
from lockstep_runtime.api.tools.probe import ToolSupport, probe

STRICT = "{% for m in messages %}{{ raise_exception('no') if m.tool_calls else m.content }}{% endfor %}"
OTHER = "{{ tools }}{% for m in messages if m.tool_calls %}CALL {{ m.tool_calls[0].function | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (HERMES, ToolSupport(format="hermes", shown=True)),
        (CODER, ToolSupport(format="qwen3_coder", shown=True)),
        (LLAMA, ToolSupport(format="llama3_json", shown=True)),
        (TEXT_ARGUMENTS, ToolSupport(format="hermes", shown=True, objects=False)),
        (OTHER, ToolSupport(format=None, shown=True)),
        (STRICT, ToolSupport()),
        (THINKING, ToolSupport()),
        ((TINY_CHAT / "chat_template.jinja").read_text(), ToolSupport()),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% set x = messages[0] %}{% endfor %}{% endfor %}",
         ToolSupport()),
    ],
)  # fmt: skip
def test_a_template_shows_how_calls_are_written(source: str, expected: ToolSupport) -> None:
    assert probe(ChatTemplate(source, {})) == expected
