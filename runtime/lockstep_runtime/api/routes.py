"""The endpoints, and their description in /openapi.json."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import lockstep_runtime
from lockstep_runtime.api.answers import (
    COMPONENT,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    ReadyBody,
    Responses,
    Version,
    errors,
    streamed,
)
from lockstep_runtime.api.errors import unknown_model
from lockstep_runtime.api.metrics import CONTENT_TYPE
from lockstep_runtime.api.middleware import GUARDED
from lockstep_runtime.api.schemas import Body, ChatRequest, CompletionRequest
from lockstep_runtime.api.service import TheService
from lockstep_runtime.api.stream import Answer
from lockstep_runtime.api.tokenization import Detokenize, Text, TokenizeChat, TokenizeText, Tokens

_REFUSALS: Final = errors(400, 401, 404, 408, 413, 415, 500, 503)
_ANY_ERROR: Final[Responses] = {"default": {"model": ErrorBody, "description": "Any other error"}}

router = APIRouter(responses=_ANY_ERROR)


@router.get("/health", tags=["state"])
async def health() -> Health:
    """The process answers, no more."""
    return Health(status="ok")


@router.get("/ready", tags=["state"], responses={503: {"model": ReadyBody, "description": "It would not"}})
async def ready(service: TheService, response: Response) -> ReadyBody:
    """Whether a request sent now would make progress."""
    readiness = service.readiness()
    if not readiness.ready:
        response.status_code = 503
    return ReadyBody(ready=readiness.ready, reason=readiness.reason)


@router.get(
    "/metrics",
    tags=["state"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "For Prometheus"}},
)
async def metrics(service: TheService) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/v1/models", tags=["OpenAI"], responses=errors(401, 503))
async def models(service: TheService) -> ModelList:
    """The one model that is served."""
    return ModelList(object="list", data=[service.card()])


@router.get("/v1/models/{name:path}", tags=["OpenAI"], responses=errors(401, 404, 503))
async def model(name: str, service: TheService) -> ModelCard:
    """The model, if it is called so."""
    card = service.card()
    if name != card.id:
        raise unknown_model(name[:200], card.id)
    return card


async def _chat_answer(request: Request, service: TheService) -> Answer:
    return await service.answer(ChatRequest, request)


async def _completion_answer(request: Request, service: TheService) -> Answer:
    return await service.answer(CompletionRequest, request)


def _body(*kinds: type[Body]) -> dict[str, Any]:
    """A body of one of these kinds that is read, bounded and validated by a dependency of ours, in a thread."""
    references = [{"$ref": COMPONENT.format(model=kind.__name__)} for kind in kinds]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post(
    "/v1/chat/completions",
    tags=["OpenAI"],
    response_class=Response,
    responses=streamed(ChatCompletion, ChatCompletionChunk) | _REFUSALS,
    openapi_extra=_body(ChatRequest),
)
async def chat(answer: Annotated[Answer, Depends(_chat_answer)]) -> Response:
    """The answer to a conversation, whole or, with `stream`, as server-sent events."""
    return answer


@router.post(
    "/v1/completions",
    tags=["OpenAI"],
    response_class=Response,
    responses=streamed(Completion, Completion) | _REFUSALS,
    openapi_extra=_body(CompletionRequest),
)
async def completion(answer: Annotated[Answer, Depends(_completion_answer)]) -> Response:
    """The continuation of one prompt or of several, whole or, with `stream`, as server-sent events."""
    return answer


def _answers(kind: type[BaseModel]) -> Responses:
    return {200: {"model": kind, "description": "The answer"}, **_REFUSALS}


async def _tokens(request: Request, service: TheService) -> bytes:
    return await service.tokenize(request)


async def _decoded(request: Request, service: TheService) -> bytes:
    return await service.detokenize(request)


@router.post(
    "/tokenize",
    tags=["vLLM"],
    response_class=Response,
    responses=_answers(Tokens),
    openapi_extra=_body(TokenizeText, TokenizeChat),
)
async def tokenize(answer: Annotated[bytes, Depends(_tokens)]) -> Response:
    """The tokens of a text, or of a conversation as the model is given it."""
    return Response(answer, media_type="application/json")


@router.post(
    "/detokenize",
    tags=["vLLM"],
    response_class=Response,
    responses=_answers(Text),
    openapi_extra=_body(Detokenize),
)
async def detokenize(answer: Annotated[bytes, Depends(_decoded)]) -> Response:
    """The text of tokens, special ones included."""
    return Response(answer, media_type="application/json")


@router.get("/version", tags=["state"])
async def version() -> Version:
    """Of Lockstep."""
    return Version(version=lockstep_runtime.__version__)


def describe(app: FastAPI, served_name: str, *, with_key: bool) -> dict[str, Any]:
    """The OpenAPI document: what FastAPI finds, the bodies that are read by hand, the one model that there is, and the
    key if one is needed."""
    document = get_openapi(
        title="Lockstep", version=lockstep_runtime.__version__, routes=app.routes, description=_DESCRIPTION
    )
    by_hand: list[tuple[Any, Any]] = [
        (ChatRequest, "validation"),
        (CompletionRequest, "validation"),
        (TokenizeText, "validation"),
        (TokenizeChat, "validation"),
        (Detokenize, "validation"),
        (ChatCompletionChunk, "serialization"),
    ]
    _, schemas = models_json_schema(by_hand, ref_template=COMPONENT)
    document["components"]["schemas"] |= schemas["$defs"]
    for kind in (ChatRequest, CompletionRequest, TokenizeText, TokenizeChat, Detokenize):
        is_required = kind.model_fields["model"].is_required()
        names = {"enum": [served_name] if is_required else [served_name, None]}
        document["components"]["schemas"][kind.__name__]["properties"]["model"] |= names
    [named] = document["paths"]["/v1/models/{name}"]["get"]["parameters"]
    named["schema"] |= {"enum": [served_name]}
    if with_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if path.startswith(GUARDED):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
    return document


_DESCRIPTION: Final = (
    "OpenAI's chat completions and completions, with the fields that vLLM's users know. Fields that nobody knows are "
    "ignored; fields that mean something this server can't do are refused by name."
)
