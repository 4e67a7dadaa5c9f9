"""Encoding of files with the packed encoder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vot_kernels.files import atomic_write, check_output
from vot_kernels.models.checkpoint import ENCODER, PERCEPTION, checkpoint_kind, load_checkpoint, on_device
from vot_kernels.pipelines.progress import track
from vot_kernels.pipelines.sampling import Sampling, checkpoint_folder, checkpoint_fps, sample_video

if TYPE_CHECKING:
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
    check_output(out, ".safetensors")
    fps = checkpoint_fps(checkpoint, ENCODER, PERCEPTION)
    clips = [
        sample_video(path, sampling or Sampling(), fps)
        for path in track(paths, "Decoding", shown=len(paths) > 1)
    ]
    # These are imported after decoding, because they take seconds and a bad file should be reported at once.
    import torch
    from safetensors.torch import save_file

    from vot_kernels.models.perception.reading import sampled_fps

    encoder, processor = load_encoder(checkpoint_folder(checkpoint, ENCODER, PERCEPTION))
    encoder = on_device(encoder, device)
    rates = [sampled_fps(clip.times) for clip in clips]
    inputs = processor([clip.frames for clip in clips], fps=rates).to(encoder.device)
    with torch.no_grad():
        seen = encoder(**inputs)
    counts = inputs["image_grid_thw"].prod(1).tolist()
    tensors: dict[str, torch.Tensor] = {}
    for n, tokens in enumerate(seen.last_hidden_state.split(counts)):
        tensors[f"{n}.pooled"] = seen.pooler_output[n].cpu().clone()
        tensors[f"{n}.tokens"] = tokens.cpu().clone()
        tensors[f"{n}.grid_thw"] = inputs["image_grid_thw"][n].cpu().clone()
        tensors[f"{n}.times_s"] = torch.from_numpy(clips[n].times)
    with atomic_write(out) as temporary:
        save_file(tensors, temporary, metadata={str(n): os.fspath(path) for n, path in enumerate(paths)})
    return [f"{clip.info.describe()} {n} tokens." for clip, n in zip(clips, counts, strict=True)]


def load_encoder(folder: Path) -> "tuple[VotEncoder, VotImageProcessor]":
    """Load the encoder of an encoder or perception checkpoint, and its processor. Errors as in `load_checkpoint`."""
    from vot_kernels.models.encoder import VotEncoder, VotImageProcessor
    from vot_kernels.models.perception import VotPerceptionModel

    processor = VotImageProcessor.from_pretrained(folder, local_files_only=True)
    if checkpoint_kind(folder, ENCODER, PERCEPTION) == ENCODER:
        return load_checkpoint(VotEncoder, folder), processor
    return load_checkpoint(VotPerceptionModel, folder).encoder, processor
