"""A detector of transformers as eyes: boxes in single frames, linked over time, and what follows from the boxes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vot_kernels.data.video import VideoClip
from vot_kernels.reasoning.llm import LanguageModelError
from vot_kernels.scene_graph.events import GEOMETRIC_EVENTS, with_geometric_events
from vot_kernels.scene_graph.graph import STSG, Box, Vocabulary
from vot_kernels.scene_graph.relations import GEOMETRIC_PREDICATES, with_geometric_relations
from vot_kernels.scene_graph.text import printable
from vot_kernels.watching.kernels import Kernels
from vot_kernels.watching.loading import check_detector_folder, check_dtype, load_patched
from vot_kernels.watching.memory import enough_memory
from vot_kernels.watching.protocols import DETECTOR_FPS, Sight
from vot_kernels.watching.tracking import Found, distinct, link

SURE = 0.4
"""Least score of a detection that counts."""
_BATCH = 4  # frames in one forward pass, which bounds memory


class DetectorEyes:
    """An object detector as eyes.

    Relations and events follow from the boxes alone, by the rules of `vot_kernels.scene_graph.relations` and `events`.
    The vocabulary holds the labels that were found and no others, since an object that a detector did not find may
    still be there.

    Args:
        model: a model for object detection, or for zero-shot detection.
        processor: its image processor, or its processor for images and text.
        name: its name.
        objects: the labels to look for. A zero-shot detector needs some; for another, none stands for all of its own.
        sure: least score of a detection that counts.
        kernels: the model on the kernels of this package; None leaves it as it is.

    Raises:
        LanguageModelError: a zero-shot detector is not told what to look for, or another does not know an object.
    """

    fps = DETECTOR_FPS

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        objects: Sequence[str] = (),
        *,
        sure: float = SURE,
        kernels: Kernels | None = None,
    ) -> None:
        self.model, self.processor, self.kernels = model, processor, kernels
        self.objects, self.sure = tuple(objects), sure
        self.name = f"the detector {name}"
        self.zero_shot = hasattr(processor, "post_process_grounded_object_detection")
        if self.zero_shot and not objects:
            raise LanguageModelError(
                f"'{name}' finds what it is told to look for; name that with --objects 'car|dog'."
            )
        known = set() if self.zero_shot else set(model.config.id2label.values())
        if unknown := sorted(set(objects) - known) if known else []:
            raise LanguageModelError(
                f"'{name}' does not know {unknown[0]!r}; it knows {', '.join(sorted(known)[:80])}."
            )

    def see(self, clip: VideoClip) -> Sight:
        """Return the graph of what is detected in each frame."""
        found = [frame for start in range(0, len(clip.frames), _BATCH) for frame in self._find(clip, start)]
        tracklets = link(clip.frames, [distinct(objects) for objects in found])
        words = Vocabulary(
            labels=tuple(dict.fromkeys(t.label for t in tracklets)),
            predicates=GEOMETRIC_PREDICATES,
            events=GEOMETRIC_EVENTS,
        )
        source = f"{Path(clip.info.path).name} seen by {self.name}"
        graph = STSG(tuple(clip.times.tolist()), tracklets, vocabulary=words, source=source)
        return Sight(with_geometric_relations(with_geometric_events(graph)), self.name)

    def _find(self, clip: VideoClip, start: int) -> Iterator[list[Found]]:
        """Yield what is found in each of the next frames."""
        from PIL import Image

        frames = clip.frames[start : start + _BATCH]
        images = [Image.fromarray(frame) for frame in frames]
        words: dict[str, Any] = {"text": [list(self.objects)] * len(images)} if self.zero_shot else {}
        inputs = self.processor(images=images, return_tensors="pt", **words).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with enough_memory(self.name), torch.inference_mode():
            output = self.kernels.run(**inputs) if self.kernels else self.model(**inputs)
        height, width = frames.shape[1:3]
        for result in self._boxes(output, [(height, width)] * len(images)):
            if not len(result["scores"]):  # of nothing, some processors name one label: an empty one
                yield []
                continue
            labels = result["text_labels"] if self.zero_shot else self._labels(result["labels"])
            sides = result["boxes"].float().cpu() / torch.tensor([width, height, width, height])
            boxes = (Box(*corners) for corners in sides.clamp(0, 1).tolist())
            items = zip(boxes, result["scores"].tolist(), map(self._wanted, labels), strict=True)
            yield [
                Found(box, score, printable(label)) for box, score, label in items if label and box.area > 0
            ]

    def _boxes(self, output: Any, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        options: dict[str, Any] = {"threshold": self.sure, "target_sizes": sizes}
        if self.zero_shot:
            texts = [list(self.objects)] * len(sizes)
            return self.processor.post_process_grounded_object_detection(output, text_labels=texts, **options)
        return self.processor.post_process_object_detection(output, **options)

    def _labels(self, ids: Any) -> list[str]:
        return [self.model.config.id2label[int(id)] for id in ids]

    def _wanted(self, label: str | None) -> str:
        """Return the object that a label means, "" for none that is looked for: some detectors answer with phrases."""
        if not self.objects or label in self.objects:
            return label or ""
        by_length = sorted(self.objects, key=len, reverse=True)  # "red car" says more than "car"
        return next((each for each in by_length if label and _has_words(label, each)), "")


def load_detector(
    path: str | os.PathLike[str], objects: Sequence[str] = (), device: str = "cpu", dtype: str = "auto"
) -> DetectorEyes:
    """Load a local object detector, or zero-shot detector, of transformers as eyes.

    Args:
        path: a folder with config.json, safetensors and an image processor.
        objects: as in `DetectorEyes`.
        device: where it runs.
        dtype: of the weights, as in `load_video_language_model`.

    Raises:
        LanguageModelError: the folder does not hold such a model, or not all of its weights.
        ValueError: an unknown dtype.
    """
    check_dtype(dtype)
    check_detector_folder(path)
    folder = Path(path).expanduser()
    loaded = load_patched(folder, device, dtype, _detector_classes)
    name = folder.resolve().name
    return DetectorEyes(loaded.model, loaded.processor, name, objects, kernels=loaded.kernels)


def _has_words(phrase: str, words: str) -> bool:
    """Return whether `words` are in the phrase as whole words: "man" is not in "a woman"."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", phrase) is not None


def _detector_classes(config: Any, folder: Path) -> tuple[Any, Any]:
    """Return the Auto classes of a detector; a LanguageModelError for any other model."""
    import transformers

    if type(config) in transformers.AutoModelForZeroShotObjectDetection._model_mapping:
        return transformers.AutoModelForZeroShotObjectDetection, transformers.AutoProcessor
    if type(config) in transformers.AutoModelForObjectDetection._model_mapping:
        return transformers.AutoModelForObjectDetection, transformers.AutoImageProcessor
    raise LanguageModelError(
        f"'{folder}' is not an object detector; it is of the type '{config.model_type}'."
    )
