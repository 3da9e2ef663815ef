"""A whole group of runners in threads of the test's process, each with its own end of a shared-memory communicator."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from tests.support.cut_off import CutOff

from lockstep_runtime.config import DType, EngineLimits, ServeConfig
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.errors import CommunicatorAborted
from lockstep_runtime.distributed.join import join, open_rendezvous
from lockstep_runtime.layers.cache import CacheSize
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.protocol.step import SamplingParams, SequenceSlice
from lockstep_runtime.worker.model_runner import LoadReport, ModelRunner, StepOutput


class Ranks:
    """Use as a context manager; `step` runs every rank and checks that their fingerprints agree."""

    def __init__(self, model: Path, size: int, *, dtype: DType = "auto", blocks: int = 64) -> None:
        self.config = ServeConfig(
            model=str(model), served_name="test", tensor_parallel_size=size, ranks_per_pod=size, backend="cpu",
            dtype=dtype, threads_per_rank=1, limits=EngineLimits(kv_cache_bytes=1 << 26),
        )  # fmt: skip
        self._pool = ThreadPoolExecutor(size)
        self._meeting = open_rendezvous(self.config, 1)
        self._steps = 0
        self._failed: list[Exception] = []
        started = [up for up in self._pool.map(lambda rank: self._try(rank, blocks), range(size)) if up]
        if self._failed:
            raise ExceptionGroup("not every rank came up", self._failed)
        self.runners: list[ModelRunner] = [runner for runner, _, _ in started]
        self.reports: list[LoadReport] = [report for _, report, _ in started]
        self.groups: list[Communicator] = [group for _, _, group in started]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for group in self.groups:
            group.close()
        self._meeting.close()
        self._pool.shutdown()

    def step(self, *sequences: SequenceSlice, images: bus.ImageWork = bus.NO_IMAGES) -> StepOutput:
        step = bus.Step(epoch=1, step=self._steps, sequences=list(sequences), images=images)
        self._steps += 1
        outputs: list[StepOutput] = list(
            self._pool.map(lambda pair: pair[0].step(step, pair[1]), zip(self.runners, self.groups, strict=True))
        )
        assert len({output.fingerprint for output in outputs}) == 1, "the ranks' fingerprints differ"
        assert all(output.sampled == [] for output in outputs[1:])
        return outputs[0]

    def cut_off(
        self, *sequences: SequenceSlice, rank: int, at: int, after: bool, images: bus.ImageWork = bus.NO_IMAGES
    ) -> int:
        """As `step`, but a rank is lost at its collective `at`, or once it is done; then the ranks meet anew.

        Returns how many collectives that rank had done.
        """
        step = bus.Step(epoch=1, step=self._steps, sequences=list(sequences), images=images)
        self._steps += 1
        lost = CutOff(self.groups[rank], at, after=after)
        groups = [lost if group.rank == rank else group for group in self.groups]
        list(self._pool.map(lambda pair: _try_step(pair[0], pair[1], step), zip(self.runners, groups, strict=True)))
        self._meet_again()
        return lost.count

    def _meet_again(self) -> None:
        for group in self.groups:
            group.close()
        self._meeting.close()
        self._meeting = open_rendezvous(self.config, 1)
        address = self._meeting.address
        self.groups = list(
            self._pool.map(lambda rank: join(self.config, rank, 1, address, timeout=60), range(len(self.groups)))
        )

    def send(self, image: Pixels, part_bytes: int = 1000) -> None:
        """An image's pixels, in parts."""
        for runner in self.runners:
            for offset in range(0, len(image.data), part_bytes):
                data = image.data[offset : offset + part_bytes]
                runner.images.take(
                    bus.ImagePart(
                        digest=image.digest, height=image.height, width=image.width, offset=offset, data=data
                    )
                )  # fmt: skip

    def greedy(self, prompt: list[int], tokens: int, blocks: list[int]) -> list[int]:
        """The whole prompt in one chunk, then token by token."""
        drawn: list[int] = []
        feed, position = prompt, 0
        for _ in range(tokens):
            output = self.step(piece(0, position, feed, blocks, SamplingParams(temperature=0)))
            position += len(feed)
            feed = [output.sampled[0].token]
            drawn += feed
        return drawn

    def _try(self, rank: int, blocks: int) -> tuple[ModelRunner, LoadReport, Communicator] | None:
        """None if it failed: then the others are called off, so that the first error is the one that shows."""
        try:
            return self._start(rank, blocks)
        except Exception as error:
            self._failed.append(error)
            return None

    def _start(self, rank: int, blocks: int) -> tuple[ModelRunner, LoadReport, Communicator]:
        runner = ModelRunner(self.config, rank)
        report = runner.load(lambda done, total: None)
        runner.allocate(CacheSize(blocks=blocks, state_slots=report.cache.state_slots))
        address, called_off = self._meeting.address, lambda: bool(self._failed)
        return runner, report, join(self.config, rank, 1, address, timeout=60, cancelled=called_off)


def _try_step(runner: ModelRunner, group: Communicator, step: bus.Step) -> None:
    with contextlib.suppress(CommunicatorAborted):
        runner.step(step, group)


def piece(
    sequence_id: int, position: int, tokens: list[int], blocks: list[int], sample: SamplingParams | None = None
) -> SequenceSlice:
    return SequenceSlice(sequence_id=sequence_id, position=position, tokens=tokens, blocks=blocks, sample=sample)


def everything(vocabulary: int) -> SamplingParams:
    """Greedy, with the log probabilities of all tokens."""
    return SamplingParams(temperature=0, logprobs=vocabulary)
