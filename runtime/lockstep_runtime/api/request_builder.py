"""From a validated request to a job: the prompt's ids, the bounds on its length, what each choice draws with."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from lockstep_runtime.api.chat_prompt import ChatPrompt, chat_prompt
from lockstep_runtime.api.errors import ApiError, invalid, too_long
from lockstep_runtime.api.generation import Job, ToolUse
from lockstep_runtime.api.grammar_fields import Form, bounded, form_of
from lockstep_runtime.api.grammars import grammar_of
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.model import SamplingDefaults, ServedModel
from lockstep_runtime.api.response_format import ChatFormat, CompletionFormat, ResponseFormat
from lockstep_runtime.api.rule_fields import rules_of
from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest
from lockstep_runtime.api.tokenizer import TooManyTokensError
from lockstep_runtime.api.tools.grammar import MARKED, calls_grammar
from lockstep_runtime.engine.client import GenerationRequest
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.protocol.step import Grammar, SamplingParams

_SEEDS: Final = 2**64
_NEXT_SEED: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: seeds of neighbouring choices differ in many bits
COMPLETION_TOKENS: Final = 16  # OpenAI's default for /v1/completions


@dataclass(frozen=True, slots=True)
class RequestBuilder:
    """What a job is made with. `prepare_*` block (template, tokenizer): run them in a thread."""

    model: ServedModel
    served_name: str
    max_model_len: int
    limits: Limits

    def build(self, request: ChatRequest | CompletionRequest, images: Sequence[Pixels]) -> tuple[Job, ResponseFormat]:
        return self.chat(request, images) if isinstance(request, ChatRequest) else self.completion(request)

    def chat(self, request: ChatRequest, images: Sequence[Pixels] = ()) -> tuple[Job, ResponseFormat]:
        try:
            prompt = chat_prompt(self.model, request, self.limits, most=self.max_model_len, images=images)
        except TooManyTokensError as error:
            raise self._too_long(str(error), "messages") from None
        form = self._form(request)
        grammar = None if form is None else grammar_of(form, self.model, prompt)
        asked = request.asked_tokens
        requests = self._requests("chatcmpl", request, [tuple(prompt.ids)], asked, "messages", grammar=grammar)
        requests = [replace(one, images=prompt.images) for one in requests] if images else requests
        logprobs = request.asked_logprobs >= 0
        job = self._job(request, requests, prompt=prompt, tools=self._tools(request), form=form)
        return job, ChatFormat(self.model.tokenizer, len(requests), logprobs=logprobs, echo=request.echoed)

    def _form(self, request: ChatRequest) -> Form | None:
        """
        Raises:
            ApiError: 400, more than one is asked for, or one is too large.
        """
        form, format, demanded = form_of(request), self.model.tools.format, request.demanded_tools
        parallel = not isinstance(request.tool_choice, tuple) and request.parallel_tool_calls is not False
        if format is None or request.offered_tools is None:
            return form
        if demanded is not None:
            if form is not None:
                raise invalid(f"`tool_choice` and `{form.field}` ask for two forms of the answer", form.field)
            return bounded(Form("lark", calls_grammar(format, demanded, parallel=parallel), "tool_choice"))
        if form is not None and form.field == "response_format" and format in MARKED:  # where it calls no tool
            grammar = calls_grammar(format, request.offered_tools, parallel=parallel, otherwise=form.text)
            return bounded(Form("lark", grammar, form.field))
        return form

    def _tools(self, request: ChatRequest) -> ToolUse | None:
        format, tools = self.model.tools.format, request.offered_tools
        if format is None or tools is None:
            return None
        return ToolUse(format=format, tools=tools, parallel=request.parallel_tool_calls is not False)

    def completion(self, request: CompletionRequest) -> tuple[Job, ResponseFormat]:
        special = request.add_special_tokens is not False
        prompts = [self._ids(prompt, special) for prompt in request.prompt]
        prompt_only = request.max_tokens == 0
        asked = 1 if prompt_only else request.max_tokens
        scores = bool(request.echo) and request.logprobs is not None
        wanted = form_of(request)
        grammar = None if wanted is None else grammar_of(wanted, self.model)
        requests = self._requests("cmpl", request, prompts, asked, "prompt", scores, grammar=grammar)
        texts = [self._text(prompt) if request.echo else "" for prompt in request.prompt]
        echoes = [text for text in texts for _ in range(request.drawn)]
        shown = [one.prompt for one in requests] if scores else ()
        logprobs, special_too = request.logprobs is not None, request.skip_special_tokens is False
        form = CompletionFormat(self.model.tokenizer, echoes, shown, logprobs=logprobs, shows_special=special_too)
        return self._job(request, requests, prompt_only=prompt_only, scores_prompt=scores, form=wanted), form

    def _ids(self, prompt: str | list[int], special: bool) -> tuple[int, ...]:
        """Special tokens in a completion's prompt are intended: its author writes the whole prompt."""
        if isinstance(prompt, str):
            try:
                encode = self.model.tokenizer.encode
                return tuple(encode(prompt, add_special_tokens=special, most=self.max_model_len))
            except TooManyTokensError as error:
                raise self._too_long(str(error), "prompt") from None
        if len(prompt) >= self.max_model_len:
            raise self._too_long(str(len(prompt)), "prompt")
        if max(prompt) >= self.model.tokenizer.size:
            message = f"prompt: token id {max(prompt)} is beyond {self.model.tokenizer.size - 1}"
            raise invalid(message, "prompt", "unknown_token")
        return tuple(prompt)

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)

    def _requests(
        self,
        prefix: str,
        request: ChatRequest | CompletionRequest,
        prompts: Sequence[tuple[int, ...]],
        asked_tokens: int | None,
        param: str,
        scores_prompt: bool = False,
        *,
        grammar: Grammar | None = None,
    ) -> list[GenerationRequest]:
        for prompt in prompts:
            self._check_rows(prompt, param)
        id = f"{prefix}-{secrets.token_hex(12)}"
        seed = secrets.randbits(64) if request.seed is None else request.seed
        stops = self.model.stop_ids | frozenset(request.stop_token_ids or ())
        rules = rules_of(request, self.model, stops, grammar)
        return [
            GenerationRequest(
                request_id=f"{id}-{index * request.drawn + choice}",
                prompt=prompt,
                max_tokens=self._room(len(prompt), asked_tokens, param, request.min_tokens or 0),
                sampling=sampling(
                    request, self.model.defaults, (seed + choice * _NEXT_SEED) % _SEEDS, scores_prompt=scores_prompt
                ),
                stop_token_ids=self._stop_ids(request) if grammar is None else stops,
                rules=rules,
                cache_salt=request.cache_salt or "",
            )
            for index, prompt in enumerate(prompts)
            for choice in range(request.drawn)
        ]

    def _job(
        self,
        request: ChatRequest | CompletionRequest,
        requests: Sequence[GenerationRequest],
        *,
        prompt: ChatPrompt | None = None,
        tools: ToolUse | None = None,
        prompt_only: bool = False,
        scores_prompt: bool = False,
        form: Form | None = None,
    ) -> Job:
        self._check_logprobs(request, requests, scores_prompt)
        return Job(
            id=requests[0].request_id.rpartition("-")[0],
            created=int(time.time()),
            model=self.served_name,
            requests=tuple(requests),
            prompt_tokens=sum(len(one.prompt) for one in requests[:: request.drawn]),
            stops=tuple(request.stop or ()),
            includes_stop=bool(request.include_stop_str_in_output),
            shows_special=request.skip_special_tokens is False,
            chat=prompt is not None,
            continues=prompt is None or prompt.continues,
            markers=None if prompt is None else self.model.markers,
            thinks=prompt is not None and prompt.thinks,
            tools=tools,
            form_field="" if form is None else form.field,
            prompt_only=prompt_only,
            scores_prompt=scores_prompt,
            drawn=request.drawn,
            kept=request.choices,
            stream=bool(request.stream),
            include_usage=request.include_usage,
        )

    def _check_rows(self, prompt: Sequence[int], param: str) -> None:
        """
        Raises:
            ApiError: 400, a token has no row in the model's embedding: the tokenizer knows more than the model.
        """
        rows, greatest = self.model.vocabulary, max(prompt, default=0)
        if rows is not None and greatest >= rows:
            token = self.model.tokenizer.token_of(greatest)
            message = f"{param}: the model knows no token {greatest} ({token!r}): it has {rows}"
            raise invalid(message, param, "unknown_token")

    def _check_logprobs(
        self, request: ChatRequest | CompletionRequest, requests: Sequence[GenerationRequest], scores_prompt: bool
    ) -> None:
        """A whole answer is held until it is complete, and a prompt's log probabilities come at once.

        Raises:
            ApiError: 400, they would be too many.
        """
        held = sum(
            (len(one.prompt) if scores_prompt else 0) + (0 if request.stream else one.max_tokens) for one in requests
        )
        asked, most = held * (request.asked_logprobs + 1), self.limits.max_logprobs
        if asked > most:
            message = f"The answer could hold {asked} log probabilities; at most {most} are given at once"
            raise invalid(f"{message}: ask for fewer tokens, choices or `logprobs`, or stream the answer", "logprobs")

    def _room(self, prompt: int, asked: int | None, param: str, least: int) -> int:
        """How many tokens may be sampled after a prompt of this length, where so many must be at least.

        Raises:
            ApiError: 400, they don't fit.
        """
        rest = self.max_model_len - prompt
        if not prompt:
            raise invalid(f"{param}: the prompt has no tokens", param)
        if rest < 1:
            raise self._too_long(str(prompt), param)
        if asked is not None and asked > rest:
            message = f"This model's maximum context length is {self.max_model_len} tokens, but {prompt + asked} were"
            raise too_long(f"{message} asked for: {prompt} in the prompt and {asked} for the answer", "max_tokens")
        default = self.model.defaults.max_tokens or rest if param == "messages" else COMPLETION_TOKENS
        most = asked or min(default, rest)
        if least > most:
            raise invalid(f"min_tokens: {least} are more than the {most} tokens that the answer may have", "min_tokens")
        return most

    def _too_long(self, tokens: str, param: str) -> ApiError:
        message = f"This model's maximum context length is {self.max_model_len} tokens, but the prompt has {tokens}"
        return too_long(f"{message}, which leaves no room for an answer", param)

    def _stop_ids(self, request: ChatRequest | CompletionRequest) -> frozenset[int]:
        own = frozenset() if request.ignore_eos else self.model.stop_ids
        return own | frozenset(request.stop_token_ids or ())


def sampling(
    request: ChatRequest | CompletionRequest, defaults: SamplingDefaults, seed: int, *, scores_prompt: bool = False
) -> SamplingParams:
    """The request's values, else the defaults of the model's generation_config.json."""
    top_p = defaults.top_p if request.top_p is None else request.top_p
    top_k = defaults.top_k if request.top_k is None else request.top_k
    return SamplingParams(
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=top_p or 1.0,
        top_k=max(0, top_k) if top_p else 1,  # the smallest nucleus there is
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        seed=seed,
        logprobs=max(request.asked_logprobs, -1 if request.drawn == request.choices else 0),  # by which they are ranked
        prompt_logprobs=request.asked_logprobs if scores_prompt else -1,
    )
