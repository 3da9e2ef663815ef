"""Faults on purpose: the vocabulary of `lockstep inject` and `POST /inject`."""

from __future__ import annotations

import enum

import msgspec


class Injection(enum.StrEnum):
    """What can be done to a rank, where the group was started with `--allow-faults`."""

    RAISE = "raise"
    HANG = "hang"
    SIGKILL = "sigkill"
    SIGSTOP = "sigstop"
    SIGSEGV = "sigsegv"  # a real one: the process reads address 0
    EXIT = "exit"  # with code 1
    MEMORY = "memory"  # a real allocation that fails, under a lowered limit
    NAN = "nan"  # in this rank's part of a sum
    INPUT = "input"  # this rank gets another token than the others
    ACTIVATION = "activation"  # this rank alters the result of a sum
    FLIP_BIT = "flip-bit"  # in this rank's weights
    SLOW = "slow"
    CLOSE_BUS = "close-bus"
    DEVICE_ASSERT = "device-assert"  # a real one, on this rank's GPU
    ILLEGAL_ACCESS = "illegal-access"  # the same: a kernel reads where there is no memory


class FaultPhase(enum.StrEnum):
    """When an injected fault acts."""

    NOW = "now"  # at once where that needs no step, else in the next one
    IDLE = "idle"  # between two commands
    PREFILL = "prefill"  # in a step that feeds more than one token of a sequence
    DECODE = "decode"  # in a step that does not
    JOINING = "joining"  # while a communicator is made: another recovery is under way
    LOADING = "loading"  # when the rank's next process loads


class CollectivePoint(enum.StrEnum):
    """Where in a step, seen from a collective."""

    BEFORE = "before"
    INSIDE = "inside"  # entered, and left only by an abort
    AFTER = "after"


class Inject(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Do this to a rank, once. From `POST /inject` by way of supervisor and engine to the worker."""

    rank: int
    kind: Injection
    phase: FaultPhase = FaultPhase.NOW
    at: CollectivePoint = CollectivePoint.BEFORE
    place: str = ""  # part of the name of a collective's place, such as layers.2.mlp; empty: the step's first
    skip: int = 0  # steps of that phase that pass unharmed first
    seconds: float = 0.1  # SLOW: longer each step
    times: int = 1  # SLOW: so many steps
    number: int = 0  # FLIP_BIT: which
