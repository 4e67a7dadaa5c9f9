import numpy as np
import pytest

from vot_kernels.data.digitworld import (
    COLOUR_NAMES,
    SPLITS,
    generate_episode,
    load_sidecar,
    save_episode,
)
from vot_kernels.data.digitworld.scene import HELD_OUT_SIZES, pair_is_held_out
from vot_kernels.data.digitworld.sprites import image_split
from vot_kernels.scene_graph.graph import STSG


@pytest.fixture(scope="module")
def drawn():
    return {split: [generate_episode(split, index) for index in range(120)] for split in SPLITS}


def pool(name: str) -> set[int]:
    return {int(image) for part in image_split()[name] for image in part}


def test_splits_hold_out_what_they_say(drawn):
    pairs = {
        split: {p for e in drawn[split] for p in zip(e.scene.colours, e.scene.digits, strict=True)}
        for split in SPLITS
    }
    held_out = {(c, d) for c in COLOUR_NAMES for d in range(10) if pair_is_held_out(c, d)}
    assert len(held_out) == 16
    for split in SPLITS:
        counts = {len(e.scene.digits) for e in drawn[split]}
        assert counts == ({5} if split == "five_objects" else {3, 4})
        assert {e.scene.num_frames for e in drawn[split]} == ({32} if split == "long" else {16})
        sizes = {e.scene.size for e in drawn[split]}
        assert sizes == (set(HELD_OUT_SIZES) if split == "resolution" else {(64, 64)})
        images = {image for e in drawn[split] for image in e.scene.images}
        assert images <= pool(split if split in ("train", "val") else "test")
        if split == "held_out_pairs":
            assert pairs[split] <= held_out
        else:
            assert not pairs[split] & held_out
    assert pairs["held_out_pairs"] == held_out


def test_train_refuses_what_is_held_out():
    for override in ({"size": HELD_OUT_SIZES[1]}, {"num_frames": 32}):
        with pytest.raises(ValueError, match="held out"):
            generate_episode("train", 0, **override)
    assert generate_episode("train", 0, size=(56, 72)).frames().shape == (16, 56, 72, 3)


def test_clips_have_events_worth_asking_about(drawn):
    hits = [len(e.motion.hits) for e in drawn["test"]]
    assert np.mean([1 <= n <= 4 for n in hits]) > 0.7
    assert 0 in hits


def test_same_arguments_same_episode():
    for split in SPLITS:
        one, two = generate_episode(split, 5, 2), generate_episode(split, 5, 2)
        assert np.array_equal(one.frames(), two.frames())
        assert one.questions == two.questions and one.stsg == two.stsg
    others = [generate_episode("test", 6, 2), generate_episode("test", 5, 3), generate_episode("val", 5, 2)]
    base = generate_episode("test", 5, 2)
    assert all(not np.array_equal(base.centers[0], other.centers[0]) for other in others)


def test_truth_tensors_agree_with_the_graph(drawn):
    for split in SPLITS:
        for episode in drawn[split][:8]:
            stsg = episode.stsg
            assert stsg.validate() == []
            height, width = episode.scene.size
            for n, tracklet in enumerate(stsg.tracklets):
                assert tracklet.name == f"{episode.scene.colours[n]} digit {episode.scene.digits[n]}"
                assert tracklet.frames == tuple(range(episode.scene.num_frames))
                centers = np.array([tracklet.box(k).center for k in tracklet.frames]) * (width, height)
                assert np.allclose(centers, episode.centers[:, n], atol=1e-3)
                box = tracklet.box(0)
                assert ((box.x2 - box.x1) * width, (box.y2 - box.y1) * height) == pytest.approx(
                    (2 * episode.radius, 2 * episode.radius)
                )
            hits = np.zeros_like(episode.hits)
            bounces = np.zeros_like(episode.bounces)
            for event in stsg.events:
                bodies = [int(p[1:]) - 1 for p in event.participants]
                if event.kind == "hits":
                    hits[event.t, bodies, bodies[::-1]] = True
                else:
                    bounces[event.t, bodies[0]] = True
            assert np.array_equal(hits, episode.hits) and np.array_equal(bounces, episode.bounces)
            assert [e.t for e in stsg.events] == sorted(e.t for e in stsg.events)
            assert STSG.from_json(stsg.to_json()) == stsg


def test_relations_follow_the_motion(drawn):
    checked = 0
    for episode in drawn["test"][:60]:
        for n, (x, _) in enumerate(episode.scene.velocities):
            straight = not episode.hits[:, n].any() and not episode.bounces[:, n].any()
            if straight and abs(x) > 10:
                own = [r for r in episode.stsg.relations if r.subject == r.object == f"o{n + 1}"]
                said = {r.predicate for r in own}
                assert ("moves right" if x > 0 else "moves left") in said
                assert ("moves left" if x > 0 else "moves right") not in said
                checked += 1
    assert checked >= 5


def test_frames_show_the_sprites_where_the_truth_says(drawn):
    for episode in drawn["resolution"][:4] + drawn["test"][:4]:
        frames, radius = episode.frames(), episode.radius
        assert frames.dtype == np.uint8
        for t, n in [(0, 0), (9, 1), (15, 2)]:
            x, y = episode.centers[t, n]
            others = np.delete(episode.centers[t], n, axis=0)
            if np.linalg.norm(others - (x, y), axis=1).min() < 3 * radius:
                continue
            rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]] + 0.5
            ink = frames[t].sum(-1) * (np.maximum(abs(rows - y), abs(columns - x)) < radius + 1)
            assert (ink * columns).sum() / ink.sum() == pytest.approx(x, abs=0.5)
            assert (ink * rows).sum() / ink.sum() == pytest.approx(y, abs=0.5)


def test_mp4_and_sidecar_round_trip(tmp_path):
    from vot_kernels.data.video import load_video

    episode = generate_episode("test", 1)
    written = save_episode(episode, tmp_path / "clip.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]
    clip = load_video(tmp_path / "clip.mp4")
    assert clip.frames.shape == episode.frames().shape
    assert np.allclose(clip.times, episode.times, atol=1e-3)
    error = np.mean((clip.frames.astype(float) - episode.frames()) ** 2)
    assert 10 * np.log10(255**2 / error) > 28
    truth = load_sidecar(written)
    assert truth.stsg == episode.stsg and truth.questions == episode.questions
    assert np.allclose(truth.centers, episode.centers, atol=1e-3)
    assert (truth.size, truth.fps, truth.radius) == (episode.scene.size, 8.0, episode.radius)
    assert load_sidecar(tmp_path / "clip.mp4").stsg == truth.stsg
    save_episode(episode, tmp_path / "clip.mp4", episode.questions[:1])
    assert load_sidecar(tmp_path / "clip.mp4").questions == episode.questions[:1]


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}', '{"format": "digitworld-1"}'])
def test_a_broken_sidecar_is_named(tmp_path, content):
    (tmp_path / "clip.json").write_text(content)
    with pytest.raises(ValueError, match="clip.json' is not a DigitWorld sidecar"):
        load_sidecar(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", 0), "one of train"),
        (("train", -1), "at least 0, got -1"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_episode(*arguments)
    with pytest.raises(ValueError, match="at least 40"):
        generate_episode("test", 0, size=(20, 64))
    with pytest.raises(ValueError, match="at least 2"):
        generate_episode("test", 0, num_frames=1)
