"""Supervised training of parts of the video-language model on conversations."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vot_kernels.integrations.patching import patch, patched, unpatch
from vot_kernels.models.vot import VotProcessor
from vot_kernels.train.checkpoint import fingerprint
from vot_kernels.train.config import identity
from vot_kernels.train.estimate import Work
from vot_kernels.train.loop import Measure, Report, Schedule, Validation, no_report, run_steps
from vot_kernels.train.optimization import in_precision, parameter_groups
from vot_kernels.train.ranks import ALONE, Ranks
from vot_kernels.train.vlm.conversations import ConversationBatches, Speaker
from vot_kernels.train.vlm.model import check_trained, train_only

Batches = Callable[..., ConversationBatches]
"""Makes the batches for a processor, a speaker, a seed, a batch size, and by the name `ranks` the ranks."""


def train_parts(
    out: Path,
    model: nn.Module,
    processor: VotProcessor,
    settings: Any,
    *,
    speak: Speaker,
    batches: Batches = ConversationBatches,
    save_every: int = 100,
    stop_at: int | None = None,
    report: Report = no_report,
    validate: Measure | None = None,
    ranks: Ranks = ALONE,
) -> int:
    """Train exactly the settings' parts of the model in place, or resume; return the number of steps done.

    Args:
        out: folder of the checkpoints, which hold the trained parameters alone.
        model: the video-language model, on its device; its other parameters stay as they are.
        processor: of the model.
        settings: those of `Training`, with parts, as `train_only` takes them.
        speak: makes the conversations.
        batches: makes what is learned from; by default from DigitWorld.
        save_every, stop_at, report: as in `run_steps`.
        validate: measures the model during training.
        ranks: the processes that train together, each on its share of every batch; losses and weights are, up to
            rounding, those of one process.

    Raises:
        ValueError: a checkpoint in `out` has other settings or began with other weights.
        RuntimeError: other parameters than those of the parts are trained.
    """
    parts = settings.parts
    data = batches(processor, speak, settings.seed, settings.part_size, ranks=ranks)
    start = fingerprint(model)
    trained = train_only(model, parts)
    groups = parameter_groups(trained, settings.weight_decay, undecayed=("embed_tokens",))
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    model.train()

    def loss_terms(index: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        check_trained(model, parts)
        return {"reply": _loss(model, batch, settings.precision)}

    with patched(model):
        done = run_steps(
            out,
            trained,
            optimizer,
            Schedule.of(settings),
            data.loader,
            loss_terms,
            signature={**identity(settings), **data.signature, "start": start},
            rows=_learnt,
            validation=Validation(model, settings, validate and partial(_unpatched, validate)),
            save_every=save_every,
            stop_at=stop_at,
            report=report,
            ranks=ranks,
        )
    model.eval()
    return done


def _unpatched(measure: Measure, model: nn.Module, clips: int) -> Mapping[str, float]:
    """Measure a patched model as it is before and after training."""
    unpatch(model)
    try:
        return measure(model, clips)
    finally:
        patch(model)


def conversation_work(
    model: nn.Module,
    processor: VotProcessor,
    settings: Any,
    speak: Speaker,
    batches: Batches = ConversationBatches,
) -> Work:
    """Return what a step of `train_parts` computes."""
    device = next(model.parameters()).device
    first = batches(processor, speak, settings.seed, settings.part_size)[0]
    batch = {name: value.to(device) for name, value in first.items()}

    def loss() -> Tensor:
        with patched(model):
            return _loss(model, batch, settings.precision)

    return Work(loss, settings.accumulation)


@torch.no_grad()
def nats_per_token(model: nn.Module, batches: ConversationBatches, clips: int) -> float:
    """Return the mean negative log-likelihood of the replies about the first `clips`, in nats per token."""
    total, tokens = 0.0, 0
    with patched(model):
        for batch in batches.first(clips):
            learnt = _learnt(batch)
            total += learnt * _loss(model, batch).item()
            tokens += learnt
    return total / tokens


def _learnt(batch: dict[str, Tensor]) -> int:
    """Return how many tokens of a batch are learnt."""
    return int((batch["labels"][:, 1:] >= 0).sum())


def _loss(model: nn.Module, batch: dict[str, Tensor], precision: str = "float32") -> Tensor:
    """Return the mean loss of the learnt tokens of a packed batch.

    Without a cache, transformers and the kernels tell its conversations apart. Logits are computed where they are
    learnt, which is a third of the tokens.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    following = inputs.pop("labels")[0, 1:]
    learnt = (following >= 0).nonzero().flatten()
    with in_precision(model, precision):
        logits = model(**inputs, use_cache=False, logits_to_keep=learnt).logits
    return nn.functional.cross_entropy(logits[0].float(), following[learnt])
