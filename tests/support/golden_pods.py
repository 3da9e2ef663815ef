"""What the operator makes of six models, as files: `python -m tests.support.golden_pods` writes them anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from lockstep_operator.decisions.pod_template import pod_template
from lockstep_operator.settings import Settings
from lockstep_operator.types.spec import parse

FOLDER: Final = Path(__file__).parents[1] / "contract" / "golden"
SETTINGS: Final = Settings(runtime_image="registry.example/lockstep-runtime:1", operator_namespace="lockstep-system")
_HUB: Final = {"huggingFace": {"repo": "Qwen/Qwen3-8B", "revision": "main"}}
_GPU: Final = {"accelerator": {"resourceName": "nvidia.com/gpu"}}
SPECS: Final[dict[str, dict[str, Any]]] = {
    "folder": {"model": {"hostPath": {"path": "/models/tiny"}}, "tensorParallelSize": 2},
    "claim": {
        "model": {"persistentVolumeClaim": {"claimName": "models", "path": "qwen"}, "servedName": "qwen"},
        "tensorParallelSize": 4,
        "ranksPerPod": 2,
        "dtype": "float32",
        "engine": {"maxModelLen": 4096, "maxSequences": 32, "kvCacheMemory": "8Gi", "prefixCaching": False},
    },
    "hub": {
        "model": _HUB | {"cache": {"persistentVolumeClaim": {"claimName": "cache"}}},
        "tensorParallelSize": 2,
        "apiKeySecretRef": {"name": "keys", "key": "keys"},
    },
    "gpus": {"model": _HUB, "tensorParallelSize": 8, "ranksPerPod": 8, **_GPU},
    "image": {
        "model": {"image": {"reference": "registry.example/models/qwen:1", "path": "weights"}},
        "tensorParallelSize": 2,
        "recovery": {"strategy": "RecyclePods", "weightCache": "Off"},
        "watchdog": {"stepTimeout": "30s"},
    },
    "template": {
        "model": {"hostPath": {"path": "/models/tiny"}},
        "tensorParallelSize": 2,
        "template": {
            "metadata": {"labels": {"team": "red"}},
            "spec": {
                "nodeSelector": {"pool": "cpu"},
                "containers": [{"name": "lockstep", "resources": {"limits": {"cpu": "4", "memory": "8Gi"}}}],
                "tolerations": [{"key": "pool", "operator": "Exists"}],
            },
        },
    },
}


def pod(name: str) -> str:
    """The pod template of group 1 of that model, as a file has it."""
    metadata = {"namespace": "team", "name": name, "uid": "0b8b5d5c-0000-4000-8000-000000000000", "generation": 1}
    template = pod_template(parse({"metadata": metadata, "spec": SPECS[name]}), 1, "0123456789", SETTINGS)
    return json.dumps(template, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for model in SPECS:
        (FOLDER / f"{model}.json").write_text(pod(model))
