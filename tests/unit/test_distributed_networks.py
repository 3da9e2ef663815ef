from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lockstep_runtime.distributed import networks
from lockstep_runtime.distributed.networks import network_sentence, tell_networks


def test_what_nccl_may_use_is_said_in_a_sentence() -> None:
    assert "goes over TCP" in network_sentence([], "")
    assert network_sentence(["mlx5_0", "mlx5_1"], "").startswith("NCCL may use mlx5_0, mlx5_1 between pods")
    lacking = network_sentence(["mlx5_0"], "cannot open shared object file")
    assert lacking == (
        "mlx5_0 can't be used, so NCCL goes over TCP between pods: install libibverbs.so.1 in the image "
        "(cannot open shared object file)"
    )
    assert network_sentence([f"mlx5_{number}" for number in range(9)], "").count("mlx5_") == 8


def test_a_device_whose_library_is_missing_is_a_warning_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(networks, "DEVICES", tmp_path)
    monkeypatch.setattr(networks, "VERBS", "libthere-is-none.so.1")
    tell_networks.cache_clear()
    with caplog.at_level(logging.INFO):
        tell_networks()
        tell_networks()
    tell_networks.cache_clear()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "libthere-is-none.so.1" in record.message
