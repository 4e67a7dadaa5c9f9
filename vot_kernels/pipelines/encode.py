"""Encoding of files with the packed encoder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vot_kernels.files import atomic_write, check_output
from vot_kernels.models.checkpoint import ENCODER, PERCEPTION, checkpoint_kind, load_checkpoint, on_device
from vot_kernels.pipelines.progress import track
from vot_kernels.pipelines.sampling import Sampling, checkpoint_folder, checkpoint_fps, sample_video

if TYPE_CHECKING:
    from torch import Tensor

    from vot_kernels.data.video import VideoClip
    from vot_kernels.models.encoder import VotEncoder, VotImageProcessor


def encode_videos(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    sampling: Sampling | None = None,
    device: str = "cpu",
) -> list[str]:
    """Encode files of any sizes in one packed pass and write a safetensors file.

    The file holds, for the n-th input, `n.pooled` `[hidden_size]`, `n.tokens` `[tokens, hidden_size]`,
    `n.grid_thw` int64 `[3]` and `n.times_s` float64 `[frames]`; its metadata maps n to the path.

    `checkpoint` is the folder of an encoder checkpoint, or of a perception checkpoint, whose encoder is used; None is
    the bundled one.

    Returns:
        One line per file with a description of the clip and its number of tokens.
    """
    check_output(out, ".safetensors", *paths)
    fps = checkpoint_fps(checkpoint, ENCODER, PERCEPTION)
    clips = [
        sample_video(path, sampling or Sampling(), fps)
        for path in track(paths, "Decoding", shown=len(paths) > 1)
    ]
    # These are imported after decoding, because they take seconds and a bad file should be reported at once.
    encoder, processor = load_encoder(checkpoint_folder(checkpoint, ENCODER, PERCEPTION), device)
    encoded = encode_clips(encoder, processor, clips)
    save_encoded(dict(enumerate(encoded)), paths, out)
    return [described(clip, len(one["tokens"])) for clip, one in zip(clips, encoded, strict=True)]


def refuse_nan(pooled: "Tensor") -> None:
    """Refuse what an encoder gives if it is no number.

    Raises:
        ValueError: it is not.
    """
    if pooled.isnan().any():
        raise ValueError("The encoder gives NaN, so its weights are damaged.")


def encode_clips(
    encoder: "VotEncoder", processor: "VotImageProcessor", clips: "Sequence[VideoClip]"
) -> "list[dict[str, Tensor]]":
    """Encode clips of any sizes in one packed pass; return what `encode_videos` writes of each, by its name."""
    import torch

    from vot_kernels.models.perception.reading import sampled_fps

    rates = [sampled_fps(clip.times) for clip in clips]
    inputs = processor([clip.frames for clip in clips], fps=rates).to(encoder.device)
    with torch.no_grad():
        seen = encoder(**inputs)
    refuse_nan(seen.pooler_output)
    grids = inputs["image_grid_thw"]
    return [
        {
            "pooled": seen.pooler_output[n].cpu().clone(),
            "tokens": tokens.cpu().clone(),
            "grid_thw": grids[n].cpu().clone(),
            "times_s": torch.from_numpy(clips[n].times),
        }
        for n, tokens in enumerate(seen.last_hidden_state.split(grids.prod(1).tolist()))
    ]


def save_encoded(
    encoded: Mapping[int, "dict[str, Tensor]"],
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
) -> None:
    """Write what was encoded of the n-th of the files `paths`, for all n in `encoded`."""
    from safetensors.torch import save_file

    tensors = {f"{n}.{name}": tensor for n, one in encoded.items() for name, tensor in one.items()}
    with atomic_write(out) as temporary:
        save_file(tensors, temporary, metadata={str(n): os.fspath(path) for n, path in enumerate(paths)})


def described(clip: "VideoClip", tokens: int) -> str:
    """Return the line that says what a clip is and how many tokens it has."""
    return f"{clip.info.describe()} {tokens} tokens."


def load_encoder(folder: Path, device: str = "cpu") -> "tuple[VotEncoder, VotImageProcessor]":
    """Load the encoder of an encoder or perception checkpoint, and its processor. Errors as in `load_checkpoint`."""
    from vot_kernels.models.encoder import VotEncoder, VotImageProcessor
    from vot_kernels.models.perception import VotPerceptionModel

    processor = VotImageProcessor.from_pretrained(folder, local_files_only=True)
    if checkpoint_kind(folder, ENCODER, PERCEPTION) == ENCODER:
        encoder = load_checkpoint(VotEncoder, folder)
    else:
        encoder = load_checkpoint(VotPerceptionModel, folder).encoder
    return on_device(encoder, device), processor
