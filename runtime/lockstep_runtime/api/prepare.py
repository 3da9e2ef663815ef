"""From a validated request to a job: the prompt's ids, the bounds on its length, what each choice draws with."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lockstep_runtime.api.chat import Chat, encode_chat
from lockstep_runtime.api.errors import invalid, too_long
from lockstep_runtime.api.forms import ChatForm, Form, TextForm
from lockstep_runtime.api.generation import Job
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.model import SamplingDefaults, ServedModel
from lockstep_runtime.api.schemas import ChatRequest, CompletionRequest
from lockstep_runtime.engine.interface import GenerationRequest
from lockstep_runtime.wire import SamplingParams

_SEEDS: Final = 2**64
_NEXT_SEED: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: seeds of neighbouring choices differ in many bits
COMPLETION_TOKENS: Final = 16  # OpenAI's default for /v1/completions


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a job is made with. `prepare_*` block (template, tokenizer): run them in a thread."""

    model: ServedModel
    served_name: str
    max_model_len: int
    limits: Limits

    def chat(self, request: ChatRequest) -> tuple[Job, Form]:
        if self.model.template is None:
            raise invalid("This model has no chat template: use /v1/completions", "messages")
        prompt = encode_chat(
            self.model.template,
            self.model.tokenizer,
            Chat(
                messages=[message.for_template() for message in request.messages],
                variables=request.chat_template_kwargs or {},
                add_generation_prompt=request.add_generation_prompt,
            ),
            seconds=self.limits.render_seconds,
            limit=self.limits.max_prompt_chars,
        )
        job = self._job("chatcmpl", request, [prompt], request.asked_tokens, "messages", request.asked_logprobs)
        return job, ChatForm(self.model.tokenizer, logprobs=request.asked_logprobs >= 0)

    def completion(self, request: CompletionRequest) -> tuple[Job, Form]:
        prompts = [self._ids(prompt) for prompt in request.prompt]
        job = self._job("cmpl", request, prompts, request.max_tokens, "prompt", request.asked_logprobs)
        texts = [self._text(prompt) if request.echo else "" for prompt in request.prompt]
        echoes = [text for text in texts for _ in range(request.choices)]
        return job, TextForm(self.model.tokenizer, echoes, logprobs=request.asked_logprobs >= 0)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        """Special tokens in a completion's prompt are meant: whoever writes one writes the whole prompt."""
        if isinstance(prompt, str):
            return self.model.tokenizer.encode(prompt, add_special_tokens=True)
        if max(prompt) >= self.model.tokenizer.size:
            raise invalid(f"prompt: token id {max(prompt)} is beyond {self.model.tokenizer.size - 1}", "prompt")
        return prompt

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)

    def _job(
        self,
        prefix: str,
        request: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        asked_tokens: int | None,
        param: str,
        logprobs: int,
    ) -> Job:
        id = f"{prefix}-{secrets.token_hex(12)}"
        seed = secrets.randbits(64) if request.seed is None else request.seed
        requests = [
            GenerationRequest(
                request_id=f"{id}-{index * request.choices + choice}",
                prompt=tuple(prompt),
                max_tokens=self._room(len(prompt), asked_tokens, param),
                sampling=sampling(request, self.model.defaults, (seed + choice * _NEXT_SEED) % _SEEDS, logprobs),
                stop_token_ids=self._stop_ids(request),
            )
            for index, prompt in enumerate(prompts)
            for choice in range(request.choices)
        ]
        return Job(
            id=id,
            created=int(time.time()),
            model=self.served_name,
            requests=tuple(requests),
            prompt_tokens=sum(map(len, prompts)),
            stops=tuple(request.stop or ()),
            reasoning=param == "messages",
            stream=bool(request.stream),
            include_usage=request.include_usage,
        )

    def _room(self, prompt: int, asked: int | None, param: str) -> int:
        """How many tokens may be drawn after a prompt of so many.

        Raises:
            ApiError: 400, they don't fit.
        """
        rest = self.max_model_len - prompt
        if not prompt:
            raise invalid(f"{param}: the prompt has no tokens", param)
        if rest < 1:
            message = f"This model's maximum context length is {self.max_model_len} tokens, but the prompt has {prompt}"
            raise too_long(f"{message}, which leaves no room for an answer", param)
        if asked is not None and asked > rest:
            message = f"This model's maximum context length is {self.max_model_len} tokens, but {prompt + asked} were"
            raise too_long(f"{message} asked for: {prompt} in the prompt and {asked} for the answer", "max_tokens")
        return asked or (rest if param == "messages" else min(COMPLETION_TOKENS, rest))

    def _stop_ids(self, request: ChatRequest | CompletionRequest) -> frozenset[int]:
        own = frozenset() if request.ignore_eos else self.model.stop_ids
        return own | frozenset(request.stop_token_ids or ())


def sampling(
    request: ChatRequest | CompletionRequest, defaults: SamplingDefaults, seed: int, logprobs: int
) -> SamplingParams:
    """What the request says, then what the model's authors advise."""
    top_k = defaults.top_k if request.top_k is None else request.top_k
    return SamplingParams(
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=max(0, top_k),
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        seed=seed,
        logprobs=logprobs,
    )
