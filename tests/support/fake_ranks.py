"""Ranks without a model: real connections to a real bus, and a toy cache that shows every mistake of the engine.

A fake rank keeps token ids by (block, slot), as a KV cache would keep keys and values, and draws the next token from
all tokens that it reads back through the block table. A lost, shared or wrongly fed block changes the answer. One with
recurrent states looks at each step whether the state that it reads is of the tokens in the blocks.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
from tests.support.toy_images import ToyImages
from tests.support.toy_states import ToyStates, check_states

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.framing import Framer, encode
from lockstep_runtime.protocol.step import SampledToken, SequenceSlice
from lockstep_runtime.recovery.self_test import SEQUENCE

VOCABULARY = 50_000
BLOCK_SIZE = 4
UNWRITTEN = (None,) * BLOCK_SIZE
NAN = -1  # in a slot: whoever reads it finds no number
TOKEN = "a token of the tests"


def next_token(tokens: Sequence[int]) -> int:
    """The toy model."""
    return zlib.crc32(struct.pack(f"<{len(tokens)}q", *tokens)) % VOCABULARY


def scores(part: SequenceSlice, context: Callable[[int], list[int]]) -> list[SampledToken]:
    """What the toy model thinks of a slice's targets; `context` gives the tokens before a position."""
    scoring = part.scoring
    if scoring is None:
        return []
    return [
        SampledToken(
            sequence_id=part.sequence_id,
            token=target,
            logprob=toy_logprob(context(part.position + scoring.first + index + 1), target),
        )
        for index, target in enumerate(scoring.targets)
    ]


def check_sharing(parts: Sequence[SequenceSlice], block_size: int) -> None:
    """Sequences may read one block, but who writes to it has it alone."""
    holders = Counter(block for part in parts for block in part.blocks)
    for part in parts:
        assert len(set(part.blocks)) == len(part.blocks), "one sequence holds a block twice"
        last = (part.position + len(part.tokens) - 1) // block_size
        written = part.blocks[part.position // block_size : last + 1]
        assert all(holders[block] == 1 for block in written), "a block is written that another sequence holds, too"


def toy_logprob(context: Sequence[int], target: int) -> float:
    """Of a token after others."""
    return -float(next_token([*context, target]) + 1)


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What the toy model answers to a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass(slots=True)
class ToyMemory:
    """What outlives a rank's process."""

    name: str = ""
    blocks: int = 0
    slots: dict[int, list[int | None]] = field(default_factory=dict)  # block → what its slots hold
    states: ToyStates = field(default_factory=ToyStates)

    def spoil(self) -> None:
        """Nothing that is here may be read again."""
        for held in self.slots.values():
            held[:] = [None] * BLOCK_SIZE
        for slot in self.states.held:
            self.states.spoil(slot, None)


Misdeed = Callable[["FakeRank", bus.Step], "bus.StepDone | bus.StepFailed | None"]


@dataclass
class FakeRank:
    """One rank; `misdeed` takes the place of one step's answer when it is set and returns, None for silence."""

    config: ServeConfig
    rank: int
    cache_blocks: int = 64
    state_slots: int = 0
    misdeed: Misdeed | None = None
    draw: Callable[[Sequence[int]], int] = next_token  # the token after these
    incarnation: str = field(default_factory=lambda: secrets.token_hex(4))
    epoch: int = 0
    deaf: bool = False  # to Abort too: like a process that is stopped
    watched: int = 0  # tensors whose checksums are known, and right
    load_error: str = ""
    load_failure: bus.LoadFailure = bus.LoadFailure.TRANSIENT
    steps: int = 0
    fed: int = 0  # tokens of requests
    aborts: list[int] = field(default_factory=list)
    weights: int = 0  # what every fingerprint depends on: another value is a corrupted shard
    stands: tuple[int, bool] = (1, True)  # the collective where a silent step stands, and whether it is inside
    moved_at: float = 0.0  # on the monotonic clock
    at_step: tuple[int, int, bool] = (0, 0, False)  # epoch, step, whether it is in it
    memory: ToyMemory = field(default_factory=lambda: ToyMemory())
    images: ToyImages = field(default_factory=ToyImages)
    closed: bool = False  # its connection, by the engine
    respawning: asyncio.Task[None] | None = None
    writer: asyncio.StreamWriter | None = None
    _task: asyncio.Task[None] | None = None
    _backlog: list[bus.ToWorker] = field(default_factory=list)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def die(self) -> None:
        """As a SIGKILL would: the connection closes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def respawn(self, *, crashed: bool = False) -> None:
        """As the supervisor does: a new process in its place, which gets its memory unless it `crashed`."""
        await self.die()
        self.incarnation = secrets.token_hex(4)
        self.epoch, self.deaf, self.weights = 0, False, 0
        self.images = ToyImages()
        if crashed:
            self.memory = ToyMemory()
        self.start()

    def send(self, message: msgspec.Struct) -> None:
        if self.writer is not None:
            self.writer.write(encode(message))

    async def _run(self) -> None:
        while True:
            try:
                reader, self.writer = await asyncio.open_connection("127.0.0.1", self.config.bus_port)
                break
            except OSError:
                await asyncio.sleep(0.01)
        try:
            self.send(self.hello())
            framer = Framer(bus.MAX_FRAME_BYTES)
            decoder = msgspec.msgpack.Decoder(bus.ToWorker)
            while data := await reader.read(1 << 16):
                for frame in framer.feed(data):
                    self._receive(decoder.decode(frame))
            self.closed = True
        finally:
            self.writer.close()

    def hello(self) -> bus.Hello:
        return bus.Hello(
            protocol=bus.PROTOCOL,
            token=TOKEN,
            role=bus.Role.WORKER,
            group=self.config.group,
            pod_index=self.rank // self.config.ranks_per_pod,
            pod=f"pod-{self.rank}",
            node="node",
            pid=1000 + self.rank,
            incarnation=self.incarnation,
            epoch=self.epoch,
            rank=self.rank,
        )

    def _receive(self, message: bus.ToWorker) -> None:
        if self.deaf:
            return
        match message:
            case bus.Welcome():
                self.images.forget()
                self.epoch = max(self.epoch, message.epoch)
                if self.load_error:
                    self.send(bus.LoadFailed(message=self.load_error, kind=self.load_failure))
                else:
                    self.send(self.loaded())
            case bus.Abort():
                self.epoch = message.epoch
                self.aborts.append(message.epoch)
                self.send(bus.Aborted(epoch=message.epoch, seconds=0.0))
            case bus.Rendezvous():
                self.send(bus.RendezvousOpened(epoch=message.epoch, address="shm:///nowhere"))
            case bus.ImagePart():
                self.images.take(message)
            case bus.Join():
                self.images.encoded.clear()
                self.send(bus.Joined(epoch=message.epoch, seconds=0.0))
            case bus.AllocateCache():
                self.send(self.allocate(message))
            case bus.Scrub():
                self.send(bus.Scrubbed(epoch=message.epoch, tensors=self.watched))
            case bus.Step():
                self._step(message)
            case _:
                pass

    def allocate(self, order: bus.AllocateCache) -> bus.CacheAllocated:
        memory = self.memory
        corrupt = any(self._reads_nan(part, part.position + 1) for part in order.unverified)
        if order.blocks != memory.blocks or corrupt:
            memory.name, memory.blocks, memory.slots = secrets.token_hex(4), order.blocks, {}
            memory.states = ToyStates()
        memory.slots[order.blocks - 1] = [*range(BLOCK_SIZE)]
        memory.states.fill_for_probe(order.state_slots)
        return bus.CacheAllocated(
            epoch=order.epoch, cache_id=memory.name, blocks=memory.blocks, memory_bytes=7, corrupt=corrupt
        )

    def loaded(self) -> bus.Loaded:
        return bus.Loaded(
            seconds=0.1,
            weight_bytes=10,
            read_bytes=10,
            cache_blocks=self.cache_blocks,
            block_size=BLOCK_SIZE,
            memory_bytes=5,
            state_slots=self.state_slots,
        )

    def _step(self, step: bus.Step) -> None:
        self.steps += 1
        self.at_step, self.moved_at = (step.epoch, step.step, True), time.monotonic()
        answer: bus.StepDone | bus.StepFailed | None = self.compute(step)
        if self.misdeed is not None:
            answer = self.misdeed(self, step)
        if answer is not None:
            self.at_step = (step.epoch, step.step, False)
            self.send(answer)

    def record(self) -> bus.ProgressRecord:
        """As its supervisor reads it."""
        epoch, step, in_step = self.at_step
        return bus.ProgressRecord(
            rank=self.rank, incarnation=self.incarnation, epoch=epoch, step=step, in_step=in_step,
            collective=self.stands[0], inside=self.stands[1], place=f"layers.{self.stands[0]}.mlp.down_proj",
            age=time.monotonic() - self.moved_at,
        )  # fmt: skip

    def compute(self, step: bus.Step) -> bus.StepDone:
        """The honest answer."""
        check_sharing(step.sequences, BLOCK_SIZE)
        if self.state_slots:
            check_states(step.sequences)
        self.images.work(step.images)
        fingerprint, sampled, scored = self.weights, [], []
        self.fed += sum(len(part.tokens) for part in step.sequences if part.sequence_id != SEQUENCE)
        for part in step.sequences:
            self._feed(part)
            drawn = self.draw(self._context(part, part.position + len(part.tokens)))
            fingerprint = zlib.crc32(struct.pack("<q", drawn), fingerprint)
            if part.sample is not None and self.rank == 0:
                sampled.append(SampledToken(sequence_id=part.sequence_id, token=drawn))
            if self.rank == 0:
                scored += scores(part, lambda end, part=part: self._context(part, end))  # type: ignore[misc]
        return bus.StepDone(
            epoch=step.epoch, step=step.step, seconds=0.001, fingerprint=fingerprint, sampled=sampled, scored=scored
        )

    def _feed(self, part: SequenceSlice) -> None:
        fed = [self.images.token(part, position, token) for position, token in enumerate(part.tokens, part.position)]
        if self.state_slots:
            self.memory.states.advance(part, self._read(part, part.position), fed)
        for position, token in enumerate(fed, part.position):
            block, slot = divmod(position, BLOCK_SIZE)
            self.memory.slots.setdefault(part.blocks[block], [None] * BLOCK_SIZE)[slot] = token

    def leave_undone(self, step: bus.Step) -> None:
        """Only a part of it was written, and nobody knows which."""
        for part in step.sequences:
            for position in range(part.position, part.position + len(part.tokens)):
                block, slot = divmod(position, BLOCK_SIZE)
                self.memory.slots[part.blocks[block]][slot] = None
            self.memory.states.spoil(part.state.write, None)

    def spoil_context(self, step: bus.Step) -> None:
        """What the step attends to is no number any more."""
        for part in step.sequences:
            for position in range(part.position):
                block, slot = divmod(position, BLOCK_SIZE)
                self.memory.slots[part.blocks[block]][slot] = NAN
            self.memory.states.spoil(part.state.read, NAN)

    def finds_nan(self, step: bus.Step) -> bool:
        """In what was computed before."""
        return any(self._reads_nan(part, part.position) for part in step.sequences)

    def _reads_nan(self, part: SequenceSlice, end: int) -> bool:
        return NAN in self._read(part, end)

    def _context(self, part: SequenceSlice, end: int) -> list[int]:
        """What the cache holds for the sequence's first `end` positions."""
        context = self._read(part, end)
        assert None not in context, "a slot is read that nobody wrote"
        return cast(list[int], context)

    def _read(self, part: SequenceSlice, end: int) -> list[int | None]:
        blocks = part.blocks[: -(-end // BLOCK_SIZE)]
        return [token for block in blocks for token in self.memory.slots.get(block, UNWRITTEN)][:end]
