"""Laying a user's template over ours, and telling whether a live object is as wanted."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from lockstep_operator.decisions.drift import differences
from lockstep_operator.decisions.strategic_merge import merge
from lockstep_operator.types.quantity import quantity

BASE: dict[str, Any] = {
    "spec": {
        "priorityClassName": "low",
        "containers": [{"name": "lockstep", "image": "a", "env": [{"name": "A", "value": "1"}], "args": ["x", "y"]}],
        "volumes": [{"name": "tmp", "emptyDir": {"medium": "Memory"}}],
    }
}


@pytest.mark.parametrize(
    ("over", "path", "expected"),
    [
        ({"nodeSelector": {"gpu": "h200"}}, "nodeSelector", {"gpu": "h200"}),
        ({"priorityClassName": None}, "priorityClassName", None),
        (
            {"volumes": [{"name": "tmp", "hostPath": {"path": "/t"}}]},
            "volumes",
            [{"name": "tmp", "hostPath": {"path": "/t"}}],
        ),
        ({"tolerations": [{"key": "a"}]}, "tolerations", [{"key": "a"}]),
    ],
)
def test_fields_of_the_pod(over: dict[str, Any], path: str, expected: Any) -> None:
    assert merge(BASE, {"spec": over})["spec"].get(path) == expected


def test_our_container_is_merged_and_others_are_added() -> None:
    ours = {
        "name": "lockstep",
        "image": "b",
        "args": ["z"],
        "env": [{"name": "A", "valueFrom": {}}, {"name": "B", "value": "2"}],
    }
    merged = merge(BASE, {"spec": {"containers": [{"name": "side", "image": "s"}, ours]}})["spec"]["containers"]
    assert merged == [
        {
            "name": "lockstep",
            "image": "b",
            "env": [{"name": "A", "valueFrom": {}}, {"name": "B", "value": "2"}],
            "args": ["z"],
        },
        {"name": "side", "image": "s"},
    ]
    assert BASE["spec"]["containers"][0]["image"] == "a", "the base is left alone"


def test_an_entry_without_its_key_is_left_for_the_api_server_to_refuse() -> None:
    assert merge(BASE, {"spec": {"containers": [{"image": "s"}]}})["spec"]["containers"][1] == {"image": "s"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", "0.5"), ("2Gi", "2147483648"), ("1e", None), ("1", "1"), (4, "4"), ("1.5k", "1500"), ("abc", None),
        ("1e3", "1000"), ("5E-1", "0.5"), ("2E", "2000000000000000000"), (".5", "0.5"), ("1e3Ki", None),
        ("1e999", None),
    ],
)  # fmt: skip
def test_quantities(text: object, number: str | None) -> None:
    assert quantity(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("desired", "live"),
    [
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"limits": {"cpu": "1000m", "nvidia.com/gpu": 2}}, {"limits": {"cpu": "1", "nvidia.com/gpu": "2"}}),
        ({"emptyDir": {"sizeLimit": "1024Mi"}}, {"emptyDir": {"sizeLimit": "1Gi"}}),
        ({"env": [{"name": "A"}, {"name": "B"}]}, {"env": [{"name": "B"}, {"name": "A", "value": ""}]}),
        ({"flag": False, "labels": {}}, {}),
        ({"ownerReferences": [{"uid": "1"}]}, {"ownerReferences": [{"uid": "0"}, {"uid": "1"}]}),
    ],
)
def test_what_the_api_server_and_others_add_is_no_difference(desired: dict[str, Any], live: dict[str, Any]) -> None:
    assert differences(desired, live) == frozenset()


@pytest.mark.parametrize(
    ("desired", "live", "words"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b: 2 instead of 1"),
        ({"a": {"b": 1}}, {}, "a: nothing instead of {'b': 1}"),
        ({"ingress": [{"x": 1}]}, {"ingress": [{"x": 1}, {}]}, "ingress: 2 entries instead of 1"),
        ({"args": ["a"]}, {"args": ["b"]}, "args[0]: b instead of a"),
        ({"selector": {"a": "1"}}, {"selector": {"a": "1", "b": "2"}}, "selector.b: 2 is too much"),
        ({"limits": {"cpu": "1"}}, {"limits": {"cpu": "2"}}, "limits.cpu: 2 instead of 1"),
        ({"env": [{"name": "A"}]}, {"env": [{"name": "B"}, {"name": "A"}]}, "env[B] is too much"),
        ({"env": [{"name": "A"}]}, {"env": []}, "env[A]: nothing instead of {'name': 'A'}"),
        ({"ports": [{"port": 1}]}, {}, "ports: nothing instead of 1 entries"),
    ],
)
def test_differences_are_told_in_words(desired: dict[str, Any], live: dict[str, Any], words: str) -> None:
    assert differences(desired, live) == {words}
