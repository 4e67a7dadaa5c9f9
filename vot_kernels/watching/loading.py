"""Models of transformers from local folders: safetensors alone, no code from the folder, our kernels where they fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vot_kernels.extras import imports_for, require
from vot_kernels.reasoning.llm import LanguageModelError, check_model_folder, quiet_transformers
from vot_kernels.watching.protocols import WINDOW

if TYPE_CHECKING:
    from vot_kernels.watching.kernels import Kernels
    from vot_kernels.watching.video_language import VideoLanguageModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class Loaded(NamedTuple):
    """A model from a folder.

    Attributes:
        model: in evaluation mode, on its device.
        processor: what was saved with it.
        kernels: runs it, and tells what of it is on this package.
    """

    model: Any
    processor: Any
    kernels: Kernels


def check_dtype(name: str) -> None:
    """Refuse what is not in `DTYPES`.

    Raises:
        ValueError: it is not.
    """
    if name not in DTYPES:
        raise ValueError(f"A dtype must be one of {', '.join(DTYPES)}, got {name!r}.")


def check_video_language_folder(path: str | os.PathLike[str]) -> None:
    """Refuse, without importing a model, a folder that cannot hold a video-language model and its processor.

    Raises:
        LanguageModelError: it holds no model in safetensors, or no processor.
        ImportError: its video processor needs a package that is not installed.
    """
    folder = Path(path)
    check_model_folder(folder)
    found = [name for name in _PROCESSOR_FILES if (folder / name).is_file()]
    if not found:
        raise LanguageModelError(
            f"'{folder}' has no processor for videos or images ({', '.join(_PROCESSOR_FILES)}); "
            "pass a model that reads text alone with --llm."
        )
    if any(_read_json(folder / name).get("video_processor") for name in found) or found[-1].startswith(
        "video"
    ):
        require("A model for videos", "vlm")


def check_detector_folder(path: str | os.PathLike[str]) -> None:
    """Refuse, without importing a model, a folder that cannot hold a detector and its processor.

    Raises:
        LanguageModelError: it holds no model in safetensors, or no processor for images.
    """
    folder = Path(path)
    check_model_folder(folder)
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise LanguageModelError(f"'{folder}' has no processor for images (preprocessor_config.json).")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LanguageModelError(f"'{path}' cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def load_video_language_model(
    path: str | os.PathLike[str], device: str = "cpu", dtype: str = "auto", max_frames: int = WINDOW
) -> VideoLanguageModel:
    """Load a local image- or video-text-to-text model of transformers, on the kernels of this package.

    Args:
        path: a folder with config.json, safetensors, a processor and its chat template.
        device: where it runs.
        dtype: of the weights, one of `DTYPES`; "auto" is that of the files.
        max_frames: most frames that it is shown at once.

    Raises:
        LanguageModelError: the folder does not hold such a model.
        ValueError: an unknown dtype.
        ImportError: its video processor needs a package that is not installed.
    """
    check_dtype(dtype)
    check_video_language_folder(path)
    with imports_for("A video-language model", "llm"):
        import transformers  # noqa: F401
    from vot_kernels.watching.video_language import VideoLanguageModel

    folder = Path(path).expanduser()
    loaded = load_patched(folder, device, dtype, _video_language_classes)
    name = folder.resolve().name
    return VideoLanguageModel(
        loaded.model, loaded.processor, name, kernels=loaded.kernels, max_frames=max_frames
    )


def load_patched(
    folder: Path, device: str, dtype: str, classes: Callable[[Any, Path], tuple[Any, Any]]
) -> Loaded:
    """Load a model of one of transformers' Auto classes with its processor, and patch it.

    Args:
        folder: where it lies.
        device, dtype: as in `load_video_language_model`.
        classes: returns the Auto classes of model and processor for a config, and raises a `LanguageModelError` for a
            config that is of no use.

    Raises:
        LanguageModelError: the folder does not hold such a model, or not all of its weights.
    """
    from transformers import AutoConfig

    import vot_kernels.models.vot  # noqa: F401  makes our own model known to the Auto classes
    from vot_kernels.watching.kernels import Kernels
    from vot_kernels.watching.memory import enough_memory

    with quiet_transformers(), one_sentence(folder), enough_memory(folder.name):
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        model_class, processor_class = classes(config, folder)
        processor = processor_class.from_pretrained(folder, **_LOCAL)
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
        if missing := sorted(report["missing_keys"]):
            raise LanguageModelError(
                f"'{folder}' does not hold all weights that its config.json describes: {missing[0]} is one of "
                f"{len(missing)} that are missing."
            )
        model = model.to(device).eval()
    return Loaded(model, processor, Kernels(model))


def _video_language_classes(config: Any, folder: Path) -> tuple[Any, Any]:
    """Return the Auto classes of a model that reads images or videos; a LanguageModelError for any other."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText, AutoProcessor
    if type(config) in AutoModelForCausalLM._model_mapping:
        raise LanguageModelError(
            f"'{folder}' is a model for text alone ({config.model_type}); pass it with --llm instead of --vlm."
        )
    raise LanguageModelError(
        f"'{folder}' is not a model that answers about images or videos; it is of the type '{config.model_type}'."
    )


@contextmanager
def one_sentence(folder: Path) -> Iterator[None]:
    """Turn the errors of transformers about broken folders, which have many types, into one sentence."""
    try:
        yield
    except LanguageModelError:
        raise
    except Exception as error:
        if isinstance(error, ImportError):  # some files do not say that they need torchvision
            require("A model for videos", "vlm")
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise LanguageModelError(f"'{folder}' cannot be loaded: {reason}") from error
