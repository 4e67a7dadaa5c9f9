"""Checkpoint folders: their kind, found without importing a model, and loading them completely."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_BUNDLED = Path(__file__).parent.parent / "checkpoints"
BUNDLED_CHECKPOINT = _BUNDLED / "digitworld-nano"
"""The perception checkpoint that ships with the package: it knows DigitWorld and nothing else."""
BUNDLED_READER = _BUNDLED / "digitworld-reader"
"""The video-language checkpoint that ships with the package: it reads scene graphs of DigitWorld and nothing else."""
BUNDLED_ADAPTERS = _BUNDLED / "digitworld-smollm2"
"""The adapters that ship with the package: with them SmolLM2-135M-Instruct, which is fetched, reads such graphs."""
PERCEPTION, ENCODER, VLM = "vot_perception", "vot_encoder", "vot"
_NAMES = {
    PERCEPTION: "a perception checkpoint",
    ENCODER: "an encoder checkpoint",
    VLM: "a video-language checkpoint",
}
_WEIGHTS = ("model.safetensors", "adapters.safetensors")
"""A checkpoint has one of these; adapters are joined with a model that others publish."""

Model = TypeVar("Model", bound="PreTrainedModel")
Module = TypeVar("Module", bound="nn.Module")


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint: `path`, or where nothing is there, the one of that name in the package."""
    given = Path(path)
    bundled = _BUNDLED / given.name
    return bundled if given.parts == (given.name,) and not given.exists() and bundled.is_dir() else given


def checkpoint_name(folder: str) -> str:
    """Return what `find_checkpoint` finds a folder by, on any machine: the name of one of the package, else itself."""
    return Path(folder).name if Path(folder).parent == _BUNDLED else folder


def checkpoint_kind(folder: str | os.PathLike[str], *allowed: str) -> str:
    """Return the kind of checkpoint in a folder, one of `allowed`: `PERCEPTION`, `ENCODER`, `VLM`.

    Raises:
        FileNotFoundError: the folder lacks a file that every checkpoint has.
        ValueError: config.json is not JSON, or names another kind of model.
    """
    wanted = " or ".join(_NAMES[kind] for kind in allowed)
    kind = _entry(folder, "model_type", wanted)
    if kind not in allowed:
        what = _NAMES.get(str(kind), f"a model of the type {kind!r}")
        raise ValueError(f"{folder} must be {wanted}, but its config.json says that it is {what}.")
    return str(kind)


def is_own_model(path: str | os.PathLike[str]) -> bool:
    """Whether the config.json in a folder, or in that of such a name in the package, is of a model of this package."""
    try:
        return str(read_config(find_checkpoint(path)).get("model_type")) in _NAMES
    except (OSError, ValueError, AttributeError):  # what is wrong with it is found when it is loaded
        return False


def check_reward_model(folder: str | os.PathLike[str]) -> None:
    """Check that a folder holds a language model with one score as its output.

    Raises:
        FileNotFoundError: the folder lacks a file that every checkpoint has.
        ValueError: config.json is not JSON, or names another kind of model.
    """
    wanted = "a reward model, of the stage preference"
    names = _entry(folder, "architectures", wanted) or []
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        raise ValueError(f"{folder} must be {wanted}, but its config.json says that it is {names}.")


def _entry(folder: str | os.PathLike[str], name: str, wanted: str) -> Any:
    """Return an entry of config.json in a folder that should be `wanted`."""
    files = {file for file in ("config.json", *_WEIGHTS) if (Path(folder) / file).is_file()}
    if "config.json" not in files or not files & {*_WEIGHTS}:
        missing = "config.json" if "config.json" not in files else _WEIGHTS[0]
        raise FileNotFoundError(f"{folder} is not {wanted}: it has no {missing}.")
    try:
        return read_config(folder).get(name)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        raise ValueError(f"{folder} is not {wanted}: its config.json is not a JSON object.") from None


def weights_file(folder: Path) -> Path:
    """Return the file with the weights, or the adapters, of a checkpoint."""
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), folder / _WEIGHTS[0])


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of config.json."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def load_checkpoint(model: type[Model], folder: str | os.PathLike[str]) -> Model:
    """Load the model of a folder in float32, for inference. Unlike `from_pretrained`, it refuses to fill in any
    weights.

    Raises:
        FileNotFoundError: the folder lacks a file that every checkpoint has.
        ValueError: it is another kind of checkpoint, its weights cannot be read, or some are missing, unexpected
            or of another shape.
    """
    import torch
    from transformers.utils import logging

    checkpoint_kind(folder, str(getattr(model.config_class, "model_type", None)))
    loud = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it reports about weights is in the error
    try:
        result: Any = model.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # transformers and safetensors raise many types for many broken files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(loud)
    loaded, report = result
    problems = {
        "lacks": report["missing_keys"],
        "has too many": report["unexpected_keys"],
        "has in another shape": [key for key, *_ in report["mismatched_keys"]],
    }
    said = [f"{what} {_listed(sorted(keys))}" for what, keys in problems.items() if keys]
    if said:
        raise ValueError(
            f"{folder} does not have the weights that its config.json describes: it {'; '.join(said)}."
        )
    return loaded.eval()


def on_device(model: Module, device: str) -> Module:
    """Move the model to `device` and return it.

    Raises:
        ValueError: torch cannot use the device.
    """
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"The device '{device}' cannot be used: {reason}") from error


def _listed(keys: list[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
