"""HTTP clients of the tests.

One that loads the authorities' certificates anew, as each does by itself, costs 40 ms of CPU, which a wait that asks
again and again takes from the ranks that it waits for; and plain HTTP needs none.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

import httpx

NO_AUTHORITIES: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
# Servers come and go on the same ports: no connection is kept.
HTTP: Final = httpx.Client(verify=NO_AUTHORITIES, limits=httpx.Limits(max_keepalive_connections=0))


def async_http(**options: Any) -> httpx.AsyncClient:
    """A client for one event loop."""
    return httpx.AsyncClient(verify=NO_AUTHORITIES, **options)
