"""Videos longer than a window: windows, joined tracklets, a graph and a memory that do not grow, streamed tokens."""

import gc
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.pipelines.long_scenes import drawn, long_scene, part_of
from vot_kernels.data.digitworld.truth import true_stsg
from vot_kernels.data.video import VideoError, load_video, save_mp4, stream_video
from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT
from vot_kernels.models.encoder import VotEncoderConfig, VotImageProcessor
from vot_kernels.models.perception import VotPerceptionConfig, VotPerceptionModel, detect
from vot_kernels.pipelines.encode import encode_videos
from vot_kernels.pipelines.long_video import GraphJoiner, see_stream
from vot_kernels.pipelines.long_video.frames import Showcase, windows
from vot_kernels.pipelines.long_video.joining import MAX_BOXES
from vot_kernels.pipelines.long_video.reading import PATIENCE, shown_part
from vot_kernels.pipelines.sampling import Sampling, stream_samples
from vot_kernels.pipelines.video_qa import VideoQA, load_perception
from vot_kernels.scene_graph import STSG, Box, Event, Interval, Relation, Tracklet
from vot_kernels.watching.perception import PerceptionEyes, explained


@pytest.fixture(scope="module")
def perception():
    return load_perception()


class TestWindows:
    @pytest.mark.parametrize("count", [1, 7, 8, 9, 13, 14, 100])
    def test_they_cover_the_stream_and_overlap(self, count):
        frames = [(np.full((2, 2, 3), k % 256, np.uint8), k / 8) for k in range(count)]
        cut = list(windows(iter(frames), 8, 3))
        assert sum(window.new for window in cut) == count
        end = 0
        for window in cut:
            assert window.start + len(window.times) == end + window.new and len(window.times) == min(8, count)
            assert window.start == 0 or end - window.start >= 3
            np.testing.assert_array_equal(window.times, np.arange(window.start, end + window.new) / 8)
            np.testing.assert_array_equal(
                window.frames[:, 0, 0, 0], np.arange(window.start, end + window.new)
            )
            end += window.new

    @pytest.mark.parametrize("overlap", [0, 8])
    def test_a_window_must_be_longer_than_what_it_shares(self, overlap):
        with pytest.raises(ValueError, match="overlap must be between 1 and size - 1 = 7"):
            list(windows([], 8, overlap))

    @pytest.mark.parametrize("count", [1, 8, 9, 1000])
    def test_the_frames_to_show_are_few_and_even(self, count):
        showcase = Showcase(8)
        assert sum(1 for _ in showcase.watch((np.zeros(1), k) for k in range(count))) == count
        times = [time for _, time in showcase.kept]
        assert len(times) <= 8 and (count < 8 or len(times) > 4)
        assert len(set(np.diff(times).tolist())) <= 1 and times[0] == 0


class TestJoining:
    @pytest.mark.parametrize("size,overlap", [(16, 4), (32, 8), (20, 11)])
    def test_windows_of_the_truth_give_the_truth(self, size, overlap):
        """Tracklets come in another order in each window; events and relations are whole, each once."""
        truth = true_stsg(*long_scene(200))
        rng, joiner, start = np.random.default_rng(0), GraphJoiner(), 0
        while True:
            end = min(start + size, 200)
            order = rng.permutation(len(truth.tracklets)).tolist()
            joiner.add(part_of(truth, start, end, order), start)
            if end == 200:
                break
            start = min(end - overlap, 200 - size)
        joined = joiner.graph("joined")
        assert joined.validate() == [] and joined.frame_times_s == truth.frame_times_s
        same = {t.id: next(u.id for u in truth.tracklets if u.name == t.name) for t in joined.tracklets}
        assert len(same) == len(set(same.values())) == len(truth.tracklets)
        for tracklet in joined.tracklets:
            of_truth = truth.tracklet(same[tracklet.id])
            assert all(of_truth.boxes[k] == entry for k, entry in tracklet.boxes.items())
        events = Counter((e.kind, e.t, frozenset(same[p] for p in e.participants)) for e in joined.events)
        assert events == Counter((e.kind, e.t, frozenset(e.participants)) for e in truth.events)
        relations = {(same[r.subject], r.predicate, same[r.object], r.t0, r.t1) for r in joined.relations}
        wanted = {(r.subject, r.predicate, r.object, r.t0, r.t1) for r in truth.relations}
        assert relations == wanted

    def test_boxes_thin_out_and_events_keep_theirs(self):
        truth = true_stsg(*long_scene(2400))
        joiner = GraphJoiner()
        for start in range(0, 2400 - 24, 24):
            joiner.add(part_of(truth, start, min(start + 32, 2400)), start)
        joined = joiner.graph()
        for tracklet in joined.tracklets:
            at_events = {e.t for e in joined.events if tracklet.id in e.participants}
            assert at_events <= set(tracklet.frames)
            assert len(set(tracklet.frames) - at_events) <= MAX_BOXES + 32
        assert joiner.every == 16

    def test_what_meets_nothing_in_the_shared_frames_is_new(self):
        times = tuple(k / 8 for k in range(8))
        left, right = Box(0.1, 0.1, 0.2, 0.2), Box(0.7, 0.7, 0.8, 0.8)
        first = STSG(times, (Tracklet("o1", "cup", ("red",), {k: (left, 1.0) for k in range(8)}),))
        second = STSG(times, (Tracklet("o1", "cup", ("red",), {k: (right, 1.0) for k in range(8)}),))
        joiner = GraphJoiner()
        assert joiner.add(first, 0) == {"o1": "o1"} and joiner.add(second, 4) == {"o1": "o2"}
        # Up to the middle of what is shared, every 4th frame of what is past.
        assert set(joiner.graph().tracklet("o1").frames) == {0, 4, 5}
        assert set(joiner.graph().tracklet("o2").frames) == set(range(6, 12))
        with pytest.raises(ValueError, match="one of the frames 0 to 12, got 13"):
            joiner.add(first, 13)

    def test_a_name_that_is_misread_once_is_outvoted(self):
        times = tuple(k / 8 for k in range(8))
        box = {k: (Box(0.1, 0.1, 0.3, 0.3), 1.0) for k in range(8)}
        joiner = GraphJoiner()
        for start, label in ((0, "cup"), (4, "jug"), (8, "cup")):
            joiner.add(STSG(times, (Tracklet("o1", label, ("red",), box),)), start)
        assert [t.name for t in joiner.graph().tracklets] == ["red cup"]

    def test_what_only_the_edge_of_a_window_shows_is_no_object(self):
        red = Tracklet("o1", "digit", ("red",), {k: (Box(0.1, 0.1, 0.3, 0.3), 1.0) for k in range(32)})
        blue = Tracklet("o2", "digit", ("blue",), {k: (Box(0.6, 0.6, 0.8, 0.8), 1.0) for k in (29, 30, 31)})
        times = tuple(k / 8 for k in range(32))
        left = (Relation("o1", "left of", "o2", 27, 29), Relation("o1", "moves", "o1", 0, 31))
        joiner = GraphJoiner()
        joiner.add(STSG(times, (red, blue), left, (Event("hits", 27, ("o1", "o2")),)), 0)
        assert [t.name for t in joiner.graph().tracklets] == ["red digit", "blue digit"]
        joiner.add(STSG(times, (red,)), 24)
        joined = joiner.graph()
        assert [t.name for t in joined.tracklets] == ["red digit"]
        assert [r.predicate for r in joined.relations] == ["moves"] and joined.events == ()

    def test_what_is_seen_for_a_moment_stays_an_object(self):
        """Frames 5 to 7 lie between those whose boxes stay."""
        brief = Tracklet("o1", "cup", (), {k: (Box(0.1, 0.1, 0.3, 0.3), 1.0) for k in (5, 6, 7)})
        times = tuple(k / 8 for k in range(32))
        joiner = GraphJoiner()
        joiner.add(STSG(times, (brief,)), 0)
        for start in range(24, 2400, 24):
            joiner.add(STSG(times), start)
        assert [t.frames for t in joiner.graph().tracklets] == [(5,)]

    def test_the_name_is_that_of_the_boxes_that_count(self):
        """Of the 8 boxes of the first window the second takes 3 back, and has 6 of its own."""
        boxes = {k: (Box(0.1, 0.1, 0.3, 0.3), 1.0) for k in range(9)}
        times, joiner = tuple(k / 8 for k in range(9)), GraphJoiner()
        first = {k: boxes[k] for k in range(8)}
        joiner.add(STSG(times[:8], (Tracklet("o1", "jug", ("red",), first),)), 0)
        joiner.add(STSG(times, (Tracklet("o1", "cup", ("red",), boxes),)), 2)
        assert [t.name for t in joiner.graph().tracklets] == ["red cup"]

    def test_what_goes_on_over_the_cut_is_one_relation_and_one_event(self):
        times = tuple(k / 8 for k in range(8))
        boxes = {k: (Box(0.1, 0.1, 0.3, 0.3), 1.0) for k in range(8)}
        tracklets = (Tracklet("o1", "cup", (), boxes),)
        first = STSG(times, tracklets, (Relation("o1", "moves", "o1", 2, 7),), (Event("falls", 5, ("o1",)),))
        second = STSG(times, tracklets, (Relation("o1", "moves", "o1", 0, 3),), (Event("falls", 2, ("o1",)),))
        joiner = GraphJoiner()
        joiner.add(first, 0)
        joiner.add(second, 4)
        joined = joiner.graph()
        assert [(r.t0, r.t1) for r in joined.relations] == [(2, 7)]
        assert [e.t for e in joined.events] == [5]  # seen by both, a frame apart, on either side of the cut


class TestReading:
    def test_one_window_gives_what_the_clip_gives(self, perception):
        scene, motion = long_scene(24)
        frames = list(drawn(scene, motion))
        clip = np.stack([frame for frame, _ in frames])
        (whole,) = explained(perception[0], detect(*perception, [clip], [np.arange(24) / 8], "clip"))
        seen = see_stream(*perception, iter(frames), "clip")
        assert seen.detection == whole and seen.complete
        np.testing.assert_array_equal(seen.frames, clip)

    def test_tracklets_keep_their_identity(self, perception):
        scene, motion = long_scene(200)
        seen = see_stream(*perception, drawn(scene, motion)).detection
        truth = true_stsg(scene, motion)
        assert len(seen.stsg.tracklets) == len(truth.tracklets) and seen.in_domain
        for tracklet in truth.tracklets:
            (same,) = [t for t in seen.stsg.tracklets if t.attributes == tracklet.attributes]
            overlap = [box.iou(tracklet.box(k)) for k, (box, _) in same.boxes.items()]
            assert same.frames[0] == 0 and same.frames[-1] == 199 and np.median(overlap) > 0.7
        found = Counter(e.kind for e in seen.stsg.events)
        wanted = Counter(e.kind for e in truth.events)
        assert 0.8 * wanted["hits"] <= found["hits"] <= 1.2 * wanted["hits"]

    def test_memory_is_flat(self):
        """No more frames and tensors are alive in a stream that is four times as long."""
        model = tiny_model(causal=None)
        (frames, tensors), (more_frames, more_tensors) = most_held(model, 500), most_held(model, 2000)
        assert frames <= 16 + 16 + 2 and more_frames == frames  # a window, those to show, and the next
        assert abs(more_tensors - tensors) < 10_000

    def test_a_stream_outside_of_the_domain_is_given_up(self, perception):
        grey = ((np.full((64, 64, 3), 128, np.uint8), k / 8) for k in range(10_000))
        seen = see_stream(*perception, grey)
        assert not seen.complete and not seen.detection.in_domain
        assert seen.detection.stsg.num_frames == 32 + 24 * (PATIENCE - 1) and next(grey)[1] < 40

    def test_a_causal_encoder_carries_its_state(self):
        """Two windows read from one stream give the tokens that the whole clip has at once."""
        model = tiny_model(causal="group")
        scene, motion = long_scene(20)
        frames = list(drawn(scene, motion))
        clip = np.stack([frame for frame, _ in frames])
        inputs = VotImageProcessor(patch_size=8)([clip], fps=[8.0])
        whole = model.encoder(**inputs).last_hidden_state.view(20, 64, -1)
        got = []

        def spy(module, args, kwargs, output):
            got.append(kwargs["tokens"].view(-1, 64, whole.shape[-1]))

        handle = model.register_forward_hook(spy, with_kwargs=True)
        see_stream(model, VotImageProcessor(patch_size=8), frames, size=12, overlap=4)
        handle.remove()
        assert [len(tokens) for tokens in got] == [12, 12]
        torch.testing.assert_close(got[0], whole[:12], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[1], whole[8:], atol=1e-4, rtol=1e-4)

    def test_no_frame_is_refused(self, perception):
        with pytest.raises(ValueError, match="at least one frame"):
            see_stream(*perception, iter(()))


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """A file of 160 frames, and its true graph."""
    scene, motion = long_scene(160)
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    save_mp4(path, (frame for frame, _ in drawn(scene, motion)), scene.fps)
    return path, true_stsg(scene, motion)


def tiny_model(causal: str | None) -> VotPerceptionModel:
    torch.manual_seed(0)
    encoder = VotEncoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        patch_size=8, pooling_heads=2, causal=causal, full_attention_every=0, num_experts=2, expert_rank=8,
    )  # fmt: skip
    return VotPerceptionModel(
        VotPerceptionConfig(
            encoder,
            num_queries=4,
            decoder_layers=1,
            decoder_heads=2,
            attributes=["red"],
            predicates=["near", "moves"],
            unary_predicates=["moves"],
            events=["hits", "falls"],
            unary_events=["falls"],
        )  # fmt: skip
    ).eval()


def most_held(model: VotPerceptionModel, count: int) -> tuple[int, int]:
    """Read a stream of `count` frames; return the largest numbers of frames and of tensors' bytes that were alive."""
    alive, most_alive, tensors, reports = 0, 0, 0, 0

    def forget() -> None:
        nonlocal alive
        alive -= 1

    def frames() -> Iterator[tuple[np.ndarray, float]]:
        nonlocal alive, most_alive
        for k in range(count):
            frame = np.full((16, 16, 3), k % 256, np.uint8)
            weakref.finalize(frame, forget)
            alive += 1
            most_alive = max(most_alive, alive)
            yield frame, k / 8

    def measure(text: str) -> None:
        nonlocal tensors, reports
        reports += 1
        if reports % 5 == 0:  # looking at every object takes a while
            # Not those of a subclass: a compiler's have no size.
            tensors = max(tensors, sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor))

    processor = VotImageProcessor(patch_size=8, min_pixels=256, max_pixels=256)
    seen = see_stream(model, processor, frames(), size=16, overlap=4, report=measure)
    assert seen.detection.stsg.num_frames == count
    return most_alive, tensors


class TestAsking:
    def test_a_long_file_is_answered_by_itself(self, perception, long_clip, tmp_path):
        path, truth = long_clip
        said: list[str] = []
        video_qa = VideoQA(PerceptionEyes(*perception), lambda prompt: "")
        hit = next(e for e in truth.events if e.kind == "hits" and e.t > 64)
        window = Interval(truth.frame_times_s[hit.t] - 0.5, truth.frame_times_s[hit.t] + 0.5)
        names = [f"the {truth.tracklet(id).attributes[0]} digit" for id in hit.participants]
        question = (
            f"Between {window.start_s:.2f} and {window.end_s:.2f} s, when does {names[0]} hit {names[1]}?"
        )
        result = video_qa.ask(path, question, report=said.append)
        found = result.answer.interval
        assert found is not None and found.length_s == 0.25
        assert abs((found.start_s + found.end_s) / 2 - truth.frame_times_s[hit.t]) <= 0.125
        assert any("Looking at the frames: 56, 7 s" in text for text in said)
        assert result.sight.stsg.num_frames == 160 and len(result.clip.frames) <= 32
        assert result.clip.info.frames_sampled == 160
        assert all(event.time_s in window for event in result.answer.evidence.events)
        assert result.save_picture(tmp_path / "long.png").stat().st_size > 1000

    def test_the_sampling_is_the_users(self, perception, long_clip):
        video_qa = VideoQA(PerceptionEyes(*perception), lambda prompt: "")
        assert video_qa.see(long_clip[0], Sampling(end=3.0))[1].stsg.num_frames == 24
        assert video_qa.see(long_clip[0], Sampling(num_frames=50))[1].stsg.num_frames == 50
        assert video_qa.see(long_clip[0], Sampling(fps=4, start=10))[1].stsg.num_frames == 40

    def test_a_stream_has_the_frames_of_the_file(self, long_clip):
        path, _ = long_clip
        whole, stream = load_video(path, fps=8), stream_samples(path, Sampling(), 8.0)
        with pytest.raises(VideoError, match="must be read to its end"):
            stream.info  # noqa: B018
        streamed = stream.clip()
        np.testing.assert_array_equal(streamed.frames, whole.frames)
        np.testing.assert_array_equal(streamed.times, whole.times)
        assert streamed.info == whole.info

    def test_a_stream_can_be_stopped_and_a_bad_file_is_reported_at_once(self, long_clip, tmp_path):
        stream = stream_video(long_clip[0], fps=8)
        frames = iter(stream)
        for _ in range(5):
            next(frames)
        info = stream.stop()
        assert info.frames_sampled == 5 and not info.complete and info.sampled_times_s[-1] == 0.5
        (tmp_path / "bad.mp4").write_bytes(b"no video")
        with pytest.raises(VideoError, match="cannot be read"):
            stream_video(tmp_path / "bad.mp4")

    def test_the_frames_shown_have_their_part_of_the_graph(self):
        truth = true_stsg(*long_scene(100))
        times = np.array(truth.frame_times_s[::25])
        part = shown_part(truth, times)
        assert part.frame_times_s == tuple(times) and part.validate() == []
        assert part.tracklets[0].box(2) == truth.tracklets[0].box(50)
        assert shown_part(truth, np.array(truth.frame_times_s)) is truth


def test_all_frames_are_encoded_as_in_one_pass(vot, tmp_path):
    scene, motion = long_scene(70)
    frames = np.stack([frame for frame, _ in drawn(scene, motion)])
    video = save_mp4(tmp_path / "long.mp4", frames, scene.fps)
    image = tmp_path / "still.png"
    Image.fromarray(frames[0]).save(image)
    code, out, _ = vot(
        "encode", str(video), str(image), "--out", str(tmp_path / "chunks.safetensors"), "--long"
    )
    assert code == 0 and out.strip() == str(tmp_path / "chunks.safetensors")
    encode_videos([video, image], tmp_path / "whole.safetensors", sampling=Sampling(fps=scene.fps))
    chunks, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("chunks", "whole"))
    assert chunks.keys() == whole.keys() and len(whole["0.times_s"]) == 70
    for name, tensor in whole.items():
        assert chunks[name].dtype == tensor.dtype
        torch.testing.assert_close(chunks[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    with safe_open(tmp_path / "chunks.safetensors", "pt") as file:
        assert file.metadata() == {"0": str(video), "1": str(image)}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chunks.safetensors",
        "long.mp4",
        "still.png",
        "whole.safetensors",
    ]


def test_long_encoding_refuses_damaged_weights(vot, tmp_path):
    scene, motion = long_scene(8)
    video = save_mp4(tmp_path / "a.mp4", np.stack([frame for frame, _ in drawn(scene, motion)]), scene.fps)
    folder = shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.full_like(w, torch.nan) for name, w in weights.items()}, folder / "model.safetensors"
    )
    out = tmp_path / "e.safetensors"
    code, _, err = vot("encode", str(video), "--checkpoint", str(folder), "--out", str(out), "--long")
    assert code == 2 and "The encoder gives NaN, so its weights are damaged." in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "damaged"]


def test_long_encoding_and_ray_exclude_each_other(vot, tmp_path):
    code, _, err = vot("encode", "a.mp4", "--out", "e.safetensors", "--long", "--engine", "ray")
    assert code == 2 and "--long works in this process alone" in err
