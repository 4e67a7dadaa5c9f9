"""Video input: sample frames of a local video, image or animation, with their real presentation times.

Memory is bounded by the frames that are sampled, not by the length of the file: frames are decoded one after another,
and only the requested ones are converted, scaled and kept. `stream_video` keeps none of them.
"""

from vot_kernels.extras import imports_for

with imports_for("Reading video", "video"):
    from vot_kernels.data.video.clip import VideoClip, VideoInfo
    from vot_kernels.data.video.load import FrameStream, count_frames, load_video, stream_video
    from vot_kernels.data.video.request import DEFAULT_NUM_FRAMES, MAX_FPS, MAX_NUM_FRAMES, VideoError
    from vot_kernels.data.video.write import save_mp4

__all__ = [
    "DEFAULT_NUM_FRAMES",
    "MAX_FPS",
    "MAX_NUM_FRAMES",
    "FrameStream",
    "VideoClip",
    "VideoError",
    "VideoInfo",
    "count_frames",
    "load_video",
    "save_mp4",
    "stream_video",
]
