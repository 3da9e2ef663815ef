"""The command line: flags, their environment variables, and what is wrong with them."""

from __future__ import annotations

import socket
from pathlib import Path

import click
import pytest
from tests.support.command_line import configuration, options
from tests.support.ports import free_port

from lockstep_runtime.cli import config_from, main, token_for, unnamed_ports
from lockstep_runtime.config import EngineLimits, ServeConfig, Source, UsageError, Vision, Watchdog
from lockstep_runtime.flags import byte_size
from lockstep_runtime.host.addresses import listen
from lockstep_runtime.supervisor.ports import Ports, open_ports


def config(*arguments: str, **environment: str) -> ServeConfig:
    return configuration(["serve", *arguments], environment)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2Gi", 2**31), ("512Mi", 2**29), ("1.5G", 1_500_000_000), ("7", 7), ("10k", 10_000), ("1Ti", 2**40)],
)
def test_sizes_are_written_as_in_kubernetes(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "2gb", "-1Gi", "0", "1e9", "2 Gi"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write it like 2Gi"):
        byte_size(text)


def test_defaults_are_a_group_on_one_machine() -> None:
    found = config("models/Qwen3-8B/", "--tensor-parallel-size", "4")
    assert found.served_name == "Qwen3-8B"
    assert (found.ranks_per_pod, found.pods, list(found.ranks), found.is_leader) == (4, 1, [0, 1, 2, 3], True)
    assert (found.host, found.leader) == ("localhost", "127.0.0.1")
    assert found.limits == EngineLimits()


def test_every_flag_arrives() -> None:
    found = config(
        "org/model", "--served-name", "m", "--revision", "abc", "--download-dir", "/models", "--dtype", "bfloat16",
        "--tensor-parallel-size", "4", "--ranks-per-pod", "2", "--backend", "cpu", "--threads-per-rank", "3",
        "--max-model-len", "4096", "--max-sequences", "8", "--max-batch-tokens", "512", "--kv-cache-memory", "2Gi",
        "--max-waiting", "9", "--host", "0.0.0.0", "--port", "1", "--bus-port", "2", "--status-port", "3",
        "--grace-seconds", "12.5", "--lame-duck-seconds", "4", "--model-name", "cr", "--group", "1",
        "--spec-revision", "r", "--pod-index", "1", "--pod", "cr-1-1", "--node", "n", "--leader", "cr-1-0.cr-1",
        "--step-timeout", "60", "--watchdog-floor", "1.5", "--watchdog-factor", "8", "--recovery-strategy",
        "RecyclePods", "--weight-cache", "Off", "--allow-faults", "--no-prefix-caching",
        "--max-pixels", "500000", "--min-pixels", "1024",
        "--allow-image-host", "a.example", "--allow-image-host", "b.example",
    )  # fmt: skip
    assert found == ServeConfig(
        model="org/model", served_name="m", model_revision="abc", download_dir="/models", dtype="bfloat16",
        tensor_parallel_size=4, ranks_per_pod=2, backend="cpu", threads_per_rank=3,
        limits=EngineLimits(max_model_len=4096, max_sequences=8, max_batch_tokens=512, kv_cache_bytes=2**31,
                            max_waiting=9, prefix_caching=False),
        host="0.0.0.0", api_port=1, bus_port=2, status_port=3, grace_seconds=12.5, lame_duck_seconds=4.0,
        model_name="cr", group=1, spec_revision="r", pod_index=1, pod="cr-1-1", node="n", leader="cr-1-0.cr-1",
        watchdog=Watchdog(step_timeout=60.0, floor=1.5, factor=8.0), recovery_strategy="RecyclePods",
        weight_cache="Off", allow_faults=True,
        vision=Vision(max_pixels=500_000, min_pixels=1024, image_hosts=("a.example", "b.example")),
    )  # fmt: skip


def test_every_flag_is_a_variable_and_the_flag_goes_first() -> None:
    environment = {"LOCKSTEP_POD_INDEX": "1", "LOCKSTEP_RANKS_PER_POD": "1", "LOCKSTEP_KV_CACHE_MEMORY": "1Gi"}
    found = config("m", "--tensor-parallel-size", "2", **environment)
    assert (found.pod_index, found.limits.kv_cache_bytes) == (1, 2**30)
    assert config("m", "--tensor-parallel-size", "2", "--pod-index", "0", **environment).pod_index == 0
    off = {"LOCKSTEP_PREFIX_CACHING": "false"}
    assert not config("m", **off).limits.prefix_caching
    assert config("m", "--prefix-caching", **off).limits.prefix_caching


@pytest.mark.parametrize("word", ["float8", ""])
def test_a_variable_is_checked_like_its_flag(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCKSTEP_DTYPE", word)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "m"])
    assert ended.value.code == 2
    assert f"'--dtype': {word!r} is not one of 'auto', 'float32'" in capsys.readouterr().err


def test_what_contradicts_itself_ends_the_command_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "m", "--tensor-parallel-size", "4", "--ranks-per-pod", "3"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "lockstep: --ranks-per-pod 3 does not divide --tensor-parallel-size 4\n"


def test_origins_are_flags_given_again_or_words_of_the_variable() -> None:
    variable = {"LOCKSTEP_CORS_ALLOW_ORIGIN": "https://a https://b"}
    assert config("m").cors_allow_origins == ()
    assert config("m", LOCKSTEP_CORS_ALLOW_ORIGIN="").cors_allow_origins == ()
    assert config("m", **variable).cors_allow_origins == ("https://a", "https://b")
    flags = ("--cors-allow-origin", "https://c", "--cors-allow-origin", "*")
    assert config("m", *flags, **variable).cors_allow_origins == ("https://c", "*")


def test_the_former_name_of_a_backend_is_still_taken() -> None:
    assert config("m", "--backend", "gloo") == config("m", "--backend", "cpu")
    assert config("m", LOCKSTEP_BACKEND="gloo").backend == "cpu"


def test_ranks_per_pod_must_divide() -> None:
    with pytest.raises(UsageError, match="--ranks-per-pod 3 does not divide --tensor-parallel-size 4"):
        config("m", "--tensor-parallel-size", "4", "--ranks-per-pod", "3")


def test_a_pod_beyond_the_group_is_refused() -> None:
    with pytest.raises(UsageError, match="a group of 2 pods has the indexes 0 to 1"):
        config("m", "--tensor-parallel-size", "2", "--ranks-per-pod", "1", "--pod-index", "2")


def test_one_machine_makes_its_own_token_and_several_pods_need_one() -> None:
    alone = config("m")
    assert len(token_for(alone, {})) >= 32
    assert token_for(alone, {}) != token_for(alone, {})
    assert token_for(alone, {"LOCKSTEP_TOKEN": "secret"}) == "secret"
    with pytest.raises(UsageError, match="LOCKSTEP_TOKEN in each of them"):
        token_for(config("m", "--tensor-parallel-size", "2", "--ranks-per-pod", "1"), {})


@pytest.mark.parametrize("flag", ["--port", "--bus-port", "--status-port"])
def test_a_taken_port_is_named_with_its_flag(flag: str) -> None:
    ports = {name: str(free_port()) for name in ("--port", "--bus-port", "--status-port")}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports[flag] = str(taken.getsockname()[1])
        with pytest.raises(UsageError, match=f"choose another with {flag}$"):
            open_ports(config("m", *(word for pair in ports.items() for word in pair)))


def close(ports: Ports) -> None:
    for one in (*ports.status, *ports.kept):
        one.close()


def test_ports_that_nobody_named_are_free_ones() -> None:
    """As of servers on one machine that are told nothing but --port."""
    known = [config("m", "--port", str(free_port())) for _ in range(3)]
    opened = [open_ports(one, may_choose=("bus_port", "status_port")) for one in known]
    ports = [port for one in opened for port in (one.config.bus_port, one.config.status_port)]
    assert len(set(ports)) == 6
    for one in opened:
        engines = listen(one.config.host, one.config.bus_port)  # the engine binds what is kept for it
        for listener in engines:
            listener.listen()
            listener.close()
        close(one)


def test_a_port_is_chosen_only_where_nobody_else_must_know_it() -> None:
    for words, chosen in (
        ("", ["bus_port", "status_port"]),
        ("--bus-port 7400", ["status_port"]),
        ("--tensor-parallel-size 2 --ranks-per-pod 1", []),
    ):
        given = options(["serve", "m", *words.split()])
        assert unnamed_ports(given, config_from(given)) == chosen
    named = options(["serve", "m"], {"LOCKSTEP_STATUS_PORT": "7401"})
    assert unnamed_ports(named, config_from(named)) == ["bus_port"]


def test_a_member_needs_only_its_status_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        member = config(
            "m", "--tensor-parallel-size", "2", "--ranks-per-pod", "1", "--pod-index", "1",
            "--port", port, "--bus-port", port, "--status-port", str(free_port()),
        )  # fmt: skip
        close(open_ports(member))


def test_what_an_operator_started_tells_of_the_engines_ports_in_its_status() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ("--port", port, "--bus-port", port, "--status-port")
        close(open_ports(config("m", "--spec-revision", "r1", *words, str(free_port()))))
        with pytest.raises(UsageError, match="choose another with --status-port"):
            open_ports(config("m", "--spec-revision", "r1", *words, port))


def test_help_lists_every_flag_with_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in ("--tensor-parallel-size", "--kv-cache-memory", "--grace-seconds", "LOCKSTEP_MAX_MODEL_LEN"):
        assert name in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step-timeout", "0"], "'0' is not a number of seconds above 0"),
        (["--step-timeout", "nan"], "'nan' is not a number of seconds above 0"),
        (["--grace-seconds", "-1"], "'-1' is not a number of seconds"),
        (["--max-sequences", "1_0"], "'1_0' is not a whole number above 0"),
        (["--port", "65536"], "'65536' is not a port between 1 and 65535"),
        (["--group", "x"], "'x' is not a whole number"),
        (["--watchdog-factor", "0.5"], "'0.5' is not a number of 1 or more"),
        (["--recovery-strategy", "Hope"], "Ladder"),
        (["--weight-cache", "Tape"], "Memory"),
        (["--allow-faults", "perhaps"], "'perhaps' is neither true nor false"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        config("m", *arguments)
    assert words in refused.value.format_message()


def test_faults_are_allowed_only_by_an_explicit_word() -> None:
    assert not config("m").allow_faults
    assert config("m", LOCKSTEP_ALLOW_FAULTS="true").allow_faults
    assert not config("m", "--allow-faults", "false", LOCKSTEP_ALLOW_FAULTS="1").allow_faults


def test_a_model_that_cannot_be_looked_at_is_told_of_where_it_is_read() -> None:
    """As a folder that may not be entered: the error says so later, and it may be mended."""
    unreadable = "/" + "x" * 300  # no file has so long a name: looking at it is an OSError, whoever looks
    with pytest.raises(OSError, match="name too long"):
        Path(unreadable).stat()
    config = config_from(options(["serve", unreadable]))
    assert (config.model, config.source) == (unreadable, Source())
