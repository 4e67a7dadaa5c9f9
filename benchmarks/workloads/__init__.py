"""What is measured: data alone. One file per family, the most telling workload first."""

from benchmarks.core import Workload
from benchmarks.workloads import attention, encoder, experts, fused, video

SUITES = ("hybrid", "softmax", "linear", "aoe", "moe", "fused", "encoder", "video")
"""In the order in which they run."""

FAMILIES = (attention, experts, fused, encoder, video)


def workloads(device: str) -> list[Workload]:
    """All of a device ("cpu" or "cuda"), suite by suite."""
    found = [workload for family in FAMILIES for workload in family.workloads(device)]
    return sorted(found, key=lambda workload: SUITES.index(workload.suite))
