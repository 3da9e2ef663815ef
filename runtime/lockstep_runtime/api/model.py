"""What the api needs of a model: tokenizer, chat template, the ids that end an answer, the sampling that is advised."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeGuard

import jinja2

from lockstep_runtime.api.chat_template import ChatTemplate
from lockstep_runtime.api.reasoning import CLOSING, OPENING, ReasoningMarkers, find_markers
from lockstep_runtime.api.template_files import DEFAULT, WITH_TOOLS, Templates, find_templates
from lockstep_runtime.api.tokenizer import TextTokenizer, UnsupportedTokenizerError
from lockstep_runtime.api.tools.probe import NO_TOOLS, ToolSupport, probe
from lockstep_runtime.config import ReasoningParser, ServeConfig, ToolCallParser
from lockstep_runtime.sources.errors import ModelError, may_pass
from lockstep_runtime.sources.files import read_bytes, read_object
from lockstep_runtime.sources.image_processor import ImageProcessor, image_processor, with_image_processor
from lockstep_runtime.sources.model_config import text_config
from lockstep_runtime.sources.model_folder import StillFetchingError, locate

_EVERY_TOKEN: Final = 2**31 - 1  # and a whole number that every process takes
_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


_NO_VISION: Final = "for it has no vision part"
_NO_PROCESSOR: Final = "for no preprocessor_config.json says how its images are prepared"


class Problem(enum.StrEnum):
    """Errors that keep a model's text files from being used. Each is reported in the group's status."""

    MODEL_NOT_FOUND = "the model's folder"  # or the hub did not deliver it, or it may not be entered
    NO_TOKENIZER = "tokenizer.json is missing"
    TOKENIZER_UNREADABLE = "tokenizer.json can't be read"
    TOKENIZER_UNUSABLE = "tokenizer.json is none that the library knows"
    SETTINGS_UNREADABLE = "config.json, generation_config.json or tokenizer_config.json"
    TEMPLATE_UNREADABLE = "the chat template's file"
    TEMPLATE_MALFORMED = "the chat template's Jinja"
    PARSER_UNFIT = "the parser that was asked for"
    UNEXPECTED = "anything else"


class ModelUnavailableError(Exception):
    """The model's text files can't be used now. The message is a sentence. Retry, but not before `retry_after` seconds.
    `may_pass`: it may resolve by itself."""

    def __init__(self, problem: Problem, message: str, retry_after: float = 0.0, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.problem = problem
        self.retry_after = retry_after
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """From generation_config.json, for what a request leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None  # of an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    tokenizer: TextTokenizer
    template: ChatTemplate | None  # None: the model is no chat model, and `why_no_template` says so
    why_no_template: str = ""
    markers: ReasoningMarkers | None = None  # None: reasoning is part of the answer
    tool_template: ChatTemplate | None = None  # for conversations with tools, if it is another
    tools: ToolSupport = NO_TOOLS
    images: ImageProcessor | None = None  # None: the model takes text only, and `why_no_images` says so
    why_no_images: str = _NO_VISION
    stop_ids: frozenset[int]
    defaults: SamplingDefaults
    vocabulary: int | None = None  # rows of its embedding: a token's id must be less; None: nobody says


def load(config: ServeConfig) -> ServedModel:
    """Blocking: run it in a thread.

    Raises:
        ModelUnavailableError: something is missing or malformed; retry, it may be fixed.
        StillFetchingError: it is on its way.
    """
    try:
        return _load(config)
    except (ModelUnavailableError, StillFetchingError):
        raise
    except Exception as error:  # whatever is in files that others wrote: it is told, not logged alone
        message = f"the tokenizer and the chat template can't be read: {type(error).__name__}: {error}"
        raise ModelUnavailableError(Problem.UNEXPECTED, message, may_pass=may_pass(error)) from error


def _load(config: ServeConfig) -> ServedModel:
    with _told_as(Problem.MODEL_NOT_FOUND):
        folder = locate(config)
    with _told_as(Problem.SETTINGS_UNREADABLE):
        names = ("tokenizer_config.json", "generation_config.json", "config.json")
        settings, generation, model = (read_object(folder / name) or {} for name in names)
    named = text_config(model).get("vocab_size")
    rows = named if _is_count(named) else None
    tokenizer = _tokenizer(folder / "tokenizer.json", rows)
    with _told_as(Problem.TEMPLATE_UNREADABLE):
        templates = find_templates(folder, settings)
    template = _template(templates, settings, DEFAULT)
    tool_template = _template(templates, settings, WITH_TOOLS) or template
    return ServedModel(
        tokenizer=tokenizer,
        template=template,
        why_no_template=templates.why_none,
        markers=_markers(tokenizer, config.reasoning_parser),
        tool_template=tool_template,
        tools=_tools(tool_template, config.tool_call_parser),
        images=_images(folder, model, config),
        why_no_images=_NO_PROCESSOR if "vision_config" in model else _NO_VISION,
        stop_ids=_stop_ids(tokenizer, generation, model, settings),
        defaults=sampling_defaults(generation),
        vocabulary=rows,
    )


def _images(folder: Path, model: Mapping[str, Any], config: ServeConfig) -> ImageProcessor | None:
    with _told_as(Problem.SETTINGS_UNREADABLE):
        processor = image_processor(with_image_processor(folder, model))
    return processor and processor.limited(config.vision.max_pixels, config.vision.min_pixels)


@contextmanager
def _told_as(problem: Problem) -> Iterator[None]:
    try:
        yield
    except StillFetchingError:
        raise
    except ModelError as error:
        raise ModelUnavailableError(problem, str(error), error.retry_after, may_pass=may_pass(error)) from error


def _tokenizer(path: Path, rows: int | None) -> TextTokenizer:
    with _told_as(Problem.TOKENIZER_UNREADABLE):
        content = read_bytes(path)
    if content is None:
        words = f"The model has no tokenizer.json: {path} does not exist"
        if others := [name for name in ("tokenizer.model", "vocab.json") if (path.parent / name).exists()]:
            words += f"; make one of {others[0]} with transformers (AutoTokenizer, save_pretrained)"
        raise ModelUnavailableError(Problem.NO_TOKENIZER, words)
    try:
        return TextTokenizer.from_file(path, rows)
    except UnsupportedTokenizerError as error:
        raise ModelUnavailableError(Problem.TOKENIZER_UNUSABLE, f"{path} can't be used: {error}") from error


def _template(templates: Templates, settings: Mapping[str, Any], name: str) -> ChatTemplate | None:
    source = templates.sources.get(name)
    if source is None:
        return None
    tokens = {name: text for name in _TOKENS if (text := _token_text(settings.get(name))) is not None}
    try:
        return ChatTemplate(source, tokens)
    except jinja2.TemplateSyntaxError as error:
        words = f"{templates.places[name]}: the chat template is malformed in line {error.lineno}: {error.message}"
        raise ModelUnavailableError(Problem.TEMPLATE_MALFORMED, words) from error


def _markers(tokenizer: TextTokenizer, parser: ReasoningParser) -> ReasoningMarkers | None:
    markers = find_markers(tokenizer.added, parser)
    if markers is None and parser not in ("auto", "none"):
        words = f"--reasoning-parser {parser} needs the tokens {OPENING} and {CLOSING}, which the tokenizer lacks"
        raise ModelUnavailableError(Problem.PARSER_UNFIT, f"{words}: choose auto or none")
    return markers


def _tools(template: ChatTemplate | None, parser: ToolCallParser) -> ToolSupport:
    if template is None:
        return NO_TOOLS
    found = probe(template)
    match parser:
        case "auto":
            return found
        case "none":
            return replace(found, format=None)
        case _:
            return replace(found, format=parser)


def _token_text(token: object) -> str | None:
    """Tokens are written as a string, or as an object with their properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _stop_ids(
    tokenizer: TextTokenizer, generation: Mapping[str, Any], config: Mapping[str, Any], settings: Mapping[str, Any]
) -> frozenset[int]:
    """The union over all files: a chat model's config.json often has only the base model's end of text."""
    places = [generation, config, text_config(config)]
    ids = {id for place in places for id in _as_list(place.get("eos_token_id")) if _is_count(id)}
    named = tokenizer.id_of(_token_text(settings.get("eos_token")) or "")
    return frozenset(ids | ({named} if named is not None else set()))


def _is_count(value: object) -> TypeGuard[int]:
    """A bool is an int to Python, and not to JSON."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def sampling_defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """Of the keys that vLLM reads. `do_sample: false` means greedy, as in transformers' `generate`; values out of range
    are left out."""
    top_k, most = generation.get("top_k"), generation.get("max_new_tokens")
    always = SamplingDefaults(
        temperature=0.0,
        repetition_penalty=_number(generation, "repetition_penalty", 0.01, 100.0, otherwise=1.0),
        max_tokens=most if _is_count(most) and most > 0 else None,
    )
    if generation.get("do_sample") is False:
        return always
    return replace(
        always,
        temperature=_number(generation, "temperature", 0.0, 2.0, otherwise=1.0),
        top_p=_number(generation, "top_p", 1e-9, 1.0, otherwise=1.0),
        min_p=_number(generation, "min_p", 0.0, 1.0, otherwise=0.0),
        top_k=min(top_k, _EVERY_TOKEN) if _is_count(top_k) else 0,
    )


def _number(values: Mapping[str, Any], name: str, least: float, most: float, *, otherwise: float) -> float:
    value = values.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return float(value)
    return otherwise
