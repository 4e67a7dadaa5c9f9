"""Ways to solve the problems: this package's backends and its peers, looked up when a run starts."""

from benchmarks.core import Provider
from benchmarks.providers import (
    encoder,
    experts,
    experts_peers,
    flash_attention,
    fused,
    hybrid_peers,
    linear_peers,
    naive_attention,
    ours,
    pytorch_attention,
    stream,
    towers,
    video,
)

PROVIDERS: tuple[Provider, ...] = (
    *ours.PROVIDERS,
    *naive_attention.PROVIDERS,
    *pytorch_attention.PROVIDERS,
    *flash_attention.PROVIDERS,
    *linear_peers.PROVIDERS,
    *hybrid_peers.PROVIDERS,
    *stream.PROVIDERS,
    *experts.PROVIDERS,
    *experts_peers.PROVIDERS,
    *fused.PROVIDERS,
    *encoder.PROVIDERS,
    *towers.PROVIDERS,
    *video.PROVIDERS,
)


def providers_of(suite: str) -> tuple[Provider, ...]:
    """Return the providers that take part in a suite, ours first."""
    return tuple(sorted((p for p in PROVIDERS if suite in p.suites), key=lambda p: not p.ours))
