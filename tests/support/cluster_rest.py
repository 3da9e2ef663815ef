"""Whether anything was written about a model since it came to rest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, Self

from tests.support.cluster_model import Model
from tests.support.wait import until

# Everything that the operator writes.
KINDS: Final = (
    "tensorparallelmodels", "statefulsets", "services", "secrets", "serviceaccounts", "networkpolicies", "events",
    "poddisruptionbudgets",
)  # fmt: skip
CALM_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Rest:
    """A model's resource versions, and when they were read (monotonic seconds)."""

    model: Model
    versions: dict[str, str]
    since: float

    @classmethod
    def of(cls, model: Model) -> Self:
        """As soon as the model is Ready and nothing has been written for some seconds."""
        model.until_ready()
        seen, since = versions(model), time.monotonic()

        def calm() -> bool:
            nonlocal seen, since
            now = versions(model)
            if now != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since > CALM_SECONDS

        until("the writes to end", calm, 60, model.explain)
        return cls(model, seen, since)

    def changes(self) -> dict[str, tuple[str | None, str | None]]:
        """Object -> its version then and now, where they differ; None is: not there."""
        now = versions(self.model)
        names = self.versions.keys() | now.keys()
        return {
            name: (self.versions.get(name), now.get(name)) for name in names if self.versions.get(name) != now.get(name)
        }


def versions(model: Model) -> dict[str, str]:
    """kind/name -> resource version of everything in the model's namespace that the operator could have written."""
    return {
        f"{kind}/{item['metadata']['name']}": str(item["metadata"]["resourceVersion"])
        for kind in KINDS
        for item in model.api.items(kind, model.namespace)
        if item.get("involvedObject", {}).get("kind", "TensorParallelModel") == "TensorParallelModel"
    }
