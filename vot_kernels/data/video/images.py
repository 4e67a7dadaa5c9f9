"""Images and animations, read with Pillow."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vot_kernels.data.video.clip import Orientation, VideoClip, make_clip
from vot_kernels.data.video.picker import Picker, sampling_warnings
from vot_kernels.data.video.request import Request, VideoError

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_ANIMATED_FORMATS = {"GIF", "WEBP", "PNG"}
_DEFAULT_ANIMATION_DELAY_S = 0.1  # what browsers use for a frame without a duration
_EXIF_ORIENTATION = 0x0112
_EXIF = {
    2: Orientation(False, False, True),
    3: Orientation(False, True, True),
    4: Orientation(False, True, False),
    5: Orientation(True, False, False),
    6: Orientation(True, False, True),
    7: Orientation(True, True, True),
    8: Orientation(True, True, False),
}


def open_image(path: Path) -> Any | None:
    """Return the opened image, or None if the file is not an image."""
    try:
        return Image.open(path, formats=_IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise VideoError(f"'{path}' is too large an image: {error}.") from None
    except (OSError, SyntaxError, ValueError):
        return None


def is_animated(image: Any) -> bool:
    return image.format in _ANIMATED_FORMATS and bool(getattr(image, "is_animated", False))


def load_image(path: Path, image: Any, request: Request) -> VideoClip:
    if request.start:
        raise VideoError(
            f"start is {request.start:g} s, but '{path}' is a single image, which has only time 0."
        )
    width, height = image.size
    if request.max_pixels is not None:
        image.draft(
            "RGB", request.size(width, height)
        )  # lets the JPEG decoder skip detail that is not needed
    complete = _load_pixels(image)
    # EXIF data is read only now, because Pillow reads a PNG to its end to find it.
    orientation = _EXIF.get(image.getexif().get(_EXIF_ORIENTATION, 1), Orientation())
    picker = Picker(np.zeros(1), 0.0, lambda frame: orientation.apply(_rgb(frame, request)))
    picker.offer(0.0, image)
    picker.close(math.inf)
    warnings = () if complete else ("The image is cut off or damaged: part of it could not be decoded.",)
    return make_clip(
        path, request, picker, kind="image", container=image.format.lower(), codec=image.format.lower(),
        source_width=width, source_height=height, orientation=orientation, average_fps=None, duration_s=0.0,
        complete=complete, decoded_until_s=0.0, warnings=warnings,
    )  # fmt: skip


def load_animation(path: Path, image: Any, request: Request) -> VideoClip:
    lengths, complete = _animation_lengths(image, path)
    if not lengths:
        raise VideoError(f"'{path}' is damaged: no frame of it can be decoded.")
    starts = np.concatenate([[0.0], np.cumsum(lengths)])
    duration = float(starts[-1])
    start, end = request.span(duration, f"'{path}'")
    picker = Picker(request.times(start, end), 1e-6, lambda frame: _rgb(frame, request))
    for i in range(len(lengths)):
        if picker.done:
            break
        _show(image, i)
        _load_pixels(image)
        picker.offer(float(starts[i]), image.copy())
    picker.close(math.inf)
    warnings = sampling_warnings(picker, complete)
    if not complete:
        warnings.insert(
            0, f"The file is cut off or damaged: {len(lengths)} frames, {duration:.2f} s, could be decoded."
        )
    return make_clip(
        path, request, picker, kind="animation", container=image.format.lower(), codec=image.format.lower(),
        source_width=image.size[0], source_height=image.size[1], orientation=Orientation(),
        average_fps=len(lengths) / duration, duration_s=duration, complete=complete,
        decoded_until_s=duration, warnings=tuple(warnings),
    )  # fmt: skip


def _load_pixels(image: Any) -> bool:
    """Decode the current frame; return False if it is cut off, with what could be decoded left in `image`."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError):
        image.tile = []  # what Pillow has decoded so far is the picture
        return False
    return True


def _rgb(image: Any, request: Request) -> np.ndarray:
    """Return pixels uint8 `[height, width, 3]`, upright, scaled, with transparency on black."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert("RGB")
    size = request.size(*image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX)
    return np.array(image, dtype=np.uint8)


def _show(image: Any, i: int) -> None:
    image.seek(i + bool(image.info.get("default_image", False)))


def _animation_lengths(image: Any, path: Path) -> tuple[list[float], bool]:
    """Return the seconds for which each frame that can be decoded is shown, and whether the file is complete."""
    lengths: list[float] = []
    while True:
        try:
            _show(image, len(lengths))
        except EOFError:
            return lengths, image.format != "GIF" or _ends_like_gif(path)
        except (OSError, SyntaxError, ValueError):
            return lengths, False
        whole = _load_pixels(image)
        lengths.append((image.info.get("duration") or 0) / 1000 or _DEFAULT_ANIMATION_DELAY_S)
        if not whole:
            return lengths, False


def _ends_like_gif(path: Path) -> bool:
    """Whether the file has the end marker of a GIF; without it more frames may have followed."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read().rstrip(b"\0\r\n").endswith(b";")
