"""All that is known of one group before anything is decided about it (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockstep_operator.groups.group import Group
from lockstep_operator.groups.group_view import GroupView, resolve_view
from lockstep_operator.groups.pod_issues import PodIssue, find_issue
from lockstep_operator.groups.process_failures import newest_failure
from lockstep_operator.types.model_status import GroupSummary, ProcessFailure
from lockstep_operator.types.observed import GroupReport, Observed
from lockstep_operator.types.spec import Model
from lockstep_runtime.protocol.status import GroupStatus

NOT_ASKED: Final = GroupView()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts:
    group: Group  # its pods
    last: GroupSummary  # the group in the status as last written
    report: GroupReport | None = None  # to this operator
    view: GroupView = NOT_ASKED  # its report, or its last one
    issue: PodIssue | None = None
    process_failure: ProcessFailure | None = None

    @property
    def reported(self) -> GroupStatus | None:
        """Its report to this operator, however old."""
        return self.report.status if self.report else None


def facts_of(group: Group, observed: Observed, model: Model, now: float) -> GroupFacts:
    last, report = observed.status.group(group.index), observed.reports.get(group.index)
    view = resolve_view(group, report, last, model, now)
    return GroupFacts(
        group=group,
        last=last,
        report=report,
        view=view,
        issue=find_issue(group, observed.warnings, now),
        process_failure=newest_failure(group, view.status, last.pod_problem, now),
    )
