"""One sequence: its tokens so far, and how many of them stand in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep_runtime.engine.client import FinishReason, GenerationRequest
from lockstep_runtime.engine.prefix_keys import PrefixKeys
from lockstep_runtime.protocol.images import ImageSpan, shift_before
from lockstep_runtime.protocol.step import Past, Ruled, SampledToken, Scoring

QUARANTINE_AT = 2  # points of blame from which a sequence runs alone
REJECT_AT = 4  # and from which it is given up


@dataclass(slots=True)
class Sequence:
    """Owned by the scheduler; `id` rises with arrival and so is the order of service.

    `fault_points` counts faults of steps that it took part in since it last drew a token: 2 for a fault that a step can
    cause, 1 for the loss of a process.
    """

    id: int
    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    fault_points: int = 0
    overtaken: int = 0  # blocks that went to later ones while it waited as the first in line
    scored: int = 1  # tokens of the prompt whose log probabilities are known; the first has none
    scores: list[SampledToken] = field(default_factory=list)  # those that were not handed on yet
    cached: int | None = None  # of its tokens, that stood in the cache when it began; None: it has not begun yet
    keys: PrefixKeys | None = None  # of its blocks, if they were asked for
    stops: tuple[int, ...] = ()  # numbers of tokens, rising: a chunk ends there, for its recurrent state to be kept
    told: bool = False  # rank 0 has drawn by this sequence's rules: it knows them, and its tokens

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next can be sampled: 1 in decode, more in prefill."""
        return len(self.tokens) - self.computed

    @property
    def until_stop(self) -> int:
        """Tokens to compute before a chunk has to end; at least one."""
        return next((stop for stop in self.stops if stop > self.computed), len(self.tokens)) - self.computed

    @property
    def drawn(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_scored(self) -> bool:
        """Nothing of the prompt is left whose log probability was asked for."""
        return self.request.sampling.prompt_logprobs < 0 or self.scored >= len(self.request.prompt)

    @property
    def most_tokens(self) -> int:
        """The longest that it can get, prompt included."""
        return len(self.request.prompt) + self.request.max_tokens

    def scoring(self, end: int) -> Scoring | None:
        """What is to be scored when its tokens from `computed` to `end` are fed. Nothing twice, though a prompt that
        gave up its blocks is fed again."""
        first = max(self.computed, self.scored - 1)
        targets = [] if self.is_scored else list(self.request.prompt[first + 1 : end + 1])
        if not targets:
            return None
        return Scoring(first=first - self.computed, targets=targets, logprobs=self.request.sampling.prompt_logprobs)

    @property
    def awaits_grammar(self) -> bool:
        """Rank 0 may have to compile it before the first draw."""
        return self.request.rules is not None and self.request.rules.grammar is not None and not self.told

    def ruled(self, first: int, *, draws: bool) -> Ruled | None:
        """What goes with a slice from `first` on. Before a draw it is only what takes time to prepare."""
        rules = self.request.rules
        if rules is None:
            return None
        if not draws:
            return Ruled(drawn=0, past=Past(rules=rules, start=first, tokens=[])) if self.awaits_grammar else None
        if self.told:
            return Ruled(drawn=self.drawn)
        start = 0 if rules.needs_prompt else len(self.request.prompt)
        return Ruled(drawn=self.drawn, past=Past(rules=rules, start=start, tokens=self.tokens[start:first]))

    def images(self, end: int) -> list[ImageSpan]:
        """Those that its tokens from `computed` to `end` reach into."""
        spans = (image.span for image in self.request.images)
        return [span for span in spans if self.computed < span.stop and span.start < end]

    @property
    def shift(self) -> int:
        """Of its next token's rotary positions, by the images before it."""
        return shift_before((image.span for image in self.request.images), self.computed)

    def score(self, token: SampledToken) -> None:
        self.scored += 1
        self.scores.append(token)

    def take_scores(self) -> tuple[SampledToken, ...]:
        scores, self.scores = tuple(self.scores), []
        return scores

    def append(self, token: SampledToken, max_model_len: int) -> FinishReason | None:
        """Append the sampled token; returns the finish reason if it was the last."""
        self.tokens.append(token.token)
        self.fault_points = 0
        if token.token in self.request.stop_token_ids:
            return FinishReason.STOP
        if self.drawn >= self.request.max_tokens or len(self.tokens) >= max_model_len:
            return FinishReason.LENGTH
        return None
