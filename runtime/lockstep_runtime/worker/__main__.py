"""The zygote of a pod, from which its ranks are forked: `python -m lockstep_runtime.worker`, by a supervisor."""

from __future__ import annotations

import os
from typing import NoReturn

import msgspec

from lockstep_runtime.config import CONFIG_VARIABLE, ServeConfig
from lockstep_runtime.zygote import main as zygote
from lockstep_runtime.zygote.messages import Entrypoint


def main() -> NoReturn:
    """Fork the pod's ranks until the supervisor has gone."""
    config = msgspec.json.decode(os.environ[CONFIG_VARIABLE], type=ServeConfig)
    zygote.run(f"model={config.model_name} group={config.group}", lambda: warm_up(config))


def warm_up(config: ServeConfig) -> Entrypoint:
    """Import torch and all that a rank uses of it, without touching a device."""
    import torch

    from lockstep_runtime.worker.process import NewRank

    torch.set_num_threads(1)
    with torch.inference_mode():
        torch.nn.functional.linear(torch.ones(8, 64), torch.ones(64, 64))  # the kernels' own start-up
    return NewRank(config)


if __name__ == "__main__":
    main()
