"""The operator's own HTTP port: /metrics, /healthz and /readyz."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from lockstep_operator.reporting.metrics import Metrics


def application(metrics: Metrics, unready: Callable[[], str]) -> web.Application:
    """/healthz answers while the event loop turns; /readyz while `unready` has nothing to say."""

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        words = unready()
        return web.Response(status=503, text=f"{words}\n") if words else web.Response(text="ok\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", exposition), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    return app


async def serve(app: web.Application, port: int) -> web.AppRunner:
    """Raises OSError when the port is taken. The caller cleans the runner up."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
