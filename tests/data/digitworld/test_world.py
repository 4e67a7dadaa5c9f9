import math

import numpy as np
import pytest

from vot_kernels.data.digitworld.world import Motion, simulate


def random_world(seed: int, count: int = 5, duration: float = 10.0) -> Motion:
    rng = np.random.default_rng(seed)
    places = rng.permutation([(x, y) for x in (10, 32, 54) for y in (10, 32, 54)])[:count]
    return simulate(
        places + rng.uniform(-2, 2, (count, 2)), rng.normal(0, 20, (count, 2)), 6.5, 64, 64, duration
    )


def test_two_discs_meet_head_on_and_swap_velocities():
    motion = simulate([(20, 32), (44, 32)], [(10, 0), (-5, 0)], 5, 64, 64, 1.5)
    (hit,) = motion.hits
    assert hit.time == pytest.approx((24 - 10) / 15)
    assert hit.speed == pytest.approx(15)
    assert np.allclose(motion.velocities[-1], [(-5, 0), (10, 0)])


def test_glancing_hit_agrees_with_the_formula_for_two_bodies():
    radius = 5.0
    motion = simulate([(20, 29), (44, 32)], [(12, 0), (0, 0)], radius, 64, 64, 1.9)
    (hit,) = motion.hits
    depth = math.sqrt((2 * radius) ** 2 - 3**2)
    assert hit.time == pytest.approx((24 - depth) / 12)
    normal = np.array([depth, 3]) / (2 * radius)
    given = 12 * normal[0] * normal
    assert np.allclose(motion.velocities[-1], [np.array([12, 0]) - given, given])


def test_wall_reflects_at_the_radius():
    motion = simulate([(20, 30)], [(-10, 4)], 5, 64, 64, 2.0)
    (bounce,) = motion.bounces
    assert (bounce.wall, bounce.body, bounce.time) == ("left", 0, pytest.approx(1.5))
    assert np.allclose(motion.centers(np.array([2.0])), [[(10, 38)]])


@pytest.mark.parametrize("seed", range(8))
def test_energy_is_conserved_and_momentum_changes_only_at_walls(seed):
    motion = random_world(seed)
    assert len(motion.hits) > 3
    energy = (motion.velocities**2).sum((1, 2))
    assert np.allclose(energy, energy[0], rtol=1e-12)
    momentum = motion.velocities.sum(1)
    at_hits = np.isin(motion.times, [hit.time for hit in motion.hits])[1:]
    change = np.abs(np.diff(momentum, axis=0)).max(1)
    assert np.all(change[at_hits] < 1e-9)
    assert np.all(change[~at_hits] > 0)


@pytest.mark.parametrize("seed", range(8))
def test_nothing_overlaps_or_leaves_the_box(seed):
    motion = random_world(seed)
    centers = motion.centers(np.linspace(0, motion.duration, 4001))
    assert centers.min() >= 6.5 - 1e-9 and centers.max() <= 64 - 6.5 + 1e-9
    gaps = np.linalg.norm(centers[:, :, None] - centers[:, None], axis=-1)
    gaps += 1e3 * np.eye(centers.shape[1])
    assert gaps.min() >= 13 - 1e-7


@pytest.mark.parametrize("seed", range(5))
def test_time_runs_backwards(seed):
    forth = random_world(seed, duration=3.0)
    end = forth.centers(np.array([3.0]))[0]
    back = simulate(end, -forth.velocities[-1], 6.5, 64, 64, 3.0)
    assert len(back.hits) == len(forth.hits) and len(back.bounces) == len(forth.bounces)
    assert np.allclose(back.centers(np.array([3.0]))[0], forth.positions[0], atol=1e-6)


def test_agrees_with_small_steps():
    motion = random_world(3, duration=2.0)
    step = 2e-5
    place, velocity = motion.positions[0].copy(), motion.velocities[0].copy()
    for _ in range(round(2.0 / step)):
        place += velocity * step
        velocity = np.where(
            (place < 6.5) & (velocity < 0) | (place > 57.5) & (velocity > 0), -velocity, velocity
        )
        offset = place[:, None] - place[None]
        for a, b in zip(*np.nonzero(np.triu((offset**2).sum(-1) < 13**2, 1)), strict=True):
            normal = offset[a, b] / np.linalg.norm(offset[a, b])
            approach = (velocity[b] - velocity[a]) @ normal
            if approach > 0:
                velocity[a] += approach * normal
                velocity[b] -= approach * normal
    assert len(motion.hits) > 0
    assert np.allclose(place, motion.centers(np.array([2.0]))[0], atol=0.05)


def test_closest_is_the_minimum_over_fine_samples():
    motion = random_world(1)
    for start, end in ((0.0, 10.0), (0.3, 0.9), (4.0, 4.001)):
        centers = motion.centers(np.linspace(start, end, 20001))
        sampled = np.linalg.norm(centers[:, 0] - centers[:, 3], axis=1).min()
        assert motion.closest(0, 3, start, end) == pytest.approx(sampled, abs=2e-3)


@pytest.mark.parametrize(
    ("places", "velocities", "message"),
    [
        ([(3, 30)], [(0, 0)], "not inside the box"),
        ([(20, 20), (25, 20)], [(0, 0), (0, 0)], "overlap"),
        ([(20, 20)], [(0, 0), (1, 1)], "as many velocities as positions, got 2 and 1"),
        ([(20, 20, 1)], [(0, 0)], "bodies, 2"),
        ([(20, math.nan)], [(0, 0)], "finite"),
    ],
)
def test_bad_worlds_are_refused_in_one_sentence(places, velocities, message):
    with pytest.raises(ValueError, match=message):
        simulate(places, velocities, 5, 64, 64, 1.0)
