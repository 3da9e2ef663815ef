"""Which parser reads a model's calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from lockstep_runtime.api.tools.json_calls import CALL, CALL_END, PYTHON_TAG, HermesCalls, LlamaCalls
from lockstep_runtime.api.tools.parser import ToolParser
from lockstep_runtime.api.tools.xml_calls import XmlCalls

ToolFormat = Literal["hermes", "qwen3_coder", "llama3_json"]
# Tokens that the parsers look for: they are text for them even where the tokenizer calls them special.
MARKERS: Final[dict[ToolFormat, tuple[str, ...]]] = {
    "hermes": (CALL, CALL_END),
    "qwen3_coder": (CALL, CALL_END),
    "llama3_json": (PYTHON_TAG,),
}


def tool_parser(format: ToolFormat, tools: Sequence[dict[str, Any]]) -> ToolParser:
    """
    Args:
        tools: as in a request.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    match format:
        case "hermes":
            return HermesCalls()
        case "llama3_json":
            return LlamaCalls(schemas)
        case "qwen3_coder":
            return XmlCalls(schemas)
