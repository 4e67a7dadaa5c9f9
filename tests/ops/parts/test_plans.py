"""Plans are remembered by the contents of a packing, and forgotten on demand."""

import gc
import weakref
from typing import NamedTuple

import torch

from vot_kernels import PackedLayout, hybrid_attention, linear_attention
from vot_kernels.ops.hybrid_attention.geometry import Geometry as HybridGeometry
from vot_kernels.ops.hybrid_attention.torch import make_plan as hybrid_plan
from vot_kernels.ops.linear_attention.geometry import Geometry as LinearGeometry
from vot_kernels.ops.linear_attention.torch import make_plan as linear_plan
from vot_kernels.ops.parts.plans import forget_plans, keep_with, remember
from vot_kernels.testing import make_tensor


class Bounds(NamedTuple):
    bounds: torch.Tensor
    window: int | None


def planner():
    made = []

    @remember
    def plan(bounds, device):
        made.append(bounds.bounds.tolist())
        return object()

    return plan, made


def bounds(*numbers, window=1):
    return Bounds(torch.tensor(numbers, dtype=torch.int32), window)


def test_equal_packings_share_a_plan():
    plan, made = planner()
    first = plan(bounds(0, 3, 5), "cpu")
    assert plan(bounds(0, 3, 5), "cpu") is first and made == [[0, 3, 5]]
    others = [bounds(0, 4, 5), bounds(0, 3), bounds(0, 3, 5, window=None)]
    assert all(plan(x, "cpu") is not first for x in others)
    assert plan(bounds(0, 3, 5), "cuda") is not first
    assert len(made) == 5


def test_plans_are_forgotten():
    plan, made = planner()
    first = plan(bounds(0, 3), "cpu")
    forget_plans()
    assert plan(bounds(0, 3), "cpu") is not first and len(made) == 2


def test_a_packing_that_changes_in_place_has_another_plan():
    plan, _ = planner()
    given = bounds(0, 3)
    first = plan(given, "cpu")
    given.bounds[1] = 4
    assert plan(given, "cpu") is not first and plan(bounds(0, 3), "cpu") is first


def test_tensors_elsewhere_are_compared_by_device_and_no_tensor_is_kept():
    made = []
    plan = remember(lambda host, device: made.append(device.device.type) or object())
    for _ in range(2):
        host, device = torch.tensor([0, 3]), torch.empty(2, device="meta")
        plan(host, device)
    assert made == ["meta"]
    alive = [weakref.ref(x) for x in (host, device)]
    del host, device
    gc.collect()
    assert not any(x() is not None for x in alive)


def tensors_of(value):
    """Every tensor in a plan, those that it caches included; blocks may hold themselves."""
    found, seen, left = [], set(), [value]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif id(value) not in seen and (isinstance(value, (tuple, list)) or hasattr(value, "__dict__")):
            seen.add(id(value))
            left += value if isinstance(value, (tuple, list)) else vars(value).values()
    return found


def test_what_is_planned_under_inference_mode_serves_training():
    forget_plans()
    layout = PackedLayout.from_lengths([7, 24, 17, 13], group_size=4)
    q, k, v = (make_tensor(61, 2, 16, seed=i) for i in range(3))
    with torch.inference_mode():
        hybrid_attention(q, k, v, layout)
        linear_attention(q, k, v, layout, causal=True, log_decay=torch.tensor([-0.1, -0.2]))
        plans = [
            hybrid_plan(HybridGeometry.of(layout, 1, None), None, (16, 16, 1), False),
            linear_plan(LinearGeometry(layout.cu_seqlens, layout.host_cu_seqlens, "token")),
        ]
    for plan in plans:
        found = tensors_of(plan)
        assert found and not any(x.is_inference() for x in found)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    hybrid_attention(*leaves, layout).sum().backward()
    assert all(x.grad is not None for x in leaves)


def test_what_is_kept_lives_with_its_tensor_until_that_is_written_to():
    made = []

    def make():
        made.append(len(made))
        return made[-1]

    owner, other = torch.zeros(3), torch.zeros(3)
    assert [keep_with(owner, "a", make) for _ in range(2)] == [0, 0]
    assert keep_with(owner, "b", make) == 1 and keep_with(other, "a", make) == 2
    owner += 1
    assert keep_with(owner, "a", make) == 3
    with torch.inference_mode():  # such tensors do not count changes
        unversioned = torch.zeros(3)
    assert [keep_with(unversioned, "a", make) for _ in range(2)] == [4, 5]


def test_few_results_are_kept():
    owner = torch.zeros(3)
    for key in range(100):
        assert keep_with(owner, key, lambda key=key: key) == key
    assert len(owner._vot_kernels_kept) <= 32
