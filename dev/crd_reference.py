"""Writes docs/crd.md from the CRD's schema: `python3 -m dev.crd_reference > docs/crd.md`. A test keeps them equal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = ROOT / "charts" / "lockstep" / "files" / "crd.yaml"
HEAD: Final = """\
# TensorParallelModel

<!-- Written by dev/crd_reference.py from charts/lockstep/files/crd.yaml: change the descriptions there. -->

`lockstep.dev/v1beta1`, short name `tpm`; `lockstep.dev/v1alpha1` has the same fields. `kubectl explain tpm.spec
--recursive` shows the same for the version that your cluster serves. Only `replicas` has a default in the schema; for
the others the descriptions say what unset means.
"""

Schema = dict[str, Any]


def reference(crd: Schema) -> str:
    """The whole page, in Markdown."""
    version = crd["spec"]["versions"][0]
    schema = version["schema"]["openAPIV3Schema"]
    columns = [(column["name"], column["description"]) for column in _described(version["additionalPrinterColumns"])]
    printed = ["## Columns of `kubectl get`", "", *_table(("column", "what it shows"), columns)]
    rules = ["## Rules of the name", "", *_rules(schema)]
    parts = [HEAD, *printed, "", *rules, ""]
    for name in ("spec", "status"):
        parts += _object(name, schema["properties"][name], level=2)
    return "\n".join(parts).rstrip() + "\n"


def _object(path: str, schema: Schema, level: int) -> Iterator[str]:
    """A section for the object, then one for each object within it."""
    yield f"{'#' * level} {path}"
    yield ""
    if "description" in schema:
        yield from (schema["description"], "")
    required = schema.get("required", [])
    fields = [
        (f"`{name}`", _kind(field, name in required), field.get("description", ""))
        for name, field in schema["properties"].items()
    ]
    yield from _table(("field", "type", "what it is"), fields)
    yield ""
    if rules := [*_rules(schema)]:
        yield from (*rules, "")
    for name, field in schema["properties"].items():
        is_list = field.get("type") == "array"
        inner = field["items"] if is_list else field
        if "properties" in inner:
            yield from _object(f"{path}.{name}{'[]' * is_list}", inner, min(level + 1, 3))


def _kind(schema: Schema, required: bool) -> str:
    either = "number or percentage" if "%" in schema.get("pattern", "") else "quantity"
    words = [either if schema.get("x-kubernetes-int-or-string") else _type(schema)]
    if "enum" in schema:
        words = [" \\| ".join(f"`{value}`" for value in schema["enum"])]
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        words.append(f"{low} to {high}")
    elif low is not None:
        words.append(f"at least {low}")
    if "default" in schema:
        words.append(f"default {schema['default']}")
    return ", ".join([*words, *(["required"] if required else [])])


def _type(schema: Schema) -> str:
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}s"
    if "additionalProperties" in schema:
        return f"map of {_type(schema['additionalProperties'])}s"
    return "time" if schema.get("format") == "date-time" else str(schema["type"])


def _rules(schema: Schema) -> Iterator[str]:
    """What CEL checks, of the object and of its plain fields."""
    for rule in schema.get("x-kubernetes-validations", []):
        yield f"- {rule['message']}"
    for field in schema.get("properties", {}).values():
        if "properties" not in field:
            yield from (f"- {rule['message']}" for rule in field.get("x-kubernetes-validations", []))


def _described(columns: list[Schema]) -> list[Schema]:
    return [column for column in columns if "description" in column]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    sys.stdout.write(reference(yaml.safe_load(SOURCE.read_text())))
