"""The pod's fetcher: `python -m lockstep_runtime.sources`, by a supervisor. It brings the model of a hub into the cache
and ends; until then it tries again, and says in a file what is the matter.

A process of its own, since no other of the pod needs the hub's library, its threads or the token, which comes on
standard input.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from lockstep_runtime.config import CONFIG_VARIABLE, ServeConfig
from lockstep_runtime.host import process_init, shm_files
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.fetch import Wanted, fetch, resolve
from lockstep_runtime.sources.fetch_order import FetchOrder
from lockstep_runtime.sources.fetch_state import StateWriter
from lockstep_runtime.sources.hub import Hub
from lockstep_runtime.sources.hub_cache import HubCache
from lockstep_runtime.sources.model_folder import cache_folder
from lockstep_runtime.sources.tokens import token_of

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = (1.0, 2.0, 4.0, 8.0, 15.0)


def main() -> None:
    """Fetch what the configuration names, however often it takes."""
    config = msgspec.json.decode(os.environ[CONFIG_VARIABLE], type=ServeConfig)
    process_init.become("fetcher", f"fetcher model={config.model_name} group={config.group}")
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=FetchOrder)
    path = shm_files.fetch_file(os.environ)
    if path is None:
        raise RuntimeError("a fetcher is started by a supervisor")
    state = StateWriter(path)
    attempt = 0
    while True:
        try:
            _fetch(config, order, state)
            return
        except ModelError as error:
            logger.warning("%s", error)
            state.failed(error)
            again = error.retry_after
        except Exception as error:  # whatever the hub answers: the group says so, and it may pass
            logger.exception("fetching failed")
            state.failed(ModelError(f"{config.model} can't be fetched: {type(error).__name__}: {error}"))
            again = 0.0
        time.sleep(max(again, RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)]))
        attempt += 1


def _fetch(config: ServeConfig, order: FetchOrder, state: StateWriter) -> None:
    wanted = Wanted(
        repo=config.model,
        cache=HubCache(cache_folder(config), config.model),
        hub=Hub(config.source.endpoint, token_of(config.source, order.token)),
        revision=config.model_revision,
        commit=order.commit or config.model_commit,
    )
    begun = time.monotonic()
    commit = resolve(wanted)
    state.resolved(commit)
    folder: Path = fetch(wanted, commit, state.tell).folder
    state.fetched(folder)
    logger.info("%s at %s is in %s, after %.1f s", config.model, commit, folder, time.monotonic() - begun)


if __name__ == "__main__":
    main()
