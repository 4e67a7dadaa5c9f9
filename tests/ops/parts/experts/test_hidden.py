"""The Triton kernels of the experts' hidden layer: on the interpreter against plain PyTorch, and what they launch.

On the interpreter a tile has 16 rows and 32 columns and is stored in two pieces, see the configs.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.marks import compiled, interpreted
from vot_kernels.ops.launch import record_launches
from vot_kernels.ops.parts.experts.hidden import expert_hidden, hidden_backward
from vot_kernels.ops.parts.experts.slots import Slots
from vot_kernels.testing import (
    assert_close_to_exact,
    make_tensor,
    uninitialized_is_nan,
)

pytest.importorskip("triton")

FORMS = pytest.mark.parametrize("cached", [True, False], ids=["aoe", "moe"])

# Experts of each token.
CHOICES = {
    "mixed": [[0, 2], [2, 3], [3, 0], [2, 0], [0, 3]] * 5,  # none for expert 1
    "one_takes_all": [[2]] * 35,
    "last_takes_all": [[3]] * 16,
    "one_slot": [[1]],
    "everybody": [[3, 1, 0, 2]] * 5,
    "twice_the_same": [[1, 1], [0, 1]],
    "some_unknown": [[0, 7], [-1, 2], [9, 9], [2, 0]] * 5,
    "all_unknown": [[4], [-1]],
}
EXPERTS = 4


def group(choices, experts=EXPERTS):
    """`Slots` of the experts of each token; undefined entries are poison."""
    chosen = [expert for row in choices for expert in row]
    order = sorted((e, slot) for slot, e in enumerate(chosen) if 0 <= e < experts)
    places = [-1] * len(chosen)
    for place, (_, slot) in enumerate(order):
        places[slot] = place
    counts = [chosen.count(e) for e in range(experts)]
    offsets = [sum(counts[:e]) for e in range(experts + 1)]
    undefined = [2**31 - 1] * (len(chosen) - len(order))
    numbers = ([slot for _, slot in order] + undefined, places, offsets)
    order, places, offsets = (torch.tensor(x, dtype=torch.int32) for x in numbers)
    return Slots(order, places, offsets, len(choices[0]))


def make(choices, cached, dim=40, rank=24, width=40, dtype=torch.float32, experts=EXPERTS):
    """x, w_value, gate, slots, and for the backward d_y, w_out, weights."""
    tokens, slots = len(choices), group(choices, experts)
    x, d_y = (make_tensor(tokens, dim, dtype=dtype, seed=seed) for seed in (0, 1))
    w_value, w_out, w_gate = (make_tensor(experts, width, dim, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    cache = make_tensor(slots.order.shape[0], rank, dtype=dtype, seed=5)
    w_up = make_tensor(experts, width, rank, dtype=dtype, seed=6) / rank**0.5
    weights = make_tensor(tokens, slots.top_k, seed=7).softmax(-1)
    gate = (cache, w_up) if cached else w_gate / dim**0.5
    return x, w_value / dim**0.5, gate, slots, d_y, w_out / dim**0.5, weights


def occupied(slots):
    """Number of places that belong to an expert, expert of each, slot of each."""
    counts = slots.offsets.diff().long()
    used = int(slots.offsets[-1])
    return used, torch.arange(len(counts)).repeat_interleave(counts), slots.order[:used].long()


def per_place(rows, weight, experts):
    """rows[p] @ weight[experts[p]].T, expert by expert."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert in experts.unique().tolist():
        out[experts == expert] = rows[experts == expert] @ weight[expert].T
    return out


def plain_products(x, w_value, gate, slots):
    """pre and value of the occupied places."""
    used, experts, order = occupied(slots)
    rows = x[order // slots.top_k]
    cache, w_gate = gate if isinstance(gate, tuple) else (None, gate)
    pre = per_place(rows if cache is None else cache[:used], w_gate, experts)
    return pre, per_place(rows, w_value, experts)


def plain_backward(d_y, w_out, pre, value, weights, slots):
    """d_pre, d_value, weighted, and the gradient of each place's mixing weight, by autograd."""
    _, experts, order = occupied(slots)
    mix = weights.flatten()[order].to(pre.dtype)
    pre, value, mix = (x.detach().requires_grad_() for x in (pre, value, mix))
    weighted = mix[:, None] * (F.silu(pre) * value)
    grad = per_place(d_y[order // slots.top_k], w_out, experts)
    d_pre, d_value, grad_mix = torch.autograd.grad(weighted, (pre, value, mix), grad)
    return d_pre, d_value, weighted.detach(), grad_mix


def double(inputs):
    if isinstance(inputs, tuple):
        return tuple(double(x) for x in inputs)
    return inputs.double()


def split(saved, gate):
    """pre, or None if it is not saved, and value."""
    return (None, saved) if isinstance(gate, tuple) else saved.chunk(2, dim=1)


def run(x, w_value, gate, slots, d_y, w_out, weights):
    """hidden, pre or None, value, d_pre, d_value, weighted, and the gradient of the mixing weights."""
    cached = gate if isinstance(gate, tuple) else None
    with uninitialized_is_nan():
        hidden, saved = expert_hidden(x, w_value, gate, slots, True)
        *grads, weighted, partials = hidden_backward(d_y, w_out, saved, cached, weights, slots)
    assert partials.dtype == torch.float32 and partials.shape[1] == slots.order.shape[0]
    if cached is None:
        grads = grads[0].chunk(2, dim=1)
    return hidden, *split(saved, gate), *grads, weighted, partials.sum(0)


NAMES = ("hidden", "pre", "value", "d_pre", "d_value", "weighted", "partials")


def check(x, w_value, gate, slots, d_y, w_out, weights):
    """Both directions obey the tolerance rule; gaps in what the kernels write show as NaN."""
    used = int(slots.offsets[-1])
    results = run(x, w_value, gate, slots, d_y, w_out, weights)
    pairs = []
    for convert in (lambda inputs: inputs, double):
        pre, value = plain_products(*convert((x, w_value, gate)), slots)
        forward = F.silu(pre) * value, pre, value
        # The backward is judged by what it was given: the rounded numbers of the forward.
        given_pre, given_value = (None if y is None else convert(y[:used]) for y in results[1:3])
        pre = pre if given_pre is None else given_pre
        backward = plain_backward(*convert((d_y, w_out)), pre, given_value, weights, slots)
        pairs.append(forward + backward)
    for name, actual, low, exact in zip(NAMES, results, *pairs, strict=True):
        if actual is None:
            continue
        assert actual.dtype == (torch.float32 if name == "partials" else x.dtype)
        assert actual.shape[0] == slots.order.shape[0]
        assert_close_to_exact(actual[:used], low, exact, name=name)


@interpreted
@FORMS
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES.keys())
def test_choices(choices, cached):
    check(*make(choices, cached))


@interpreted
@FORMS
@pytest.mark.parametrize("sizes", [(7, 7, 7), (100, 40, 70), (32, 16, 64), (33, 70, 100), (1, 1, 1)], ids=str)
def test_sizes(sizes, cached):
    check(*make(CHOICES["mixed"][:12], cached, *sizes))


@interpreted
@FORMS
def test_many_experts(cached):
    choices = [[(13 * i) % 67, 66] for i in range(9)]
    check(*make(choices, cached, experts=67))


@interpreted
@FORMS
def test_float16(cached):
    check(*make(CHOICES["mixed"], cached, 100, 40, 70, dtype=torch.float16))


@interpreted
@FORMS
def test_no_slots(cached):
    """No tokens: nothing is launched, and the results have the right shapes."""
    x, w_value, gate, _, d_y, w_out, weights = make([[0, 1]], cached)
    empty = torch.empty(0, dtype=torch.int32)
    slots = Slots(empty, empty, torch.zeros(EXPERTS + 1, dtype=torch.int32), 2)
    gate = (gate[0][:0], gate[1]) if cached else gate
    hidden, pre, *others, grad_mix = run(x[:0], w_value, gate, slots, d_y[:0], w_out, weights[:0])
    assert (pre is None) == cached
    assert all(y.shape == (0, 40) for y in (hidden, *others)) and grad_mix.shape == (0,)


@interpreted
@FORMS
def test_without_saving(cached):
    x, w_value, gate, slots, *_ = make(CHOICES["mixed"], cached)
    with uninitialized_is_nan():
        hidden, nothing = expert_hidden(x, w_value, gate, slots, False)
        expected, _ = expert_hidden(x, w_value, gate, slots, True)
    assert nothing is None and torch.equal(hidden, expected)


def same(first, second, rows=slice(None)):
    return all(
        (a is None and b is None) or torch.equal(a[rows], b[rows]) for a, b in zip(first, second, strict=True)
    )


@interpreted
@FORMS
def test_same_bits_again(cached):
    inputs = make(CHOICES["mixed"], cached)
    assert same(run(*inputs), run(*inputs))


def transposed(w):
    return w.mT.contiguous().mT


def spread(x):
    """Return elements two apart."""
    return x.repeat_interleave(2, -1)[..., ::2]


def inside(x):
    """Return part of a wider tensor."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


@interpreted
@FORMS
@pytest.mark.parametrize("view", [transposed, spread, inside])
def test_strides(view, cached):
    x, w_value, gate, slots, d_y, w_out, weights = make(CHOICES["mixed"], cached, 24, 16, 40)
    expected = run(x, w_value, gate, slots, d_y, w_out, weights)
    gate = tuple(view(y) for y in gate) if cached else view(gate)
    views = [view(y) for y in (x, w_value, d_y, w_out, weights)]
    assert not any(y.is_contiguous() for y in views)
    assert same(run(*views[:2], gate, slots, *views[2:]), expected)


@interpreted
def test_one_weight_for_all_experts_and_one_gradient_for_all_tokens():
    """Strides of 0, as expand makes them."""
    x, w_value, gate, slots, d_y, w_out, weights = make(CHOICES["mixed"], True)
    w_value, w_out = (w[:1].expand(EXPERTS, -1, -1) for w in (w_value, w_out))
    d_y = torch.ones(()).expand(d_y.shape)
    expected = run(x, w_value.contiguous(), gate, slots, d_y.contiguous(), w_out.contiguous(), weights)
    assert same(run(x, w_value, gate, slots, d_y, w_out, weights), expected)


@interpreted
@FORMS
def test_nan_stays_with_its_token(cached):
    """In the token's input, its upstream gradient and its caches; beyond the last expert everything is NaN."""
    x, w_value, gate, slots, d_y, w_out, weights = make(CHOICES["some_unknown"], cached)
    used, _, order = occupied(slots)
    clean = run(x, w_value, gate, slots, d_y, w_out, weights)
    ill = order // slots.top_k == 4
    for y in (x, d_y, weights):
        y[4] = torch.nan
    if cached:
        gate[0][used:] = torch.nan
        gate[0][:used][ill] = torch.nan
    results = run(x, w_value, gate, slots, d_y, w_out, weights)
    assert 0 < ill.sum() < used < len(slots.order)
    for actual, expected in zip(results, clean, strict=True):
        if actual is not None:
            assert actual[:used][ill].isnan().all()
            assert torch.equal(actual[:used][~ill], expected[:used][~ill])


@interpreted
@FORMS
@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # of NumPy; 1 / (1 + inf) is the 0 it should be
@pytest.mark.parametrize("magnitude", [100.0, 1000.0])
def test_large_gates_do_not_overflow(magnitude, cached):
    """SiLU is 0 or its argument there, and its derivative 0 or 1."""
    x, w_value, gate, slots, d_y, w_out, weights = make(CHOICES["mixed"], cached)
    signs = make_tensor(40, seed=8).sign()
    if cached:
        gate[0].fill_(1.0)
        gate[1].copy_((magnitude / 24 * signs)[:, None].expand(40, 24))
    else:
        x.fill_(1.0)
        gate.copy_((magnitude / 40 * signs)[:, None].expand(40, 40))
    check(x, w_value, gate, slots, d_y, w_out, weights)
    _, _, value, d_pre, d_value, *_ = run(x, w_value, gate, slots, d_y, w_out, weights)
    positive = signs > 0
    assert (d_value[:, positive] != 0).all() and (d_pre[:, positive] != 0).all()
    assert max(y[:, ~positive].abs().max() for y in (d_pre, d_value)) < 1e-30


def recorded(
    tokens=300, dim=768, rank=64, width=3840, experts=8, top_k=2, dtype=torch.bfloat16, arch="sm_90"
):
    """What both forms launch, forward and backward; and their results."""
    total = tokens * top_k
    order, places = (torch.empty(total, dtype=torch.int32) for _ in range(2))
    slots = Slots(order, places, torch.empty(experts + 1, dtype=torch.int32), top_k)
    x = torch.empty(tokens, dim, dtype=dtype)
    weight, w_up = (torch.empty(experts, width, columns, dtype=dtype) for columns in (dim, rank))
    gate, mix = (torch.empty(total, rank, dtype=dtype), w_up), torch.empty(tokens, top_k)
    with record_launches(arch) as launches:
        hidden, value = expert_hidden(x, weight, gate, slots, True)
        cached = hidden_backward(x, weight, value, gate, mix, slots)
        _, saved = expert_hidden(x, weight, weight, slots, True)
        plain = hidden_backward(x, weight, saved, None, mix, slots)
    return launches, cached, plain


@compiled
def test_recorded_launches():
    launches, cached, plain = recorded()
    assert [x.kernel.__name__ for x in launches] == ["_expert_hidden_kernel", "_expert_hidden_bwd_kernel"] * 2
    for found in launches:
        assert set(found.arguments) == set(found.kernel.arg_names)
        rows, columns = (
            found.config.blocks["BLOCK_M"],
            found.arguments.get("BLOCK_N", found.arguments.get("TILE_N")),
        )
        assert found.grid == ((600 // rows + 8) * -(-3840 // columns),)
    for launch, (*grads, weighted, partials) in zip(launches[1::2], (cached, plain), strict=True):
        assert partials.shape == (-(-3840 // launch.arguments["TILE_N"]), 600) and weighted.shape == (
            600,
            3840,
        )
        width = 3840 if len(grads) == 2 else 7680
        assert all(grad.shape == (600, width) and grad.is_contiguous() for grad in grads)
    assert (len(cached), len(plain)) == (4, 3)
    arguments = launches[3].arguments
    assert arguments["d_value_ptr"] is None and arguments["d_pre_ptr"].shape[1] == 2 * 3840


@compiled
def test_batches_of_any_size_share_their_kernels():
    """Only what may change without compiling again differs."""
    for first, second in zip(recorded()[0], recorded(tokens=1717)[0], strict=True):
        free = {p.name for p in first.kernel.params if p.do_not_specialize}
        assert free == {"slots", "experts", "top_k"}
        for name, value in first.arguments.items():
            if name not in free and not isinstance(value, torch.Tensor):
                assert second.arguments[name] == value, name


@compiled
@pytest.mark.parametrize(
    ("sizes", "unit"), [((768, 64, 3840), 8), ((100, 40, 70), 4), ((7, 64, 64), 1)], ids=str
)
def test_strides_tell_how_wide_loads_may_be(sizes, unit):
    for found in recorded(30, *sizes)[0]:
        assert found.arguments["STRIDE_UNIT"] == unit


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_there_is_a_config_for_all_sizes(arch):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for sizes in [(7, 7, 7), (64, 16, 64), (1280, 400, 6470), (2048, 512, 8192)]:
            assert len(recorded(5, *sizes, dtype=dtype, arch=arch)[0]) == 4
