"""What benches run without a server: a generated model, and the processes of its two ranks, asked step by step."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from bench.report import OUTPUT
from tests.support.models import QWEN3_0_6B, write_model

from lockstep_runtime.config import DType, EngineLimits, ServeConfig
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.join import join, open_rendezvous
from lockstep_runtime.layers.cache import CacheSize
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.step import PROBE_STATE_SLOTS, SamplingParams, SequenceSlice, StateSlots
from lockstep_runtime.worker.model_runner import LoadReport, ModelRunner, StepOutput

RANKS: Final = 2
BLOCKS: Final = 16  # of the KV cache, per sequence: its prompt and what is decoded
GREEDY: Final = SamplingParams(temperature=0)
T = TypeVar("T")


def model_directory() -> Path:
    """The generated checkpoint, made once and kept."""
    directory = OUTPUT / "models" / "qwen3-0.6b"
    if not (directory / "model.safetensors").exists():
        write_model(directory, QWEN3_0_6B)
    return directory


def config(model: Path, dtype: DType = "auto") -> ServeConfig:
    """Of ranks of one thread each."""
    return ServeConfig(
        model=str(model), served_name="bench", tensor_parallel_size=RANKS, ranks_per_pod=RANKS, backend="cpu",
        dtype=dtype, threads_per_rank=1, limits=EngineLimits(kv_cache_bytes=1 << 28),
    )  # fmt: skip


class Child:
    """A process that answers calls, one at a time."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, *arguments), daemon=True)
        self.process.start()
        end.close()

    def receive(self, timeout: float = 600.0) -> Any:
        if not self.pipe.poll(timeout):
            raise TimeoutError(f"no answer in {timeout} s")
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


class Ranks:
    """Two ranks, and the least of an engine."""

    def __init__(
        self, serve: Callable[[Connection, ServeConfig, int, str], None], config: ServeConfig, blocks: int = BLOCKS
    ) -> None:
        """`serve` is what each process runs: it calls `start` and then `answer_orders`. `blocks`: of each sequence."""
        self._blocks = blocks
        self._meeting = open_rendezvous(config, 1)
        self._children = [Child(serve, config, rank, self._meeting.address) for rank in range(RANKS)]
        for child in self._children:
            child.receive()
        self._steps = 0
        self._states: dict[int, StateSlots] = {}  # by sequence, of the step before

    def next_step(
        self, tokens: list[list[int]], position: int, first: int = 0, params: SamplingParams = GREEDY
    ) -> bus.Step:
        """Each sequence goes on with its own tokens, all from the same position. `first`: of the sequences."""
        self._steps += 1
        return bus.Step(
            epoch=1,
            step=self._steps,
            sequences=[
                SequenceSlice(
                    sequence_id=index, position=position, tokens=feed, sample=params,
                    blocks=list(range(index * self._blocks, (index + 1) * self._blocks)),
                    state=self._next_state(index, anew=position == 0),
                )
                for index, feed in enumerate(tokens, first)
            ],
        )  # fmt: skip

    def _next_state(self, index: int, *, anew: bool) -> StateSlots:
        """Where models keep recurrent states: what was written is read, and the other of its two slots is written."""
        slots = (2 * index + 1, 2 * index + 2)
        read = 0 if anew else self._states[index].write
        self._states[index] = StateSlots(read, slots[0] if read == slots[1] else slots[1])
        return self._states[index]

    def take(self, order: msgspec.Struct, meanwhile: Callable[[], object] = lambda: None) -> list[int]:
        """Have the ranks take a step: every sequence's next token. `meanwhile` is done here.

        Raises:
            RuntimeError: the ranks disagree.
        """
        answers = self.ask(order, bus.StepDone, meanwhile)
        if len({answer.fingerprint for answer in answers}) != 1:
            raise RuntimeError("the ranks' hidden states differ")
        return [sampled.token for sampled in answers[0].sampled]

    def ask(self, order: msgspec.Struct, kind: type[T], meanwhile: Callable[[], object] = lambda: None) -> list[T]:
        """Every rank's answer, which is of this kind."""
        frame = msgspec.msgpack.encode(order)
        for child in self._children:
            child.pipe.send_bytes(frame)
        meanwhile()
        return [msgspec.msgpack.decode(child.pipe.recv_bytes(), type=kind) for child in self._children]

    def close(self) -> None:
        for child in self._children:
            child.close()
        self._meeting.close()


def start(
    config: ServeConfig, rank: int, address: str, sequences: int, blocks: int = BLOCKS
) -> tuple[ModelRunner, LoadReport, Communicator]:
    """In the rank's process: a runner with room for so many sequences, and its end of the communicator."""
    runner = ModelRunner(config, rank)
    loaded = runner.load(lambda done, total: None)
    slots = 1 + 2 * sequences + PROBE_STATE_SLOTS if loaded.cache.state_slots else 0
    runner.allocate(CacheSize(blocks=sequences * blocks, state_slots=slots))
    return runner, loaded, join(config, rank, 1, address, timeout=300)


def answer_orders(pipe: Connection, kind: type[T], answer: Callable[[T], object]) -> None:
    """In the rank's process: answer until the other end is closed."""
    pipe.send("ready")
    while True:
        try:
            order = msgspec.msgpack.decode(pipe.recv_bytes(), type=kind)
        except EOFError:
            return
        pipe.send_bytes(msgspec.msgpack.encode(answer(order)))


def done(step: bus.Step, output: StepOutput) -> bus.StepDone:
    return bus.StepDone(
        epoch=step.epoch, step=step.step, seconds=0.0, fingerprint=output.fingerprint, sampled=output.sampled
    )
