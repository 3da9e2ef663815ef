"""The files that the cluster's programs read, as text. Pure: `write` is the only function that touches the disk."""

import base64
import json
from pathlib import Path
from typing import Final

from dev.cluster.layout import (
    API_URL,
    CGROUP,
    CNI_CONFIG,
    CNI_LEASES,
    CNI_NETWORK,
    CNI_PLUGINS,
    CONTAINERD_ROOT,
    CONTAINERD_SOCKET,
    CONTAINERD_STATE,
    DNS_SERVICE_ADDRESS,
    KUBECONFIG,
    LOGS,
    NODE_ADDRESS,
    NODE_NAME,
    PAUSE_IMAGE,
    PKI,
    POD_CIDR,
    RUN,
    RUNC_ROOT,
)

# Certificate: (common name, organization). The names are those that Kubernetes' built-in RBAC bindings expect.
CLIENTS: Final = {
    "admin": ("lockstep-admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
    "coredns": ("lockstep-coredns", ""),
}


def containerd() -> str:
    return f"""\
version = 2
root = "{CONTAINERD_ROOT}"
state = "{CONTAINERD_STATE}"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
                    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
                    "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true  # a root without CAP_SYS_RESOURCE may not lower scores
  netns_mounts_under_state_dir = true  # else they are in /run/netns, beyond what `down` may claim as its own
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{CNI_CONFIG}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "{RUNC_ROOT}"
      SystemdCgroup = false
"""


def cni() -> str:
    """A veth pair and a host route per pod: all traffic is routed, so that no bridge lets replies bypass conntrack."""
    ipam = {
        "type": "host-local",
        "dataDir": str(CNI_LEASES),
        "ranges": [[{"subnet": POD_CIDR}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return json.dumps(
        {
            "cniVersion": "0.4.0",
            "name": CNI_NETWORK,
            "plugins": [{"type": "ptp", "ipMasq": False, "ipam": ipam}],
        }
    )


def kubelet() -> str:
    return f"""\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {NODE_ADDRESS}
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: {PKI}/ca.crt}}
authorization: {{mode: Webhook}}
tlsCertFile: {PKI}/kubelet.crt
tlsPrivateKeyFile: {PKI}/kubelet.key
containerRuntimeEndpoint: unix://{CONTAINERD_SOCKET}
cgroupDriver: cgroupfs
cgroupRoot: /{CGROUP}
clusterDNS: [{DNS_SERVICE_ADDRESS}]
clusterDomain: cluster.local
resolvConf: {resolv_conf()}
podLogsDir: {LOGS}/pods
volumePluginDir: {RUN}/volume-plugins
healthzPort: 0
failSwapOn: false
failCgroupV1: false
oomScoreAdj: 0  # a root without CAP_SYS_RESOURCE may not lower it
makeIPTablesUtilChains: false
registerWithTaints: []
serializeImagePulls: false
imageGCHighThresholdPercent: 100  # images are loaded by hand: none may be collected, however full the disk
evictionHard: {{memory.available: 100Mi, nodefs.available: 500Mi}}
"""


def proxy() -> str:
    return f"""\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
bindAddress: {NODE_ADDRESS}
healthzBindAddress: {NODE_ADDRESS}:10256
metricsBindAddress: {NODE_ADDRESS}:10249
clientConnection: {{kubeconfig: {RUN}/proxy.kubeconfig}}
clusterCIDR: {POD_CIDR}
detectLocalMode: ClusterCIDR
hostnameOverride: {NODE_NAME}
oomScoreAdj: 0
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
nftables: {{minSyncPeriod: 0s, syncPeriod: 30s}}
"""


def corefile() -> str:
    return f"""\
.:53 {{
    bind {NODE_ADDRESS}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {RUN}/coredns.kubeconfig
        ttl 1
        fallthrough in-addr.arpa
    }}
    forward . {resolv_conf()}
    cache 30 {{
        disable success cluster.local
        disable denial cluster.local
    }}
}}
"""


def addons() -> str:
    """CoreDNS runs as a daemon of the host, so its Service has no selector and its endpoint is written by hand."""
    return f"""\
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  clusterIP: {DNS_SERVICE_ADDRESS}
  ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kube-dns-node, namespace: kube-system, labels: {{kubernetes.io/service-name: kube-dns}}}}
addressType: IPv4
ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
endpoints: [{{addresses: ["{NODE_ADDRESS}"], conditions: {{ready: true}}}}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: lockstep:coredns}}
rules:
- {{apiGroups: [""], resources: [endpoints, services, pods, namespaces], verbs: [list, watch]}}
- {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: lockstep:coredns}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: lockstep:coredns}}
subjects: [{{apiGroup: rbac.authorization.k8s.io, kind: User, name: lockstep-coredns}}]
"""


def kubeconfig(client: str) -> str:
    """Credentials and all in one file, so that it can be copied anywhere."""
    return f"""\
apiVersion: v1
kind: Config
current-context: lockstep
clusters: [{{name: lockstep, cluster: {{server: "{API_URL}", certificate-authority-data: {_encoded("ca.crt")}}}}}]
contexts: [{{name: lockstep, context: {{cluster: lockstep, user: {client}}}}}]
users:
- name: {client}
  user:
    client-certificate-data: {_encoded(f"{client}.crt")}
    client-key-data: {_encoded(f"{client}.key")}
"""


def resolv_conf() -> Path:
    """The nameservers of the network: systemd-resolved's stub is on loopback, where a forwarder would meet itself."""
    resolved = Path("/run/systemd/resolve/resolv.conf")
    return resolved if resolved.exists() else Path("/etc/resolv.conf")


def write() -> None:
    """All of the above and the clients' kubeconfigs; the certificates must be there."""
    CNI_CONFIG.mkdir(parents=True, exist_ok=True)
    (CNI_CONFIG / "10-lockstep.conflist").write_text(cni())
    (RUN / "containerd.toml").write_text(containerd())
    (RUN / "kubelet.yaml").write_text(kubelet())
    (RUN / "proxy.yaml").write_text(proxy())
    (RUN / "Corefile").write_text(corefile())
    (RUN / "addons.yaml").write_text(addons())
    for client in CLIENTS:
        path = KUBECONFIG if client == "admin" else RUN / f"{client}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(kubeconfig(client))


def _encoded(name: str) -> str:
    return base64.b64encode((PKI / name).read_bytes()).decode()
