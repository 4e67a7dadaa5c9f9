"""Metrics of a pretrained encoder, measured on held-out DigitWorld clips."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.data.digitworld.sprites import COLOUR_NAMES
from vot_kernels.extras import imports_for
from vot_kernels.train.encoder.settings import EncoderTraining
from vot_kernels.train.encoder.stage import (
    EncoderPretraining,
    Teacher,
    captioned,
    make_processor,
)

_BATCH = 16
Metrics = dict[str, float]


@torch.no_grad()
def encoder_metrics(
    model: EncoderPretraining, teacher: Teacher, settings: EncoderTraining, clips: int, seed: int = 0
) -> Metrics:
    """Measure on the first `clips` episodes of the split "test"; the probe is fitted on those of "val".

    No training clip shows the digits of either split.

    Returns:
        distil_tokens, distil_pooled: the distances that distillation minimises, about 1 where only the
        teacher's mean is known. video_to_caption_r1, caption_to_video_r1: share of clips (captions) whose
        nearest caption (clip) among all is its own; r1_chance: 1 / clips. probe_count, probe_colour: accuracy
        of a linear probe of the pooled vector on the number of objects and on the presence of each colour;
        probe_count_majority, probe_colour_majority: of always giving the most frequent answer.
        The entries of an objective that is turned off are left out.
    """
    model.eval()
    test, val = (_look(model, teacher, settings, split, clips, seed) for split in ("test", "val"))
    metrics = {name: float(np.mean(values)) for name, values in test.distances.items()}
    if model.contrast is not None:
        metrics |= _recall(torch.cat(test.images), torch.cat(test.texts))
    return metrics | _probe(val, test)


class _Seen:
    """The clips of one split and the model's outputs, with a list entry per batch."""

    def __init__(self) -> None:
        self.episodes: list[Episode] = []
        self.pooled: list[Tensor] = []
        self.images: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.distances: dict[str, list[float]] = {}


def _look(
    model: EncoderPretraining, teacher: Teacher, settings: EncoderTraining, split: str, clips: int, seed: int
) -> _Seen:
    seen, processor = _Seen(), make_processor(model.encoder.config)
    for first in range(0, clips, _BATCH):
        episodes = [
            generate_episode(split, index, seed, num_frames=settings.num_frames)
            for index in range(first, min(first + _BATCH, clips))
        ]
        batch = captioned(episodes, settings.h264_share)
        inputs = processor(batch.clips, fps=batch.fps).to(teacher.encoder.device)
        output = model.encoder(**inputs)
        seen.episodes += episodes
        seen.pooled.append(output.pooler_output.cpu())
        if model.distillation is not None:
            for name, value in model.distil(output, teacher, inputs).items():
                seen.distances.setdefault(f"distil_{name}", []).append(value.item())
        if model.contrast is not None:
            images, texts = model.embed(output, batch.captions)
            seen.images.append(images.cpu())
            seen.texts.append(texts.cpu())
    return seen


def _recall(images: Tensor, texts: Tensor) -> Metrics:
    """Return R@1 in both directions; row i of one belongs to row i of the other."""
    similarity = images @ texts.T
    own = torch.arange(len(similarity))
    return {
        "video_to_caption_r1": (similarity.argmax(1) == own).float().mean().item(),
        "caption_to_video_r1": (similarity.argmax(0) == own).float().mean().item(),
        "r1_chance": 1 / len(similarity),
    }


def _probe(fit: _Seen, test: _Seen) -> Metrics:
    """Return the accuracies of ridge classifiers on standardised pooled vectors, and of the most frequent answer."""
    with imports_for("A linear probe", "train"):
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    known, features = (torch.cat(seen.pooled).numpy() for seen in (fit, test))
    accuracies: dict[str, list[float]] = {}
    for name, wanted, truth in zip(_PROBES, _answers(fit.episodes), _answers(test.episodes), strict=True):
        probe = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-2, 4, 13)))
        values, counts = np.unique(wanted, return_counts=True)
        guess = np.full_like(truth, values[counts.argmax()])
        predicted = probe.fit(known, wanted).predict(features) if len(values) > 1 else guess
        accuracies.setdefault(f"probe_{name}", []).append(float((predicted == truth).mean()))
        accuracies.setdefault(f"probe_{name}_majority", []).append(float((guess == truth).mean()))
    return {name: float(np.mean(shares)) for name, shares in accuracies.items()}


_PROBES = ("count", *("colour" for _ in COLOUR_NAMES))


def _answers(episodes: Sequence[Episode]) -> list[np.ndarray]:
    """Return for each probe the truth of each clip: the number of objects, then whether it shows each colour."""
    count = np.array([len(episode.scene.digits) for episode in episodes])
    shown = [np.array([colour in episode.scene.colours for episode in episodes]) for colour in COLOUR_NAMES]
    return [count, *(presence.astype(np.int64) for presence in shown)]
