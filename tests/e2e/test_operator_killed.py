"""The same life with an operator that is killed again and again: it must find its way from whatever is there."""

from __future__ import annotations

import os
import random
import secrets
from typing import Final

from tests.support.cluster_api import ClusterApi
from tests.support.cluster_chaos import OperatorKiller
from tests.support.cluster_lifecycle import (
    DAMAGES,
    change_spec,
    scale,
    shape,
    uids,
    until_groups,
    until_rolled_out,
    until_shape,
)
from tests.support.cluster_load import Load
from tests.support.cluster_model import Model, tiny_chat

SEED_VARIABLE: Final = "LOCKSTEP_TEST_SEED"  # repeats the moments of an earlier run


def test_an_operator_killed_at_any_moment_goes_on_where_it_was(api: ClusterApi, namespace: str) -> None:
    seed = int(os.environ.get(SEED_VARIABLE, secrets.randbelow(2**31)))
    print(f"{SEED_VARIABLE}={seed}")
    chance = random.Random(seed)
    model = Model(api, namespace, "survivor")

    with OperatorKiller(api, chance):
        model.apply(tiny_chat(tensorParallelSize=1))
    until_groups(model, 1)

    with OperatorKiller(api, chance):
        scale(model, 2)
    until_groups(model, 2)

    before = uids(model)
    with Load(model, clients=2) as load:
        with OperatorKiller(api, chance, kills=3):
            change_spec(model, '{"spec": {"engine": {"maxSequences": 8}}}')
        until_rolled_out(model, before)
    assert load.failures == []

    scale(model, 1)
    until_groups(model, 1)
    wanted = shape(model)
    with OperatorKiller(api, chance):
        for damage in chance.sample(sorted(DAMAGES), 4):
            print(f"damage: {damage}")
            DAMAGES[damage](model)
    until_shape(model, wanted)
    until_groups(model, 1)

    with OperatorKiller(api, chance):
        model.delete()
    model.until_gone()
