"""Images and animations."""

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from tests.data.video.media import bright_corner, corner, cut, grey, noisy, numbers  # noqa: E402
from vot_kernels.data.video import VideoError, load_video  # noqa: E402


@pytest.mark.parametrize(
    ("tag", "where", "turned", "mirrored"),
    [
        (1, "top left", 0, False), (2, "top right", 0, True), (3, "bottom right", 180, False),
        (4, "bottom left", 180, True), (5, "top left", 90, True), (6, "top right", 90, False),
        (7, "bottom right", 270, True), (8, "bottom left", 270, False),
    ],
)  # fmt: skip
def test_exif_orientation_is_applied(tmp_path, tag, where, turned, mirrored):
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(corner(0, (64, 32))).save(tmp_path / "a.jpg", exif=exif)
    clip = load_video(tmp_path / "a.jpg")
    assert bright_corner(clip.frames[0]) == where
    assert clip.info.rotation == turned and clip.info.mirrored == mirrored
    assert clip.frames.shape[1:3] == ((64, 32) if tag >= 5 else (32, 64))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg", "tiff"])
def test_images_are_clips_of_one_frame(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    Image.fromarray(grey(7, (33, 17))).save(tmp_path / f"a.{suffix}", **options)
    clip = load_video(tmp_path / f"a.{suffix}", num_frames=8)
    assert clip.frames.shape == (1, 17, 33, 3) and clip.times.tolist() == [0.0] and numbers(clip) == [7]
    assert clip.info.kind == "image" and clip.info.complete and clip.info.warnings == ()


def test_image_is_known_by_content_not_by_name(tmp_path):
    Image.fromarray(grey(3)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    assert load_video(tmp_path / "a.mp4").info.kind == "image"


def test_transparency_lies_on_black(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[...] = (200, 100, 50, 0)
    pixels[0] = (200, 100, 50, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = load_video(tmp_path / "a.png").frames[0]
    assert frame[0, 0].tolist() == [200, 100, 50] and not frame[1:].any()


def test_sixteen_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 128 << 8, np.uint16)).save(tmp_path / "a.png")
    assert np.unique(load_video(tmp_path / "a.png").frames).tolist() == [128]


def test_image_is_scaled(tmp_path):
    Image.fromarray(grey(9, (400, 200))).save(tmp_path / "a.jpg", quality=100)
    clip = load_video(tmp_path / "a.jpg", max_pixels=800)
    assert clip.frames.shape == (1, 20, 40, 3) and numbers(clip) == [9]
    assert (clip.info.source_width, clip.info.source_height) == (400, 200)


def animation(path, lengths, size=(32, 32)):
    frames = [Image.fromarray(grey(4 * k, size)) for k in range(len(lengths))]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=lengths, loop=0, **options)
    return path


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_keep_their_real_times(tmp_path, suffix):
    path = animation(tmp_path / f"a.{suffix}", [100, 400, 50, 50, 200])
    clip = load_video(path, fps=100)
    np.testing.assert_allclose(clip.times, [0, 0.1, 0.5, 0.55, 0.6])
    assert numbers(clip) == [0, 4, 8, 12, 16]
    assert clip.info.kind == "animation" and clip.info.duration_s == pytest.approx(0.8) and clip.info.complete
    assert numbers(load_video(path, num_frames=2)) == [4, 16]  # on show at 0.2 and 0.6 s
    assert numbers(load_video(path, num_frames=1, start=0.52)) == [16]


def test_gif_of_one_frame_is_an_image(tmp_path):
    Image.fromarray(grey(2)).save(tmp_path / "a.gif")
    assert load_video(tmp_path / "a.gif").info.kind == "image"


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_truncated_image(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    clip = load_video(cut(tmp_path / f"a.{suffix}", 0.6))
    assert (
        clip.frames.shape == (1, 200, 200, 3) and np.delete(clip.frames[0], range(60, 140), axis=0).std() > 40
    )
    assert not clip.info.complete and "cut off" in clip.info.warnings[0]


def test_truncated_gif(tmp_path):
    path = tmp_path / "a.gif"
    frames = [Image.fromarray(noisy(k, (64, 64))) for k in range(10)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    assert load_video(path, fps=10).info.complete
    clip = load_video(cut(path, 0.55), fps=10)
    assert not clip.info.complete and 4 <= len(clip.times) <= 6
    assert "could be decoded" in clip.info.warnings[0]


def test_range_of_an_image_is_refused(tmp_path):
    Image.fromarray(grey(1)).save(tmp_path / "a.png")
    with pytest.raises(VideoError, match="only time 0"):
        load_video(tmp_path / "a.png", start=1)
