"""The cluster's daemons as command lines, in the order in which they start."""

from dev.cluster.layout import (
    API_SERVICE_ADDRESS,
    API_URL,
    ETCD_DATA,
    ETCD_URL,
    KUBELET_ROOT,
    KUBERNETES,
    NODE_ADDRESS,
    NODE_NAME,
    PKI,
    RUN,
    SERVICE_CIDR,
)
from dev.cluster.settings import CLIENTS


def foundation() -> dict[str, list[str]]:
    """What runs before the API server answers; the three bear each other's absence for a while."""
    return {
        "containerd": ["containerd", "--config", f"{RUN}/containerd.toml"],
        "etcd": _kubernetes(
            "etcd",
            "name=lockstep",
            f"data-dir={ETCD_DATA}",
            f"listen-client-urls={ETCD_URL}",
            f"advertise-client-urls={ETCD_URL}",
            f"listen-peer-urls=https://{NODE_ADDRESS}:2380",
            f"initial-advertise-peer-urls=https://{NODE_ADDRESS}:2380",
            f"initial-cluster=lockstep=https://{NODE_ADDRESS}:2380",
            "client-cert-auth",
            f"trusted-ca-file={PKI}/ca.crt",
            f"cert-file={PKI}/server.crt",
            f"key-file={PKI}/server.key",
            "peer-client-cert-auth",
            f"peer-trusted-ca-file={PKI}/ca.crt",
            f"peer-cert-file={PKI}/server.crt",
            f"peer-key-file={PKI}/server.key",
            "unsafe-no-fsync",  # nothing in it outlives the cluster
        ),
        "kube-apiserver": _kubernetes(
            "kube-apiserver",
            f"bind-address={NODE_ADDRESS}",
            f"advertise-address={NODE_ADDRESS}",
            f"service-cluster-ip-range={SERVICE_CIDR}",
            f"etcd-servers={ETCD_URL}",
            f"etcd-cafile={PKI}/ca.crt",
            f"etcd-certfile={PKI}/server.crt",
            f"etcd-keyfile={PKI}/server.key",
            f"client-ca-file={PKI}/ca.crt",
            f"tls-cert-file={PKI}/server.crt",
            f"tls-private-key-file={PKI}/server.key",
            f"kubelet-certificate-authority={PKI}/ca.crt",
            f"kubelet-client-certificate={PKI}/admin.crt",
            f"kubelet-client-key={PKI}/admin.key",
            "kubelet-preferred-address-types=InternalIP",
            f"service-account-issuer={API_URL}",
            f"service-account-key-file={PKI}/service-accounts.key",
            f"service-account-signing-key-file={PKI}/service-accounts.key",
            "authorization-mode=Node,RBAC",
            "enable-admission-plugins=NodeRestriction",
            "allow-privileged=true",
            "profiling=false",
        ),
    }


def control_and_node() -> dict[str, list[str]]:
    """What runs once the API server is ready."""
    return {
        "kube-controller-manager": _kubernetes(
            "kube-controller-manager",
            f"kubeconfig={RUN}/controller-manager.kubeconfig",
            f"service-account-private-key-file={PKI}/service-accounts.key",
            f"root-ca-file={PKI}/ca.crt",
            f"cluster-signing-cert-file={PKI}/ca.crt",
            f"cluster-signing-key-file={PKI}/ca.key",
            "use-service-account-credentials=true",
            f"bind-address={NODE_ADDRESS}",
            "leader-elect=false",
        ),
        "kube-scheduler": _kubernetes(
            "kube-scheduler",
            f"kubeconfig={RUN}/scheduler.kubeconfig",
            f"bind-address={NODE_ADDRESS}",
            "leader-elect=false",
        ),
        "kubelet": _kubernetes(
            "kubelet",
            f"config={RUN}/kubelet.yaml",
            f"kubeconfig={RUN}/kubelet.kubeconfig",
            f"root-dir={KUBELET_ROOT}",
            f"hostname-override={NODE_NAME}",
            f"node-ip={NODE_ADDRESS}",
        ),
        "kube-proxy": _kubernetes("kube-proxy", f"config={RUN}/proxy.yaml"),
        "coredns": [str(KUBERNETES), "coredns", "-conf", f"{RUN}/Corefile", "-quiet"],
    }


def certificates() -> list[str]:
    """The arguments of `kubernetes pki`."""
    clients = [f"{name}={common}/{organization}" for name, (common, organization) in CLIENTS.items()]
    hosts = (
        f"localhost,127.0.0.1,{NODE_ADDRESS},{API_SERVICE_ADDRESS},kubernetes,kubernetes.default,kubernetes.default.svc"
    )
    clients = [
        f"{client}@{NODE_NAME},{NODE_ADDRESS}" if client.startswith("kubelet=") else client for client in clients
    ]
    return [str(KUBERNETES), "pki", str(PKI), *clients, f"server=kube-apiserver@{hosts}"]


def _kubernetes(program: str, *options: str) -> list[str]:
    return [str(KUBERNETES), program, *(f"--{option}" for option in options)]
