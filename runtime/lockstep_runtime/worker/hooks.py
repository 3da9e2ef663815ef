"""Where something may come between a worker and its work. In production nothing does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the control thread connects before torch is imported
    from lockstep_runtime.distributed.communicator import Communicator
    from lockstep_runtime.protocol import bus


class Hooks:
    """Called by the worker's main thread; each does nothing. `chaos.injector.Injector` has the same methods."""

    def begin_load(self, flip_bit: Callable[[int], str]) -> None:
        """Weights are about to be read. `flip_bit` changes one bit of them and returns the tensor's name."""

    def loading(self) -> None:
        """While weights are being read, again and again."""

    def joining(self) -> None:
        """Before a communicator is joined."""

    def idle(self) -> None:
        """Between two commands, when the control thread asks for it."""

    def step(self, step: bus.Step, group: Communicator) -> tuple[bus.Step, Communicator]:
        """What is computed instead of the step, and over which communicator."""
        return step, group
