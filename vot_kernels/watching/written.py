"""A video-language model as eyes: it writes the scene graph itself, in the text form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vot_kernels.data.video import VideoClip
from vot_kernels.reasoning.llm import LanguageModel
from vot_kernels.reasoning.types import ModelCall
from vot_kernels.scene_graph.graph import STSG, Tracklet, Vocabulary
from vot_kernels.scene_graph.relations import GEOMETRIC_PREDICATES, with_geometric_relations
from vot_kernels.scene_graph.text import from_text
from vot_kernels.watching.protocols import VIDEO_LANGUAGE_FPS, WINDOW, Reader, Sight

WRITTEN_TOKENS = 512  # a dozen objects with three boxes each
PROMPT = """\
List the main objects of the video and what happens to them, in this form:
<stsg>
o1=red car: 0:10,40,30,55 {last}:60,40,80,55
o2=dog: 0:70,50,80,70
o1 hits o2 @{middle}
</stsg>
A line names an object and gives its box in some frames, as frame:left,top,right,bottom. Frames count from 0 to {last}.
The sides of the picture are 99 long. A line with @ is an event and its frame. Write only the lines between the tags."""


class WrittenGraph:
    """Eyes that are a video-language model: it is asked to write the graph, and whatever it writes is read.

    Relations that follow from boxes are worked out from the boxes.

    Args:
        reader: the model.
        name: its name.
        fps: frames per second that it wants to see.
    """

    def __init__(self, reader: Reader, name: str, fps: float = VIDEO_LANGUAGE_FPS) -> None:
        self.reader, self.fps = reader, fps
        self.window = getattr(reader, "max_frames", WINDOW)
        self.name = f"the video-language model {name}, which wrote the graph"

    def see(self, clip: VideoClip) -> Sight:
        """Return the graph that the model writes. What of it could not be read is in `Sight.issues`."""
        model: LanguageModel = self.reader.about(clip)
        last = len(clip.times) - 1
        prompt = PROMPT.format(last=last, middle=last // 2)
        reply = model.generate(prompt, max_new_tokens=WRITTEN_TOKENS)
        written, issues = from_text(reply, None, clip.times.tolist())
        graph = replace(_completed(written), source=f"{Path(clip.info.path).name} written by {model.name}")
        calls = (ModelCall("graph", prompt, str(reply)),)
        return Sight(graph, self.name, None, tuple(issues), calls)


def _completed(graph: STSG) -> STSG:
    """Return the graph with boxes between those that were written, and with the relations that follow from boxes."""
    tracklets = tuple(_named(tracklet).interpolated() for tracklet in graph.tracklets if tracklet.boxes)
    ids = {tracklet.id for tracklet in tracklets}
    vocabulary = Vocabulary(
        labels=tuple(dict.fromkeys(t.label for t in tracklets)),
        attributes=tuple(dict.fromkeys(word for t in tracklets for word in t.attributes)),
        predicates=tuple(dict.fromkeys((*GEOMETRIC_PREDICATES, *graph.vocabulary.predicates))),
        events=graph.vocabulary.events,
    )
    relations = tuple(r for r in graph.relations if {r.subject, r.object} <= ids)
    events = tuple(e for e in graph.events if set(e.participants) <= ids)
    kept = replace(graph, tracklets=tracklets, relations=relations, events=events, vocabulary=vocabulary)
    return with_geometric_relations(kept)


def _named(tracklet: Tracklet) -> Tracklet:
    """Return the tracklet with the last word of its name as label and the words before it as attributes."""
    *attributes, label = tracklet.name.split() or ["object"]
    return replace(tracklet, label=label, attributes=tuple(attributes))
