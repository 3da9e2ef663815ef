"""A rank's process is killed while a client reads: the client notices a pause and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from openai import OpenAI
from tests.support import kubectl
from tests.support.cluster_model import Model, Object
from tests.support.cluster_processes import kill, one_process

TOKENS: Final = 150
KILL_AFTER: Final = 10  # pieces


def pieces(client: OpenAI) -> Iterator[str]:
    """A long answer drawn at random from a fixed seed: any difference in the history would change all that follows."""
    for part in client.completions.create(
        model="tiny", prompt="The class statement", max_tokens=TOKENS, temperature=1, seed=7, stream=True,
        extra_body={"ignore_eos": True},
    ):  # fmt: skip
        yield part.choices[0].text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_outlives_its_ranks(served: Model, rank: int) -> None:
    recoveries = served.status()["recoveries"]
    epoch = served.status()["groups"][0]["epoch"]
    with served.client() as client:
        undisturbed = "".join(pieces(client))
        disturbed, worker = "", one_process(served.pod(0, rank), "lockstep: worker")
        for number, piece in enumerate(pieces(client)):
            if number == KILL_AFTER:
                kill(worker)
            disturbed += piece

    assert disturbed == undisturbed
    served.until("the repair in the status", lambda: served.status()["recoveries"] > recoveries, 30)
    _assert_told(served, rank, epoch)


def _assert_told(model: Model, rank: int, epoch: int) -> None:
    """The fault is in the status and in an Event, and the group serves again without a new pod."""
    model.until_ready(30)
    status = model.status()
    fault: Object = status["lastFault"]
    assert (fault["fault"], fault["group"], fault["rank"]) == ("RankLost", 0, rank)
    assert fault["recoveredTime"] >= fault["time"]
    assert status["groups"][0]["epoch"] > epoch
    assert status["groups"][0]["ranks"][rank]["respawns"] >= 1
    restarts = [container["restartCount"] for pod in model.pods() for container in pod["status"]["containerStatuses"]]
    assert restarts == [0, 0]
    model.until(
        "an Event about the fault",
        lambda: "RankLost" in kubectl.describe(model.namespace, "tpm", model.name).partition("\nEvents:")[2],
        20,
    )
