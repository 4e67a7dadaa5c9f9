"""What each rank runs for test_training.py: a stage over ranks beside the same stage in one process."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.data import Dataset
from transformers import BatchFeature

from tests.distributed.ranks import given_by_first, shared_folder
from tests.models.vot.tiny import tiny_config, tiny_tokenizer
from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.vot import VotForConditionalGeneration, VotProcessor
from vot_kernels.nn import AutonomyOfExperts
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import shifted
from vot_kernels.train.encoder.settings import EncoderTraining
from vot_kernels.train.encoder.stage import CaptionBatches, EncoderPretraining, random_features, train_encoder
from vot_kernels.train.linearize import linearize
from vot_kernels.train.linearize import run as linearization
from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.perception import run as perception_run
from vot_kernels.train.perception import stage as perception
from vot_kernels.train.perception.batches import Batch, TrainingBatches, digitworld_config
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.perception.stage import make_processor
from vot_kernels.train.projector.settings import ProjectorTraining
from vot_kernels.train.projector.stage import train_projector
from vot_kernels.train.ranks import ALONE, Ranks
from vot_kernels.train.vlm.conversations import ConversationBatches

CONFIG = VotEncoderConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=96,
    patch_size=16,
    expert_rank=16,
    full_attention_every=2,
    projection_size=64,
)
# Clips of mixed sizes that the ranks cannot share evenly.
SETTINGS = EncoderTraining(
    steps=3, batch_size=7, num_frames=2, warmup=2, caption_width=16, caption_layers=1, h264_share=0.25
)
STEPS = {"both": {}, "distillation": {"contrastive": 0.0}, "contrast": {"distillation": 0.0}}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "expert_rank": 8,
}
Losses = list[dict[str, float]]


def _in_process(batches: Dataset, start: int, stop: int) -> Iterator[object]:
    """Make batches without a worker, which the processes of the tests may not have."""
    return (batches[step] for step in range(start, stop))


def ranks_of(group: ProcessGroup) -> Ranks:
    return Ranks(dist.get_rank(group), dist.get_world_size(group), group)


def trained(
    out: Path, settings: EncoderTraining, ranks: Ranks, stop_at: int | None = None
) -> tuple[EncoderPretraining, list[dict[str, float]]]:
    """Train in float64; return the model and the terms of each step that was reported."""
    torch.set_default_dtype(torch.float64)
    try:
        seen: list[dict[str, float]] = []
        teacher = random_features(CONFIG, seed=1)
        with mock.patch.object(CaptionBatches, "loader", _in_process):
            model = train_encoder(
                out,
                settings,
                CONFIG,
                teacher,
                ranks=ranks,
                stop_at=stop_at,
                report=lambda step, t: seen.append(t),
            )
        return model, seen
    finally:
        torch.set_default_dtype(torch.float32)


def equals_one_process(group: ProcessGroup, **options: float) -> None:
    settings, ranks = dataclasses.replace(SETTINGS, **options), ranks_of(group)
    model, seen = trained(shared_folder(group), settings, ranks)
    alone, wanted = given_by_first(group, lambda: trained(Path(tempfile.mkdtemp()), settings, ALONE))
    assert all(layer.spread is None for layer in model.modules() if isinstance(layer, AutonomyOfExperts))
    assert_same_weights(model, alone, settings.learning_rate)
    assert len(wanted) == settings.steps
    assert_same_losses(seen, wanted if ranks.first else [])


def assert_same_weights(found: nn.Module, wanted: nn.Module, learning_rate: float) -> None:
    """Compare parameters; Adam's step has one length, also where a gradient is but rounding."""
    for (name, value), true in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(
            value, true, rtol=0, atol=0.02 * learning_rate, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_same_losses(found: Losses, wanted: Losses) -> None:
    """Compare the terms of every step."""
    for step, (terms, true) in enumerate(zip(found, wanted, strict=True)):
        assert terms.keys() == true.keys()
        for name, value in true.items():
            assert abs(terms[name] - value) <= 1e-6 * max(1.0, abs(value)), (step, name, terms[name], value)


def language_model_equals_one_process(group: ProcessGroup) -> None:
    """Conversations about clips, graphs or both, in float64; in a step a rank may have no clip, or no graph."""
    torch.set_default_dtype(torch.float64)
    try:
        settings, ranks = ProjectorTraining(steps=3, batch_size=5, warmup=1), ranks_of(group)
        model, seen = spoken(shared_folder(group), settings, ranks)
        alone, wanted = given_by_first(group, lambda: spoken(Path(tempfile.mkdtemp()), settings, ALONE))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_weights(model, alone, settings.learning_rate)
    assert len(wanted) == settings.steps
    assert_same_losses(seen, wanted if ranks.first else [])


def spoken(out: Path, settings: ProjectorTraining, ranks: Ranks) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a tiny video-language model; return it and the terms of each step that was reported."""
    torch.manual_seed(1)
    config, seen = tiny_config(), []
    model = VotForConditionalGeneration(config).double()
    processor = VotProcessor.for_model(config, tiny_tokenizer())
    with mock.patch.object(ConversationBatches, "loader", _in_process):
        train_projector(
            out, model, processor, settings, ranks=ranks, report=lambda step, terms: seen.append(terms)
        )
    return model, seen


def perception_equals_one_process(group: ProcessGroup) -> None:
    """The three stages, which the ranks leave and resume in each; in float64."""
    ranks, folder, seen = ranks_of(group), shared_folder(group), []
    settings = PerceptionTraining(
        steps=3, batch_size=4, num_frames=3, warmup=2, dynamics_steps=2, name_steps=2
    )
    torch.set_default_dtype(torch.float64)
    try:
        for stop_at in (2, 4, 6, None):
            model = perceiving(folder, settings, ranks, seen, stop_at)
            dist.barrier(group)
        wanted: Losses = []
        alone, wanted = given_by_first(
            group, lambda: (perceiving(Path(tempfile.mkdtemp()), settings, ALONE, wanted), wanted)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_weights(model, alone, settings.learning_rate)
    for name in ("domain_mean", "domain_precision", "domain_threshold"):
        torch.testing.assert_close(getattr(model, name), getattr(alone, name), rtol=1e-4, atol=1e-4)
    assert len(wanted) == 7
    assert_same_losses(seen, wanted if ranks.first else [])


def _in_float64(model: VotPerceptionModel) -> Callable[..., BatchFeature]:
    """Return the model's processor with pixels in float64, which the head reads as they are."""
    processor = make_processor(model)

    def process(clips: list[np.ndarray], fps: float) -> BatchFeature:
        inputs = processor(clips, fps=fps)
        return BatchFeature({**inputs, "pixel_values": inputs["pixel_values"].double()})

    return process


def perceiving(
    out: Path, settings: PerceptionTraining, ranks: Ranks, seen: Losses, stop_at: int | None = None
) -> VotPerceptionModel:
    """Train a tiny perception model, and add the terms of each step that is reported to `seen`."""
    with (
        mock.patch.object(TrainingBatches, "loader", _in_process),
        mock.patch.multiple(perception, _DYNAMICS_BATCH=5, _DOMAIN_STEPS=3, _DOMAIN_HELD_OUT=1),
        mock.patch.object(perception, "make_processor", _in_float64),
    ):
        return perception.train_perception(
            out,
            settings,
            config=digitworld_config(**SMALL),
            ranks=ranks,
            stop_at=stop_at,
            report=lambda step, terms: seen.append(terms),
        )


def linearization_equals_one_process(group: ProcessGroup) -> None:
    """Losses, weights and the errors of layers, in float64."""
    ranks = ranks_of(group)
    settings = Linearization(layer_steps=2, steps=2, warmup=1, learning_rate=1e-3)
    torch.set_default_dtype(torch.float64)
    try:
        model, errors, seen = linearized(shared_folder(group), settings, ranks)
        alone, true_errors, wanted = given_by_first(
            group, lambda: linearized(Path(tempfile.mkdtemp()), settings, ALONE)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_weights(model, alone, settings.learning_rate)
    assert len(wanted) == 4 and errors.keys() == true_errors.keys()
    assert_same_losses(list(errors.values()), list(true_errors.values()))
    assert_same_losses(seen, wanted if ranks.first else [])


def linearized(
    out: Path, settings: Linearization, ranks: Ranks
) -> tuple[nn.Module, dict[str, dict[str, float]], Losses]:
    """Linearize a tiny encoder; return it, the errors of its layers and the terms of each step."""
    torch.manual_seed(1)
    teacher = VotPerceptionModel(digitworld_config("softmax", **SMALL)).eval().requires_grad_(False)
    student, seen = linearization.convert(teacher, 0).eval(), []
    processor, data = make_processor(teacher), TrainingBatches(1, 4, num_frames=3, ranks=ranks)

    def outputs(model: VotPerceptionModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        found = model.encoder(**processor(list(batch.clips), fps=batch.fps))
        return found.last_hidden_state, found.pooler_output

    errors = linearize(
        out,
        teacher,
        student,
        [f"encoder.blocks.{n}.attention" for n in range(2)],
        partial(_in_process, data),
        outputs,
        settings,
        report=lambda step, terms: seen.append(terms),
        ranks=ranks,
    )
    return student, errors, seen


def first_rank_publishes(group: ProcessGroup) -> None:
    """The commands perception and linearize, one after the other."""
    ranks, folder = ranks_of(group), shared_folder(group)
    seeing, linear = folder / "perception", folder / "linearize"
    settings = PerceptionTraining(
        steps=1,
        batch_size=ranks.size,
        num_frames=2,
        dynamics_steps=1,
        name_steps=1,
        attention="softmax",
    )
    with (
        mock.patch.object(TrainingBatches, "loader", _in_process),
        mock.patch.multiple(perception, _DOMAIN_STEPS=3, _DOMAIN_HELD_OUT=1),
        mock.patch.object(linearization, "_BATCH", ranks.size),
    ):
        table = perception_run.run(seeing, settings, eval_clips=1, ranks=ranks)
        assert ("five_objects" in table) == ranks.first
        dist.barrier(group)
        steps = Linearization(layer_steps=1, steps=1)
        table = linearization.run(linear, seeing / "model", steps, eval_clips=1, ranks=ranks)
        assert ("layer by layer" in table) == ranks.first
        dist.barrier(group)
    for out in (seeing, linear):
        record = json.loads((out / "model" / "training.json").read_text())
        assert record["processes"] == ranks.size
        assert not list(out.glob("model.*.old"))  # which a second writer would leave


def resumes_together(group: ProcessGroup) -> None:
    ranks, folder = ranks_of(group), shared_folder(group)
    trained(folder, SETTINGS, ranks, stop_at=1)
    dist.barrier(group)
    model, seen = trained(folder, SETTINGS, ranks)
    straight, wanted = trained(shared_folder(group), SETTINGS, ranks)
    assert seen == wanted[1:]
    for found, true in zip(model.state_dict().values(), straight.state_dict().values(), strict=True):
        assert torch.equal(found, true)


def too_few_clips(group: ProcessGroup) -> None:
    ranks = ranks_of(group)
    try:
        ranks.share(PackedLayout.from_lengths([5] * (ranks.size - 1)))
    except ValueError as error:
        assert f"at least one clip for each of the {ranks.size} processes, got {ranks.size - 1}" in str(error)
    else:
        raise AssertionError("a batch of fewer clips than ranks was shared")
    try:
        TrainingBatches(0, ranks.size - 1, ranks=ranks)
    except ValueError as error:
        assert f"got {ranks.size - 1}" in str(error)
    else:
        raise AssertionError("a batch of fewer clips than ranks was divided")


def balances_over_all_tokens(group: ProcessGroup) -> None:
    """Load, balance loss and its gradient are those of all tokens in one process."""
    torch.manual_seed(shifted(0))
    ranks = ranks_of(group)
    layer = AutonomyOfExperts(16, num_experts=4, top_k=2, hidden=8).double()
    counts = [3, 0, 6][: ranks.size]
    tokens = torch.randn(sum(counts), 16, dtype=torch.float64).split(counts)
    _, whole = layer(torch.cat(tokens), return_aux=True)
    (wanted,) = torch.autograd.grad(whole.balance_loss, layer.w_down)
    with ranks.balance(layer):
        _, aux = layer(tokens[ranks.rank], return_aux=True)
        aux.balance_loss.backward()
    ranks.average_gradients([layer.w_down])
    torch.testing.assert_close(aux.load, whole.load)
    torch.testing.assert_close(aux.balance_loss, whole.balance_loss)
    torch.testing.assert_close(layer.w_down.grad, wanted)


def joins_rows_and_texts(group: ProcessGroup) -> None:
    """A loss of all rows, taken on every rank, has the gradient of one process."""
    torch.manual_seed(shifted(1))
    ranks = ranks_of(group)
    linear = nn.Linear(4, 3).double()
    rows = torch.randn(9, 4, dtype=torch.float64).split([4, 3, 2][: ranks.size])

    def loss(whole: torch.Tensor) -> torch.Tensor:
        return (whole @ whole.T).tanh().sum()

    wanted = torch.autograd.grad(loss(linear(torch.cat(rows))), linear.weight)[0]
    whole = ranks.joined(linear(rows[ranks.rank]))
    torch.testing.assert_close(whole, linear(torch.cat(rows)))
    loss(whole).backward()
    ranks.average_gradients(linear.parameters())
    torch.testing.assert_close(linear.weight.grad, wanted)
    assert ranks.joined_texts([str(ranks.rank)] * ranks.rank) == [
        str(n) for n in range(ranks.size) for _ in range(n)
    ]


CASES: dict[str, Callable[[ProcessGroup], None]] = {
    **{f"encoder_{name}": partial(equals_one_process, **options) for name, options in STEPS.items()},
    "language_model": language_model_equals_one_process,
    "perception": perception_equals_one_process,
    "linearization": linearization_equals_one_process,
    "first_rank_publishes": first_rank_publishes,
    "resumes_together": resumes_together,
    "too_few_clips": too_few_clips,
    "balances_over_all_tokens": balances_over_all_tokens,
    "joins_rows_and_texts": joins_rows_and_texts,
}
