"""The picture of the web page in the README: `python docs/draw_web.py` asks the demo's question and draws docs/web.png.

It needs Chromium, and takes the language model of the demo.
"""

import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.chromium import tab
from vot_kernels.files import atomic_write
from vot_kernels.pipelines.demo import demo_questions
from vot_kernels.pipelines.video_qa import load_video_qa
from vot_kernels.pipelines.web import build, served

PICTURE = Path(__file__).with_name("web.png")
WIDTH, HEIGHT = 1120, 1140
COLOURS = 128  # enough for a page, and the file stays small


def main() -> None:
    """Write the picture."""
    with served(build(load_video_qa(), demo_questions())) as address, tab(WIDTH, HEIGHT) as page:
        page.send("Page.navigate", url=address)
        page.wait("document.querySelector('#ask') !== null")
        page.run("document.querySelector('#ask').click()")
        page.wait("document.querySelector('#frames img')?.naturalWidth > 0", seconds=300)
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    with atomic_write(PICTURE) as temporary:
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
