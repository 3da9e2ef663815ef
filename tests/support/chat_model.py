"""tiny-chat's text side with the markers and templates of models that think and call tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from tests.support.api_server import TINY_CHAT
from tokenizers import AddedToken, Tokenizer

MARKERS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # text in an answer, as in Qwen3's tokenizer
SPECIAL: Final = ("<|python_tag|>", "<|eom_id|>")  # none, as in Llama 3's

# As Qwen3.5's: thinking begins in the prompt, unless it is switched off.
THINKING: Final = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}
{%- else %}{{ '<think>\n' }}{% endif %}
{%- endif %}"""


def _with_calls(call: str) -> str:
    """A template with tools. `call`: Jinja that writes one."""
    return rf"""
{{%- if tools %}}{{{{ '<|im_start|>system\n# Tools\n' }}}}
{{%- for tool in tools %}}{{{{ tool | tojson + '\n' }}}}{{% endfor %}}{{{{ '<|im_end|>\n' }}}}{{% endif %}}
{{%- for message in messages %}}{{{{ '<|im_start|>' + message.role + '\n' + message.content }}}}
{{%- for call in message.tool_calls or [] %}}
{{%- set name, arguments = call.function.name, call.function.arguments %}}
{call}
{{%- endfor %}}
{{{{- '<|im_end|>\n' }}}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"""


_HERMES: Final = (
    r"""{{- '\n<tool_call>\n{"name": "' + name + '", "arguments": ' + arguments | tojson + '}\n</tool_call>' }}"""
)
_CODER: Final = r"""
{{- '\n<tool_call>\n<function=' + name + '>\n' }}
{%- for key, value in arguments.items() %}
{{- '<parameter=' + key + '>\n' + (value if value is string else value | tojson) + '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}"""
_LLAMA: Final = r"""{{- '{"name": "' + name + '", "parameters": ' + arguments | tojson + '}' }}"""
HERMES: Final = _with_calls(_HERMES)  # as Qwen3's
CODER: Final = _with_calls(_CODER)  # as Qwen3-Coder's and Qwen3.5's
LLAMA: Final = _with_calls(_LLAMA)  # as Llama 3.1's
TEXT_ARGUMENTS: Final = _with_calls(_HERMES.replace("arguments | tojson", "arguments"))  # as DeepSeek V3's


def chat_tokenizer() -> Tokenizer:
    """tiny-chat's, with the markers."""
    tokenizer: Tokenizer = Tokenizer.from_file(str(TINY_CHAT / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKERS])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return tokenizer


def write_chat_model(folder: Path, template: str | None = None) -> Path:
    """What the api reads of a model.

    Args:
        template: Jinja in the place of tiny-chat's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(TINY_CHAT / name, folder)
    tokenizer = chat_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((TINY_CHAT / "config.json").read_text())
    config["vocab_size"] = tokenizer.get_vocab_size(with_added_tokens=True)
    (folder / "config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
