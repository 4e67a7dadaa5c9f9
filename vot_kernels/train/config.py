"""Settings of the stages: dataclasses whose fields say what they mean, and their YAML files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from vot_kernels.extras import imports_for

Settings = TypeVar("Settings")
_KINDS = {int: "a whole number", float: "a number", str: "a text"}


def setting(default: Any, meaning: str) -> Any:
    """Return a field of a settings dataclass with its default and what it means, in one sentence."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Training:
    """What stages have in common; two runs with equal settings give equal weights on one machine.

    A stage repeats a field to give it another default, and its meaning where that is another one, too.
    """

    steps: int = setting(1000, "Optimiser steps.")
    batch_size: int = setting(4, "Clips per step.")
    learning_rate: float = setting(
        2e-3, "Peak learning rate, reached after the warmup, from which it falls to 0 along half a cosine."
    )
    warmup: int = setting(50, "Steps in which the learning rate rises.")
    weight_decay: float = setting(0.02, "Weight decay of AdamW, on matrices alone.")
    clip: float = setting(1.0, "Largest gradient norm.")
    seed: int = setting(0, "Seed of weights and data.")


@dataclasses.dataclass(frozen=True)
class VlmTraining(Training):
    """What the stages of the video-language model have in common."""

    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "Numbers of matrix products in training; weights stay in float32."
    )


def meanings(settings: type) -> dict[str, str]:
    """Return what each field of a settings dataclass means, in their order; a field without a meaning inherits it."""
    found: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        for name, field in getattr(base, "__dataclass_fields__", {}).items():
            found[name] = field.metadata.get("meaning", found.get(name))
    return {field.name: found[field.name] for field in dataclasses.fields(settings)}


def read_settings(settings: type[Settings], file: Path | None, given: Mapping[str, Any]) -> Settings:
    """Return the settings of a YAML file, except those in `given`, which win; the rest have their defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, has a setting that the stage lacks or of another type, or `settings` refuses one.
    """
    read = {} if file is None else _read(settings, file)
    return settings(**{**read, **given})


def _read(settings: type, file: Path) -> dict[str, Any]:
    with imports_for("A recipe", "train"):
        import yaml
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(read, dict):
        raise ValueError(f"{file} must hold lines of `setting: value`, got {type(read).__name__}.")
    hints, names = get_type_hints(settings), list(meanings(settings))
    for name in read:
        if name not in names:
            raise ValueError(
                f"{file}: {name!r} is not a setting of this stage; these are: {', '.join(names)}."
            )
    return {name: _checked(f"{file}: {name}", value, hints[name]) for name, value in read.items()}


def _checked(where: str, value: Any, hint: Any) -> Any:
    """Return a value of YAML as one of the hinted type."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} must be {' or '.join(map(str, get_args(hint)))}, got {value!r}.")
        return value
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-4 for a text
        except ValueError:
            pass
    if not isinstance(value, hint) or isinstance(value, bool):
        raise ValueError(f"{where} must be {_KINDS[hint]}, got {value!r}.")
    return value


def recipe_text(stage: str, settings: type) -> str:
    """Return a YAML file with the defaults of a stage, each after a comment that says what it means."""
    lines = [f"# Settings of `vot train {stage} --config FILE`; options of the command win over the file."]
    for name, meaning in meanings(settings).items():
        lines += ["", f"# {meaning}", f"{name}: {getattr(settings, name)}"]
    return "\n".join(lines) + "\n"
