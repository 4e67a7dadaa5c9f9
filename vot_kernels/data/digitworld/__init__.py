"""DigitWorld: coloured handwritten digits that hit each other, with exact ground truth and balanced questions."""

from vot_kernels.data.digitworld.baselines import BASELINES, accuracy_by_kind, baseline_answers
from vot_kernels.data.digitworld.batches import TrainingBatch, episode_batch
from vot_kernels.data.digitworld.codec import h264_roundtrip
from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.data.digitworld.hidden_colours import HiddenColours, hidden_colours
from vot_kernels.data.digitworld.localisation import (
    INTERVAL_BASELINES,
    baseline_intervals,
    interval_by_rules,
    localisation_scores,
)
from vot_kernels.data.digitworld.needles import NEEDLE_FORMS, LongClip, Needle, long_clip, needle, needles
from vot_kernels.data.digitworld.particle_filter import explain_events
from vot_kernels.data.digitworld.physics import Physics
from vot_kernels.data.digitworld.question_sets import AskedEpisode, generate_questions
from vot_kernels.data.digitworld.questions import KINDS, TIMED_KINDS, Question
from vot_kernels.data.digitworld.rules import answer_by_rules, answer_text_by_rules
from vot_kernels.data.digitworld.scene import SPLITS, Scene
from vot_kernels.data.digitworld.sidecar import Sidecar, load_sidecar, save_episode
from vot_kernels.data.digitworld.sprites import COLOUR_NAMES, COLOURS
from vot_kernels.data.digitworld.truth import VOCABULARY

__all__ = [
    "BASELINES",
    "COLOURS",
    "COLOUR_NAMES",
    "INTERVAL_BASELINES",
    "KINDS",
    "NEEDLE_FORMS",
    "SPLITS",
    "TIMED_KINDS",
    "VOCABULARY",
    "AskedEpisode",
    "Episode",
    "HiddenColours",
    "LongClip",
    "Needle",
    "Physics",
    "Question",
    "Scene",
    "Sidecar",
    "TrainingBatch",
    "accuracy_by_kind",
    "answer_by_rules",
    "answer_text_by_rules",
    "baseline_answers",
    "baseline_intervals",
    "episode_batch",
    "explain_events",
    "generate_episode",
    "generate_questions",
    "h264_roundtrip",
    "hidden_colours",
    "interval_by_rules",
    "load_sidecar",
    "localisation_scores",
    "long_clip",
    "needle",
    "needles",
    "save_episode",
]
