"""The web page: what it shows, what it refuses, and a question that a browser asks."""

import socket
import sys
import urllib.request
from contextlib import contextmanager
from functools import partial
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests import chromium
from tests.reasoning.scripted import ScriptedLanguageModel
from tests.watching.families import save
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.data.video import save_mp4
from vot_kernels.pipelines.video_qa import VideoQA, load_eyes, load_video_qa
from vot_kernels.reasoning.types import Switches
from vot_kernels.watching import written

CLIP, QUESTION, CANDIDATES = digitworld_clip()
CHOICES = "|".join(CANDIDATES)
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def web():
    """The module, which imports gradio: four seconds, which only the process that runs these tests shall pay."""
    pytest.importorskip("gradio")
    from vot_kernels.pipelines import web

    return web


@pytest.fixture(scope="module")
def make():
    """Make a `VideoQA` with a language model that follows a script."""
    llm = ScriptedLanguageModel({"analysis": f"It moves. {EVIL}"}, likelihood={CANDIDATES[0]: -0.1})
    return partial(VideoQA, load_eyes(), llm)


def nothing(text: str) -> None:
    pass


def test_an_answer_has_all_its_parts(web, make):
    said = []
    shown = web.answer_question(make, CLIP, QUESTION, CHOICES, False, said.append)
    assert f"<h2>{CANDIDATES[0]}</h2>" in shown.headline and "decided by likelihood" in shown.headline
    assert "<rect" in shown.timeline and " hits " in shown.timeline
    assert np.asarray(shown.frames).shape[2] == 3 and np.asarray(shown.frames).std() > 10
    for number, name in enumerate(("Task def", "Tracking", "Action", "Ranking", "Verification"), 1):
        assert f"<summary>{number}. {name}" in shown.steps
    assert QUESTION in shown.steps and said[0] == "Looking at the frames" and said[-1] == "Drawing"
    assert len(said) == web.ACTIVITIES


def test_what_others_say_is_text(web, make):
    shown = web.answer_question(make, CLIP, f"Which digit hits {EVIL}?", f"{EVIL}|b", False, nothing)
    assert "&lt;img" in shown.steps and "&lt;img" in shown.headline
    assert not any("<img" in part for part in (shown.headline, shown.timeline, shown.steps))


def test_a_foreign_clip_gets_no_answer_unless_asked_to_guess(web, make, tmp_path):
    save_mp4(tmp_path / "grey.mp4", np.full((4, 64, 64, 3), 128, np.uint8), 8)
    ask = partial(web.answer_question, make, tmp_path / "grey.mp4", "What moves?", "a|b")
    shown = ask(False, nothing)
    assert "no answer" in shown.headline and shown.timeline == "" and shown.frames.size[0] > 100
    assert "outside what the checkpoint knows" in ask(True, nothing).headline


@pytest.mark.parametrize(
    ("path", "question", "candidates", "told"),
    [
        (CLIP, " ", "", "The question is empty"),
        (CLIP, "Who?", "a|a", "Two candidates are the same"),
        (CLIP, "Who?", "a||b", "A candidate is blank"),
        ("FOLDER/missing.mp4", "Who?", "", "missing.mp4"),
        ("FOLDER/text.mp4", "Who?", "", "text.mp4"),
    ],
)
def test_mistakes_are_one_sentence_without_the_folder(web, make, path, question, candidates, told, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    path = str(path).replace("FOLDER", str(tmp_path))
    with pytest.raises(web.gr.Error) as caught:
        web.answer_question(make, path, question, candidates, False, nothing)
    assert told in caught.value.message and str(tmp_path) not in caught.value.message
    assert len(caught.value.message.splitlines()) == 1 and not caught.value.print_exception


@pytest.fixture(scope="module")
def address(web, make):
    with web.served(web.build(make(), [(CLIP, QUESTION, CANDIDATES)])) as address:
        yield address


def test_the_page_is_for_this_machine_alone(address):
    place = urlsplit(address)
    assert place.hostname == "127.0.0.1"
    if (
        sys.platform == "linux"
    ):  # there all of 127.0.0.0/8 is this machine: a server on all addresses would answer
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", place.port), timeout=5)
    with urllib.request.urlopen(address) as reply:
        policy, text = reply.headers["content-security-policy"], reply.read().decode()
    assert policy.startswith("default-src 'self'") and "http" not in policy
    assert '"analytics_enabled":false' in text.replace(" ", "") and "is_share" not in text


def test_a_port_that_is_taken_is_one_sentence(web, make, address):
    port, page = urlsplit(address).port, web.build(make(), [(CLIP, QUESTION, CANDIDATES)])
    with pytest.raises(OSError, match=rf"^The port {port} is taken: .*\.$"), web.served(page, port):
        pass


@pytest.fixture
def tab():
    if chromium.program() is None:
        pytest.skip(f"there is no Chromium here: none of {', '.join(chromium.PROGRAMS)}")
    with chromium.tab() as tab:
        yield tab


def test_a_browser_asks_and_sees_the_answer(tab, address):
    for domain in ("Network", "Page", "Log"):
        tab.send(f"{domain}.enable")
    tab.send("Page.navigate", url=address)
    tab.wait("document.querySelector('#ask') !== null")
    tab.run("document.querySelector('#ask').click()")
    said = tab.wait("document.querySelector('#answer h2')?.innerText")
    assert said == CANDIDATES[0]
    assert tab.wait("document.querySelectorAll('#timeline svg rect').length") >= 3
    assert tab.wait("document.querySelector('#frames img')?.naturalWidth") > 500
    assert tab.run("document.querySelectorAll('#steps details').length") == 6  # the clip and five steps
    assert EVIL in tab.run("document.querySelector('#steps').textContent")
    tab.run(
        "const box = document.querySelector('textarea'); box.value = ' ';"
        "box.dispatchEvent(new Event('input', {bubbles: true}));"
        "document.querySelector('#ask').click()"
    )
    assert tab.wait("document.body.innerText.includes('The question is empty')")
    asked = {e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"}
    hosts = {urlsplit(url).netloc for url in asked if url.startswith(("http", "ws"))}
    assert hosts == {urlsplit(address).netloc}
    logged = [e["params"]["entry"]["text"] for e in tab.events if e["method"] == "Log.entryAdded"]
    assert not [text for text in logged if "Content Security Policy" in text]  # nothing was tried, either


def test_a_browser_uploads_a_clip_of_its_own(tab, address, tmp_path):
    save_mp4(tmp_path / "grey.mp4", np.full((4, 64, 64, 3), 128, np.uint8), 8)
    tab.send("Page.navigate", url=address)
    tab.wait("document.querySelector('input[type=file]') !== null")
    document = tab.send("DOM.getDocument")["root"]["nodeId"]
    upload = tab.send("DOM.querySelector", nodeId=document, selector="input[type=file]")["nodeId"]
    tab.send("DOM.setFileInputFiles", nodeId=upload, files=[str(tmp_path / "grey.mp4")])
    tab.wait("document.body.innerText.includes('grey')")
    tab.run("document.querySelector('#ask').click()")
    assert "no answer" in tab.wait("document.querySelector('#answer h2')?.innerText")
    assert "grey.mp4" in tab.run("document.querySelector('#steps').textContent")


@pytest.fixture
def vlm(tmp_path, monkeypatch):
    """The folder of a tiny video-language model."""
    pytest.importorskip("torchvision", reason="video processors need torchvision: make")
    monkeypatch.setattr(written, "WRITTEN_TOKENS", 8)
    return save("smolvlm2", tmp_path / "smolvlm2")


def test_a_video_language_model_answers_on_the_page(web, vlm):
    video_qa = load_video_qa(vlm=vlm)
    page = web.build(video_qa, [(CLIP, QUESTION, CANDIDATES)])
    props = [block.get_config() for block in page.blocks.values()]
    assert any("the video-language model smolvlm2" in str(each.get("value")) for each in props)
    (anyway,) = [each for each in props if "does not know" in str(each.get("label"))]
    assert not anyway["visible"], "it has no domain to leave"
    make = partial(VideoQA, video_qa.eyes, video_qa.reader)
    shown = web.answer_question(make, CLIP, QUESTION, CHOICES, False, nothing)
    assert any(f"<h2>{said}" in shown.headline for said in (*CANDIDATES, "I cannot tell"))
    assert "5. Verification" in shown.steps and "Sampled" in shown.steps


def test_a_browser_asks_a_video_language_model(web, tab, vlm):
    with web.served(web.build(load_video_qa(vlm=vlm), [(CLIP, QUESTION, CANDIDATES)])) as address:
        tab.send("Page.navigate", url=address)
        tab.wait("document.querySelector('#ask') !== null")
        tab.run("document.querySelector('#ask').click()")
        said = tab.wait("document.querySelector('#answer h2')?.innerText")
        assert said in CANDIDATES or said.startswith("I cannot tell")
        assert tab.wait("document.querySelectorAll('#steps details').length") == 6


def test_the_policy_keeps_a_page_from_going_elsewhere(tab, address):
    tab.send("Page.navigate", url=address)
    tab.wait("document.querySelector('#ask') !== null")
    tab.run(
        "window.refused = []; document.addEventListener('securitypolicyviolation',"
        " event => window.refused.push(event.effectiveDirective))"
    )
    tab.run("fetch('http://localhost:9/').catch(() => null); 0")
    assert tab.wait("window.refused.join()") == "connect-src"


def test_the_command_serves_until_ctrl_c(web, monkeypatch, capsys, make):
    from vot_kernels import cli

    def interrupted():
        raise KeyboardInterrupt

    def vot(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vot", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    @contextmanager
    def served(page, port):
        yield f"http://127.0.0.1:{port}"

    loaded = []
    monkeypatch.setattr(
        "vot_kernels.pipelines.video_qa.load_video_qa", lambda **options: loaded.append(options) or make()
    )
    monkeypatch.setattr(web, "served", served)
    monkeypatch.setattr("vot_kernels.cli.demo._forever", interrupted)
    assert vot("demo", "--web", "--port", "7999") == 130
    out, err = capsys.readouterr()
    assert out.startswith("http://127.0.0.1:7999 ") and "the page is closed" in err.splitlines()[-1]
    given = {name: value for name, value in loaded[0].items() if value}
    assert given == {"device": "cpu", "dtype": "auto", "switches": Switches()}
    assert vot("demo", "--port", "7999") == 2 and "--web" in capsys.readouterr().err


def test_the_page_is_served_with_the_models_that_are_given(monkeypatch, capsys, make, vlm):
    from vot_kernels import cli

    loaded = []
    monkeypatch.setattr(
        "vot_kernels.pipelines.video_qa.load_video_qa", lambda **options: loaded.append(options) or make()
    )
    monkeypatch.setattr("vot_kernels.cli.demo._forever", lambda: None)

    def vot(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["vot", "demo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert vot("--web", "--vlm", vlm, "--window", 8, "--dtype", "float32") == 0
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")
    assert (loaded[0]["vlm"], loaded[0]["window"], loaded[0]["dtype"]) == (vlm, 8, "float32")
    for words, message in (
        (("--vlm", vlm), "give --web"),
        (("--web", "--vlm", vlm, "--llm", vlm), "not both"),
        (("--web", "--objects", "car"), "give --detector PATH"),
        (("--web", "--detector", vlm.parent), "config.json"),
    ):
        assert vot(*words) == 2 and message in capsys.readouterr().err
    assert len(loaded) == 1
