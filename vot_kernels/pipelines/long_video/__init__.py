"""Videos of any length in bounded memory: windows that overlap, read one by one and joined into one scene graph."""

from vot_kernels.pipelines.long_video.joining import GraphJoiner
from vot_kernels.pipelines.long_video.looking import look_at
from vot_kernels.pipelines.long_video.reading import Seen, see_stream, see_windows

__all__ = ["GraphJoiner", "Seen", "look_at", "see_stream", "see_windows"]
