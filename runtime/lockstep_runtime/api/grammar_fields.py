"""Fields that constrain the form of an answer: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`.

Source: https://platform.openai.com/docs/guides/structured-outputs, vLLM's `StructuredOutputsParams`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lockstep_runtime.api.errors import invalid
from lockstep_runtime.protocol.step import GrammarKind

MAX_BYTES: Final = 64 * 1024  # of a schema or another form
MAX_CHOICES: Final = 4096
_ANY_OBJECT: Final = '{"type":"object"}'

_Schema = dict[str, Any] | str
_Choices = Annotated[list[str], Field(max_length=MAX_CHOICES)]


@dataclass(frozen=True, slots=True)
class Form:
    """Of an answer. `field` asked for it."""

    kind: GrammarKind
    text: str
    field: str


_EMPTY: Final[tuple[object, ...]] = ({}, [], "")


def _empty_is_none(value: object) -> object:
    return None if value in _EMPTY else value


def _or_empty(schema: dict[str, Any]) -> None:
    """The same, for the API's description."""
    if "anyOf" in schema:
        schema["anyOf"].append({"enum": list(_EMPTY)})
    else:
        del schema["type"]
        schema["enum"] = [None, *_EMPTY]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class JsonSchema(_Part):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="either way the answer matches the schema")


class OutputFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Part):
    json_: Annotated[_Schema | None, BeforeValidator(_empty_is_none)] = Field(
        None, alias="json", json_schema_extra=_or_empty
    )
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Annotated[None, BeforeValidator(_empty_is_none)] = Field(
        None, description="not supported", json_schema_extra=_or_empty
    )


class GrammarFields(BaseModel):
    """Part of every request for tokens."""

    response_format: Annotated[OutputFormat | None, BeforeValidator(_empty_is_none)] = Field(
        None, json_schema_extra=_or_empty
    )
    structured_outputs: Annotated[StructuredOutputs | None, BeforeValidator(_empty_is_none)] = Field(
        None, json_schema_extra=_or_empty
    )
    guided_json: Annotated[_Schema | None, BeforeValidator(_empty_is_none)] = Field(None, json_schema_extra=_or_empty)
    guided_regex: str | None = None
    guided_choice: _Choices | None = None
    guided_grammar: str | None = Field(None, description="in Lark's dialect of llguidance, or GBNF")


def form_of(request: GrammarFields) -> Form | None:
    """
    Raises:
        ApiError: 400, more than one is asked for, or one is too large.
    """
    forms = list(_forms(request))
    if len(forms) > 1:
        raise invalid(f"`{forms[0].field}` and `{forms[1].field}` ask for two forms of the answer", forms[1].field)
    return bounded(forms[0]) if forms else None


def bounded(form: Form) -> Form:
    """
    Raises:
        ApiError: 400, it is too large.
    """
    if (size := len(form.text.encode())) > MAX_BYTES:
        raise invalid(f"{form.field}: at most {MAX_BYTES} bytes, not {size}; ask for less", form.field)
    return form


def _forms(request: GrammarFields) -> Iterator[Form]:
    wanted = request.response_format
    if wanted is not None and wanted.type == "json_object":
        yield Form("json_schema", _ANY_OBJECT, "response_format")
    if wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise invalid("response_format.json_schema: a format of this type needs it", "response_format")
        yield Form("json_schema", _text(wanted.json_schema.schema_), "response_format")
    given = request.structured_outputs
    if given is not None:
        field = "structured_outputs"
        if given.json_object:
            yield Form("json_schema", _ANY_OBJECT, field)
        yield from _each(given.json_, given.regex, given.choice, given.grammar, [field] * 4)
    names = ["guided_json", "guided_regex", "guided_choice", "guided_grammar"]
    guided = (request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar)
    yield from _each(*guided, names)


def _each(
    schema: _Schema | None, regex: str | None, choice: list[str] | None, grammar: str | None, fields: list[str]
) -> Iterator[Form]:
    if schema is not None:
        yield Form("json_schema", schema if isinstance(schema, str) else _text(schema), fields[0])
    if regex:
        yield Form("regex", regex, fields[1])
    if choice:
        yield Form("lark", "start: " + " | ".join(_text(one) for one in choice), fields[2])
    if grammar:
        yield Form("gbnf" if "::=" in grammar else "lark", grammar, fields[3])


def _text(value: dict[str, Any] | str) -> str:
    """As JSON, in which Lark's strings are written, too."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
