"""What is asked of a hub, through huggingface_hub: which commit a revision is, which files it has, and their contents.

The library's own download into its cache begins anew when its process has ended (each writes to a file of its own,
https://github.com/huggingface/huggingface_hub/pull/4228), and says nothing on the way. So the transfer is made here,
with the library's client, addresses, headers and errors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from lockstep_runtime.sources.hub_cache import CHUNK_BYTES
from lockstep_runtime.sources.hub_errors import explain, wrong_contents
from lockstep_runtime.sources.repository import Digest, RemoteFile

READ_SECONDS: Final = 20.0  # without a byte
AGAIN_SECONDS: Final = 0.5  # before a connection that was cut is made again
Moved = Callable[[int], None]  # so many bytes came; negative: what was there is of no use


class Hub:
    """`endpoint` None: huggingface.co, or HF_ENDPOINT. `token` None: that of `hf auth login`, False: none."""

    def __init__(self, endpoint: str | None, token: str | bool | None) -> None:
        self._endpoint, self._token = endpoint, token

    @property
    def endpoint(self) -> str:
        from huggingface_hub import constants

        return (self._endpoint or os.environ.get("HF_ENDPOINT") or str(constants.ENDPOINT)).rstrip("/")

    def resolve(self, repo: str, revision: str) -> str:
        """The commit that the revision is now.

        Raises:
            ModelError: the hub did not say.
        """
        return str(self._info(repo, revision).sha)

    def files(self, repo: str, commit: str) -> list[RemoteFile]:
        """
        Raises:
            ModelError: the hub did not list them.
        """
        return [
            _remote(repo, one, self.endpoint) for one in self._info(repo, commit, files_metadata=True).siblings or ()
        ]

    def _info(self, repo: str, revision: str, *, files_metadata: bool = False) -> Any:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, token=self._token, library_name="lockstep")
        try:
            return api.model_info(repo, revision=revision, files_metadata=files_metadata, timeout=READ_SECONDS)
        except Exception as error:  # of the library, or of its HTTP client
            raise explain(repo, revision, error, self.endpoint) from error

    def transfer(self, repo: str, commit: str, file: RemoteFile, part: Path, moved: Moved) -> None:
        """Append to `part` what it lacks, and check it. A connection that is cut is made again as long as it helps.

        Raises:
            ModelError: the hub did not deliver it, or the disk refuses. What came stays, for the next time.
        """
        try:
            for attempt in range(2):
                digest = self._whole(repo, commit, file, part, moved)
                if digest.found == digest.expected:
                    return
                part.unlink()
                moved(-file.size)
                if attempt:
                    raise wrong_contents(repo, file.path, digest.name, digest.found, digest.expected, self.endpoint)
        except Exception as error:
            raise explain(repo, commit, error, self.endpoint) from error

    def _whole(self, repo: str, commit: str, file: RemoteFile, part: Path, moved: Moved) -> Digest:
        """Until it has its size."""
        while True:
            had = part.stat().st_size if part.exists() else 0
            try:
                digest, size = self._append(repo, commit, file, part, moved)
                if size >= file.size:
                    return digest
                ended: Exception = ConnectionError(f"{self.endpoint} ended after {size} of {file.size} bytes")
            except Exception as error:
                ended = error
            if part.stat().st_size <= had:
                raise ended
            time.sleep(AGAIN_SECONDS)

    def _append(self, repo: str, commit: str, file: RemoteFile, part: Path, moved: Moved) -> tuple[Digest, int]:
        """One request. Returns the hash of what is there, and its size."""
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("r+b" if part.exists() else "w+b") as stream:
            digest, have = file.digest, 0
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                have += len(chunk)
            if have > file.size:
                moved(-have)
                stream.truncate(0)
                stream.seek(0)
                digest, have = file.digest, 0
            if have < file.size or not file.size:
                digest, have = self._receive(repo, commit, file, stream, (digest, have), moved)
            stream.flush()
            os.fsync(stream.fileno())
        return digest, have

    def _receive(
        self, repo: str, commit: str, file: RemoteFile, stream: Any, known: tuple[Digest, int], moved: Moved
    ) -> tuple[Digest, int]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined] # documented, and not marked so for mypy
            build_hf_headers,
            hf_raise_for_status,
        )

        digest, have = known
        url = hf_hub_url(repo, file.path, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self._token, library_name="lockstep") | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with get_session().stream("GET", url, headers=headers, timeout=READ_SECONDS) as response:
            hf_raise_for_status(response)
            if have and response.status_code != 206:  # it begins anew, whatever was asked for
                moved(-have)
                stream.truncate(0)
                stream.seek(0)
                digest, have = file.digest, 0
            for chunk in response.iter_bytes():
                stream.write(chunk)
                digest.update(chunk)
                have += len(chunk)
                moved(len(chunk))
                if have > file.size:
                    break
        return digest, have


def _remote(repo: str, listed: Any, endpoint: str) -> RemoteFile:
    size = listed.lfs.size if listed.lfs else listed.size
    if size is None:
        raise explain(repo, None, ValueError(f"{endpoint} lists {listed.rfilename} without its size"), endpoint)
    return RemoteFile(listed.rfilename, size, listed.blob_id or "", listed.lfs.sha256 if listed.lfs else None)
