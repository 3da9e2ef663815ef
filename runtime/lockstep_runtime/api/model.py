"""What the api needs of a model: tokenizer, chat template, the ids that end an answer, the sampling that is advised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import msgspec

from lockstep_runtime.api.chat import ChatTemplate
from lockstep_runtime.api.tokenizer import TextTokenizer, UnsupportedTokenizerError
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.weights.errors import ModelError
from lockstep_runtime.weights.source import find_model

_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ModelUnavailableError(Exception):
    """The model's text files can't be read now. The message is a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """From generation_config.json, for what a request leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    tokenizer: TextTokenizer
    template: ChatTemplate | None  # None: the model is no chat model
    stop_ids: frozenset[int]
    defaults: SamplingDefaults


def load(config: ServeConfig) -> ServedModel:
    """Blocking: run it in a thread.

    Raises:
        ModelUnavailableError: something is missing or malformed; it may be mended, so try again.
    """
    try:
        folder = find_model(config.model, config.model_revision, config.download_dir)
    except ModelError as error:
        raise ModelUnavailableError(str(error)) from error
    try:
        tokenizer = TextTokenizer.from_file(_existing(folder / "tokenizer.json"))
    except UnsupportedTokenizerError as error:
        raise ModelUnavailableError(f"{folder}/tokenizer.json can't be used: {error}") from error
    settings = _object(folder / "tokenizer_config.json")
    generation = _object(folder / "generation_config.json")
    return ServedModel(
        tokenizer=tokenizer,
        template=_template(folder, settings),
        stop_ids=_stop_ids(tokenizer, generation, _object(folder / "config.json"), settings),
        defaults=sampling_defaults(generation),
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelUnavailableError(f"The model has no {path.name}: {path} does not exist")
    return path


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no such file."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelUnavailableError(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelUnavailableError(f"{path} should hold a JSON object")
    return value


def _template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    source = _template_source(folder, settings)
    if source is None:
        return None
    tokens = {name: text for name in _TOKENS if (text := _token_text(settings.get(name))) is not None}
    try:
        return ChatTemplate(source, tokens)
    except jinja2.TemplateError as error:
        raise ModelUnavailableError(f"The model's chat template is malformed: {error}") from error


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The file of its own goes before the setting, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = _object(folder / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(found, list):
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}.get("default")
    return found if isinstance(found, str) else None


def _token_text(token: object) -> str | None:
    """Tokens are written as a string, or as an object with their properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _stop_ids(
    tokenizer: TextTokenizer, generation: Mapping[str, Any], config: Mapping[str, Any], settings: Mapping[str, Any]
) -> frozenset[int]:
    """Every file's say counts: a chat model's config.json often names only the base model's end of text."""
    text_config = config.get("text_config")
    places = [generation, config, text_config if isinstance(text_config, dict) else {}]
    ids = {id for place in places for id in _as_list(place.get("eos_token_id")) if isinstance(id, int)}
    named = tokenizer.id_of(_token_text(settings.get("eos_token")) or "")
    return frozenset(ids | ({named} if named is not None else set()))


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def sampling_defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """`do_sample: false` means greedy, as in transformers' `generate`; values out of range are left out."""
    if generation.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)
    top_k = generation.get("top_k")
    return SamplingDefaults(
        temperature=_number(generation, "temperature", 0.0, 2.0, otherwise=1.0),
        top_p=_number(generation, "top_p", 1e-9, 1.0, otherwise=1.0),
        min_p=_number(generation, "min_p", 0.0, 1.0, otherwise=0.0),
        top_k=max(0, top_k) if isinstance(top_k, int) else 0,
    )


def _number(values: Mapping[str, Any], name: str, least: float, most: float, *, otherwise: float) -> float:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and least <= value <= most else otherwise
