"""The pod of a rank as the operator makes it, before the user's template (pure)."""

from __future__ import annotations

import math
from typing import Any, Final

from lockstep_operator.settings import Settings
from lockstep_operator.types import names
from lockstep_operator.types.model_source import Claim, EmptyDir, HostPath, HuggingFace, Image
from lockstep_operator.types.spec import Model
from lockstep_operator.types.spec_values import SecretKey
from lockstep_runtime.protocol.status import API_PORT

MODEL_MOUNT: Final = "/model"
CACHE_MOUNT: Final = "/cache"
SHARED_MEMORY: Final = "1Gi"
SCRATCH: Final = "512Mi"
TERMINATION_SECONDS: Final = 60  # running requests finish in it
UNSET_TERMINATION_SECONDS: Final = 30  # Kubernetes' default
LAME_DUCK_SECONDS: Final = 3.0  # until every node has taken the pod out of the Service
EXIT_SECONDS: Final = 5.0  # for processes to end after the last request
CPU_PER_RANK: Final = 0.25
CPU_PER_GPU_RANK: Final = 2  # one thread queues the device's work, and must not wait for a core; others serve the bus
MEMORY_PER_RANK_MIB: Final = 512
API_KEY_MOUNT: Final = "/etc/lockstep/api-key"
API_KEY_FILE: Final = "keys"
HUB_TOKEN_MOUNT: Final = "/etc/lockstep/hub-token"  # noqa: S105 - a folder
OPERATOR_TOKEN_MOUNT: Final = "/etc/lockstep/operator"  # noqa: S105 - a folder
HUB_TOKEN_FILE: Final = "token"  # noqa: S105 - a file


def pod_spec(model: Model, group: str, revision: str, tokens: str, settings: Settings) -> dict[str, Any]:
    security: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    cached_on_a_claim = isinstance(model.source, HuggingFace) and isinstance(model.cache, Claim)
    if cached_on_a_claim and settings.fs_group is not None:
        security |= {"fsGroup": settings.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    pull = {"imagePullSecrets": [{"name": name} for name in settings.pull_secrets]} if settings.pull_secrets else {}
    on_host = bool((model.template.get("spec") or {}).get("hostNetwork"))
    dns = {"dnsPolicy": "ClusterFirstWithHostNet"} if on_host else {}  # the node's own wouldn't know the group's names
    return {
        **pull,
        **dns,
        "serviceAccountName": names.account_name(model.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": TERMINATION_SECONDS,
        "securityContext": security,
        "containers": [_container(model, group, revision, tokens, settings)],
        "volumes": _volumes(model, tokens),
    }


def _container(model: Model, group: str, revision: str, tokens: str, settings: Settings) -> dict[str, Any]:
    return {
        "name": names.CONTAINER,
        "image": settings.runtime_image,
        "imagePullPolicy": settings.pull_policy,
        "args": _arguments(model),
        "env": _environment(model, group, revision, tokens, settings),
        "ports": [
            {"name": "api", "containerPort": model.ports.api, "protocol": "TCP"},
            {"name": "bus", "containerPort": model.ports.bus, "protocol": "TCP"},
            {"name": "status", "containerPort": model.ports.status, "protocol": "TCP"},
        ],
        "resources": _resources(model),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "livenessProbe": _probe("/healthz", period=10, failures=6),
        "readinessProbe": _probe("/readyz", period=1, failures=5),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(model),
    }


def _probe(path: str, *, period: int, failures: int) -> dict[str, Any]:
    """A busy pod answers late, which is not a fault: time-outs are long, and one failure changes nothing."""
    return {
        "httpGet": {"path": path, "port": "status", "scheme": "HTTP"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _arguments(model: Model) -> list[str]:
    seconds = float(_grace(model))
    lame_duck = min(LAME_DUCK_SECONDS, seconds / 4)
    options: list[tuple[str, object]] = [
        ("tensor-parallel-size", model.tensor_parallel_size),
        ("ranks-per-pod", model.ranks_per_pod),
        ("served-name", model.served_name),
        ("dtype", model.dtype),
        # Never `auto`: a rank whose driver fails must fail, not fall back to its CPU.
        ("backend", "nccl" if model.on_gpus else "cpu"),
        ("device", "cuda" if model.on_gpus else "cpu"),
        ("max-model-len", model.engine.max_model_len),
        ("max-sequences", model.engine.max_sequences),
        ("max-batch-tokens", model.engine.max_batch_tokens),
        ("kv-cache-memory", model.engine.kv_cache_memory),
        ("reasoning-parser", model.engine.reasoning_parser),
        ("tool-call-parser", model.engine.tool_call_parser),
        ("max-pixels", model.vision.max_pixels),
        ("min-pixels", model.vision.min_pixels),
        ("step-timeout", _plain(model.watchdog.step_timeout)),
        ("watchdog-floor", _plain(model.watchdog.floor)),
        ("watchdog-factor", _plain(model.watchdog.factor)),
        ("recovery-strategy", model.recovery.strategy),
        ("weight-cache", model.recovery.weight_cache),
        ("lame-duck-seconds", lame_duck),
        ("grace-seconds", max(0.0, seconds - lame_duck - EXIT_SECONDS)),
        ("host", "::"),  # every address of both families
        ("port", model.ports.api if model.ports.api != API_PORT else None),
        ("bus-port", model.ports.bus),
        ("status-port", model.ports.status),
        *_source_options(model),
    ]
    switches = ["--no-prefix-caching"] if model.engine.prefix_caching is False else []
    given = [f"--{name}={value}" for name, value in options if value is not None]
    return ["serve", _location(model), *given, *switches]


def _grace(model: Model) -> int:
    written = (model.template.get("spec") or {}).get("terminationGracePeriodSeconds", TERMINATION_SECONDS)
    return UNSET_TERMINATION_SECONDS if written is None else int(written)


def _plain(number: float | None) -> str | None:
    return None if number is None else f"{number:.3f}".rstrip("0").rstrip(".")


def _location(model: Model) -> str:
    match model.source:
        case HuggingFace(repo=repo):
            return repo
        case Claim(path=path) | Image(path=path) if path:
            return f"{MODEL_MOUNT}/{path}"
        case _:
            return MODEL_MOUNT


def _source_options(model: Model) -> list[tuple[str, object]]:
    hub = model.source
    if not isinstance(hub, HuggingFace):
        return []
    told = [("endpoint", hub.endpoint), ("token-file", f"{HUB_TOKEN_MOUNT}/{HUB_TOKEN_FILE}" if hub.token else None)]
    parts = [f"{name}={value}" for name, value in told if value]
    source = ",".join([f"name={hub.source}", *parts, "default"]) if parts else None
    return [
        ("source", source),
        ("revision", hub.revision),
        ("download-dir", CACHE_MOUNT),
    ]


def _environment(model: Model, group: str, revision: str, tokens: str, settings: Settings) -> list[dict[str, Any]]:
    name = names.group_name(model.name, group)
    plain = {
        "HOME": "/tmp",  # noqa: S108 - the pod's own scratch volume
        "LOCKSTEP_MODEL_NAME": model.name,
        "LOCKSTEP_GROUP": group,
        "LOCKSTEP_SPEC_REVISION": revision,
        "LOCKSTEP_LEADER": f"{name}-0.{name}.{model.namespace}.svc",
        "LOCKSTEP_OPERATOR_TOKEN_FILE": f"{OPERATOR_TOKEN_MOUNT}/{names.TOKEN_KEY}",
        **({"LOCKSTEP_API_KEY_FILE": f"{API_KEY_MOUNT}/{API_KEY_FILE}"} if model.api_key else {}),
        **({"LOCKSTEP_LOG_FORMAT": settings.log_format} if settings.log_format != "text" else {}),
        **({"OTEL_EXPORTER_OTLP_ENDPOINT": settings.tracing_endpoint} if settings.tracing_endpoint else {}),
    }
    fields = {
        "LOCKSTEP_POD": "metadata.name",
        "LOCKSTEP_NODE": "spec.nodeName",
        "LOCKSTEP_POD_INDEX": f"metadata.labels['{names.POD_INDEX_LABEL}']",
    }
    secrets = {"LOCKSTEP_TOKEN": SecretKey(names.group_token_name(model.name, tokens), names.TOKEN_KEY)}
    return [
        *({"name": variable, "value": value} for variable, value in plain.items()),
        *({"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}} for variable, path in fields.items()),
        *(
            {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}}
            for variable, secret in secrets.items()
        ),
    ]


def _resources(model: Model) -> dict[str, Any]:
    """Enough for an idle pod; how much a model needs, the user sets in the template."""
    each = CPU_PER_GPU_RANK if model.on_gpus else CPU_PER_RANK
    resources: dict[str, Any] = {
        "requests": {
            "cpu": f"{math.ceil(each * 1000) * model.ranks_per_pod}m",
            "memory": f"{MEMORY_PER_RANK_MIB * model.ranks_per_pod}Mi",
        }
    }
    if model.accelerator:
        resources["limits"] = {model.accelerator: str(model.ranks_per_pod)}
        resources["requests"][model.accelerator] = str(model.ranks_per_pod)
    return resources


def _volumes(model: Model, tokens: str) -> list[dict[str, Any]]:
    """Memory-backed volumes count towards the container's memory limit, which bounds them where they have no limit of
    their own.

    /dev/shm holds the weight cache: how large the pod's slices are, only the checkpoint knows.
    """
    cached = model.recovery.weight_cache != "Off"
    operator = names.operator_token_name(model.name, tokens)
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", **({} if cached else {"sizeLimit": SHARED_MEMORY})}},
        {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": SCRATCH}},
        # Optional: without it the group serves, and only the operator can't ask it.
        {"name": names.OPERATOR_TOKEN_VOLUME, "secret": {"secretName": operator, "optional": True}},
    ]
    if model.api_key:  # a file, since the kubelet brings a changed Secret there, and not to variables
        items = [{"key": model.api_key.key, "path": API_KEY_FILE}]
        volumes.append({"name": "api-key", "secret": {"secretName": model.api_key.name, "items": items}})
    match model.source:
        case HuggingFace(token=token, token_is_optional=optional):
            volumes.append({"name": "cache", **_cache_volume(model)})
            if token:  # a file: what stands in a variable, every process of the pod has
                items = [{"key": token.key, "path": HUB_TOKEN_FILE}]
                secret = {"secretName": token.name, "items": items, **({"optional": True} if optional else {})}
                volumes.append({"name": "hub-token", "secret": secret})
        case Claim(name=claim):
            volumes.append({"name": "model", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        case HostPath(path=path):
            volumes.append({"name": "model", "hostPath": {"path": path, "type": "Directory"}})
        case Image(reference=reference, pull_policy=policy):
            image = {"reference": reference, **({"pullPolicy": policy} if policy else {})}
            volumes.append({"name": "model", "image": image})
    return volumes


def _cache_volume(model: Model) -> dict[str, Any]:
    match model.cache:
        case Claim(name=claim):
            return {"persistentVolumeClaim": {"claimName": claim}}
        case HostPath(path=path):
            return {"hostPath": {"path": path, "type": "Directory"}}
        case EmptyDir(size_limit=limit):
            return {"emptyDir": {"sizeLimit": limit} if limit else {}}


def _mounts(model: Model) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the pod's own volume
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own volume
        {"name": names.OPERATOR_TOKEN_VOLUME, "mountPath": OPERATOR_TOKEN_MOUNT, "readOnly": True},
    ]
    if model.api_key:
        mounts.append({"name": "api-key", "mountPath": API_KEY_MOUNT, "readOnly": True})
    if isinstance(model.source, HuggingFace):
        if model.source.token:
            mounts.append({"name": "hub-token", "mountPath": HUB_TOKEN_MOUNT, "readOnly": True})
        return [*mounts, {"name": "cache", "mountPath": CACHE_MOUNT}]
    return [*mounts, {"name": "model", "mountPath": MODEL_MOUNT, "readOnly": True}]
