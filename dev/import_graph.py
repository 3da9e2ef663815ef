"""Draw the packages' rooms and what each imports into docs/architecture.md: `make picture`.

A room is a module or package directly below `lockstep_operator` or `lockstep_runtime`. An arrow is an import; one that
other arrows imply (a longer way between the same rooms) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import grimp

PACKAGES: Final = ("lockstep_operator", "lockstep_runtime")
DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "architecture.md"
BEGIN: Final = "<!-- made by `make picture` -->"
END: Final = "<!-- end of the picture -->"
_NOT_DRAWN: Final = frozenset({"__main__"})

Rooms = Mapping[str, frozenset[str]]  # each room, and those that it imports


def rooms_of(graph: grimp.ImportGraph) -> Rooms:
    """The imports between the rooms of both packages, by the modules' own imports."""
    names = [child for package in PACKAGES for child in sorted(graph.find_children(package))]
    drawn = [name for name in names if name.rpartition(".")[2] not in _NOT_DRAWN]
    return {one: frozenset(other for other in drawn if other != one and _imports(graph, one, other)) for one in drawn}


def _imports(graph: grimp.ImportGraph, one: str, other: str) -> bool:
    return graph.direct_import_exists(importer=one, imported=other, as_packages=True)


def reduced(rooms: Rooms) -> Rooms:
    """Without the arrows that others imply."""
    return {
        one: frozenset(
            other for other in imported if not any(other in _below(rooms, way) for way in imported - {other})
        )
        for one, imported in rooms.items()
    }


def _below(rooms: Rooms, room: str) -> set[str]:
    found: set[str] = set()
    todo = [room]
    while todo:
        fresh = rooms[todo.pop()] - found
        found |= fresh
        todo += fresh
    return found


def diagram(rooms: Rooms) -> str:
    """As Mermaid."""
    return "\n".join(["```mermaid", "flowchart TD", *_lines(reduced(rooms)), "```"])


def _lines(rooms: Rooms) -> Iterator[str]:
    for package in PACKAGES:
        yield f"    subgraph {package}"
        yield from (
            f"        {_id(room)}[{room.rpartition('.')[2]}]" for room in rooms if room.startswith(package + ".")
        )
        yield "    end"
    yield from (f"    {_id(one)} --> {_id(other)}" for one, imported in rooms.items() for other in sorted(imported))


def _id(room: str) -> str:
    package, _, name = room.rpartition(".")
    return f"{package.removeprefix('lockstep_')}_{name}"


def drawn_into(text: str, picture: str) -> str:
    """The document with this picture between its marks."""
    return re.sub(f"(?<={BEGIN}\n).*?(?={END})", lambda _: f"{picture}\n", text, count=1, flags=re.DOTALL)


def current() -> str:
    """The diagram of the code as it is."""
    return diagram(rooms_of(grimp.build_graph(*PACKAGES, cache_dir=None)))


if __name__ == "__main__":
    DOCUMENT.write_text(drawn_into(DOCUMENT.read_text(), current()))
