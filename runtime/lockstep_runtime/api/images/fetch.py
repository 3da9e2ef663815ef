"""Fetches an image from another host: only from those that the operator of this server has named.

A name is resolved once, every address of it must be a public one, and the connection goes to that address: what the
name says a moment later (DNS rebinding) doesn't matter. No redirects, no proxies, and bounds on size and time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from urllib.parse import urlsplit

import httpx

from lockstep_runtime.api.errors import ApiError, invalid
from lockstep_runtime.api.images.content import RemoteImage
from lockstep_runtime.host.addresses import join

_PARAM: Final = "messages"
_HINT: Final = "send the image as a data URI (data:image/png;base64,...)"
Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Every address of a name.

    Raises:
        OSError: there is none.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Whether anybody may be there: no loopback, private, link-local, shared or multicast address, in either family."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None and not inner.is_global:
            return False
    return found.is_global and not found.is_multicast


@dataclass(frozen=True)
class ImageFetcher:
    """`hosts`: in lower case. `resolve` and `may_reach` are the edge to the network."""

    hosts: Collection[str]
    seconds: float
    most_bytes: int
    resolve: Resolve = resolve
    may_reach: Callable[[str], bool] = is_public

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def fetch(self, image: RemoteImage) -> bytes:
        """
        Raises:
            ApiError: 400, the host is not allowed, or does not deliver.
        """
        if image.host not in self.hosts:
            why = f"images are fetched from {', '.join(sorted(self.hosts))} only" if self.hosts else "none are fetched"
            raise invalid(f"The host of an image's URL is not allowed: {why}; {_HINT}", _PARAM)
        try:
            async with asyncio.timeout(self.seconds):
                return await self._get(image, await self._address(image))
        except TimeoutError:
            raise _failed(image, f"it did not arrive within {self.seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise _failed(image, f"{type(error).__name__}: {error}"[:200]) from None

    async def _address(self, image: RemoteImage) -> str:
        addresses = await self.resolve(image.host, image.port)
        if not addresses or not all(map(self.may_reach, addresses)):
            raise _failed(image, "its address is not a public one")
        return addresses[0]

    async def _get(self, image: RemoteImage, address: str) -> bytes:
        parts = urlsplit(image.url)
        target = parts._replace(netloc=join(address, image.port), scheme=image.scheme, fragment="").geturl()
        headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity"}
        content = bytearray()
        async with (
            httpx.AsyncClient(
                verify=self._tls, trust_env=False, follow_redirects=False, timeout=self.seconds
            ) as client,
            client.stream("GET", target, headers=headers, extensions={"sni_hostname": image.host}) as answer,
        ):
            if answer.status_code != 200:
                raise _failed(image, f"it answers {answer.status_code}; redirects are not followed")
            async for chunk in answer.aiter_raw():
                content += chunk
                if len(content) > self.most_bytes:
                    raise _failed(image, f"it is larger than {self.most_bytes} bytes")
        return bytes(content)


def _failed(image: RemoteImage, reason: str) -> ApiError:
    return invalid(f"An image can't be fetched from {image.host}: {reason}; {_HINT}", _PARAM)
