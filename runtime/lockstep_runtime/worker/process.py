"""A rank's process from its first line to its last: connect, load, leave a loaded zygote on CPUs, work, exit."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from lockstep_runtime.chaos.injector import Injector
from lockstep_runtime.config import TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.distributed import join as collectives
from lockstep_runtime.distributed.errors import CommunicatorStuckError
from lockstep_runtime.host import process_init
from lockstep_runtime.layers.cache import CacheMemory
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.progress_record import Progress
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.worker.bus_client import BusClient
from lockstep_runtime.worker.fault_classifier import load_failure
from lockstep_runtime.worker.hooks import Hooks
from lockstep_runtime.worker.main import Worker
from lockstep_runtime.worker.model_runner import ModelRunner
from lockstep_runtime.zygote.loaded import fork_loaded_zygote
from lockstep_runtime.zygote.messages import ForkRequest

logger = logging.getLogger(__name__)

STUCK_EXIT: Final = 5  # of a rank whose communicator can neither be made nor given back
REPORT_SECONDS: Final = 5.0  # for the engine to be there to hear why loading failed


@dataclass(frozen=True, slots=True)
class NewRank:
    """The children of the pod's zygote: each loads."""

    config: ServeConfig

    def prepare(self) -> None:
        """Nothing is known yet of the rank."""

    def run(self, request: ForkRequest) -> NoReturn:
        """Load, on a CPU leave a zygote that has loaded, and work."""
        config, rank = self.config, request.rank
        client, worker = _connect(config, request)
        runner = _load(client, worker, lambda: ModelRunner(worker.locate(), rank, CacheMemory(request.cache)))
        if request.zygote is not None and runner.on_cpu:
            with client.resolving:
                fork_loaded_zygote(rank, _title(config), request.zygote, LoadedRank(config, rank, runner))
        _work(worker)


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """The children of a rank's loaded zygote: they have the weights."""

    config: ServeConfig
    rank: int
    runner: ModelRunner

    def prepare(self) -> None:
        """Have the kernel fill the page table, for which the first step would wait."""
        process_init.become(f"worker {self.rank}", f"standby of rank {self.rank} {_title(self.config)}")
        self.runner.touch_weights()

    def run(self, request: ForkRequest) -> NoReturn:
        """Work."""
        client, worker = _connect(self.config, request)
        self.runner.memory = CacheMemory(request.cache)
        _load(client, worker, lambda: self.runner)
        _work(worker)


def _title(config: ServeConfig) -> str:
    return f"model={config.model_name} group={config.group}"


def _connect(config: ServeConfig, request: ForkRequest) -> tuple[BusClient, Worker]:
    rank = request.rank
    process_init.become(f"worker {rank}", f"worker {_title(config)} rank={rank}")
    client = BusClient(config, rank, os.environ[TOKEN_VARIABLE], request.incarnation)
    client.start()
    progress = Progress(request.progress)
    return client, Worker(config, rank, client, progress, collectives, choose_hooks(config, rank, client, progress))


def choose_hooks(config: ServeConfig, rank: int, client: BusClient, progress: Progress) -> Hooks | Injector:
    """The one place where faults on purpose come in."""
    if not config.allow_faults:
        return Hooks()
    injector = Injector(rank, progress, client.disconnect)
    client.on_inject = injector.arm
    return injector


def _load(client: BusClient, worker: Worker, runner: Callable[[], ModelRunner]) -> ModelRunner:
    try:
        found = runner()
        worker.load(found)
        return found
    except Exception as error:
        _report_load_failure(client, error)


def _work(worker: Worker) -> NoReturn:
    try:
        logger.info("ends: %s", worker.run())
    except CommunicatorStuckError as error:
        logger.error("ends, so that another process takes its place: %s", error)
        _exit(STUCK_EXIT)
    _exit(0)


def load_error(error: Exception) -> str:
    """The model's own words where it is the model's fault, else the exception."""
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _report_load_failure(client: BusClient, error: Exception) -> NoReturn:
    """To the engine, as soon as it can be reached: this process has nothing else to do."""
    message, kind = load_error(error), load_failure(error)
    logger.error("can't load (%s): %s", kind, message)
    deadline = time.monotonic() + REPORT_SECONDS
    while time.monotonic() < deadline and not client.connected:
        time.sleep(0.05)
    client.send(bus.LoadFailed(message=message, kind=kind))
    _exit(process_init.LOAD_FAILED_EXIT if kind is bus.LoadFailure.TRANSIENT else process_init.CANT_LOAD_EXIT)


def _exit(code: int) -> NoReturn:
    """No interpreter teardown: torch's threads and the control thread have nothing to finish."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
