"""The optional packages of this project by extra, and the one sentence that a user sees where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# Extra -> name of the module that is imported -> name of the package that holds it.
EXTRAS = {
    "video": {"av": "av", "PIL": "pillow", "scipy": "scipy"},
    "llm": {
        "transformers": "transformers",
        "tokenizers": "tokenizers",
        "safetensors": "safetensors",
        "gguf": "gguf",
    },
    "train": {"sklearn": "scikit-learn", "rich": "rich", "yaml": "pyyaml"},
    "cli": {"typer": "typer", "rich": "rich"},
    "vlm": {"torchvision": "torchvision", "num2words": "num2words"},
    "web": {"gradio": "gradio", "starlette": "gradio"},
    "rl": {
        "peft": "peft",
        "trl": "trl",
        "datasets": "datasets",
        "accelerate": "accelerate",
        "tensorboard": "tensorboard",
    },
    "ray": {"ray": "ray", "pyarrow": "pyarrow"},
    "lmms": {"lmms_eval": "lmms_eval"},
}


def require(what: str, *extras: str) -> None:
    """Check, without importing them, that all packages of `extras` are installed.

    Args:
        what: the feature that needs them; the beginning of the error message.
        extras: keys of `EXTRAS`.

    Raises:
        ImportError: names the missing packages and the command that installs them.
    """
    missing = {
        extra: [package for module, package in EXTRAS[extra].items() if find_spec(module) is None]
        for extra in extras
    }
    packages = list(dict.fromkeys(package for names in missing.values() for package in names))
    if packages:
        raise ImportError(_sentence(what, packages, [extra for extra, names in missing.items() if names]))


@contextmanager
def imports_for(what: str, extra: str) -> Iterator[None]:
    """Around imports: where a package of `extra` is missing, say so in the sentence of `require`."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = EXTRAS[extra].get((error.name or "").split(".")[0])
        if package is None:
            raise
        raise ImportError(_sentence(what, [package], [extra])) from error


def _sentence(what: str, packages: list[str], extras: list[str]) -> str:
    return f"{what} needs {', '.join(packages)}: pip install 'vot-kernels[{','.join(extras)}]'."
