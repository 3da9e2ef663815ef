"""Which commit of a hub's repository a model is (pure): resolved once, by the first group that says so, for all.

The operator needs no hub. A group's first pod resolves the revision and reports the commit. The report of the lowest
group is written to `status.model`; what is written there is given to every pod from then on, in its arguments, but is
no part of the rollout's revision: no running pod is replaced for it. Two groups that start at once may resolve to
different commits if the branch moves in between: the one that is not at the commit of the status is replaced, in turn.

A pin holds as long as source, repository, revision and the annotation that asks for a new resolution stay. When one of
them changes, so does the rollout's revision: the first group of the new one resolves anew, and those that wait for
their turn keep their template, and with it the old commit.
"""

from __future__ import annotations

from collections.abc import Iterable

from lockstep_operator.groups.facts import GroupFacts
from lockstep_operator.groups.group import Group
from lockstep_operator.types.model_source import HuggingFace
from lockstep_operator.types.model_status import PinnedModel
from lockstep_operator.types.spec import Model

DEFAULT_REVISION = "main"
_COMMIT = "--commit="


def pinned(model: Model, known: PinnedModel | None) -> str:
    """The commit that the status holds for this spec; empty: there is none."""
    return known.commit if known is not None and known == _pin(model, known.commit) else ""


def pin(model: Model, revision: str, groups: Iterable[GroupFacts], known: PinnedModel | None) -> PinnedModel | None:
    """What the status is to hold after a pass; None: nobody knows yet, or the model is of no hub."""
    if pinned(model, known):
        return known
    if isinstance(model.source, HuggingFace) and model.source.is_fixed:
        return _pin(model, model.source.revision or "")
    commit = next((said for one in groups if (said := _said(one, revision))), "")
    return _pin(model, commit) if commit else None


def astray(revision: str, groups: Iterable[GroupFacts], commit: str) -> dict[int, str]:
    """The commits of groups of this rollout revision that load another than `commit`, by group. One that was given this
    very commit is left alone: replacing it again would not help."""
    said = {one.group.index: _said(one, revision) for one in groups if commit and not _was_given(one, commit)}
    return {index: other for index, other in said.items() if other not in ("", commit)}


def given_commit(group: Group) -> str:
    """That the group's template names; empty: none."""
    template = ((group.workload or {}).get("spec") or {}).get("template") or {}
    arguments = [word for one in (template.get("spec") or {}).get("containers") or [] for word in one.get("args") or []]
    return next((word.removeprefix(_COMMIT) for word in arguments if word.startswith(_COMMIT)), "")


def _was_given(facts: GroupFacts, commit: str) -> bool:
    leader = facts.group.leader
    containers = ((leader.raw.get("spec") or {}).get("containers") or []) if leader else []
    return any(f"{_COMMIT}{commit}" in (one.get("args") or []) for one in containers)


def _said(facts: GroupFacts, revision: str) -> str:
    report = facts.reported
    return report.commit if report is not None and revision and report.spec_revision == revision else ""


def _pin(model: Model, commit: str) -> PinnedModel | None:
    source = model.source
    if not isinstance(source, HuggingFace):
        return None
    return PinnedModel(
        source=source.source,
        repo=source.repo,
        revision=source.revision or DEFAULT_REVISION,
        resolve_revision_at=source.resolve_at,
        commit=commit,
    )
