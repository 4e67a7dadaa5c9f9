"""The workloads, which are data only. Each family has a file, with the most informative workload first."""

from benchmarks.core import Workload
from benchmarks.workloads import attention, encoder, experts, fused, stream, towers, video

SUITES = ("hybrid", "stream", "softmax", "linear", "aoe", "moe", "fused", "encoder", "towers", "video")
"""The suites in the order in which they run."""

FAMILIES = (attention, stream, experts, fused, encoder, towers, video)


def workloads(device: str) -> list[Workload]:
    """Return all workloads of a device ("cpu" or "cuda"), suite by suite."""
    found = [workload for family in FAMILIES for workload in family.workloads(device)]
    return sorted(found, key=lambda workload: SUITES.index(workload.suite))
