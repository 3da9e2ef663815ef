"""A context that is computed again gives the same tokens, of a vocabulary in which many are nearly as likely."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.chaos import STREAM_SECONDS
from tests.support.faults import inject
from tests.support.large_vocabulary import NAME, is_whole, start, write_large_vocabulary
from tests.support.serve import AS_JSON, served
from tests.support.stream import answers

from lockstep_runtime.protocol.chaos import FaultPhase, Injection
from lockstep_runtime.recovery.log_trail import TrailPhase

pytestmark = pytest.mark.third


def test_a_context_that_is_computed_again_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    model = write_large_vocabulary(tmp_path / NAME)
    with served(tmp_path, "--tensor-parallel-size", "2", "--allow-faults", model=model, environment=AS_JSON) as serve:
        serve.ready()
        undisturbed = answers(start(serve.api, NAME, STREAM_SECONDS))
        assert all(is_whole(answer) for answer in undisturbed), undisturbed
        for rank, steps in ((0, 50), (1, 200)):
            inject(serve, Injection.SIGSEGV, rank, phase=FaultPhase.DECODE, skip=steps)
            assert answers(start(serve.api, NAME, STREAM_SECONDS)) == undisturbed, serve.log.read_text()
        resumed = [line for line in serve.records() if line.get("phase") == TrailPhase.RESUMED]
        assert [line["kept"] for line in resumed] == [False, False]
