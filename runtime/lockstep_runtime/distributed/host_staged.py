"""GPU tensors over a communicator of the host's: for ranks that share a GPU, which NCCL refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lockstep_runtime.distributed.communicator import Communicator


class HostStagedCommunicator:
    """Any group of CPU tensors, for tensors of any device: each is copied to the host and back."""

    def __init__(self, group: Communicator) -> None:
        self.rank, self.size = group.rank, group.size
        self.check, self.release, self.close = group.check, group.release, group.close
        self._group = group

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        return tensor.copy_(self._group.all_reduce(tensor.cpu(), place))

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        parts = self._group.gather(tensor.cpu(), place)
        return None if parts is None else [part.to(tensor.device) for part in parts]
