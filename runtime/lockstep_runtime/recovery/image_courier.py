"""Brings pixels to the ranks: once by each connection, in frames of bounded size, ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.framing import encode
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.recovery.bus_server import Peer


class ImageCourier:
    """`peers`: by rank. A rank whose connection is another holds nothing."""

    def __init__(self, peers: Mapping[int, Peer]) -> None:
        self._peers = peers
        self._held: dict[int, tuple[Peer, set[str]]] = {}  # by rank: digests that were sent by this connection

    def deliver(self, images: Sequence[Pixels]) -> None:
        """What a rank has not got yet."""
        for image in images:
            lacking = [peer for rank, peer in self._peers.items() if self._lacks(rank, peer, image.digest)]
            for frame in _frames(image) if lacking else ():
                for peer in lacking:
                    peer.send_frame(frame)

    def dropped(self, digests: Iterable[str]) -> None:
        """The next step tells the ranks to."""
        gone = set(digests)
        for _, held in self._held.values():
            held -= gone

    def _lacks(self, rank: int, peer: Peer, digest: str) -> bool:
        if rank not in self._held or self._held[rank][0] is not peer:
            self._held[rank] = (peer, set())
        held = self._held[rank][1]
        if digest in held:
            return False
        held.add(digest)
        return True


def _frames(image: Pixels) -> Iterator[bytes]:
    for offset in range(0, len(image.data), bus.IMAGE_PART_BYTES):
        data = image.data[offset : offset + bus.IMAGE_PART_BYTES]
        yield encode(
            bus.ImagePart(
                digest=image.digest, height=image.height, width=image.width, offset=offset, data=data
            )
        )  # fmt: skip
