"""The exact scene graph of a simulated clip."""

import numpy as np

from vot_kernels.data.digitworld.scene import Scene
from vot_kernels.data.digitworld.sprites import COLOUR_NAMES
from vot_kernels.data.digitworld.world import Motion
from vot_kernels.scene_graph.graph import STSG, Box, Event, Tracklet, Vocabulary
from vot_kernels.scene_graph.relations import GEOMETRIC_PREDICATES, with_geometric_relations

VOCABULARY = Vocabulary(
    labels=tuple(f"digit {n}" for n in range(10)),
    attributes=COLOUR_NAMES,
    predicates=GEOMETRIC_PREDICATES,
    events=("hits", "bounces"),
)


def frame_of(time: float, fps: float) -> int:
    """Return the frame nearest to a moment in seconds."""
    return int(time * fps + 0.5)


def true_stsg(scene: Scene, motion: Motion, source: str = "") -> STSG:
    """Return tracklets, events and geometric relations of `motion` at the frames of `scene`.

    Object n is the track f"o{n + 1}"; boxes are the sprites' squares; events are at the nearest frame, and
    the participant with the smaller index comes first.
    """
    times = np.arange(scene.num_frames) / scene.fps
    height, width = scene.size
    corners = motion.centers(times)[..., None, :] + scene.radius * np.array([[-1.0], [1.0]])
    boxes = np.clip(corners / (width, height), 0.0, 1.0).reshape(len(times), -1, 4).tolist()
    tracklets = tuple(
        Tracklet(
            id=f"o{n + 1}",
            label=f"digit {digit}",
            attributes=(colour,),
            boxes={k: (Box(*frame[n]), 1.0) for k, frame in enumerate(boxes)},
        )
        for n, (digit, colour) in enumerate(zip(scene.digits, scene.colours, strict=True))
    )
    hits = [(hit.time, Event("hits", 0, (f"o{hit.a + 1}", f"o{hit.b + 1}"))) for hit in motion.hits]
    bounces = [(bounce.time, Event("bounces", 0, (f"o{bounce.body + 1}",))) for bounce in motion.bounces]
    timed = sorted([*hits, *bounces], key=lambda pair: pair[0])
    return with_geometric_relations(
        STSG(
            frame_times_s=tuple(times.tolist()),
            tracklets=tracklets,
            events=tuple(Event(e.kind, frame_of(time, scene.fps), e.participants) for time, e in timed),
            vocabulary=VOCABULARY,
            source=source,
        )
    )
