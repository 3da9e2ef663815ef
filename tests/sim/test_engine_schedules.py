"""Thousands of random schedules: every request finishes with the right tokens, no block is lost or used twice, and no
state is read that is not the text's."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from tests.support.fake_ranks import check_sharing, continuation, next_token, scores, toy_logprob

from lockstep_runtime.engine.client import GenerationRequest
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.protocol.step import Grammar, LogitRules, SampledToken, SamplingParams, SequenceSlice
from lockstep_runtime.worker.rulebook import Rulebook

SCHEDULES = 3000
BATCHES = 10


GARBAGE = -1
PENALIZED = LogitRules(repetition_penalty=1.1)
PENALIZED_ANSWER = LogitRules(presence_penalty=0.5)
CONSTRAINED = LogitRules(grammar=Grammar(kind="regex", text=".*", end_ids=()))


class Life:
    """One random schedule: arrivals, steps, cancellations and faults, on a machine with too few blocks.

    Some prompts begin alike. After a fault the cache is new, or goes on with whatever the step that failed has left in
    what it writes to; or garbage was found, and what no sequence holds may be garbage, too. Rank 0 forgets the rules of
    sequences now and then, and takes its time for a grammar.

    Half of the models have recurrent states: `states[slot]` is of which tokens.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.block_size = self.random.choice([1, 2, 4, 16])
        self.blocks = self.random.randint(3, 24)
        self.capacity = self.blocks * self.block_size
        self.budget = self.random.randint(2, 24)
        self.state_slots = self.random.choice([0, self.random.randint(3, 24)])
        self.states: dict[int, tuple[int, ...]] = {0: ()}
        self.scheduler = Scheduler(
            max_sequences=self.random.randint(1, 8),
            max_batch_tokens=self.budget,
            max_model_len=self.capacity,
            blocks=self.blocks,
            block_size=self.block_size,
            prefix_caching=self.random.random() < 0.8,
            state_slots=self.state_slots,
        )
        self.beginnings = [self.tokens(self.random.randint(1, self.capacity)) for _ in range(2)]
        self.turns: list[tuple[str, tuple[int, ...]]] = []  # salts, prompts with their answers
        self.cache: dict[tuple[int, int], int] = {}
        self.to_come = self.random.randint(1, 16)
        self.sequences = 0
        self.open: dict[int, tuple[GenerationRequest, list[int]]] = {}
        self.faults_left = self.random.choice([0, 0, 1, 3])
        self.rulebook = Rulebook(3)  # rank 0's: too small for all

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(1000) for _ in range(count))

    def arrive(self) -> None:
        self.to_come -= 1
        self.sequences += 1
        prompt_length = self.random.randint(1, self.capacity - 1)
        if self.random.random() < 0.7:
            prompt_length = min(prompt_length, self.random.choice([5, 3 * self.block_size]))
        max_tokens = self.random.randint(1, min(12, self.capacity - prompt_length))
        shared = self.random.choice(self.beginnings)[: self.random.choice([0, prompt_length, prompt_length - 1])]
        salt = self.random.choice(["", "", "salt"])
        turns = [turn for turn in self.turns if len(turn[1]) < prompt_length]
        if turns and self.random.random() < 0.8:
            salt, shared = self.random.choice(turns)
        prompt = shared + self.tokens(prompt_length - len(shared))
        request = GenerationRequest(
            request_id="r",
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=0, prompt_logprobs=self.random.choice([-1, -1, 0])),
            cache_salt=salt,
            rules=self.random.choice([None, None, PENALIZED, PENALIZED_ANSWER, CONSTRAINED]),
        )
        self.open[self.sequences] = (request, [])
        self.scheduler.add(Sequence(self.sequences, request))

    def compute(self, slices: list[SequenceSlice]) -> tuple[list[SampledToken], list[SampledToken]]:
        """What is drawn, and what is scored."""
        assert sum(len(part.tokens) for part in slices) <= self.budget
        assert len({part.sequence_id for part in slices}) == len(slices)
        check_sharing(slices, self.block_size)
        written = {part.state.write for part in slices}
        assert not self.state_slots or len(written) == len(slices), "two write one state"
        assert not written & {part.state.read for part in slices} - {0}, "one writes what another reads"
        sampled, scored = [], []
        for part in slices:
            for offset, token in enumerate(part.tokens):
                self.cache[self.slot(part, part.position + offset)] = token
            if self.state_slots:
                self.advance(part)
            if part.sample is not None:
                context = self.context(part, part.position + len(part.tokens))
                sampled.append(SampledToken(sequence_id=part.sequence_id, token=next_token(context)))
            scored += scores(part, lambda end, part=part: self.context(part, end))  # type: ignore[misc]
        return sampled, scored

    def advance(self, part: SequenceSlice) -> None:
        """From one slot to another."""
        state = self.states[part.state.read]
        assert state == tuple(self.context(part, part.position)), "the state of another text is read"
        assert 0 < part.state.write < self.state_slots
        assert part.state.write != part.state.read
        self.states[part.state.write] = (*state, *part.tokens)

    def put_off(self, slices: list[SequenceSlice]) -> set[int]:
        """Those that rank 0 can't draw for: it has forgotten their past, or still compiles a grammar."""
        if self.random.random() < 0.03:
            self.rulebook = Rulebook(3)
        drawing = [part for part in slices if part.sample is not None]
        constrained = [part for part in drawing if self.open_rules(part) is CONSTRAINED]
        for part in constrained:
            assert part.ruled is not None
            assert part.ruled.past is None or len(part.tokens) == 1, "what may come again is short"
        penalized = [part for part in drawing if self.open_rules(part) in (PENALIZED, PENALIZED_ANSWER)]
        page = self.rulebook.page(penalized)
        for ruled in page.ruled:
            part = penalized[ruled.row]
            context = self.context(part, part.position + len(part.tokens))
            prompt, answer = context[: len(context) - ruled.drawn], context[len(context) - ruled.drawn :]
            assert answer == self.open[part.sequence_id][1]
            seen = dict(zip(ruled.seen.tokens.tolist(), ruled.seen.counts.tolist(), strict=True))
            of_prompt = dict.fromkeys(prompt, 0.0) if ruled.rules is PENALIZED else {}
            assert seen == of_prompt | dict(Counter(answer))
        forgotten = {penalized[row].sequence_id for row in page.put_off}
        assert all(part.ruled and part.ruled.past is None for part in penalized if part.sequence_id in forgotten)
        waited_for = {part.sequence_id for part in constrained if part.ruled and part.ruled.past}
        return forgotten | {one for one in sorted(waited_for) if self.random.random() < 0.4}

    def open_rules(self, part: SequenceSlice) -> LogitRules | None:
        return self.open[part.sequence_id][0].rules

    def context(self, part: SequenceSlice, end: int) -> list[int]:
        return [self.cache[self.slot(part, position)] for position in range(end)]

    def slot(self, part: SequenceSlice, position: int) -> tuple[int, int]:
        return part.blocks[position // self.block_size], position % self.block_size

    def step(self) -> None:
        slices = self.scheduler.plan()
        assert slices or not self.open, "there is work, and nothing is planned"
        if self.faults_left and self.random.random() < 0.05:
            self.faults_left -= 1
            self.fault(slices)
            return
        sampled, scored = self.compute(slices)
        put_off = self.put_off(slices)
        if self.open and self.random.random() < 0.02:
            self.cancel(self.random.choice(list(self.open)))
        sampled = [token for token in sampled if token.sequence_id not in put_off]
        for drawn in self.scheduler.apply(slices, sampled, scored, put_off):
            request, tokens = self.open[drawn.sequence_id]
            wanted = request.sampling.prompt_logprobs >= 0 and not tokens
            assert [(one.token, one.logprob) for one in drawn.prompt] == (judged(request.prompt) if wanted else [])
            tokens.append(drawn.token.token)
            if drawn.finish:
                assert tokens == continuation(request.prompt, request.max_tokens)
                self.turns.append((request.cache_salt, (*request.prompt, *tokens)))
                del self.open[drawn.sequence_id]

    def fault(self, slices: list[SequenceSlice]) -> None:
        for given_up in self.scheduler.fault_points(slices, self.random.choice([1, 2])):
            del self.open[given_up.id]
        match self.random.choice(["new", "kept", "looked at"]):
            case "new":
                self.cache.clear()
                self.states = {0: ()}
                lost = self.scheduler.start_over(
                    max_model_len=self.capacity, blocks=self.blocks, block_size=self.block_size,
                    state_slots=self.state_slots,
                )  # fmt: skip
                assert not lost
            case "kept":
                for part in slices:
                    for position in range(part.position, part.position + len(part.tokens)):
                        self.cache[self.slot(part, position)] = GARBAGE
                    if self.state_slots:
                        self.states[part.state.write] = (GARBAGE,)
            case _:
                self.scheduler.forget_cached()
                held = {block for part in self.scheduler.held() for block in part.blocks}
                for block, slot in self.cache:
                    if block not in held:
                        self.cache[block, slot] = GARBAGE
                read = {part.state.read for part in self.scheduler.held()}
                self.states = {slot: state if slot in read | {0} else (GARBAGE,) for slot, state in self.states.items()}

    def cancel(self, sequence_id: int) -> None:
        del self.open[sequence_id]
        self.scheduler.remove(sequence_id)

    def run(self) -> None:
        steps = 0
        while self.to_come or self.open:
            if self.to_come and (not self.open or self.random.random() < 0.3):
                self.arrive()
            self.step()
            steps += 1
            assert steps < 20_000, "a request starves"
        assert self.scheduler.plan() == []
        assert self.scheduler.book.used == 0


def judged(prompt: tuple[int, ...]) -> list[tuple[int, float]]:
    """Every token but the first, once."""
    return [(prompt[end], toy_logprob(prompt[:end], prompt[end])) for end in range(1, len(prompt))]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_schedules(batch: int) -> None:
    preemptions = found = with_states = 0
    for seed in range(batch * SCHEDULES // BATCHES, (batch + 1) * SCHEDULES // BATCHES):
        life = Life(seed)
        life.run()
        preemptions += life.scheduler.preemptions
        found += life.scheduler.cached_tokens
        with_states += life.scheduler.cached_tokens if life.state_slots else 0
    assert preemptions > 100, "these schedules hardly ever run out of blocks"
    assert found > 500, "these prompts hardly ever begin alike"
    assert with_states > 100, "what they begin with hardly ever has a state"
