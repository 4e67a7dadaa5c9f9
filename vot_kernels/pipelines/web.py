"""The demo as a web page: a question about a clip, and the answer with what it rests on.

The page is served to this machine alone, and its browser loads nothing from anywhere else.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

from vot_kernels.data.contact_sheet import contact_sheet
from vot_kernels.extras import imports_for
from vot_kernels.pipelines.errors import CORRECTABLE, sentence
from vot_kernels.pipelines.long_video.reading import spacing
from vot_kernels.pipelines.timeline import timeline
from vot_kernels.pipelines.video_qa import VideoAnswer, VideoQA
from vot_kernels.reasoning.reasoning import check_question, split_candidates
from vot_kernels.watching.perception import PerceptionEyes

with imports_for("The web page", "web"):
    import gradio as gr
    from starlette.middleware import Middleware

HOST = "127.0.0.1"
WAITING = 16  # questions that may wait while one is answered
ACTIVITIES = 8  # reports of one question: frames, language model, five steps, drawing
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self'; frame-ancestors 'self'"
)
_INTRODUCTION = """# Video of Thought
A question about a clip is answered in five steps from its scene graph: the objects it tracks, their relations and
events. """
_BUNDLED = "The bundled checkpoint knows DigitWorld alone; it says so of any other clip."

Clip = tuple[Path, str, Sequence[str]]
"""A bundled clip: its path, a question about it and the candidates."""


class Shown(NamedTuple):
    """An answer as the page shows it.

    Attributes:
        headline: HTML of the answer and its confidence.
        timeline: HTML of the evidence over time; empty of a clip that the checkpoint does not know.
        frames: the frames with the boxes of the tracklets, an image of Pillow.
        steps: HTML of what was looked at, and of the five steps, each with its prompts and replies.
    """

    headline: str
    timeline: str
    frames: Any
    steps: str


def show(result: VideoAnswer) -> Shown:
    """Return the parts of the page for an answer; whatever a clip, a question or a model says is escaped."""
    answer, stsg = result.answer, result.known_stsg
    how = f"confidence {answer.confidence:.2f}, decided by {answer.decided_by}"
    notes = "".join(f"<p>{escape(note)}</p>" for note in result.clip.info.warnings)
    looks = [result.clip, *([result.read] if result.read else [])]
    told = "<br>".join(escape(look.info.describe()) for look in looks)
    clip = f"<details><summary>Clip</summary>{told}</details>"
    headline = f"<h2>{escape(answer.text)}</h2><p>{how}</p>{notes}"
    drawn = ""
    if stsg is not None:
        drawn = timeline(stsg, answer.evidence, spacing(stsg, len(result.clip.times)))
    steps = "".join(
        f"<details><summary>{number}. {escape(step.in_short())}</summary>{_calls(step.calls)}</details>"
        for number, step in enumerate(answer.trace, 1)
    )
    return Shown(headline, drawn, contact_sheet(result.clip, result.shown_stsg), clip + steps)


def _calls(calls: Sequence[Any]) -> str:
    """Return what the language model was asked and what it replied."""
    told = ((call.purpose, call.prompt, call.output) for call in calls)
    return "".join(
        f"<p><b>{escape(purpose)}</b></p><pre>{escape(prompt)}</pre><pre>→ {escape(str(output))}</pre>"
        for purpose, prompt, output in told
    )


def answer_question(
    make: Callable[..., VideoQA],
    path: str | os.PathLike[str],
    question: str,
    candidates: str,
    anyway: bool,
    report: Callable[[str], None],
) -> Shown:
    """Answer what the page asks.

    Args:
        make: returns the `VideoQA` for the keyword `anyway`.
        path: the clip.
        question: a question about it.
        candidates: answers to choose from, separated by "|"; if blank, the language model proposes them.
        anyway: also guess about a clip that the checkpoint does not know.
        report: is called with the name of the current activity.

    Raises:
        gradio.Error: one sentence on an error that the user can correct.
    """
    try:
        check_question(question)
        given = split_candidates(candidates if candidates.strip() else None)
        result = make(anyway=anyway).ask(path, question, given, report=report)
        report("Drawing")
        return show(result)
    except CORRECTABLE as error:
        said = sentence(error).replace(os.fspath(path), Path(path).name)  # not gradio's folder of uploads
        raise gr.Error(escape(said), print_exception=False) from error


def build(video_qa: VideoQA, clips: Sequence[Clip]) -> gr.Blocks:
    """Return the page, which asks the models of `video_qa` about one of `clips` or an uploaded file."""
    make = partial(VideoQA, video_qa.eyes, video_qa.reader)
    checkpoint = isinstance(video_qa.eyes, PerceptionEyes)
    bundled = {path.name: (path, question, "|".join(choices)) for path, question, choices in clips}
    first = next(iter(bundled))

    def ask(
        name: str,
        uploaded: str | None,
        question: str,
        candidates: str,
        anyway: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio looks for it in the signature
    ) -> Shown:
        done = iter(range(ACTIVITIES))

        def report(text: str) -> None:
            progress((next(done, ACTIVITIES), ACTIVITIES), desc=f"{text} …")

        return answer_question(make, uploaded or bundled[name][0], question, candidates, anyway, report)

    with gr.Blocks(title="vot-kernels", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        seen_by = _BUNDLED if checkpoint else f"The graph is seen by {video_qa.eyes.name}."
        gr.Markdown(_INTRODUCTION + seen_by)
        with gr.Row():
            with gr.Column(scale=1):
                clip = gr.Dropdown(list(bundled), value=first, label="Bundled clip")
                upload = gr.File(label="Or a clip of your own", file_types=["video", "image"], height=120)
                question = gr.Textbox(bundled[first][1], label="Question", lines=2)
                candidates = gr.Textbox(
                    bundled[first][2],
                    label="Candidates",
                    info="Separated by |; if there are none, the language model proposes them.",
                )
                anyway = gr.Checkbox(
                    label="Guess about a clip that the checkpoint does not know", visible=checkpoint
                )
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=2):
                headline = gr.HTML(elem_id="answer")
                drawn = gr.HTML(elem_id="timeline")
                steps = gr.HTML(elem_id="steps")
        frames = gr.Image(
            label="Frames and tracklets",
            elem_id="frames",
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],  # the third, "share", would send it elsewhere
        )
        clip.input(
            lambda name: (None, *bundled[name][1:]),
            clip,
            [upload, question, candidates],
            api_visibility="private",
        )
        button.click(
            ask,
            [clip, upload, question, candidates, anyway],
            [headline, drawn, frames, steps],
            api_visibility="private",
            show_progress_on=headline,
        )
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


class _NothingFromElsewhere:
    """Tells the browser, in every reply, to load nothing that this server does not serve."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@contextmanager
def served(page: gr.Blocks, port: int | None = None) -> Iterator[str]:
    """Serve a page to this machine and yield its address; afterwards it is closed.

    Args:
        page: the page, of `build`.
        port: by default the first free one from 7860 on.

    Raises:
        OSError: the port is taken.
    """
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size="1gb",
            app_kwargs={"middleware": [Middleware(_NothingFromElsewhere)]},
        )
    except OSError:
        taken = "The ports from 7860 to 7959 are" if port is None else f"The port {port} is"
        raise OSError(f"{taken} taken: free one, or give another with --port.") from None
    try:
        yield address.rstrip("/")
    finally:
        page.close(verbose=False)
