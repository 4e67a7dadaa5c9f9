"""Training state on disk: one folder per checkpoint, complete or absent, safetensors and JSON only."""

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vot_kernels.models.checkpoint import weights_file

_PREFIX = "checkpoint-"


def save_state(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    further: Mapping[str, str] | None = None,
) -> Path:
    """Write `out/checkpoint-<step>`, then delete older checkpoints. A killed run leaves the older one whole.

    `further` are the texts of further files by their names.
    """
    target = out / f"{_PREFIX}{step}"
    draft = out / f".{target.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, draft / "model.safetensors")
    save_file(_flatten(optimizer), draft / "optimizer.safetensors")
    (draft / "state.json").write_text(json.dumps({"step": step, "settings": settings}, indent=1))
    for name, text in (further or {}).items():
        (draft / name).write_text(text, encoding="utf-8")
    if target.exists():
        shutil.rmtree(target)
    draft.rename(target)
    for other in _checkpoints(out):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def load_state(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> int:
    """Restore the newest checkpoint under `out`; return its step, or 0 if there is none.

    Raises:
        ValueError: the checkpoint was made with other settings, which the message names.
    """
    folder = newest_checkpoint(out)
    if folder is None:
        return 0
    state = json.loads((folder / "state.json").read_text())
    saved = state["settings"]
    settings = json.loads(json.dumps(settings))  # JSON has lists for tuples, and keys are texts
    differing = sorted(key for key in saved.keys() | settings.keys() if saved.get(key) != settings.get(key))
    if differing:
        changes = ", ".join(f"{key} was {saved.get(key)}, now {settings.get(key)}" for key in differing)
        raise ValueError(f"{folder} cannot be resumed with other settings: {changes}.")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    _unflatten(optimizer, load_file(folder / "optimizer.safetensors"))
    return int(state["step"])


@contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty draft folder; on success it replaces `folder`, whose old contents are kept aside.

    On failure the draft is deleted and `folder` stays as it was.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for file in draft.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.{int(time.time())}.old"))
    draft.rename(folder)


def fingerprint(model: nn.Module) -> str:
    """Return a string that changes with the weights, and with nothing else."""
    return _checksum(model.state_dict().values())


def folder_fingerprint(folder: Path) -> str:
    """Return a string that changes with the weights or adapters in a checkpoint's folder, whose model is not made for
    it."""
    return _checksum(load_file(weights_file(folder)).values())


def _checksum(tensors: Iterable[Tensor]) -> str:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.cpu().contiguous().float().numpy().tobytes(), total)
    return f"{total:08x}"


def newest_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint under `out`, None if there is none."""
    return next(reversed(_checkpoints(out)), None)


def _checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = [p for p in out.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.contiguous()
        for index, entry in state.items()
        for name, value in entry.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
