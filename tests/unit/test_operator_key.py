"""The operator's key: made once, read afterwards, never anything but a key."""

from __future__ import annotations

import asyncio
import base64

import pytest
from tests.support.kube_fake import KEY_SECRET, FakeKube

from lockstep_operator.cluster import operator_key
from lockstep_operator.cluster.client import KubeError
from lockstep_operator.types.operator_key import KEY_BYTES, OperatorKey

PLACE = ("lockstep-system", KEY_SECRET)


@pytest.fixture
def kube(monkeypatch: pytest.MonkeyPatch) -> FakeKube:
    monkeypatch.setattr(operator_key, "RETRY_SECONDS", 0.001)
    return FakeKube(lambda: 0.0)


async def test_the_first_operator_makes_it_and_the_next_reads_it(kube: FakeKube) -> None:
    first = await operator_key.obtained(kube, *PLACE)
    assert len(first.secret) == KEY_BYTES
    assert await operator_key.obtained(kube, *PLACE) == first
    assert [write for write in kube.writes if write[1] == "Secret"] == [("create", "Secret", KEY_SECRET)]


async def test_two_that_begin_at_once_have_the_same(kube: FakeKube) -> None:
    kube.pause = lambda: 2
    one, other = await asyncio.gather(*(operator_key.obtained(kube, *PLACE) for _ in range(2)))
    assert one == other


async def test_one_that_is_lost_is_followed_by_another(kube: FakeKube) -> None:
    first = await operator_key.obtained(kube, *PLACE)
    kube.remove("Secret", *PLACE)
    assert (await operator_key.obtained(kube, *PLACE)).id != first.id


@pytest.mark.parametrize("data", [{}, {"key": ""}, {"key": "short"}, {"key": "n o t base64"}])
async def test_a_secret_without_a_key_is_told_and_waited_for(
    kube: FakeKube, data: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    kube.put("Secret", {"metadata": {"namespace": PLACE[0], "name": PLACE[1]}, "data": data})
    looks = iter(range(3))

    def removed_in_the_end() -> None:
        if next(looks, None) is None and ("Secret", *PLACE) in kube.objects:
            kube.remove("Secret", *PLACE)

    kube.before_read = removed_in_the_end
    async with asyncio.timeout(10):
        assert len((await operator_key.obtained(kube, *PLACE)).secret) == KEY_BYTES
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told.endswith("delete it, and another is made")


async def test_an_api_server_that_refuses_is_asked_again(kube: FakeKube) -> None:
    refusals = iter([KubeError(403, "Forbidden", "no"), KubeError(0, "TimeoutError", "no answer")])

    def refuse() -> None:
        if error := next(refusals, None):
            raise error

    kube.before_read = refuse
    async with asyncio.timeout(10):
        assert len((await operator_key.obtained(kube, *PLACE)).secret) == KEY_BYTES


def test_tokens_differ_by_key_model_request_and_whom_they_are_for() -> None:
    key, other = OperatorKey(b"a" * KEY_BYTES), OperatorKey(b"b" * KEY_BYTES)
    tokens = [
        made(uid, request)
        for one in (key, other)
        for made in (one.group_token, one.operator_token)
        for uid in ("uid-1", "uid-2")
        for request in ("0123456789", "9876543210")
    ]
    assert len(set(tokens)) == len(tokens) == 16
    assert base64.b64encode(key.secret).decode() not in repr(key)
    assert "a" * KEY_BYTES not in repr(key)
