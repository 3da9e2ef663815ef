"""The chart as installed: its own test passes and has broken a model, nothing of it breaks the restricted profile."""

from __future__ import annotations

from tests.support import kubectl
from tests.support.chart import RELEASE, helm
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import OPERATOR_NAMESPACE, operator_pods
from tests.support.pod_security import violations


def test_helm_test_passes(api: ClusterApi) -> None:
    where = ("--kubeconfig", str(kubectl.KUBECONFIG), "--namespace", OPERATOR_NAMESPACE)
    result = helm("test", RELEASE, *where, "--logs", "--timeout", "5m", timeout=320)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok operator" in result.stdout
    assert "ok models" in result.stdout
    assert "rank 1 hung while it streamed: repaired by Respawn" in result.stdout
    assert "the process of rank 0 was killed while it streamed: repaired by Respawn" in result.stdout
    assert "removed tiny-chat-gameday-" in result.stdout
    assert "\npassed\n" in result.stdout
    assert not api.items("tensorparallelmodels", OPERATOR_NAMESPACE)


def test_the_operators_pod_keeps_to_the_restricted_profile(api: ClusterApi) -> None:
    pods = operator_pods(api)
    assert pods
    assert [violations(pod["spec"]) for pod in pods] == [[] for _ in pods]


def test_the_operator_may_read_no_secret_but_its_own(api: ClusterApi) -> None:
    pod = operator_pods(api)[0]
    account = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{pod['spec']['serviceAccountName']}"
    as_operator = ("--as", account)
    for verb in ("get", "list", "watch", "update", "patch", "deletecollection"):
        for where in ("--all-namespaces", f"--namespace={OPERATOR_NAMESPACE}"):
            asked = kubectl.attempt("auth", "can-i", verb, "secrets", where, *as_operator)
            assert asked.stdout.strip() == "no", verb
    own = ("auth", "can-i", "get", "secret/lockstep-key", "-n", OPERATOR_NAMESPACE, *as_operator)
    assert kubectl.attempt(*own).stdout.strip() == "yes"
