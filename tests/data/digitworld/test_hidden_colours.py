import numpy as np

from vot_kernels.data.digitworld import COLOUR_NAMES, generate_episode, hidden_colours


def test_half_of_one_frame_is_black_and_the_truth_says_what_still_shows():
    clips = hidden_colours("train", 8, seed=3)
    assert clips.frames.shape == (8, 4, 64, 64, 3) and clips.frames.dtype == np.uint8
    for row in range(8):
        episode = generate_episode("train", row, 3)
        whole = episode.frames()[[0, 5, 10, 15]]
        differs = (clips.frames[row] != whole).any((1, 2, 3))
        assert np.flatnonzero(differs).tolist() == [clips.covered[row]]
        shown = clips.frames[row, clips.covered[row]]
        black = [not shown[:, :32].any(), not shown[:, 32:].any()]
        assert sum(black) == 1
        assert {COLOUR_NAMES[i] for i in np.flatnonzero(clips.present[row])} == set(episode.scene.colours)
        x = episode.centers[[0, 5, 10, 15]][clips.covered[row], :, 0]
        visible = {
            name for name, place in zip(episode.scene.colours, x, strict=True) if not black[int(place >= 32)]
        }
        assert {COLOUR_NAMES[i] for i in np.flatnonzero(clips.shown[row])} == visible


def test_equal_arguments_give_equal_clips_and_another_seed_others():
    one, two, other = (hidden_colours("test", 3, num_frames=2, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(vars(one).values(), vars(two).values(), strict=True))
    assert not np.array_equal(one.frames, other.frames)
