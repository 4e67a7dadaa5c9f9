"""Detectors as eyes: what they find is linked into tracklets, and relations and events follow from the boxes."""

import json
import sys

import numpy as np
import pytest
import torch

from tests.watching.detectors import DETECTORS, LABELS, ZERO_SHOT, save
from vot_kernels.data.digitworld.episode import generate_episode
from vot_kernels.data.sample_clips import digitworld_clip, natural_clip
from vot_kernels.data.video import VideoClip, load_video
from vot_kernels.reasoning.llm import LanguageModelError
from vot_kernels.scene_graph.graph import STSG, Box
from vot_kernels.scene_graph.relations import geometric_relations
from vot_kernels.testing import shifted
from vot_kernels.watching.detector import DetectorEyes, load_detector
from vot_kernels.watching.protocols import Eyes
from vot_kernels.watching.tracking import Found, appearance, distinct, link


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp("detectors") / name)
        return made[name]

    return folder


@pytest.fixture(scope="module", params=DETECTORS)
def eyes(request, detector_folder):
    objects = ["bicycle", "person"] if request.param in ZERO_SHOT else []
    return load_detector(detector_folder(request.param), objects)


@pytest.fixture(scope="module")
def clip() -> VideoClip:
    return load_video(digitworld_clip()[0], num_frames=6)


def found_in(episode) -> list[list[Found]]:
    """What a detector without error finds in an episode: one label for all, in any order."""
    rng = np.random.default_rng(shifted(0))
    frames = []
    for k in range(episode.stsg.num_frames):
        objects = [Found(node.box, 0.9, "digit") for node in episode.stsg.frame(k).nodes]
        frames.append([objects[n] for n in rng.permutation(len(objects))])
    return frames


def test_a_detector_is_eyes(eyes, clip):
    assert isinstance(eyes, Eyes)
    eyes.sure = 0.0
    frames = [list(frame) for frame in eyes._find(clip, 0)] + [list(frame) for frame in eyes._find(clip, 4)]
    assert len(frames) == len(clip.frames) and any(frames)
    scores = sorted(item.score for frame in frames for item in frame)
    eyes.sure = scores[-10:][0] - 1e-6  # so that the random model is sure of something
    sight = eyes.see(clip)
    assert sight.stsg.validate() == [] and sight.warning is None and sight.eyes == eyes.name
    assert sight.stsg.frame_times_s == tuple(clip.times)
    assert {t.label for t in sight.stsg.tracklets} <= set(eyes.objects or LABELS.values())
    assert "vot-kernels" in str(eyes.kernels) or "vot_kernels.flash_attn_varlen_func" in str(eyes.kernels)


def test_a_detector_may_find_nothing(eyes, clip):
    eyes.sure = 1.0
    sight = eyes.see(clip)
    assert sight.stsg.tracklets == () and sight.stsg.frame_times_s == tuple(clip.times)


def test_boxes_are_those_of_the_processor_in_fractions_of_the_frame(detector_folder):
    """On a frame that is not square, so that width and height cannot be mistaken for each other."""
    eyes = load_detector(detector_folder("rt_detr"))
    eyes.sure = 0.0
    frame = np.random.default_rng(shifted(0)).integers(0, 255, (48, 96, 3), np.uint8)
    info = load_video(digitworld_clip()[0], num_frames=1).info
    (found,) = eyes._find(VideoClip(frame[None], np.zeros(1), info), 0)
    inputs = eyes.processor(images=[frame], return_tensors="pt")
    with torch.no_grad():
        output = eyes.model(**inputs)
    (direct,) = eyes.processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(1, 1)])
    boxes = direct["boxes"].clamp(0, 1)
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]).prod(1) > 0)]
    assert np.allclose([item.box for item in found], boxes, atol=1e-5) and len(found) == len(boxes) > 0


@pytest.fixture(scope="module")
def episodes():
    return [generate_episode("train", index) for index in range(6)]


class TestLinking:
    def test_objects_keep_their_identity(self, episodes):
        """Boxes without labels of DigitWorld, whose digits cross and collide, against the true tracks."""
        together = total = 0
        for episode in episodes:
            tracklets = link(np.stack(list(episode.frames())), found_in(episode))
            for truth in episode.stsg.tracklets:
                shares = [
                    sum(truth.box(k) is not None and truth.box(k).iou(t.box(k)) > 0.99 for k in t.frames)
                    for t in tracklets
                ]
                together, total = together + max(shares), total + len(truth.boxes)
        assert together >= 0.95 * total

    def test_relations_are_those_of_the_true_tracks(self, episodes):
        episode = episodes[0]
        tracklets = link(np.stack(list(episode.frames())), found_in(episode))
        seen = STSG(tuple(episode.times), tracklets)
        truth = STSG(tuple(episode.times), episode.stsg.tracklets)
        moves = ["moves left", "moves right", "moves up", "moves down"]
        count = [len(geometric_relations(graph, predicates=moves)) for graph in (seen, truth)]
        assert count[0] == pytest.approx(count[1], abs=2) and count[1] > 2

    def test_a_missed_frame_is_filled_and_a_single_sighting_is_dropped(self):
        frames = np.zeros((6, 64, 64, 3), np.uint8)
        at = [[Found(Box(0.1 + 0.05 * k, 0.4, 0.3 + 0.05 * k, 0.6), 0.8, "car")] for k in range(6)]
        at[2] = []
        at[4] = [*at[4], Found(Box(0.8, 0.8, 0.9, 0.9), 0.5, "dog")]
        (car,) = link(frames, at)
        assert (car.id, car.label, car.frames) == ("o1", "car", tuple(range(6)))
        assert np.allclose(car.box(2), (0.2, 0.4, 0.4, 0.6))

    def test_labels_and_distance_keep_objects_apart(self):
        frames = np.zeros((4, 64, 64, 3), np.uint8)
        car = Found(Box(0.1, 0.1, 0.2, 0.2), 0.9, "car")
        cat, far = car._replace(label="cat"), car._replace(box=Box(0.8, 0.8, 0.9, 0.9))
        assert len(link(frames, [[car], [car], [cat], [cat]])) == 2
        assert len(link(frames, [[car], [car], [far], [far]])) == 2

    @pytest.mark.parametrize("swapped", [False, True])
    def test_colour_decides_where_boxes_hardly_do(self, swapped):
        """Two objects meet and part, or pass each other, between two frames; their colours tell which."""
        red, blue = (255, 0, 0), (0, 0, 255)
        frames = np.zeros((2, 40, 80, 3), np.uint8)
        before = Box(0.1, 0.2, 0.3, 0.8), Box(0.5, 0.2, 0.7, 0.8)
        after = Box(0.25, 0.2, 0.35, 0.8), Box(0.45, 0.2, 0.55, 0.8)
        frames[0, :, :32], frames[0, :, 32:] = red, blue
        frames[1, :, :32], frames[1, :, 32:] = (blue, red) if swapped else (red, blue)
        tracklets = link(frames, [[Found(box, 0.9, "ball") for box in boxes] for boxes in (before, after)])
        assert [t.box(0) for t in tracklets] == list(before)
        assert [t.box(1) for t in tracklets] == list(after[::-1] if swapped else after)

    def test_nothing_found(self):
        assert link(np.zeros((3, 8, 8, 3), np.uint8), [[], [], []]) == ()

    def test_a_single_frame_is_enough_of_a_picture(self):
        assert len(link(np.zeros((1, 8, 8, 3), np.uint8), [[Found(Box(0, 0, 1, 1), 0.9, "car")]])) == 1


def test_appearance_is_the_share_of_colours_and_works_at_the_edges():
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[:, 4:] = 255
    assert appearance(frame, Box(0, 0, 1, 1))[[0, -1]].tolist() == [0.5, 0.5]
    for box in (Box(1, 1, 1, 1), Box(0, 0, 0, 0), Box(0.5, 0, 1, 1)):
        assert appearance(frame, box).sum() == pytest.approx(1)


def test_of_objects_that_cover_each_other_the_surest_stays():
    a, b = Found(Box(0, 0, 0.5, 0.5), 0.6, "car"), Found(Box(0, 0, 0.5, 0.52), 0.8, "car")
    other = Found(Box(0, 0, 0.5, 0.5), 0.5, "bus")
    assert distinct([a, b, other]) == [b, other]


def test_what_to_look_for(detector_folder):
    with pytest.raises(LanguageModelError, match="--objects 'car|dog'"):
        load_detector(detector_folder("owlv2"))
    with pytest.raises(
        LanguageModelError, match="does not know 'dog'; it knows bicycle, person, traffic light"
    ):
        load_detector(detector_folder("rt_detr"), ["dog"])
    eyes = load_detector(detector_folder("rt_detr"), ["person"])
    assert [eyes._wanted(label) for label in ("person", "bicycle")] == ["person", ""]
    phrases = DetectorEyes(eyes.model, eyes.processor, "it", ["person", "traffic light"])
    assert [phrases._wanted(label) for label in ("a person", "traffic light red", "", None)] == [
        *("person", "traffic light", "", "")
    ]
    phrases.objects = ("man", "woman", "car", "red car")
    assert [
        phrases._wanted(label) for label in ("a woman", "the man", "a red car", "cargo", "car (red)")
    ] == [*("woman", "man", "red car", "", "car")]


def test_a_model_whose_attention_turns_out_not_to_be_served_runs_as_it_is(detector_folder, clip):
    """Grounding DINO gives its text tower a mask for every pair of words."""
    eyes = load_detector(detector_folder("grounding_dino"), ["bicycle"])
    assert "modules replaced" in str(eyes.kernels)
    patched = eyes.see(clip)
    assert "Nothing runs on the kernels" in str(eyes.kernels) and "mask of its own" in str(eyes.kernels)
    plain = DetectorEyes(eyes.model, eyes.processor, "it", ["bicycle"]).see(clip)
    assert patched.stsg.tracklets == plain.stsg.tracklets


def test_errors_of_the_model_itself_are_not_hidden(detector_folder, clip, monkeypatch):
    eyes = load_detector(detector_folder("rt_detr"))

    def broken(*_, **__):
        raise ValueError("too few queries")

    monkeypatch.setattr(type(eyes.model), "forward", broken)
    with pytest.raises(ValueError, match="too few queries"):
        eyes.see(clip)
    assert "modules replaced" in str(eyes.kernels)


@pytest.mark.parametrize("reader", ["vlm", "llm"])
def test_the_whole_command(detector_folder, folder_of, reader, monkeypatch, capfd):
    """The detector's graph goes to a video-language model or to a text model; a perfect detector is put in."""
    from tests.reasoning.scripted import ScriptedLanguageModel
    from vot_kernels import cli
    from vot_kernels.pipelines import video_qa

    def crossing(self, clip, start):
        for k in range(start, min(start + 4, len(clip.frames))):
            x = 0.1 + 0.7 * k / (len(clip.frames) - 1)
            yield [Found(Box(x, 0.4, x + 0.1, 0.7), 0.9, "bicycle")]

    monkeypatch.setattr(DetectorEyes, "_find", crossing)
    monkeypatch.setattr(
        video_qa, "load_language_model", lambda path, device: ScriptedLanguageModel(likelihood={})
    )
    words = [
        "vot",
        "ask",
        natural_clip(),
        "Which way does the bicycle go?",
        "--candidates",
        "left|right",
        "--json",
    ]
    words += ["--end", "3", "--detector", detector_folder("rt_detr")]
    words += ["--vlm", folder_of("smolvlm2")] if reader == "vlm" else []
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    answer = json.loads(capfd.readouterr().out)
    assert ended.value.code == 0 and answer["choice"] == "right" and answer["warning"] is None
    assert answer["eyes"]["name"] == "the detector rt_detr" and answer["eyes"]["parse_issues"] == 0
    assert len(answer["stsg"]["frame_times_s"]) == 12  # 4 a second
    assert [t["label"] for t in answer["stsg"]["tracklets"]] == ["bicycle"]
    assert answer["trace"][4]["output"]["checks"][-1]["verdict"] == "supported"
    assert answer["model"] == ("smolvlm2" if reader == "vlm" else "scripted")
