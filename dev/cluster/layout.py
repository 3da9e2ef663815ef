"""Where the cluster keeps its files, and the addresses that it uses."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
DEV: Final = ROOT / ".dev"
SOURCES: Final = Path(__file__).resolve().parent / "go"

# What outlives `down`, so that the next `up` is warm.
BIN: Final = DEV / "bin"
GO: Final = DEV / "go"
CONTAINERD_ROOT: Final = DEV / "containerd"
BUILD_STORE: Final = DEV / "buildah"
SCRATCH: Final = DEV / "tmp"

# What `down` removes.
RUN: Final = DEV / "run"
LOGS: Final = DEV / "logs"  # kept by `down` for whoever asks why; emptied by the next `up`
KUBECONFIG: Final = DEV / "kubeconfig"
PKI: Final = RUN / "pki"
ETCD_DATA: Final = RUN / "etcd"
KUBELET_ROOT: Final = RUN / "kubelet"
CONTAINERD_STATE: Final = RUN / "containerd"
CONTAINERD_SOCKET: Final = RUN / "containerd.sock"
RUNC_ROOT: Final = RUN / "runc"
CNI_CONFIG: Final = RUN / "cni"
CNI_LEASES: Final = RUN / "leases"
PIDS: Final = RUN / "pids"

KUBERNETES: Final = BIN / "kubernetes"  # every program in one binary, which is told by its first argument who it is
PAUSE: Final = BIN / "pause"
CNI_PLUGINS: Final = Path("/usr/lib/cni")
# The model folders of examples/, seen under a path that is the same on every machine: examples' CRs name it.
MODELS: Final = Path("/var/lib/lockstep/models")
EXAMPLES: Final = ROOT / "examples"

# One /22 that is unlikely to be anyone's: the node's own address, the pods' and the Services'.
NETWORK: Final = "10.177.0.0/22"
NODE_ADDRESS: Final = "10.177.0.1"
POD_CIDR: Final = "10.177.1.0/24"
SERVICE_CIDR: Final = "10.177.2.0/24"
API_SERVICE_ADDRESS: Final = "10.177.2.1"
DNS_SERVICE_ADDRESS: Final = "10.177.2.10"
API_URL: Final = f"https://{NODE_ADDRESS}:6443"
ETCD_URL: Final = f"https://{NODE_ADDRESS}:2379"
INTERFACE: Final = "lockstep0"
NFT_TABLES: Final = (("ip", "lockstep"), ("ip", "kube-proxy"), ("ip6", "kube-proxy"))
NODE_NAME: Final = "lockstep"
CGROUP: Final = "lockstep"
CNI_NETWORK: Final = "lockstep"
PAUSE_IMAGE: Final = "localhost/lockstep/pause:dev"
