"""What a run is planned for: a cluster's nodes, or this machine."""

from dataclasses import dataclass
from pathlib import Path

from dskd.config.cluster import ClusterConfig
from dskd.config.run import RunConfig

GB = 10**9
H100_GB, H100_TFLOPS = 80.0, 989.0
"""Memory and dense bf16 peak of one."""
CORE_TFLOPS = 0.06
"""Of one core of a server, fp32."""


@dataclass(frozen=True)
class Machine:
    """Nodes that are all alike. On CPUs a process has its share of the node's memory."""

    name: str
    nodes: int
    ranks_per_node: int
    on_gpu: bool
    memory: int
    """Bytes that a rank can have: a GPU's, or its share of the node's."""
    flops: float
    """Peak of a rank in a second."""
    host_memory: int | None
    """Bytes of a node; None where the profile does not say."""
    most_nodes: int = 64

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def cluster_machine(run: RunConfig, name: str, cluster: ClusterConfig) -> Machine | None:
    """The nodes that a run would get there; None where the profile does not say how much memory a GPU has."""
    if not cluster.gpus_per_node or cluster.gpu_memory_gb is None:
        return None
    return Machine(
        name=f"{name}: {run.launch.processes or cluster.gpus_per_node} GPUs of {cluster.gpu_memory_gb:g} GB a node",
        nodes=run.launch.nodes,
        ranks_per_node=run.launch.processes or cluster.gpus_per_node,
        on_gpu=True,
        memory=round(cluster.gpu_memory_gb * GB),
        flops=(cluster.gpu_tflops or H100_TFLOPS) * 1e12,
        host_memory=None if cluster.memory_gb is None else cluster.memory_gb * GB,
    )


def assumed_machine(run: RunConfig) -> Machine:
    """Without a profile: this machine's CPUs where the run says on how many processes, else nodes of 8 H100."""
    if run.launch.processes is not None:
        return this_machine(run.launch.processes)
    return Machine(
        name=f"assumed, without --cluster: nodes of 8 H100, {H100_GB:g} GB each",
        nodes=run.launch.nodes,
        ranks_per_node=8,
        on_gpu=True,
        memory=round(H100_GB * GB),
        flops=H100_TFLOPS * 1e12,
        host_memory=2000 * GB,
    )


def these_gpus(ranks: int, memory: int) -> Machine:
    """The GPUs of this machine."""
    return Machine(
        name=f"this machine: {ranks} GPU(s) of {memory / GB:.0f} GB",
        nodes=1,
        ranks_per_node=ranks,
        on_gpu=True,
        memory=memory,
        flops=H100_TFLOPS * 1e12,
        host_memory=None,
        most_nodes=1,
    )


def this_machine(processes: int) -> Machine:
    """The CPUs of this machine, shared by so many processes."""
    total = memory_of_this_machine()
    return Machine(
        name=f"this machine: {total / GB:.0f} GB for {processes} process(es) on CPUs",
        nodes=1,
        ranks_per_node=processes,
        on_gpu=False,
        memory=total // processes,
        flops=CORE_TFLOPS * 1e12,
        host_memory=None,
        most_nodes=1,
    )


def memory_of_this_machine() -> int:
    """Bytes, as /proc/meminfo says."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:")) * 1024
