"""Where a model keeps its chat template: a file of its own, several named ones, or a setting of the tokenizer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lockstep_runtime.sources.files import read_object, read_text

DEFAULT: Final = "default"
WITH_TOOLS: Final = "tool_use"  # transformers' name for the template of conversations with tools


@dataclass(frozen=True, slots=True)
class Templates:
    """Jinja by name, and where each stands."""

    sources: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, name: object, source: object, place: object) -> None:
        """The first of a name counts."""
        if isinstance(name, str) and isinstance(source, str) and name not in self.sources:
            self.sources[name], self.places[name] = source, str(place)

    @property
    def why_none(self) -> str:
        """Why there is no default to chat with."""
        if not self.sources:
            return "This model has no chat template: use /v1/completions"
        named = ", ".join(sorted(self.sources))
        return f"This model's chat templates ({named}) have no default among them: use /v1/completions"


def find_templates(folder: Path, settings: Mapping[str, Any]) -> Templates:
    """A file goes before a setting, as in transformers. `settings`: tokenizer_config.json.

    Raises:
        ModelError: a file can't be read.
    """
    found = Templates()
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        found.add(name, read_text(path), path)
    for place in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        holder = settings if place.name == "tokenizer_config.json" else read_object(place) or {}
        setting = holder.get("chat_template")
        if isinstance(setting, str):
            found.add(DEFAULT, setting, f"chat_template in {place}")
        named = setting if isinstance(setting, list) else []
        for item in named:
            if isinstance(item, dict):
                found.add(item.get("name"), item.get("template"), f"chat_template {item.get('name')!r} in {place}")
    return found
