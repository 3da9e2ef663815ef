"""Turns what huggingface_hub raises into sentences with a remedy, and whether to retry."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError, chain, lasts

SLOW_RETRY_SECONDS: Final = 30.0  # where a person must act: the hub is asked again, but seldom
_NETWORK: Final = frozenset({"ConnectError", "TimeoutException", "NetworkError", "RemoteProtocolError", "ReadError"})
_TOKEN: Final = "the token (HF_TOKEN; in a TensorParallelModel spec.model.huggingFace.tokenSecretRef)"  # noqa: S105


def explain(model: str, revision: str | None, error: Exception, hub: str) -> ModelError:
    """The first cause that names itself decides: the library wraps what its HTTP client raises."""
    for cause in chain(error):
        if found := _explain(model, revision, cause, hub):
            return found
    return _transient(f"{model} is no directory here, and the hub did not deliver it: {_words(error)}")


def _explain(model: str, revision: str | None, error: BaseException, hub: str) -> ModelError | None:
    from huggingface_hub import errors

    if isinstance(error, ModelError):
        return error

    kinds = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, errors.GatedRepoError):
        return _permanent(f"{model} is gated: ask for access on its page at {hub}, and give {_TOKEN} of that account")
    if isinstance(error, errors.RevisionNotFoundError):
        return _permanent(f"{model} has no revision {revision or 'main'} at {hub}: give another")
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(model, error, hub)
    if isinstance(error, errors.HFValidationError):
        return _permanent(f"{model} is neither a directory here nor a hub id such as Qwen/Qwen3-8B")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline(model)
    if "ProxyError" in kinds:
        return _transient(
            f"{model} can't be downloaded: the proxy ({_proxy()}) refuses: {_words(error)}; fix HTTPS_PROXY"
        )
    if kinds & _NETWORK:
        return _transient(f"{model} can't be downloaded now: {hub} can't be reached: {_words(error)}; tried again")
    if isinstance(error, ConnectionError):
        return _transient(f"{model} can't be downloaded now: {' '.join(str(error).split())}; tried again")
    if isinstance(error, OSError) and error.errno is not None:
        return _unstored(model, error)
    return None


def _unstored(model: str, error: OSError) -> ModelError:
    message = f"{model} can't be stored: {error.filename or 'the cache'}: {os.strerror(error.errno or 0)}"
    if not lasts(error):
        return _transient(message)
    who = f"user {os.geteuid()} (group {os.getegid()})"
    return _permanent(f"{message}; let {who} write there, or name another cache (spec.model.cache, --download-dir)")


def _by_status(model: str, error: Any, hub: str) -> ModelError:
    status = error.response.status_code
    if status in (401, 403):
        return _permanent(
            f"{hub} refuses {model} ({status}): it needs another token, or there is no such model: check {_TOKEN}"
        )
    if status == 404:
        return _permanent(f"{hub} has no model {model}, or not for this token ({status}): check the name and {_TOKEN}")
    if status == 407:
        return _permanent(
            f"{model} can't be downloaded: the proxy ({_proxy()}) needs a password (407): fix HTTPS_PROXY"
        )
    if status == 429:
        wait = _retry_after(error.response.headers)
        return _transient(f"{hub} allows no more requests now (429) and {model} is tried again after {wait:g} s", wait)
    if status >= 500:
        return _transient(f"{hub} fails ({status}) and {model} is tried again")
    return _permanent(f"{hub} refuses {model}: {status} {error.response.reason_phrase}")


def wrong_contents(model: str, file: str, kind: str, found: str, expected: str, hub: str) -> ModelError:
    """Twice, so it is not this connection's fault."""
    return _transient(
        f"{file} of {model} came wrong from {hub}: its {kind} is {found}, where the hub lists "
        f"{expected}; fetched again",
        SLOW_RETRY_SECONDS,
    )


def no_room(model: str, needed: int, free: int, where: Path) -> ModelError:
    return _transient(
        f"{model} needs {needed / 1e9:.1f} GB more in {where}, where {free / 1e9:.1f} GB are free: make room, or name "
        "another cache (spec.model.cache, --download-dir)",
        SLOW_RETRY_SECONDS,
    )


def offline(model: str, what: str = "") -> ModelError:
    lacking = f": {what}" if what else ""
    return _permanent(f"{model} is not in the cache{lacking}, and HF_HUB_OFFLINE forbids to download it: unset that")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds. The hub names them in `RateLimit` (`"api";r=0;t=189`), others in `Retry-After`."""
    reset = re.search(r"r=0;\s*t=(\d+)", headers.get("ratelimit") or "")
    seconds = reset[1] if reset else headers.get("retry-after") or ""
    return min(float(seconds), 600.0) if seconds.isdecimal() else SLOW_RETRY_SECONDS


def _permanent(message: str) -> ModelError:
    return ModelError(message, kind=LoadFailure.PERMANENT, retry_after=SLOW_RETRY_SECONDS)


def _transient(message: str, retry_after: float = 0.0) -> ModelError:
    return ModelError(message, kind=LoadFailure.TRANSIENT, retry_after=retry_after)


def _words(error: BaseException) -> str:
    """One line, bounded: the library's own messages go over several."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _proxy() -> str:
    """Without the password that it may hold."""
    found = next(
        (
            os.environ[name]
            for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")
            if os.environ.get(name)
        ),
        "of the environment",
    )
    return found.rpartition("@")[2]
