"""Which files of a hub's repository are a model: the weights of one format, and what is read beside them. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_BESIDE: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")
_UNREAD: Final = ("*.index.json", "adapter_*", "training_args*", "trainer_state*", "optimizer*", "scheduler*")
# The same weights in other layouts.
_OTHER_WEIGHTS: Final = ("consolidated*", "adapter_*")
_INSTEAD: Final = (
    ("adapter_model.safetensors", "it is an adapter (LoRA): merge it into its model first"),
    ("*.gguf", "llama.cpp's format is not read; give the model's original checkpoint"),
    ("*.bin", "pickled weights are not read; give a revision that has safetensors"),
    ("*.pth", "pickled weights are not read; give a revision that has safetensors"),
)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it. `sha256`: of files in Git LFS; `blob_id`: git's, of the others a hash of them."""

    path: str
    size: int  # bytes
    blob_id: str
    sha256: str | None = None

    @property
    def etag(self) -> str:
        """What the hub calls its contents, and the cache its blob."""
        return self.sha256 or self.blob_id

    @property
    def digest(self) -> Digest:
        """To be fed with its contents."""
        if self.sha256:
            return Digest("sha256", hashlib.sha256(), self.sha256)
        header = b"blob %d\0" % self.size  # https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
        return Digest("git id", hashlib.sha1(header, usedforsecurity=False), self.blob_id)


@dataclass(frozen=True, slots=True)
class Digest:
    """A hash that is being computed, and what it should become."""

    name: str
    state: Any  # of hashlib
    expected: str

    def update(self, chunk: bytes) -> None:
        self.state.update(chunk)

    @property
    def found(self) -> str:
        return str(self.state.hexdigest())


def is_hub_id(model: str) -> bool:
    """Whether it looks like one, and not like a path."""
    return not (model.startswith(("/", ".", "~")) or model.count("/") > 1)


def beside_weights(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Configuration, tokenizer, templates, generation_config, preprocessor_config, and the weights' index."""
    return [one for one in files if one.path == INDEX or (_matches(one, _BESIDE) and not _matches(one, _UNREAD))]


def weights(model: str, files: Sequence[RemoteFile], index: Mapping[str, Any] | None) -> list[RemoteFile]:
    """The safetensors files, as they are looked for in a folder: one file before the index of several.

    Raises:
        ModelError: there are none, or not all that `index` (of `INDEX`) names.
    """
    by_path = {one.path: one for one in files}
    if SINGLE in by_path:
        return [by_path[SINGLE]]
    if names := index_names(index):
        if absent := sorted(names - by_path.keys()):
            raise _permanent(f"{model} has no {absent[0]}, though its {INDEX} names it: give another revision")
        return [by_path[name] for name in sorted(names)]
    found = [one for one in files if fnmatchcase(one.path, "*.safetensors") and "/" not in one.path]
    found = [one for one in found if not _matches(one, _OTHER_WEIGHTS)]
    if not found:
        raise _permanent(f"{model} has no safetensors file{_instead(by_path)}")
    return found


def index_names(index: Mapping[str, Any] | None) -> frozenset[str]:
    """The files that the weights' index names; empty where it is none."""
    named = (index or {}).get("weight_map")
    return frozenset(map(str, named.values())) if isinstance(named, dict) else frozenset()


def _matches(file: RemoteFile, patterns: Sequence[str]) -> bool:
    """A pattern without a slash is for the top folder alone."""
    return any(fnmatchcase(file.path, one) and file.path.count("/") == one.count("/") for one in patterns)


def _instead(paths: Collection[str]) -> str:
    for pattern, words in _INSTEAD:
        if found := sorted(path for path in paths if fnmatchcase(path, pattern)):
            return f", but {found[0]}: {words}"
    return ""


def _permanent(message: str) -> ModelError:
    return ModelError(message, kind=LoadFailure.PERMANENT)
