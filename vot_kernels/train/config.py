"""Settings of the stages: dataclasses whose fields say what they mean, and their YAML files."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from vot_kernels.extras import imports_for
from vot_kernels.files import read_text

Settings = TypeVar("Settings")
_WATCHING = ("validate_every", "validation_clips")
_KINDS = {int: "a whole number", float: "a number", str: "a text"}


def setting(
    default: Any,
    meaning: str | None = None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """Return a field of a settings dataclass with its default, what it means, in one sentence, and its bounds.

    What is not given is that of the field that this one repeats. Numbers are finite, except where `most` is infinity.
    """
    given = {"meaning": meaning, "least": least, "above": above, "most": most}
    return dataclasses.field(
        default=default, metadata={name: value for name, value in given.items() if value is not None}
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """What stages have in common; two runs with equal settings give equal weights on one machine.

    A stage repeats a field to give it another default, and its meaning where that is another one, too.
    """

    item_name: ClassVar[str] = "clips"
    """What messages call the items of a step."""

    steps: int = setting(1000, "Optimiser steps.", least=1)
    batch_size: int = setting(4, "Clips per step.", least=1)
    learning_rate: float = setting(
        2e-3,
        "Peak learning rate, reached after the warmup, from which it falls to 0 along half a cosine.",
        least=0,
    )
    warmup: int = setting(50, "Steps in which the learning rate rises.", least=0)
    weight_decay: float = setting(0.02, "Weight decay of AdamW, on matrices alone.", least=0)
    clip: float = setting(1.0, "Largest gradient norm; inf clips nothing.", above=0, most=math.inf)
    seed: int = setting(0, "Seed of weights and data.", least=0)
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "Numbers of matrix products in training; weights stay in float32."
    )
    accumulation: int = setting(1, "Parts into which a step is cut, to save memory.", least=1)
    validate_every: int = setting(0, "Steps between two measurements of held-out clips; 0 is never.", least=0)
    validation_clips: int = setting(16, "Held-out clips in each of these measurements.", least=1)

    def __post_init__(self) -> None:
        """Refuse settings out of their bounds.

        Raises:
            ValueError: one is.
        """
        check_bounds(self)
        if self.items % self.accumulation:
            raise ValueError(
                f"accumulation must divide the {self.items} {self.item_name} of a step, got {self.accumulation}."
            )

    @property
    def items(self) -> int:
        """How many items a step has, which accumulation divides."""
        return self.batch_size

    @property
    def part_size(self) -> int:
        """How many of them each part of a step has."""
        return self.items // self.accumulation


def meanings(settings: type) -> dict[str, str]:
    """Return what each field of a settings dataclass means, in their order."""
    return {name: known["meaning"] for name, known in _metadata(settings).items()}


def check_bounds(settings: Any) -> None:
    """Refuse numbers of a settings dataclass that are out of the bounds of their fields.

    Raises:
        ValueError: one is, or is not a number at all.
    """
    for name, known in _metadata(type(settings)).items():
        value, least, above, most = (getattr(settings, name), *map(known.get, ("least", "above", "most")))
        if isinstance(value, float) and not math.isfinite(value) and value != most:
            raise ValueError(f"{name} must be a number, got {value}.")
        if least is not None and most is not None and not least <= value <= most:
            raise ValueError(f"{name} must lie between {least} and {most}, got {value}.")
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
        if above is not None and value <= above:
            raise ValueError(f"{name} must be more than {above}, got {value}.")


def identity(settings: Any) -> dict[str, Any]:
    """Return the settings on which the weights depend: two runs with equal ones are the same run."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in _WATCHING}


def _metadata(settings: type) -> dict[str, dict[str, Any]]:
    """Return what is said of each field of a settings dataclass, in their order; what is not said is inherited."""
    found: dict[str, dict[str, Any]] = {}
    for base in reversed(settings.__mro__):
        for name, field in getattr(base, "__dataclass_fields__", {}).items():
            found[name] = found.get(name, {}) | dict(field.metadata)
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
        read = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
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
