"""What `lockstep serve` is told by variables alone, as the operator tells its rank pods."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.http import HTTP
from tests.support.serve import AS_JSON, served

from lockstep_runtime.config import API_KEY_FILE_VARIABLE
from lockstep_runtime.log import LEVEL_VARIABLE


def test_keys_come_from_a_file_that_may_change_and_every_process_logs_json_with_a_requests_id(tmp_path: Path) -> None:
    file, fresh = tmp_path / "keys", tmp_path / "fresh"
    file.write_text("old\n")
    environment = {**AS_JSON, LEVEL_VARIABLE: "debug", API_KEY_FILE_VARIABLE: str(file), "LOCKSTEP_BACKEND": "gloo"}
    with served(tmp_path, "--threads-per-rank", "1", environment=environment) as serve:
        serve.ready()

        def answers() -> list[int]:
            keys = [{"Authorization": f"Bearer {key}"} for key in ("old", "new")]
            return [HTTP.get(f"{serve.api}/v1/models", headers=headers).status_code for headers in keys]

        assert answers() == [200, 401]
        fresh.write_text("old\nnew\n")
        fresh.replace(file)
        assert answers() == [200, 200]
        body = {"model": "tiny-chat", "prompt": "Once", "max_tokens": 3}
        asked = HTTP.post(
            f"{serve.api}/v1/completions", json=body, headers={"Authorization": "Bearer new"}, timeout=120
        )
        assert serve.end() == 0

    records = [json.loads(line) for line in serve.log.read_text().splitlines()]
    name = asked.json()["id"]
    about = [(record["request"], record["message"].split()[2:4]) for record in records if "request" in record]
    assert about == [(name, ["asks", "for"]), (f"{name}-0", ["is", "queued,"]), (f"{name}-0", ["is", "complete:"])]
    assert {"supervisor", "engine", "worker 0"} <= {record["part"] for record in records}
    assert all({"time", "level", "message"} <= record.keys() for record in records)
    assert "--backend gloo is deprecated: it is called cpu now" in {record["message"] for record in records}
    assert [record["message"] for record in records if "API keys" in record["message"]] == [
        f"1 API keys are valid, from {file}",
        f"2 API keys are valid, from {file}",
    ]
