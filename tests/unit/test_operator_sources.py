"""Hubs that the installation names, and what a model of one of them is given."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.support.operator_models import NOW, group, model
from tests.support.operator_settings import read_settings

from lockstep_operator.cluster.failures import Failures
from lockstep_operator.cluster.obstacles import find_obstacle
from lockstep_operator.decisions.planner import Decision
from lockstep_operator.groups.facts import GroupFacts
from lockstep_operator.reporting.conditions import Obstacle
from lockstep_operator.settings import ModelSource, Settings
from lockstep_operator.types.model_source import Claim, EmptyDir, HostPath, HuggingFace, Image
from lockstep_operator.types.model_status import GroupSummary, ModelStatus
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.spec import Model, parse
from lockstep_operator.types.spec_values import SecretKey, SpecError

CORP = ModelSource(
    name="corp",
    endpoint="https://hub.corp.example",
    token_secret=("hub", "token"),
    cache={"hostPath": {"path": "/var/models"}},
)
LAB = ModelSource(name="lab", endpoint="http://lab:8080", default=True)


def parsed(written: dict[str, Any], *sources: ModelSource, **annotations: str) -> Model:
    names = {f"lockstep.dev/{name}": value for name, value in annotations.items()}
    metadata = {"name": "chat", "namespace": "team", "uid": "u", "annotations": names}
    return parse({"metadata": metadata, "spec": {"model": written, "tensorParallelSize": 1}}, sources)


def hub(**fields: Any) -> dict[str, Any]:
    return {"huggingFace": {"repo": "a/b", **fields}}


def test_the_operator_is_told_of_sources_in_json() -> None:
    told = [
        {
            "name": "corp",
            "endpoint": "https://hub.corp.example",
            "tokenSecretRef": {"name": "hub", "key": "token"},
            "cache": {"hostPath": {"path": "/var/models"}},
        },
        {"name": "lab", "endpoint": "http://lab:8080", "default": True},
    ]
    found = read_settings([], {"LOCKSTEP_RUNTIME_IMAGE": "r", "LOCKSTEP_SOURCES": json.dumps(told)})
    assert found == Settings(runtime_image="r", sources=(CORP, LAB))


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ("{", "is no list of sources"),
        ('[{"endpoint": "https://a"}]', "is no list of sources"),
        ("[1]", "is no list of sources"),
        ('[{"name": "corp"}]', "corp has no endpoint"),
        ('[{"name": "Corp", "endpoint": "https://a"}]', "lower-case letters"),
        ('[{"name": "corp", "endpoint": "hub"}]', "no http(s) address"),
        ('[{"name": "corp", "endpoint": "https://a,b"}]', "no http(s) address"),
        ('[{"name": "corp", "endpoint": "https://a", "token": "x"}]', "token is no field of a source"),
        ('[{"name": "corp", "endpoint": "https://a", "cache": {"nfs": {}}}]', "the cache of corp is none of"),
        ('[{"name": "a", "endpoint": "https://a"}, {"name": "a", "endpoint": "https://b"}]', "names must differ"),
        (
            '[{"name": "a", "endpoint": "https://a", "default": true}, '
            '{"name": "b", "endpoint": "https://b", "default": true}]',
            "one source at most may be the default",
        ),
    ],
)
def test_what_is_wrong_with_them_is_said(sources: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings([], {"LOCKSTEP_RUNTIME_IMAGE": "r", "LOCKSTEP_SOURCES": sources})
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_model_is_of_the_source_that_it_names_or_of_the_default() -> None:
    corp = HuggingFace(
        repo="a/b",
        token=SecretKey("hub", "token"),
        token_is_optional=True,
        source="corp",
        endpoint="https://hub.corp.example",
    )
    named = parsed(hub(source="corp"), CORP, LAB)
    assert (named.source, named.cache, named.flaw) == (corp, HostPath("/var/models"), "")
    lab = HuggingFace(repo="a/b", token_is_optional=True, source="lab", endpoint="http://lab:8080")
    assert parsed(hub(), CORP, LAB).source == lab
    plain = parsed(hub(source="huggingface"), CORP, LAB)
    assert (plain.source, plain.cache) == (HuggingFace(repo="a/b", token_is_optional=True), EmptyDir())


def test_a_models_own_token_and_cache_go_first() -> None:
    own = {"name": "mine", "key": "k"}
    written = hub(source="corp", tokenSecretRef=own) | {"cache": {"persistentVolumeClaim": {"claimName": "c"}}}
    found = parsed(written, CORP)
    assert isinstance(found.source, HuggingFace)
    assert (found.source.token, found.source.token_is_optional) == (SecretKey("mine", "k"), False)
    assert found.cache == Claim("c")


def test_the_source_that_is_always_there_may_be_given_a_token() -> None:
    found = parsed(hub(), ModelSource(name="huggingface", token_secret=("hub", "token"))).source
    assert found == HuggingFace(repo="a/b", token=SecretKey("hub", "token"), token_is_optional=True)


def test_a_source_that_nobody_knows_is_a_flaw_that_leaves_pods_alone() -> None:
    assert parsed(hub(source="home"), CORP).flaw == (
        "model.huggingFace.source is home, and the operator knows huggingface, corp (models.sources of its chart)"
    )


def test_a_request_to_resolve_anew_is_a_time() -> None:
    found = parsed(hub(), resolveRevisionAt="2027-01-15T08:00:00.75Z")
    assert isinstance(found.source, HuggingFace)
    assert found.source.resolve_at == 1_800_000_000.0
    assert "lockstep.dev/resolveRevisionAt must be a time" in parsed(hub(), resolveRevisionAt="now").flaw


def test_an_image_is_a_source() -> None:
    image = {"image": {"reference": "registry.example/qwen:1", "pullPolicy": "Always", "path": "a/b/"}}
    assert parsed(image).source == Image("registry.example/qwen:1", "Always", "a/b")
    with pytest.raises(SpecError, match="exactly one of huggingFace, persistentVolumeClaim, hostPath and image"):
        parsed(image | hub())


def test_a_commit_is_known_by_its_form() -> None:
    plain = HuggingFace(repo="a/b")
    assert [replace(plain, revision=one).is_fixed for one in (None, "main", "c" * 39, "c" * 40)] == [False] * 3 + [True]


def test_a_cluster_without_image_volumes_is_told_of_them() -> None:
    def obstacle(volumes: list[dict[str, Any]], source: Image | HostPath, revision: str = "new") -> Obstacle | None:
        made = group(0, revision)
        assert made.workload is not None
        template = {**made.workload["spec"]["template"], "spec": {"volumes": volumes}}
        workload = {**made.workload, "spec": {**made.workload["spec"], "template": template}}
        facts = GroupFacts(group=replace(made, workload=workload), last=GroupSummary(group=0))
        decision = Decision(revision="new", groups=(facts,))
        return find_obstacle(model(source=source), decision, Failures(lambda: NOW), ModelStatus(), NOW)

    image = Image("registry.example/qwen:1")
    found = obstacle([{"name": "tmp", "emptyDir": {}}], image)
    assert found is not None
    assert (found.reason, found.stalled) == (Reason.REFUSED, True)
    assert "this cluster has no image volumes" in found.message
    assert obstacle([{"name": "model", "image": {"reference": "registry.example/qwen:1"}}], image) is None
    assert obstacle([], HostPath("/models")) is None
    assert obstacle([], image, revision="old") is None
