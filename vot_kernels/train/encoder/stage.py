"""Pretraining of the encoder on DigitWorld: distillation from a frozen teacher, contrast with captions."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature

from vot_kernels.data.digitworld.batches import episode_batch
from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.models.checkpoint import ENCODER, PERCEPTION, checkpoint_kind, load_checkpoint
from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.encoder.modeling import VotEncoder, VotEncoderOutput
from vot_kernels.models.encoder.objectives import (
    CaptionEncoder,
    ContrastiveHead,
    TokenDistillation,
    mean_tokens,
)
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.packing import PackedLayout
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.relations import MOTIONS
from vot_kernels.train.checkpoint import fingerprint
from vot_kernels.train.config import identity
from vot_kernels.train.encoder.settings import EncoderTraining
from vot_kernels.train.estimate import Work
from vot_kernels.train.loop import (
    Measure,
    Report,
    Schedule,
    Validation,
    load_ahead,
    no_report,
    run_steps,
)
from vot_kernels.train.optimization import check_optimised, in_precision, parameter_groups
from vot_kernels.train.perception.batches import TRAIN_SIZES
from vot_kernels.train.ranks import ALONE, Ranks

_MAX_PIXELS = 96 * 96
_BALANCE_WEIGHT = 0.01
_FIT_BATCHES = 4  # steps from whose clips the teacher's mean and deviation are taken


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder.

    Attributes:
        name: a readable description.
        encoder: the encoder, whose parameters are frozen; the student is trained on its device.
    """

    name: str
    encoder: VotEncoder

    def __post_init__(self) -> None:
        self.encoder.eval().requires_grad_(False)

    @property
    def fingerprint(self) -> str:
        """Return a string that changes with the weights."""
        return fingerprint(self.encoder)


def load_teacher(folder: Path) -> Teacher:
    """Load the encoder of a perception checkpoint, or an encoder checkpoint.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: it holds one of another kind, or not all of its weights.
    """
    if checkpoint_kind(folder, PERCEPTION, ENCODER) == PERCEPTION:
        perception = load_checkpoint(VotPerceptionModel, folder)
        return Teacher(f"encoder of the perception checkpoint {folder.name}", perception.encoder)
    return Teacher(f"encoder checkpoint {folder.name}", load_checkpoint(VotEncoder, folder))


def random_features(config: VotEncoderConfig, seed: int = 0, wider: int = 2) -> Teacher:
    """Return a freshly initialised encoder, `wider` times as wide as `config`. It knows nothing about images."""
    torch.manual_seed(seed)
    wide = VotEncoderConfig(
        **{
            **config.to_dict(),
            "hidden_size": wider * config.hidden_size,
            "num_attention_heads": wider * config.num_attention_heads,
            "num_key_value_heads": wider * config.num_key_value_heads,
        }
    )
    return Teacher("random features", VotEncoder(wide))


class EncoderPretraining(nn.Module):
    """The encoder with the heads of its objectives; an objective of weight 0 has no head.

    Args:
        config: configuration of the encoder.
        teacher_width: width of the teacher's tokens.
        settings: settings of the run.
        kind: class of the encoder.
    """

    def __init__(
        self,
        config: VotEncoderConfig,
        teacher_width: int,
        settings: EncoderTraining,
        kind: type[VotEncoder] = VotEncoder,
    ):
        super().__init__()
        width = config.hidden_size
        self.encoder = kind(config)
        self.distillation = TokenDistillation(width, teacher_width) if settings.distillation else None
        self.captions: CaptionEncoder | None = None
        self.contrast: ContrastiveHead | None = None
        if settings.contrastive:
            texts, bias = settings.caption_width, -math.log(settings.part_size)
            self.captions = CaptionEncoder(texts, settings.caption_layers)
            self.contrast = ContrastiveHead(width, texts, config.projection_size, bias=bias)

    def embed(self, seen: VotEncoderOutput, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed clips and captions in the shared space, `[N, projection_size]` and `[M, projection_size]`."""
        if self.captions is None or self.contrast is None:
            raise ValueError("This model was trained without contrast and has no shared space.")
        return self.contrast(seen.pooler_output, self.captions.encode(captions))

    def distil(
        self, seen: VotEncoderOutput, teacher: Teacher, inputs: BatchFeature, ranks: Ranks = ALONE
    ) -> dict[str, Tensor]:
        """Return the distances from the teacher's tokens and from its mean token of each clip, over all `ranks`."""
        if self.distillation is None:
            raise ValueError("This model was trained without distillation and has no head for it.")
        grid = inputs["image_grid_thw"]
        tokens, pooled = teach(teacher, inputs)
        distances = self.distillation(
            seen.last_hidden_state,
            seen.pooler_output,
            tokens,
            pooled,
            self.encoder.layout(grid),
            teacher.encoder.layout(grid),
        )
        rows = {"tokens": len(tokens), "pooled": len(pooled)}
        return {name: ranks.weight(rows[name]) * distance for name, distance in distances.items()}

    def losses(
        self,
        inputs: BatchFeature,
        captions: Sequence[str],
        teacher: Teacher,
        settings: EncoderTraining,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, scalars, whose sum is minimised.

        With several ranks, `inputs` and `captions` are those of this one, and the averages of the terms are the whole
        batch's.
        """
        whole = next(self.parameters()).dtype
        with in_precision(self, settings.precision):
            found = self.encoder(**inputs)
        # The teacher and the objectives are in the precision of the weights, as the teacher's statistics are.
        seen: Any = VotEncoderOutput()
        for name in ("last_hidden_state", "pooler_output", "balance_loss"):
            seen[name] = found[name].to(whole)
        terms = {"balance": _BALANCE_WEIGHT * seen.balance_loss}
        if self.distillation is not None:
            distances = self.distil(seen, teacher, inputs, ranks)
            terms |= {f"distil_{name}": settings.distillation * d for name, d in distances.items()}
        if self.captions is not None and self.contrast is not None:
            texts = self.captions.encode(ranks.joined_texts(list(captions)))
            clips = ranks.joined(seen.pooler_output)
            terms["contrast"] = settings.contrastive * self.contrast.loss(clips, texts)
        return terms


@dataclass
class CaptionedClips:
    """Clips of mixed sizes with captions.

    Attributes:
        clips: uint8 `[T, H, W, 3]` arrays.
        fps: frame rate of all clips.
        captions: one per clip.
    """

    clips: list[np.ndarray]
    fps: float
    captions: list[str]


class CaptionBatches(Dataset[CaptionedClips]):
    """The batches of the training split by number, each a step or a part of one.

    They are the same on every machine and in every process.

    With several `ranks` an item is this rank's share of the batch.
    """

    def __init__(self, settings: EncoderTraining, ranks: Ranks = ALONE):
        self.settings, self.ranks = settings, replace(ranks, group=None)  # a worker process has no group

    def __getitem__(self, step: int) -> CaptionedClips:
        settings = self.settings
        rng = np.random.default_rng([settings.seed, step])
        sizes = [TRAIN_SIZES[rng.integers(len(TRAIN_SIZES))] for _ in range(settings.part_size)]
        # Patches have a fixed size, so pixels stand for tokens here.
        pixels = PackedLayout.from_grid_thw([[settings.num_frames, *size] for size in sizes])
        episodes = [
            generate_episode(
                "train",
                step * settings.part_size + i,
                settings.seed,
                size=sizes[i],
                num_frames=settings.num_frames,
            )
            for i in self.ranks.share(pixels)
        ]
        return captioned(episodes, settings.h264_share)

    def loader(self, start: int, stop: int) -> DataLoader[CaptionedClips]:
        """Load batches `start` … `stop - 1` in order, prepared in advance by one worker process."""
        return load_ahead(self, range(start, stop))


def captioned(episodes: Sequence[Episode], h264_share: float = 0.0) -> CaptionedClips:
    """Render and caption episodes, a share `h264_share` of which are encoded with H.264 and decoded."""
    clips = [episode_batch([episode], codec_fraction=h264_share).frames[0] for episode in episodes]
    return CaptionedClips(clips, episodes[0].scene.fps, [caption(episode.stsg) for episode in episodes])


def caption(stsg: STSG) -> str:
    """Describe a graph in one line: who is there, where each moves first, who hits whom.

    "blue digit 7 moves up, red digit 3 moves left and down; blue digit 7 hits red digit 3". Objects are in
    alphabetical order, hits in order of time, so the caption does not depend on the numbers of the tracks.
    """
    names = {tracklet.id: tracklet.name for tracklet in stsg.tracklets}
    clauses = ", ".join(sorted(f"{name}{_first_motion(stsg, track)}" for track, name in names.items()))
    hits = [" hits ".join(sorted(names[p] for p in e.participants)) for e in stsg.events if e.kind == "hits"]
    return "; ".join([clauses, *hits])


def _first_motion(stsg: STSG, track: str) -> str:
    """Return " moves left and up", or "" for what rests in the first frame."""
    first = [
        r.predicate for r in stsg.relations if r.subject == track and r.t0 == 0 and r.predicate in MOTIONS
    ]
    return " moves " + " and ".join(sorted(p.removeprefix("moves ") for p in first)) if first else ""


def train_encoder(
    out: Path,
    settings: EncoderTraining,
    config: VotEncoderConfig,
    teacher: Teacher,
    *,
    save_every: int = 100,
    stop_at: int | None = None,
    report: Report = no_report,
    kind: type[VotEncoder] = VotEncoder,
    validate: Measure | None = None,
    ranks: Ranks = ALONE,
) -> EncoderPretraining:
    """Train, or resume from the newest checkpoint under `out`; the caller saves the result.

    `kind` is the class of the encoder, and `validate` measures the model during training. See
    `vot_kernels.train.loop.run_steps` for the other options. With several `ranks` each trains on its share of every
    batch, and the weights are, up to rounding, those of one process.

    Raises:
        ValueError: the teacher has another patch size, or the checkpoint has other settings.
        RuntimeError: other parameters are trained than the stage should train.
    """
    model = build(settings, config, teacher, kind).train()
    processor = make_processor(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98)
    )

    def losses(index: int, batch: CaptionedClips) -> dict[str, Tensor]:
        inputs = processor(batch.clips, fps=batch.fps).to(teacher.encoder.device)
        return model.losses(inputs, batch.captions, teacher, settings, ranks)

    with ranks.balance(model):
        run_steps(
            out,
            model,
            optimizer,
            Schedule.of(settings),
            CaptionBatches(settings, ranks).loader,
            losses,
            signature=_signature(settings, config, teacher),
            save_every=save_every,
            stop_at=stop_at,
            report=report,
            validation=Validation(model, settings, validate),
            after_backward=lambda: assert_trainable(model, optimizer, teacher, settings),
            ranks=ranks,
        )
    return model.eval()


def build(
    settings: EncoderTraining, config: VotEncoderConfig, teacher: Teacher, kind: type[VotEncoder] = VotEncoder
) -> EncoderPretraining:
    """Return the model before its first step, on the teacher's device: random weights and the teacher's statistics."""
    if teacher.encoder.config.patch_size != config.patch_size:
        raise ValueError(
            f"The teacher's patch_size must be the student's, got {teacher.encoder.config.patch_size} "
            f"and {config.patch_size}."
        )
    torch.manual_seed(settings.seed)
    model = EncoderPretraining(config, teacher.encoder.config.hidden_size, settings, kind)
    model.to(teacher.encoder.device)
    if model.distillation is not None:
        processor, batches = make_processor(config), CaptionBatches(settings)
        seen = [
            teach(teacher, processor(batch.clips, fps=batch.fps).to(teacher.encoder.device))
            for batch in (batches[n] for n in range(_FIT_BATCHES * settings.accumulation))
        ]
        tokens, pooled = (torch.cat(parts) for parts in zip(*seen, strict=True))
        model.distillation.fit_targets(tokens, pooled)
    return model


def encoder_work(model: EncoderPretraining, settings: EncoderTraining, teacher: Teacher) -> Work:
    """Return what a step of `train_encoder` computes."""
    batch = CaptionBatches(settings)[0]
    inputs = make_processor(model.encoder.config)(batch.clips, fps=batch.fps).to(teacher.encoder.device)

    def loss() -> Tensor:
        terms = model.losses(inputs, batch.captions, teacher, settings)
        return torch.stack(list(terms.values())).sum()

    return Work(loss, settings.accumulation)


def make_processor(config: VotEncoderConfig) -> VotImageProcessor:
    """Return the processor that belongs to an encoder of this stage."""
    return VotImageProcessor(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        max_pixels=_MAX_PIXELS,
    )


@torch.no_grad()
def teach(teacher: Teacher, inputs: BatchFeature) -> tuple[Tensor, Tensor]:
    """Return the teacher's tokens `[tokens, width]` and its mean token of each clip `[clips, width]`.

    It uses the mean, because the attention pooling of a teacher may never have been trained.
    """
    tokens = teacher.encoder(**inputs).last_hidden_state
    return tokens, mean_tokens(tokens, teacher.encoder.layout(inputs["image_grid_thw"]))


def trainable_parts(settings: EncoderTraining) -> tuple[str, ...]:
    """Return the parts of `EncoderPretraining` that the stage trains; each is trained completely."""
    distillation = ("distillation",) if settings.distillation else ()
    contrast = ("captions", "contrast") if settings.contrastive else ()
    return ("encoder", *distillation, *contrast)


def assert_trainable(
    model: EncoderPretraining,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher,
    settings: EncoderTraining,
) -> None:
    """Check after a backward pass that exactly what the stage trains has a gradient and is optimised.

    Raises:
        RuntimeError: it is not so; the message names the first parameters that differ.
    """
    parts = trainable_parts(settings)
    wanted = {f"{part}.{n}" for part in parts for n, _ in model.get_submodule(part).named_parameters()}
    parameters = dict(model.named_parameters()) | {
        f"teacher.{name}": p for name, p in teacher.encoder.named_parameters()
    }
    check_optimised(parameters, wanted, optimizer, ", ".join(parts))


def _signature(settings: EncoderTraining, config: VotEncoderConfig, teacher: Teacher) -> dict[str, Any]:
    """Return what must be equal for a run to be resumed."""
    fields = set(inspect.signature(VotEncoderConfig.__init__).parameters) - {"self", "kwargs"}
    known = {"teacher": teacher.name, "teacher_fingerprint": teacher.fingerprint}
    return identity(settings) | known | {f"encoder.{name}": getattr(config, name) for name in sorted(fields)}
