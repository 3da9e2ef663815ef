"""The bus's handshake and its bounds; 1,000 malformed frames close their own connections and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import random

import msgspec
import pytest
from tests.support.fake_ranks import TOKEN, FakeRank, continuation
from tests.support.live_engine import LiveEngine, live_engine

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.framing import FrameError, Framer, decode, encode
from lockstep_runtime.protocol.tokens import Purpose, purpose_token
from lockstep_runtime.recovery import bus_server


async def exchange(live: LiveEngine, data: bytes) -> bytes:
    """What the bus answers to a stranger's bytes before it closes; the stranger keeps its end open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.config.bus_port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def refusal(answer: bytes) -> str:
    [frame] = Framer(bus.MAX_HELLO_BYTES).feed(answer)
    return msgspec.msgpack.decode(frame, type=bus.Refused).reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token": "wrong"}, "the token is not this group's"),
        ({"token": "wröng"}, "the token is not this group's"),
        ({"token": purpose_token(TOKEN, Purpose.STATUS)}, "the token is not this group's"),
        ({"protocol": 99}, "protocol 99; this engine speaks 1"),
        ({"group": 5}, "this is group 0, not 5"),
        ({"rank": 2}, "rank 2 does not belong to pod 0"),
        ({"rank": 1}, "rank 1 does not belong to pod 0"),
        ({"rank": -1}, "rank -1 does not belong to pod 0"),
        ({"pod_index": 7}, "there is no pod 7 in a group of 2"),
    ],
)
async def test_who_does_not_belong_here_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    async with live_engine() as live:
        hello = msgspec.structs.replace(live.ranks[0].hello(), incarnation="new", **change)
        assert refusal(await exchange(live, encode(hello))) == reason
        assert live.engine.status().faults == []


async def test_a_frame_longer_than_a_hello_is_refused_by_its_header() -> None:
    async with live_engine() as live:
        assert await exchange(live, (bus.MAX_HELLO_BYTES + 1).to_bytes(4, "big")) == b""


async def test_a_stranger_has_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_server, "HELLO_SECONDS", 0.1)
    async with live_engine() as live:
        assert await exchange(live, b"\x00\x00") == b""


async def test_of_too_many_strangers_the_oldest_go_and_members_are_not_shut_out() -> None:
    async with live_engine(strangers=4) as live:
        strangers = [await asyncio.open_connection("127.0.0.1", live.config.bus_port) for _ in range(10)]
        async with asyncio.timeout(10):
            for reader, _ in strangers[:6]:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
        await live.ranks[1].respawn()  # while the others are still there
        await live.until(lambda: live.engine.status().recoveries == 1, "the rank is back")
        assert not strangers[9][0].at_eof()
        for _, writer in strangers:
            writer.close()


def malformed(chance: random.Random, hello: bytes) -> bytes:
    """One of many kinds of nonsense."""
    noise = chance.randbytes(chance.randint(1, 300))
    cut = hello[: chance.randint(1, len(hello) - 1)]
    flipped = bytearray(hello)
    flipped[chance.randrange(4, len(hello))] ^= 1 << chance.randrange(8)
    kinds = [
        noise,
        len(noise).to_bytes(4, "big") + noise,
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff" + noise,
        (4000).to_bytes(4, "big") + b"\x91" * 4000,
        (4000).to_bytes(4, "big") + b"\x81\xa1a" * 1333 + b"\xc0",
        cut + noise,
        bytes(flipped),
        encode(bus.Loaded(seconds=0, weight_bytes=0, read_bytes=0, cache_blocks=0, block_size=0, memory_bytes=0)),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    return chance.choice(kinds)


async def test_a_thousand_malformed_frames_from_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_server, "HELLO_SECONDS", 0.3)
    chance = random.Random(3)
    async with live_engine() as live:
        hello = encode(msgspec.structs.replace(live.ranks[0].hello(), incarnation="forged", token="guess"))
        running = asyncio.create_task(live.generate((1, 2), 200))
        for _ in range(10):
            await asyncio.gather(*(exchange(live, malformed(chance, hello)) for _ in range(100)))
        assert await running == continuation((1, 2), 200)
        assert await live.generate((3,), 5) == continuation((3,), 5)
        assert live.engine.status().faults == []


async def test_malformed_frames_from_a_member_cost_that_member_its_connection_only() -> None:
    chance = random.Random(4)
    async with live_engine() as live:
        for turn in range(3):
            writer = live.ranks[1].writer
            assert writer is not None
            noise = chance.randbytes(50)
            writer.write(len(noise).to_bytes(4, "big") + noise)
            await live.until(lambda turn=turn: len(live.engine.status().faults) == turn + 1, "it is cut off")  # type: ignore[misc]
            await live.ranks[1].respawn()
            await live.until(lambda turn=turn: live.engine.status().recoveries == turn + 1, "it is back")  # type: ignore[misc]
        assert await live.generate((3,), 5) == continuation((3,), 5)
        assert live.engine.status().ranks[0].respawns == 0


async def test_a_supervisor_may_not_speak_as_a_worker() -> None:
    async with live_engine(supervisors=False) as live:
        hello = msgspec.structs.replace(live.ranks[1].hello(), role=bus.Role.SUPERVISOR, incarnation="s", rank=-1)
        answer = await exchange(live, encode(hello) + encode(bus.Aborted(epoch=9, seconds=0)))
        assert isinstance(msgspec.msgpack.decode(answer[4:], type=bus.ToSupervisor), bus.Welcome)
        assert live.engine.status().faults == []


async def test_a_worker_of_two_connections_speaks_through_the_newer() -> None:
    async with live_engine() as live:
        twin = FakeRank(live.config, 1, incarnation=live.ranks[1].incarnation)
        twin.start()
        await live.until(lambda: live.engine.status().recoveries == 1, "the group is formed with the newer")
        assert live.engine.status().ranks[1].respawns == 0
        assert await live.generate((3,), 5) == continuation((3,), 5)
        assert twin.steps > 0
        await twin.die()


class TestFramer:
    def test_frames_come_out_however_the_bytes_are_cut(self) -> None:
        chance = random.Random(1)
        bodies = [chance.randbytes(chance.randint(1, 50)) for _ in range(100)]
        stream = b"".join(len(body).to_bytes(4, "big") + body for body in bodies)
        framer, found = Framer(50), []
        while stream:
            size = chance.randint(1, 70)
            found += list(framer.feed(stream[:size]))
            stream = stream[size:]
        assert found == bodies

    @pytest.mark.parametrize("length", [0, 51, 2**32 - 1])
    def test_a_length_out_of_bounds_is_an_error(self, length: int) -> None:
        with pytest.raises(FrameError, match="allowed are 1 to 50"):
            list(Framer(50).feed(length.to_bytes(4, "big")))

    def test_a_message_too_long_to_send_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bus, "MAX_FRAME_BYTES", 10)
        with pytest.raises(FrameError, match="a LoadFailed of"):
            encode(bus.LoadFailed(message="x" * 20))

    def test_deep_nesting_is_an_error_and_no_crash(self) -> None:
        decoder = msgspec.msgpack.Decoder(bus.FromWorker)
        with pytest.raises(FrameError):
            decode(decoder, b"\x82\xa4type\xa6Joined\xa1x" + b"\x91" * 1_000_000)


async def test_a_peer_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_server, "MAX_UNSENT_BYTES", 1 << 20)
    async with live_engine(supervisors=False) as live:
        hello = msgspec.structs.replace(live.ranks[1].hello(), role=bus.Role.SUPERVISOR, incarnation="s", rank=-1)
        reader, writer = await asyncio.open_connection("127.0.0.1", live.config.bus_port, limit=1024)
        writer.write(encode(hello))
        await live.until(lambda: 1 in live.engine.group.supervisors, "it is connected")
        peer = live.engine.group.supervisors[1]
        for _ in range(1000):
            peer.send_frame(bytes(1 << 16))
            await asyncio.sleep(0)
            if 1 not in live.engine.group.supervisors:
                break
        await live.until(lambda: 1 not in live.engine.group.supervisors, "it is cut off")
        writer.close()
        del reader
