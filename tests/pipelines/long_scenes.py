"""Long scenes of DigitWorld: their frames, and the parts of their true graphs that windows see."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from vot_kernels.data.digitworld import generate_episode
from vot_kernels.data.digitworld.sprites import render
from vot_kernels.scene_graph import STSG


def long_scene(frames: int, index: int = 3):
    """A scene of DigitWorld that goes on for so many frames, and its motion."""
    scene = replace(generate_episode("test", index).scene, num_frames=frames)
    return scene, scene.simulate()


def drawn(scene, motion, chunk: int = 64) -> Iterator[tuple[np.ndarray, float]]:
    for first in range(0, scene.num_frames, chunk):
        times = np.arange(first, min(first + chunk, scene.num_frames)) / scene.fps
        frames = render(motion.centers(times), scene.images, scene.colours, scene.radius, *scene.size)
        yield from zip(frames, times.tolist(), strict=True)


def part_of(stsg: STSG, start: int, end: int, order: list[int] | None = None) -> STSG:
    """What a window sees of a true graph: frames from 0, tracklets in another order under new ids."""
    ids = [t.id for t in stsg.tracklets]
    new = {ids[old]: f"o{n + 1}" for n, old in enumerate(order or range(len(ids)))}
    cut = stsg.subgraph(None, start, end - 1)
    tracklets = [
        replace(t, id=new[t.id], boxes={k - start: entry for k, entry in t.boxes.items()})
        for t in cut.tracklets
    ]
    return replace(
        cut,
        frame_times_s=stsg.frame_times_s[start:end],
        tracklets=tuple(sorted(tracklets, key=lambda t: t.id)),
        relations=tuple(
            replace(r, subject=new[r.subject], object=new[r.object], t0=r.t0 - start, t1=r.t1 - start)
            for r in cut.relations
        ),
        events=tuple(
            replace(e, t=e.t - start, participants=tuple(new[p] for p in e.participants)) for e in cut.events
        ),
    )
