"""What the assistant of these tests is asked, what it calls, and what it says in the end."""

from __future__ import annotations

from typing import Final

from tests.support.scripted_model import Script, call

MODEL: Final = "assistant"
AT_ONCE: Final = 2  # sequences
CITY: Final = "São Paulo"
ARGUMENTS: Final = {"city": CITY, "days": 2}
OTHERS: Final = ({"city": "Oslo", "days": 1}, {"city": "Rome", "days": 3})
QUESTION: Final = "What is the weather like?"
COMPARISON: Final = "Compare two cities, please."
PROSE: Final = "Let me look."
RESULT: Final = "sunny, 25 degrees"
FINAL: Final = "It will be sunny, about 25 degrees. ☀"
UNKNOWN: Final = "I have no idea."
SCRIPTS: Final = (
    Script("user", "weather", f"{PROSE}\n{call('get_weather', **ARGUMENTS)}"),
    Script("user", "Compare", "\n".join(call("get_weather", **other) for other in OTHERS)),
    Script("tool", "sunny", FINAL),
    Script("", "", UNKNOWN),
)
