"""Thirty conversations in OpenAI's form: tools and their results, thinking on and off, many scripts, code."""

from __future__ import annotations

import json
from typing import Any, Final

Conversation = dict[str, Any]

CODE: Final = (
    'def f(x: int) -> str:\n    """Doc."""\n    return f"{x!r:>10}\\t<|{x}|>"  # ½\n\n\n'
    '```bash\n$ ls -la | grep "\\.py$"\n```\n'
)
ARABIC: Final = "مرحبا، كيف الحال؟ \u200fالسعر ١٢٣ \u202aUSD\u202c ﷺ"  # noqa: RUF001
HEBREW: Final = "שלום עולם! \u05e9\u05c1\u05b8 (C++) 50%"
EMOJI: Final = "👩‍👩‍👧 🇨🇭 👍🏽 ☹️ e\u0301\u0302 🫠🏳️‍🌈"
ASIAN: Final = "日本語の文章、中文字符。한국어 문장 ไทย हिन्दी"
SPACES: Final = "  two  spaces\t\ttabs\n\n\n\nlines \u00a0\u3000\r\nend  "
WEATHER: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather, in °C",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "e.g. Zürich"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
SEARCH: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": 'Finds "things" & more <b>',
        "parameters": {"type": "object", "properties": {}},
    },
}
ODD_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {"name": "日本_tool", "parameters": None, "strict": True},
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: str | None, *calls: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    made = [
        {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for index, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, **({"tool_calls": made} if made else {}), **more}


def result(content: str, index: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{index}", "content": content}


def chat(*messages: dict[str, Any], **more: Any) -> Conversation:
    return {"messages": list(messages), **more}


ZURICH: Final = ("get_weather", {"city": "Zürich", "days": 3})
TOKYO: Final = ("get_weather", {"city": "東京 🗼"})
ODD: Final = ("search", {"q": 'a "b" \\ \n\t', "nested": {"list": [1, 2.5, None, True, []]}, "": ""})
NO_THINKING: Final = {"chat_template_kwargs": {"enable_thinking": False}}
THINKING: Final = {"chat_template_kwargs": {"enable_thinking": True}}
TOOLS: Final = [WEATHER, SEARCH]

PLAIN: Final[list[Conversation]] = [
    chat(user("Hi")),
    chat(system("Be brief."), user("Hi")),
    chat({"role": "developer", "content": "Be brief."}, user("Hi"), assistant("Ho"), user("So?\n")),
    chat(user(CODE)),
    chat(user(ARABIC), assistant(HEBREW), user(ARABIC + HEBREW)),
    chat(system(EMOJI), user(EMOJI * 5)),
    chat(user(ASIAN), assistant(ASIAN), user(CODE)),
    chat(user(SPACES), assistant(SPACES), user(SPACES)),
    chat(user("")),
    chat(user([{"type": "text", "text": "one"}, {"type": "text", "text": EMOJI}])),
    chat(system(""), user("1234567890 ½ ⅷ 3.14159e-10")),
    chat(user("don't we'll I'M 'S"), assistant("x" * 400), user("word " * 300)),
    chat(*[turn for n in range(20) for turn in (user(f"{n}?"), assistant(f"{n}!"))], user("end")),
    chat(user("Go on"), assistant("One, two,"), add_generation_prompt=False),
    chat(user("Hi"), assistant("a"), assistant("b"), user("c"), user("d")),
]
THOUGHTFUL: Final[list[Conversation]] = [
    chat(user("2+2?"), **THINKING),
    chat(user("2+2?"), **NO_THINKING),
    chat(user("2+2? /no_think"), reasoning_effort="none"),
    chat(user("2+2?"), assistant("4", reasoning_content="2+2 is 4\n"), user("3+3?"), **THINKING),
    chat(user("2+2?"), assistant("<think>\nhm\n</think>\n\n4"), user("3+3?"), **NO_THINKING),
    chat(user("2+2?"), assistant("4", reasoning=ARABIC + CODE), add_generation_prompt=False),
]
WITH_TOOLS: Final[list[Conversation]] = [
    chat(user("Weather?"), tools=TOOLS),
    chat(system("Be brief. 🎉"), user(HEBREW), tools=[*TOOLS, ODD_TOOL], **NO_THINKING),
    chat(user("Weather?"), assistant(None, ZURICH), result('{"t": 21.5, "sky": "☀️"}'), tools=TOOLS),
    chat(user("Both?"), assistant("I look.", ZURICH, TOKYO), result("21", 0), result("19", 1), tools=TOOLS, **THINKING),
    chat(user("Both?"), assistant("", ZURICH, TOKYO), result("21"), assistant("It is 21."), user("And?"), tools=TOOLS),
    chat(user(CODE), assistant(None, ODD), result(CODE), assistant(None, ODD), result(ARABIC), tools=[SEARCH]),
    chat(user("?"), assistant("", ZURICH, reasoning_content="I must look\n\nit up"), result("21"), tools=TOOLS),
    chat(user("?"), assistant("", ZURICH, reasoning="hm"), result(EMOJI), tools=TOOLS, **NO_THINKING),
]
# A conversation may go on without the tools that it had.
AFTER_TOOLS: Final[list[Conversation]] = [
    chat(
        *(user("Weather?"), assistant("I look.", ZURICH), result("21"), assistant("It is 21."), user(ASIAN)),
        tool_choice="none",
        tools=TOOLS,
    ),
]
ALL: Final = [*PLAIN, *THOUGHTFUL, *WITH_TOOLS, *AFTER_TOOLS]


def for_transformers(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and settings of `apply_chat_template`, which takes a call's arguments as an object."""
    messages = [_message(message) for message in conversation["messages"]]
    variables = dict(conversation.get("chat_template_kwargs", {}))
    if "reasoning_effort" in conversation:
        effort = conversation["reasoning_effort"]
        variables |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    tools = conversation.get("tools") if conversation.get("tool_choice") != "none" else None
    prompt = conversation.get("add_generation_prompt", True)
    return messages, {"tools": tools, "add_generation_prompt": prompt, **variables}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    made = dict(message)
    if made["role"] == "developer":
        made["role"] = "system"
    if isinstance(made["content"], list):
        made["content"] = "\n".join(part["text"] for part in made["content"])
    made["content"] = made["content"] or ""
    if "tool_calls" in made:
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in made["tool_calls"]
        ]
    return made
