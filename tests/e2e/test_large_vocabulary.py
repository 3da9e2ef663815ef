"""In real pods, too, a context that is computed again gives the same tokens of a vocabulary as large as Qwen's."""

from __future__ import annotations

from pathlib import Path

from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import STREAM_SECONDS, breakable, events, inject, until_told
from tests.support.cluster_model import Model
from tests.support.large_vocabulary import is_whole, start, write_large_vocabulary
from tests.support.stream import answers


def test_a_context_that_is_computed_again_goes_on_with_the_same_tokens(
    api: ClusterApi, namespace: str, folder: Path
) -> None:
    write_large_vocabulary(folder)
    model = Model(api, namespace, "many-words")
    model.apply(breakable(model={"hostPath": {"path": str(folder)}}))
    model.until_ready()
    undisturbed = answers(start(model.url(), model.served(), STREAM_SECONDS))
    assert all(is_whole(answer) for answer in undisturbed), undisturbed

    known = set(events(model))
    inject(model, "sigsegv", 1, "--phase=decode", "--skip=100")
    assert answers(start(model.url(), model.served(), STREAM_SECONDS)) == undisturbed, model.explain()
    until_told(model, known, ["Recovered"], ["group 0 rank 1 recovered from RankLost by Respawn"])
