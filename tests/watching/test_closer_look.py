"""Any eyes see a long video in windows, and a reader that sees the video looks where the graph says."""

import gc
import json
import sys
import weakref
from collections import Counter

import numpy as np
import pytest

from tests.pipelines.long_scenes import drawn, long_scene, part_of
from tests.reasoning.scripted import ScriptedLanguageModel
from tests.watching import detectors
from vot_kernels.data.digitworld.truth import true_stsg
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.data.video import VideoClip, count_frames, load_video, save_mp4, stream_video
from vot_kernels.pipelines.estimates import estimate_run
from vot_kernels.pipelines.long_video import look_at
from vot_kernels.pipelines.sampling import Sampling
from vot_kernels.pipelines.video_qa import VideoQA
from vot_kernels.scene_graph import STSG, Interval, Tracklet, Vocabulary
from vot_kernels.scene_graph.graph import Box
from vot_kernels.watching import video_language, written
from vot_kernels.watching.cost import Estimate, Run
from vot_kernels.watching.detector import load_detector
from vot_kernels.watching.loading import load_video_language_model
from vot_kernels.watching.protocols import Sight
from vot_kernels.watching.written import WrittenGraph

FRAMES, FPS = 240, 8


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A file of 30 s, and its true graph."""
    scene, motion = long_scene(FRAMES)
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    pixels = np.stack([frame for frame, _ in drawn(scene, motion)])
    return save_mp4(path, pixels, FPS), true_stsg(scene, motion)


class TrueEyes:
    """Sees of each window what is true of it, with words for what the window shows alone."""

    name, fps, window = "true eyes", float(FPS), 16

    def __init__(self, truth: STSG) -> None:
        self.truth, self.seen = truth, []

    def see(self, clip: VideoClip) -> Sight:
        self.seen.append(clip)
        start = round(float(clip.times[0]) * FPS)
        part = part_of(self.truth, start, start + len(clip.times))
        words = Vocabulary(
            labels=tuple({t.label: None for t in part.tracklets}),
            attributes=tuple({word: None for t in part.tracklets for word in t.attributes}),
            predicates=tuple({r.predicate: None for r in part.relations}),
            events=tuple({e.kind: None for e in part.events}),
        )
        part = STSG(part.frame_times_s, part.tracklets, part.relations, part.events, words)
        return Sight(part, self.name)


class Watcher(ScriptedLanguageModel):
    """A reader that sees videos, and keeps those that it was shown."""

    max_frames = 12

    def __init__(self) -> None:
        super().__init__({}, likelihood={})
        self.shown: list[VideoClip] = []

    def about(self, clip: VideoClip) -> "Watcher":
        self.shown.append(clip)
        return self


def test_windows_of_any_eyes_are_joined(film):
    path, truth = film
    eyes = TrueEyes(truth)
    clip, sight = VideoQA(eyes, lambda prompt: "").see(path)
    assert len(eyes.seen) == 1 + -(-(FRAMES - 16) // 12) and all(len(each.times) == 16 for each in eyes.seen)
    assert {each.info.kind for each in eyes.seen} == {"video"} and eyes.seen[3].info.frames_sampled == 16
    assert sight.stsg.num_frames == FRAMES and sight.stsg.validate() == []
    assert len(clip.times) <= 16 and clip.info.frames_sampled == FRAMES
    assert len(sight.stsg.tracklets) == len(truth.tracklets)
    assert Counter((e.kind, e.t) for e in sight.stsg.events) == Counter((e.kind, e.t) for e in truth.events)
    assert set(sight.stsg.vocabulary.events) == {e.kind for e in truth.events}


def test_a_reader_looks_around_the_moments_that_the_graph_names(film):
    path, truth = film
    names = {t.id: t.name for t in truth.tracklets}
    hits = [e for e in truth.events if e.kind == "hits"]
    hit = hits[len(hits) // 2]
    same = [e for e in hits if set(e.participants) == set(hit.participants)]
    question = "Does the {} hit the {}?".format(*(names[id] for id in hit.participants))
    reader = Watcher()
    result = VideoQA(TrueEyes(truth), reader).ask(path, question, ("yes", "no"))
    (shown,) = reader.shown
    assert result.read is shown and len(shown.times) == 12 and (np.diff(shown.times) > 0).all()
    nearest = np.abs(shown.times[:, None] - np.array([truth.frame_times_s[e.t] for e in same])).min(1)
    assert nearest.max() <= 1.0 + 2 / FPS, "each frame is near a hit of the two"
    exact = load_video(path, fps=FPS)
    for frame, time in zip(shown.frames, shown.times, strict=True):
        assert np.array_equal(frame, exact.frames[np.searchsorted(exact.times, time)])
    told = result.to_dict()["reader_looked_at"]
    assert "Sampled 12 frames" in told and f"{shown.times[0]:.2f}" in told
    assert "240 frames" in result.to_dict()["looked_at"]


def test_a_short_video_is_read_as_it_was_seen():
    path, question, candidates = digitworld_clip()
    reader = Watcher()
    eyes = TrueEyes(true_stsg(*long_scene(FRAMES)))
    result = VideoQA(eyes, reader).ask(path, question, candidates, Sampling(num_frames=8))
    assert reader.shown == [eyes.seen[0]] and result.read is None and result.clip is eyes.seen[0]
    assert result.to_dict()["reader_looked_at"] is None


def test_a_reader_with_less_room_than_the_eyes_is_shown_less(film):
    path, truth = film
    reader, question = Watcher(), "What happens?"
    result = VideoQA(TrueEyes(truth), reader).ask(path, question, ("a", "b"), Sampling(num_frames=14))
    assert len(result.clip.times) == 14 and len(reader.shown[0].times) <= 12


class TestLooking:
    def test_frames_are_shared_out_among_moments(self, film):
        moments = [Interval(3, 3), Interval(20, 20), Interval(20.5, 21)]
        clip = look_at(film[0], moments, 12, Interval(0, 30))
        assert sum(clip.times < 10) == 4 and clip.times[0] >= 2 - 1 / FPS and clip.times[3] <= 4
        assert sum(clip.times > 10) == 8 and clip.times[4] >= 19 - 1 / FPS and clip.times[-1] <= 22
        assert clip.info.sampled_times_s == tuple(clip.times) and clip.info.num_frames == 12
        assert (clip.info.start, clip.info.end) == (2.0, 22.0)

    def test_a_clip_in_memory_gives_the_same_frames_as_its_file(self, film):
        moments = [Interval(3, 3), Interval(29.9, 30)]
        whole = load_video(film[0], fps=FPS)
        found, expected = (look_at(v, moments, 10, Interval(0, 30)) for v in (whole, film[0]))
        assert np.array_equal(found.times, expected.times) and np.array_equal(found.frames, expected.frames)

    def test_nothing_outside_of_the_range_is_shown(self, film):
        clip = look_at(film[0], [Interval(5, 5), Interval(8, 9)], 12, Interval(5, 8.5))
        assert clip.times.min() >= 5 - 1 / FPS and clip.times.max() <= 8.5
        outside = look_at(film[0], [Interval(1, 1)], 6, Interval(5, 8))
        assert len(outside.times) == 6 and outside.times.min() >= 5 - 1 / FPS


class TestStreams:
    @pytest.mark.parametrize("options", [{"fps": 8}, {"fps": 3, "start": 2, "end": 9}, {"num_frames": 50}])
    def test_frames_are_counted_without_decoding(self, film, options):
        assert count_frames(film[0], **options) == len(list(stream_video(film[0], **options)))

    @pytest.mark.parametrize("most", [0, 1, 5, 239, 240, 300])
    def test_a_stream_that_is_asked_for_its_length_loses_nothing(self, film, most):
        stream = stream_video(film[0], fps=8)
        assert stream.begun.kind == "video" and stream.begun.width == 64 and stream.begun.frames_sampled == 0
        assert stream.is_longer(most) == (most < FRAMES) and stream.is_longer(2)
        assert [time for _, time in stream] == pytest.approx(np.arange(FRAMES) / FPS, abs=1e-3)


@pytest.fixture
def models(folder_of, tmp_path_factory, monkeypatch):
    """A tiny model that writes graphs, and a tiny detector that is sure of a few things."""
    monkeypatch.setattr(written, "WRITTEN_TOKENS", 4)
    reader = load_video_language_model(folder_of("smolvlm2"), max_frames=8)
    detector = load_detector(detectors.save("rt_detr", tmp_path_factory.mktemp("detector") / "rt_detr"))
    detector.sure, detector.window = 0.45, 8
    return {
        "vlm": VideoQA(WrittenGraph(reader, "m"), reader),
        "detector": VideoQA(detector, lambda prompt: ""),
    }


@pytest.mark.parametrize("kind", ["vlm", "detector"])
def test_of_the_windows_one_is_held_at_a_time(film, models, kind, monkeypatch):
    """And the one before, until the model has begun with the next."""
    video_qa, held, alive = models[kind], [], []
    see = type(video_qa.eyes).see
    gc.collect()
    gc.freeze()  # what is there already need not be searched again and again

    def watching(self, clip):
        gc.collect()
        held.append(weakref.ref(clip.frames))
        alive.append(sum(frames() is not None for frames in held))
        return see(self, clip)

    monkeypatch.setattr(type(video_qa.eyes), "see", watching)
    clip, sight = video_qa.see(film[0], Sampling(fps=8, end=6))
    assert sight.stsg.num_frames == 48 and len(clip.times) <= 8 and sight.stsg.validate() == []
    assert len(alive) == 1 + -(-(48 - 8) // 6) and max(alive) <= 2


@pytest.fixture
def vot(monkeypatch, capfd):
    from vot_kernels import cli

    monkeypatch.setattr(written, "WRITTEN_TOKENS", 4)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vot", *map(str, words)])
        capfd.readouterr()  # what making a model's folder wrote
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return run


def test_the_command_answers_about_a_long_video(vot, film, folder_of, monkeypatch):
    watched = []
    init = video_language.ClipLanguageModel.__init__
    monkeypatch.setattr(
        video_language.ClipLanguageModel,
        "__init__",
        lambda self, whole, clip: watched.append(clip) or init(self, whole, clip),
    )
    code, out, err = vot(
        *(
            "ask",
            film[0],
            "What happens at 20 s?",
            "--candidates",
            "a hit|nothing",
            "--vlm",
            folder_of("smolvlm2"),
        ),
        *("--fps", 8, "--window", 8, "--end", 22, "--json", "--skip", "action_analysis"),
    )
    assert code == 0, err
    answer, windows = json.loads(out), 1 + -(-(176 - 8) // 6)
    assert len(answer["stsg"]["frame_times_s"]) == 176 and len(answer["eyes"]["calls"]) == windows
    assert (
        len(watched) == windows + 2 and max(len(clip.times) for clip in watched) == 8
    )  # one for the estimate
    assert "Sampled 176 frames" in answer["looked_at"] and "fps 8" in answer["looked_at"]
    assert "Sampled 8 frames" in answer["reader_looked_at"]
    assert (np.abs(watched[-1].times - 20) <= 1.5).all(), "the question names the moment"


def test_bad_windows(vot, film, folder_of):
    for words, message in (
        (("--window", 8), "give --vlm PATH"),
        (("--vlm", folder_of("smolvlm2"), "--window", 3), "at least 4 frames, got 3"),
    ):
        code, out, err = vot("ask", film[0], "What?", *words)
        assert code == 2 and not out and message in err and len(err.splitlines()) == 1


class Costly(Watcher):
    """A reader whose estimates can be counted by hand."""

    max_frames = 32

    def estimate(self, clip: VideoClip) -> Estimate:
        self.shown.append(clip)
        return Estimate(1, 1, 1, 1, 10.0, 1.0, 1.0, 1e3)


class TestEstimates:
    def test_windows_and_questions_are_counted(self, film, tmp_path):
        reader = Costly()
        video_qa = VideoQA(WrittenGraph(reader, "m"), reader)
        short = digitworld_clip()[0]
        every = Sampling()
        long, missing = (film[0], 3, every), (tmp_path / "missing.mp4", 5, every)
        found = estimate_run(video_qa, [long, (short, 2, every), missing])
        # 60 frames at 2 a second are a window of 32 and two of 24 more; each question has a clip of its own
        assert found.run == Run(videos=2, questions=5, clips=3 + 3 + 1, graphs=3 + 1)
        assert len(reader.shown[0].times) == 32 and len(reader.shown) == 1
        assert found.seconds == pytest.approx(7 * 10 + 5 + (4 * 512 + 5 * 288) / 1e3)
        assert estimate_run(video_qa, [(*long[:2], Sampling(num_frames=32))]).run == Run(1, 3, 1, 1)

    def test_other_eyes_write_no_graph(self, film):
        reader = Costly()
        video_qa = VideoQA(TrueEyes(film[1]), reader)
        assert estimate_run(video_qa, [(film[0], 3, Sampling())]).run == Run(1, 3, 3, 0)
        clip = load_video(film[0], num_frames=6)
        assert (
            estimate_run(video_qa, [(clip, 3, Sampling())]).run == Run(1, 3, 1, 0)
            and reader.shown[-1] is clip
        )

    def test_a_reader_that_sees_nothing_has_none(self, film):
        assert estimate_run(VideoQA(TrueEyes(film[1]), lambda prompt: ""), [(film[0], 1, Sampling())]) is None
        reader = Costly()
        assert estimate_run(VideoQA(TrueEyes(film[1]), reader), [("missing.mp4", 1, Sampling())]) is None

    def test_long_runs_are_announced_for_several_videos_and_batches(
        self, vot, film, folder_of, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("vot_kernels.watching.cost.LONG", 0.0)
        short = digitworld_clip()[0]
        words = ("--num-frames", 4, "--vlm", folder_of("smolvlm2"), "--skip", "action_analysis")
        code, _, err = vot("ask", short, film[0], "What?", "--candidates", "a|b", *words)
        assert code == 0 and err.count("Estimate: ") == 1
        assert "for 2 questions about 2 videos (clips to read: 2, graphs to write: 2)" in err
        lines = [{"video": str(short), "question": q, "candidates": ["a", "b"]} for q in ("What?", "Who?")]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
        code, _, err = vot("ask", "--batch", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl", *words)
        assert code == 0
        assert "for 2 questions about 1 video (clips to read: 1, graphs to write: 1)" in err


def test_a_named_object_without_events_is_looked_at_while_it_is_seen():
    from vot_kernels.reasoning.moments import moments_to_look_at

    box = (Box(0.1, 0.1, 0.2, 0.2), 1.0)
    tracks = (Tracklet("o1", "cat", (), {4: box, 6: box}), Tracklet("o2", "dog", (), {0: box}))
    graph = STSG(tuple(k / 2 for k in range(20)), tracks)
    assert moments_to_look_at("What does the cat do?", graph, 4) == [Interval(2, 3)]
    assert moments_to_look_at("What happens?", graph, 4) == [Interval(0, 9.5)]
    assert moments_to_look_at("What happens between 4 s and 6 s?", graph, 4) == [Interval(4, 6)]
