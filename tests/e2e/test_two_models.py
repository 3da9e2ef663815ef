"""Two models at once, of the same name, in two namespaces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.support.cluster_api import ClusterApi
from tests.support.cluster_lifecycle import uids
from tests.support.cluster_model import Model, tiny_chat


def test_models_of_the_same_name_know_nothing_of_each_other(api: ClusterApi, namespace: str, served: Model) -> None:
    first, second = served, Model(api, namespace, served.name)
    second.apply(tiny_chat(tensorParallelSize=1))
    second.until_ready()
    pods = uids(first)

    with ThreadPoolExecutor() as threads:
        texts = list(threads.map(_ask, (first, second) * 4))

    assert len(set(texts)) == 1, "both serve the same weights, greedily"
    assert first.token() != second.token()
    assert [pod["metadata"]["name"] for pod in second.pods()] == ["tiny-chat-0-0"]
    second.delete()
    second.until_gone()
    assert uids(first) == pods
    first.until_ready(5)
    assert _ask(first) == texts[0]


def _ask(model: Model) -> str:
    with model.client() as client:
        answer = client.completions.create(model=model.served(), prompt="A module is", max_tokens=16, temperature=0)
    return answer.choices[0].text
