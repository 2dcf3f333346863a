"""The machines a prediction is for. Every number of the hardware is here, and is an input."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """peak: dense bf16 FLOP/s of a GPU. achievable: share of it that whole encoders reach.

    memory: bytes of a GPU; bandwidth: its bytes/s. link: bytes/s of a GPU to others in its node, one direction;
    network: the same to other nodes. per_node: GPUs of a node. moved: share of bandwidth, link and network that real
    transfers reach. latency: seconds per level of the tree of a collective.
    """

    name: str
    peak: float
    achievable: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int
    moved: float
    latency: float

    def bus(self, gpus: int) -> float:
        """Bytes/s at which a ring moves what each GPU sends.

        Rings over nodes enter and leave a node by all its network ports, so a node's ports together are the limit, and
        not one port (nccl-tests, doc/PERFORMANCE.md: "bus bandwidth").
        """
        return self.moved * (self.link if gpus <= self.per_node else min(self.link, self.network * self.per_node))

    def collective(self, sent: float, calls: int, gpus: int) -> float:
        """Seconds of `calls` collectives that together send `sent` bytes from each GPU."""
        return sent / self.bus(gpus) + calls * self.latency * math.ceil(math.log2(gpus)) if gpus > 1 else 0.0


# NVIDIA H200 datasheet, SXM: 1,979 TFLOP/s bf16 with sparsity, so 989.5 dense; 141 GB at 4.8 TB/s; NVLink 900 GB/s for
# both directions. DGX H200 datasheet: 8 GPUs, 8 ports of 400 Gb/s for compute. This project's own assumptions, to be
# replaced by measured ones: 45 % of the peak for whole encoders, 80 % of a bandwidth, 5 us a level.
H200 = Cluster(
    name="H200 SXM, nodes of 8",
    peak=989.5e12,
    achievable=0.45,
    memory=141e9,
    bandwidth=4.8e12,
    link=450e9,
    network=50e9,
    per_node=8,
    moved=0.8,
    latency=5e-6,
)
