"""The live page of the deployed operator, in a browser behind `kubectl port-forward`, while a real rank hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.support import kubectl
from tests.support.browser import Watched, browsing, opened
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import begun, breakable, inject, read
from tests.support.cluster_model import OPERATOR_NAMESPACE, Model, operator_pods, tiny_chat
from tests.support.port_forward import forwarding
from tests.support.ports import free_port
from tests.support.stream import answers

LIVE_PORT = 8081
HOSTILE = "/var/lib/lockstep/models/<img src=x onerror=alert(1)>"
RANKS = "[...document.querySelectorAll('[aria-label^=tiny-chat] .rank')].map(one => one.dataset.mood).join()"
LIVE = "document.getElementById('link').dataset.state === 'live'"


def leader() -> str:
    """The operator that works, as the documents have people ask for it."""
    lease = ("get", "lease", "lockstep", "-o", "jsonpath=pod/{.spec.holderIdentity}")
    return kubectl.kubectl("-n", OPERATOR_NAMESPACE, *lease)


async def sees(watched: Watched, text: str) -> None:
    await watched.page.get_by_text(text).first.wait_for()


async def test_a_hang_is_seen_while_it_is_and_healed_and_the_page_outlives_its_operator(
    api: ClusterApi, namespace: str, new_namespace: Callable[[str], str]
) -> None:
    model, hostile = Model(api, namespace, "tiny-chat"), Model(api, namespace, "hostile")
    model.apply(breakable())
    hostile.apply(tiny_chat(model={"hostPath": {"path": HOSTILE}}))
    await asyncio.to_thread(model.until_ready)
    port = free_port()
    async with browsing() as browser:
        with forwarding(OPERATOR_NAMESPACE, leader, port, LIVE_PORT) as url:
            opening = opened(browser, f"{url}/?text={namespace}/")
            watched = await opening.__aenter__()
            await watched.until(f"{RANKS} === 'ready,ready'", 30)
            await _hangs_and_heals(model, watched)
            await sees(watched, HOSTILE)
            assert await watched.page.evaluate("document.querySelectorAll('img').length") == 0
            assert watched.problems == []
            for pod in operator_pods(api):
                kubectl.kubectl("-n", OPERATOR_NAMESPACE, "delete", "pod", pod["metadata"]["name"], "--wait=true")
            await sees(watched, "not connected")
        with forwarding(OPERATOR_NAMESPACE, leader, port, LIVE_PORT):
            await watched.until(LIVE, 60)
            await watched.until(f"{RANKS} === 'ready,ready'", 30)
            await sees(watched, "healed by Respawn")  # the group remembers its faults
            await opening.__aexit__(None, None, None)
    model.delete()
    hostile.delete()


async def _hangs_and_heals(model: Model, watched: Watched) -> None:
    readers = read(model, 64)
    begun(readers)
    inject(model, "hang", 1, "--phase=decode")
    await watched.until(f"{RANKS} === 'waiting,stopped'", 30)
    await sees(watched, "Hang: ")
    await sees(watched, "rank 1 stopped")
    await sees(watched, "healed by Respawn")
    shown = await watched.page.locator(".group .phases li").all_inner_texts()
    assert [text.split()[0] for text in shown][:5] == ["detect", "abort", "respawn", "rebuild", "verify"]
    await watched.until(f"{RANKS} === 'ready,mended'", 30)
    assert all(answer.finish == "length" for answer in answers(readers))
    assert model.read()["status"]["lastRecovery"]["fault"] == "Hang"
