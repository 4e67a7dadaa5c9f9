"""A clip as the processors of transformers take it: frames with their true times."""

from dataclasses import dataclass
from typing import Any

from vot_kernels.data.video import VideoClip
from vot_kernels.reasoning.llm import LanguageModelError

CLOCK = 90_000
"""Ticks per second, as in MPEG. The processors count time in frames of a constant rate; the sampled frames are told to
be frames of a video of this rate, so that each keeps its own time even where the rate of the file varies."""


@dataclass(frozen=True)
class Media:
    """What a processor is given of one clip.

    Attributes:
        content: the items of a chat message that stand for it.
        arguments: what the processor is called with besides the text.
        frames: how many frames that is.
    """

    content: list[dict[str, str]]
    arguments: dict[str, Any]
    frames: int


def media(clip: VideoClip, processor: Any) -> Media:
    """Return a clip as one video; as images if the processor takes no video; a picture as one image."""
    video = takes_videos(processor)
    image = getattr(processor, "image_processor", None) is not None
    if image and (len(clip.frames) == 1 or not video):
        return _as_images(clip)
    return _as_video(clip)


def takes_videos(processor: Any) -> bool:
    """Whether a processor has a part for videos, or a token for them and no separate part."""
    own_part = hasattr(processor, "video_processor")
    return processor.video_processor is not None if own_part else hasattr(processor, "video_token")


def _as_images(clip: VideoClip) -> Media:
    from PIL import Image

    content: list[dict[str, str]] = []
    for number, at in enumerate(clip.times):
        if clip.info.kind != "image":
            content.append({"type": "text", "text": f"Frame {number} at {at:.2f} s: "})
        content.append({"type": "image"})
    images = [Image.fromarray(frame) for frame in clip.frames]
    return Media(content, {"images": [images]}, len(images))


def _as_video(clip: VideoClip) -> Media:
    arguments = {
        "videos": [clip.frames],
        "video_metadata": [metadata(clip)],
        "do_sample_frames": False,  # they are sampled already
    }
    return Media([{"type": "video"}], arguments, len(clip.frames))


def metadata(clip: VideoClip) -> dict[str, Any]:
    """Return the metadata from which processors compute the times of the frames.

    A frame's time is its index by the rate, exact to a tick. The length is such that the mean rate, from which some
    models compute rotary positions, is that of the sampled frames.
    """
    count = len(clip.times)
    interval = (clip.times[-1] - clip.times[0]) / (count - 1) if count > 1 else 1.0
    return {
        "fps": CLOCK,
        "frames_indices": [round(float(at) * CLOCK) for at in clip.times],
        "total_num_frames": round(count * float(interval) * CLOCK),
        "duration": max(clip.info.duration_s, float(clip.times[-1])),
        "width": clip.info.width,
        "height": clip.info.height,
    }


def times_in_words(clip: VideoClip) -> str:
    """Return a line with the time of every frame, since not every model is told it otherwise."""
    if clip.info.kind == "image":
        return ""
    times = ", ".join(f"{at:.2f}" for at in clip.times)
    plural = "s" if len(clip.times) > 1 else ""
    return f"The video is shown in {len(clip.times)} frame{plural}, at {times} s.\n"


def check_all_seen(inputs: Any, given: Media, processor: Any, visual_tokens: set[int], name: str) -> None:
    """Refuse inputs from which the processor or the chat template dropped the video or some of its frames.

    Raises:
        LanguageModelError: there is no token of an image or video, or another number of frames.
    """
    count = sum(id in visual_tokens for id in inputs["input_ids"][0].tolist())
    if not count:
        raise LanguageModelError(
            f"The video did not reach the model '{name}': its chat template or processor left it out of the prompt."
        )
    seen = _frames_in(inputs, given, processor)
    if seen is not None and seen != given.frames:
        raise LanguageModelError(
            f"The processor of '{name}' was given {given.frames} frames and passed {seen} on to the model; "
            f"show it as many with --num-frames {seen}."
        )


def _frames_in(inputs: Any, given: Media, processor: Any) -> int | None:
    """Return how many frames or images the pixels hold, None if their shape does not tell."""
    if "images" in given.arguments:
        return len(inputs["image_grid_thw"]) if "image_grid_thw" in inputs else None
    if "video_grid_thw" in inputs:
        steps = int(inputs["video_grid_thw"][0][0])
        part = getattr(processor, "video_processor", processor.image_processor)
        patch = int(getattr(part, "temporal_patch_size", None) or 1)
        return given.frames if steps == -(-given.frames // patch) else steps * patch
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
    if pixels is None:
        return 0
    return int(pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0])
