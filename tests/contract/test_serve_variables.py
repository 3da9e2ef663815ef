"""What `lockstep serve` is told by variables alone, as the operator tells its rank pods."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.http import HTTP
from tests.support.serve import served

from lockstep_runtime.config import API_KEY_FILE_VARIABLE
from lockstep_runtime.log import FORMAT_VARIABLE


def test_keys_come_from_a_file_that_may_change_and_every_process_logs_json(tmp_path: Path) -> None:
    file, fresh = tmp_path / "keys", tmp_path / "fresh"
    file.write_text("old\n")
    environment = {API_KEY_FILE_VARIABLE: str(file), FORMAT_VARIABLE: "json", "LOCKSTEP_BACKEND": "gloo"}
    with served(tmp_path, "--threads-per-rank", "1", environment=environment) as serve:
        serve.ready()

        def answers() -> list[int]:
            keys = [{"Authorization": f"Bearer {key}"} for key in ("old", "new")]
            return [HTTP.get(f"{serve.api}/v1/models", headers=headers).status_code for headers in keys]

        assert answers() == [200, 401]
        fresh.write_text("old\nnew\n")
        fresh.replace(file)
        assert answers() == [200, 200]
        assert serve.end() == 0

    records = [json.loads(line) for line in serve.log.read_text().splitlines()]
    assert {"supervisor", "engine", "worker 0"} <= {record["part"] for record in records}
    assert all({"time", "level", "message"} <= record.keys() for record in records)
    assert "--backend gloo is deprecated: it is called cpu now" in {record["message"] for record in records}
    assert [record["message"] for record in records if "API keys" in record["message"]] == [
        f"1 API keys are valid, from {file}",
        f"2 API keys are valid, from {file}",
    ]
