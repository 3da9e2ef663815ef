"""Groups are replaced under load while the operator's pod is killed: see test_operator_writes.py for all else."""

from __future__ import annotations

import os
import random
import secrets
from typing import Final

from tests.support.cluster_api import ClusterApi
from tests.support.cluster_chaos import OperatorKiller
from tests.support.cluster_lifecycle import change_spec, uids, until_groups, until_rolled_out
from tests.support.cluster_load import Load
from tests.support.cluster_model import Model, tiny_chat

SEED_VARIABLE: Final = "LOCKSTEP_TEST_SEED"  # repeats the moments of an earlier run


def test_no_request_fails_while_an_operator_that_is_killed_again_and_again_replaces_the_groups(
    api: ClusterApi, namespace: str
) -> None:
    seed = int(os.environ.get(SEED_VARIABLE, secrets.randbelow(2**31)))
    print(f"{SEED_VARIABLE}={seed}")
    model = Model(api, namespace, "survivor")
    model.apply(tiny_chat(tensorParallelSize=1, replicas=2))
    until_groups(model, 2)

    before = uids(model)
    with Load(model, clients=2) as load:
        with OperatorKiller(api, random.Random(seed), kills=3):
            change_spec(model, '{"spec": {"engine": {"maxSequences": 8}}}')
        until_rolled_out(model, before)

    assert load.failures == []
    assert load.answered > 0
    until_groups(model, 2)
