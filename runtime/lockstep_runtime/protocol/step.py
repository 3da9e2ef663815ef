"""What one step computes: its sequences, their sampling parameters, and the sampled tokens."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from lockstep_runtime.protocol.images import ImageSpan


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence's next token is sampled. Draws are keyed by (seed, position), never by history or batch."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # in (0, 1]
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # in [0, 1]
    seed: int = 0  # 64 bits, unsigned
    logprobs: int = -1  # -1: none; 0: the drawn token's; k: also those of the k likeliest, and of the drawn one
    prompt_logprobs: int = -1  # the same of every token of the prompt but the first, which follows nothing


class Thoughts(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens between which a model reasons, where no grammar holds. If the prompt has not opened it, the answer's
    first token may."""

    opening: int
    closing: int
    open: bool = False  # by the prompt's end


GrammarKind = Literal["json_schema", "regex", "lark", "gbnf"]  # JSON text; Rust's regex; llguidance's dialect of Lark


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer's text must match; then the end is drawn. A form that the api's process has tried."""

    kind: GrammarKind
    text: str
    end_ids: tuple[int, ...]  # tokens that end the answer, drawn nowhere but where it is complete
    thoughts: Thoughts | None = None


class LogitRules(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What changes a sequence's logits before its next token is drawn, in this order; not its log probabilities."""

    bias: dict[int, float] = {}  # added to a token's logit
    min_tokens: int = 0  # as long as fewer were drawn, none of `end_ids` is
    end_ids: list[int] = []
    repetition_penalty: float = 1.0  # above 0: divides positive logits of tokens in prompt or answer, multiplies others
    frequency_penalty: float = 0.0  # from -2 to 2: taken off for every time that the answer has the token
    presence_penalty: float = 0.0  # from -2 to 2: taken off if the answer has the token
    grammar: Grammar | None = None

    @property
    def needs_prompt(self) -> bool:
        return self.repetition_penalty != 1

    @property
    def penalizes(self) -> bool:
        return self.needs_prompt or self.frequency_penalty != 0 or self.presence_penalty != 0


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 may not know of a sequence with rules: a process that is new, or has forgotten it."""

    rules: LogitRules
    start: int  # the position of tokens[0]: where what the rules look back on begins
    tokens: list[int]  # up to the slice's first


class Ruled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of a sequence with rules. Rank 0 remembers rules and tokens from draw to draw; if it doesn't, it draws nothing
    for the sequence (`StepDone.put_off`), and is asked again with the past."""

    drawn: int  # of the sequence's tokens, the slice's included
    past: Past | None = None


class Scoring(msgspec.Struct, frozen=True, kw_only=True):
    """Known tokens whose log probabilities are wanted: `targets[i]` follows the slice's token `first` + i."""

    first: int
    targets: list[int]
    logprobs: int  # as in `SamplingParams`, 0 or more


class StateSlots(msgspec.Struct, frozen=True, array_like=True):
    """Where one sequence's recurrent state is before a step, and where it is to be after it: never the same place, so
    that a step can be repeated. Slot 0 is what every sequence begins with."""

    read: int = 0
    write: int = 0


NO_STATE: Final = StateSlots()  # of models whose layers have none
PROBE_STATE_SLOTS: Final = 2  # behind those of requests: what the probe reads, and what it writes


class SequenceSlice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence's part of a step: feed `tokens` at `position`; with `sample` set, sample a token after the last."""

    sequence_id: int
    position: int  # of tokens[0] in the sequence
    tokens: list[int]
    blocks: list[int]  # the sequence's whole block table: covers position + len(tokens)
    state: StateSlots = NO_STATE
    sample: SamplingParams | None = None
    scoring: Scoring | None = None
    ruled: Ruled | None = None
    images: list[ImageSpan] = []  # that reach into the tokens, in order
    shift: int = 0  # of rotary positions: what the images before those have shifted them by

    @property
    def is_prefill(self) -> bool:
        """Whether it feeds a prompt, or a text that is computed again."""
        return len(self.tokens) > 1 or not self.position


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What rank 0 sampled for one sequence. Log probabilities are of the unmodified distribution, natural log."""

    sequence_id: int
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []
