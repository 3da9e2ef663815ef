"""The operator with thousands of models, on a real API server with fake nodes: `python -m bench.scale [--models N]`.

Etcd, API server, controllers and scheduler run as processes of this machine; kwok answers for nodes and pods, and
`tests.support.fake_leaders` for the supervisors of the groups' first pods. The operator has the rights that the chart
gives it. Requests are counted, and reactions timed, by the API server's audit log. Then the models are removed, and
LeaderWorkerSet's controller has as many sets of as many pods.

With `--folder` the cluster stays there, and a run that its `--minutes` have ended is gone on with by the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Final

from bench.report import Row, report
from bench.scale_lws import PATH, PLURAL, Peer, available, worker_set
from bench.scale_models import NAMESPACES, create_all, model, remove_models
from bench.scale_scene import ACCOUNT, Operator, Program, Scene, when
from tests.support.wait import DeadlineError, until

SETTLED_SECONDS: Final = 30.0
LOOK_SECONDS: Final = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.scale")
    parser.add_argument("--models", type=int, default=2000, help="of one group of four pods each")
    parser.add_argument("--rest-seconds", type=float, default=600, help="for how long requests at rest are counted")
    parser.add_argument("--faults", type=int, default=200, help="groups that are poisoned, two a second")
    parser.add_argument("--minutes", type=float, default=120, help="after which the run ends, whatever is missing")
    parser.add_argument("--folder", type=Path, help="for the cluster: the same one goes on with what is in it")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-scale-")))
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(Scene(folder, stack, options.models), options)
        try:
            run.all()
        except DeadlineError as error:
            print(error, "\nthe same --folder goes on from here", file=sys.stderr)
            return 2
    report("scale", run.rows)
    return 0


class Run:
    """What is measured, one thing after another. What has been is in the folder, so that it is not measured again."""

    def __init__(self, scene: Scene, options: argparse.Namespace) -> None:
        self.scene, self.options = scene, options
        self._ends = time.monotonic() + 60 * options.minutes
        self._state = scene.folder / f"findings-{scene.models}.json"
        kept = json.loads(self._state.read_text()) if self._state.exists() else {"done": [], "rows": []}
        self._done: list[str] = kept["done"]
        self.rows = [Row(**row) for row in kept["rows"]]
        self._case = ""

    def all(self) -> None:
        count = self.scene.models
        self._case = f"{count} models, {4 * count} pods"
        if "models removed" not in self._done:
            with self.scene.leaders():
                operator = Operator(self.scene.plane)
                try:
                    self._operator(operator)
                finally:
                    operator.stop()
            self._once("models removed", lambda: remove_models(self.scene.plane, self._until))
        self._case = f"{count} LeaderWorkerSets, {4 * count} pods"
        peer = Peer(self.scene.plane)
        try:
            self._peer(peer)
        finally:
            peer.stop()

    def _operator(self, operator: Operator) -> None:
        self._once("made", lambda: self._made(operator))
        self._once("restarted", lambda: self._restarted(operator, lambda: operator.ready() >= self.scene.models))
        if not operator.runs:
            operator.start()
            self._until("all to be reconciled", lambda: operator.ready() >= self.scene.models)
        self._once("at rest", lambda: self._at_rest(operator))
        self._once("reactions", lambda: self._reactions(operator))

    def _peer(self, peer: Peer) -> None:
        self._once("sets made", lambda: self._sets_made(peer))
        self._once("peer restarted", lambda: self._restarted(peer, lambda: peer.sync_count() >= self.scene.models))
        if not peer.runs:
            peer.start()
            self._until("all sets to be reconciled", lambda: peer.sync_count() >= self.scene.models)
        self._once("peer at rest", lambda: self._at_rest(peer))

    def _made(self, operator: Operator) -> None:
        """All models at once, on an empty cluster."""
        scene, began = self.scene, time.time()
        print(f"making {scene.models} models", flush=True)
        operator.start()
        create_all(scene.plane, scene.models, model, scene.nodes.placement)
        self._until("all models to be Ready", lambda: self._shown(operator.ready()) >= scene.models)
        self._until("all groups to be well", lambda: scene.groups_well() >= scene.models)
        if not (scene.folder / "again").exists():
            self._add("from nothing to all Ready", time.time() - began, "s")
            self._add("requests for each, until then", scene.asked(ACCOUNT, began).total() / scene.models)
            self._add("CPU for each, until then", operator.cpu_seconds() / scene.models, "s")

    def _sets_made(self, peer: Peer) -> None:
        scene, began = self.scene, time.time()
        peer.start()
        print(f"making {scene.models} LeaderWorkerSets", flush=True)
        create_all(scene.plane, scene.models, worker_set, scene.nodes.placement, f"{PATH}/namespaces/{{}}/{PLURAL}")
        self._until("all sets to be available", lambda: self._shown(available(scene.plane)) >= scene.models)
        if not (scene.folder / "again").exists():
            self._add("from nothing to all Available", time.time() - began, "s")
            self._add("requests for each, until then", scene.asked(peer.account, began).total() / scene.models)
            self._add("CPU for each, until then", peer.cpu_seconds() / scene.models, "s")

    def _restarted(self, program: Operator | Peer, reconciled: Callable[[], bool]) -> None:
        program.stop()
        began = time.time()
        program.start()
        self._until("all to be reconciled", reconciled)
        self._add("restart to all reconciled", time.time() - began, "s")
        self._add("CPU of the restart", program.cpu_seconds(), "s")
        self._add("requests for each, until then", self.scene.asked(program.account, began).total() / self.scene.models)
        self._add("peak memory of the start", program.mebibytes("VmHWM"), "MiB")

    def _at_rest(self, program: Program) -> None:
        seconds = self.options.rest_seconds
        time.sleep(SETTLED_SECONDS)
        began, cpu = time.time(), program.cpu_seconds()
        time.sleep(seconds)
        if not program.runs:
            raise DeadlineError(f"{program.name} has ended meanwhile: {self.scene.plane.log(program.name, 300)}")
        asked = self.scene.asked(program.account, began)
        of_models = sum(count for what, count in asked.items() if not what.endswith(" leases"))
        self._add("requests at rest per model and 10 minutes", of_models / self.scene.models * 600 / seconds)
        self._add("requests of the Lease per second", (asked.total() - of_models) / seconds)
        self._add("CPU at rest", (program.cpu_seconds() - cpu) / seconds * 100, "% of a core")
        self._add("memory at rest", program.mebibytes("VmRSS"), "MiB")

    def _reactions(self, operator: Operator) -> None:
        """Seconds from a group's word that it is poisoned to the deletion of its suspect's pod."""
        scene, cpu = self.scene, operator.cpu_seconds()
        chosen = Random(0).sample(range(scene.models), min(self.options.faults, scene.models))
        began, reported = time.time(), dict[str, float]()
        for number in chosen:
            place = f"bench-{number % NAMESPACES}/m{number}"
            reported[f"{place}-0-1"] = scene.poison(f"{place}/0")
            time.sleep(0.5)
        deleted = dict[str, float]()

        def all_deleted() -> bool:
            if not operator.runs:
                raise DeadlineError(f"the operator has ended meanwhile: {scene.plane.log(operator.name, 300)}")
            for entry in scene.requests(ACCOUNT, began):
                if entry["verb"] == "delete" and entry["objectRef"]["resource"] == "pods":
                    reference = entry["objectRef"]
                    deleted.setdefault(f"{reference['namespace']}/{reference['name']}", when(entry))
            return reported.keys() <= deleted.keys()

        self._until("an action for each", all_deleted)
        delays = sorted(deleted[pod] - at for pod, at in reported.items())
        self._add("a fault report to its action, median", delays[len(delays) // 2], "s")
        self._add("a fault report to its action, p99", delays[int(len(delays) * 0.99)], "s")
        self._add("CPU for each fault", (operator.cpu_seconds() - cpu) / len(chosen), "s")
        self._add("peak memory", operator.mebibytes("VmHWM"), "MiB")

    def _once(self, name: str, measure: Callable[[], None]) -> None:
        if name in self._done:
            return
        before = len(self.rows)
        try:
            measure()
        except DeadlineError:
            del self.rows[before:]
            (self.scene.folder / "again").touch()  # what was begun is no longer from nothing
            raise
        self._done.append(name)
        self._state.write_text(json.dumps({"done": self._done, "rows": [asdict(row) for row in self.rows]}))

    def _add(self, metric: str, value: float, unit: str = "") -> None:
        """Shown as it comes, with how many processes wanted a processor."""
        self.rows.append(Row(case=self._case, metric=metric, value=value, unit=unit))
        print(f"{self._case}: {metric}: {value:.4g} {unit} (load {os.getloadavg()[0]:.1f})", flush=True)

    def _until(self, what: str, look: Callable[[], bool]) -> None:
        until(what, look, max(0.0, self._ends - time.monotonic()), self.scene.explain)

    def _shown(self, count: int) -> int:
        print(f"{count} of {self.scene.models}", flush=True)
        time.sleep(LOOK_SECONDS)
        return count


if __name__ == "__main__":
    sys.exit(main())
