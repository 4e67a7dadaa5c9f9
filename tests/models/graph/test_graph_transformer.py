"""The recurrent graph transformer: a dense oracle, its symmetries, and a task that needs its memory."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vot_kernels.models.graph.modeling import (
    RecurrentGraphTransformer,
    RecurrentGraphTransformerConfig,
)
from vot_kernels.scene_graph import STSG, Event, Relation, Tracklet, Vocabulary
from vot_kernels.testing import shifted

VOCABULARY = Vocabulary(
    labels=("digit 3", "digit 7"),
    attributes=("red", "blue", "green"),
    predicates=("left of", "moves left"),
    events=("hits", "bounces"),
)


def model(seed=0, **options) -> RecurrentGraphTransformer:
    torch.manual_seed(shifted(seed))
    options = {"dim": 16, "num_layers": 2, "num_heads": 2} | options
    net = RecurrentGraphTransformer(RecurrentGraphTransformerConfig(VOCABULARY, **options)).double()
    with torch.no_grad():  # biases that matter, a gate that is not one half
        net.relation_bias.normal_()
        if net.memory_gate is not None:
            net.memory_gate.normal_()
    return net


def graph(seed=0, tracks=4, frames=5, gap=None) -> STSG:
    """Return a random graph in which each track misses some frames, and frame `gap` has no nodes."""
    rng = np.random.default_rng(shifted(seed))
    tracklets, relations, events = [], [], []
    for i in range(tracks):
        present = [k for k in range(frames) if k != gap and rng.random() < 0.8]
        boxes = {k: (np.sort(rng.random((2, 2)), axis=0).ravel(), rng.random()) for k in present}
        label, attribute = rng.choice(VOCABULARY.labels), rng.choice(VOCABULARY.attributes)
        tracklets.append(Tracklet(f"o{i + 1}", str(label), (str(attribute),), boxes))
    ids = [t.id for t in tracklets]
    for _ in range(3 * tracks):
        a, b = rng.choice(ids, 2)
        t0, t1 = sorted(rng.integers(0, frames, 2))
        relations.append(Relation(a, str(rng.choice(VOCABULARY.predicates)), b, t0, t1, rng.random()))
        events.append(Event(str(rng.choice(VOCABULARY.events)), t0, (a, b) if a != b else (a,), rng.random()))
    return STSG(tuple(range(frames)), tuple(tracklets), tuple(relations), tuple(events), VOCABULARY)


def by_node(stsg: STSG, states: torch.Tensor) -> dict:
    """{(track id, frame): state}, for comparing graphs whose nodes come in different orders."""
    packed = stsg.to_packed(VOCABULARY)
    frame = np.repeat(np.arange(len(packed.lengths)), packed.lengths)
    return {(stsg.tracklets[t].id, int(k)): s for t, k, s in zip(packed.track, frame, states, strict=True)}


def oracle(net: RecurrentGraphTransformer, stsg: STSG, features=None) -> dict:
    """The equations, written from the typed graph: one frame at a time, dense attention, no packing."""
    config, dim = net.config, net.config.dim
    types = (*VOCABULARY.predicates, *VOCABULARY.events)
    memory = {t.id: torch.zeros(dim, dtype=torch.float64) for t in stsg.tracklets}
    states, row = {}, 0
    for k in range(stsg.num_frames):
        frame = stsg.frame(k)
        at = {node.id: i for i, node in enumerate(frame.nodes)}
        edges = [(r.subject, r.object, r.predicate, r.score) for r in frame.relations]
        edges += [(e.participants[0], e.participants[-1], e.kind, e.score) for e in frame.events]
        edges = [(at[a], at[b], types.index(p), s) for a, b, p, s in edges if a in at and b in at]
        if not frame.nodes:
            continue
        rows = []
        for node in frame.nodes:
            x1, y1, x2, y2 = box = [float(np.float32(v)) for v in node.box]
            shape = [*box, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, float(np.float32(node.score))]
            x = net.box_mlp(torch.tensor([4 * v - 2 for v in shape], dtype=torch.float64))
            x = x + net.label_embedding.weight[VOCABULARY.labels.index(node.label)]
            for attribute in node.attributes:
                x = x + net.attribute_embedding[VOCABULARY.attributes.index(attribute)]
            if features is not None:
                x = x + net.feature_projection.weight @ features[row]
            rows.append(x)
            row += 1
        n, heads = len(rows), config.num_heads
        bias = [[[torch.tensor(0.0).double()] * n for _ in range(n)] for _ in range(heads)]
        for a, b, type, score in edges:
            score = float(np.float32(score))
            rows[a] = rows[a] + score * net.relation_embedding[type, 0]
            rows[b] = rows[b] + score * net.relation_embedding[type, 1]
            for h in range(heads):
                bias[h][a][b] = bias[h][a][b] + score * net.relation_bias[type, 0, h]
                bias[h][b][a] = bias[h][b][a] + score * net.relation_bias[type, 1, h]
        hidden = torch.stack(rows)
        if config.memory:
            carried = torch.stack([memory[node.id] for node in frame.nodes])
            hidden = hidden + torch.sigmoid(net.memory_gate) * carried
        for layer in net.layers:
            q, k_, v = layer.qkv(layer.attention_norm(hidden)).split(dim, dim=1)
            mixed = []
            for h, s in enumerate(torch.arange(dim).split(dim // heads)):
                extra = torch.stack([torch.stack(line) for line in bias[h]])
                logits = q[:, s] @ k_[:, s].T / (dim // heads) ** 0.5 + extra
                mixed.append(logits.softmax(1) @ v[:, s])
            hidden = hidden + layer.output(torch.cat(mixed, 1))
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
        hidden = net.norm(hidden)
        for i, node in enumerate(frame.nodes):
            states[node.id, k] = hidden[i]
            if config.memory:
                memory[node.id] = net.memory_cell(hidden[i : i + 1], memory[node.id].unsqueeze(0))[0]
    pooled = []
    for t in stsg.tracklets:
        mine = [states[t.id, k] for k in t.frames]
        mean = torch.stack(mine).mean(0) if mine else torch.zeros(dim, dtype=torch.float64)
        pooled.append(net.readout(torch.cat([mean, memory[t.id]]) if config.memory else mean))
    return states, torch.stack(pooled)


def assert_same(got: dict, expected: dict, atol=1e-10):
    assert got.keys() == expected.keys()
    for key, state in got.items():
        torch.testing.assert_close(
            state, expected[key], atol=atol, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("tracks", [1, 4, 40])  # 40: more than one step of place dimensions
@pytest.mark.parametrize("memory", [True, False])
def test_equals_the_dense_oracle(tracks, memory):
    net, stsg = model(memory=memory), graph(tracks=tracks, frames=4 if tracks < 9 else 2)
    states, tracks = oracle(net, stsg)
    assert_same(by_node(stsg, net([stsg.to_packed()])), states)
    torch.testing.assert_close(net.embed(stsg), tracks, atol=1e-10, rtol=0)


def test_region_features_enter_every_node():
    net, stsg = model(feature_dim=6), graph(gap=2)
    features = torch.randn(len(stsg.to_packed().track), 6, dtype=torch.float64)
    states, tracks = oracle(net, stsg, features)
    assert_same(by_node(stsg, net([stsg.to_packed()], features)), states)
    torch.testing.assert_close(net.embed(stsg, features), tracks, atol=1e-10, rtol=0)


def test_the_bias_is_what_tells_subject_from_object():
    """Without relations two nodes look alike; the oracle comparison must not pass by ignoring them."""
    net, stsg = model(), graph()
    bare = dataclasses.replace(stsg, relations=(), events=())
    with_relations, without = net([stsg.to_packed()]), net([bare.to_packed()])
    assert (with_relations - without).abs().max() > 0.1
    with torch.no_grad():
        net.relation_embedding.zero_()
    assert (net([stsg.to_packed()]) - without).abs().max() > 0.01  # through the bias alone


def test_nodes_in_another_order_give_the_same_states_in_that_order():
    net, stsg = model(), graph(tracks=5)
    shuffled = dataclasses.replace(stsg, tracklets=tuple(stsg.tracklets[i] for i in (3, 0, 4, 2, 1)))
    assert_same(by_node(shuffled, net([shuffled.to_packed()])), by_node(stsg, net([stsg.to_packed()])))
    torch.testing.assert_close(net.embed(shuffled), net.embed(stsg)[[3, 0, 4, 2, 1]])


def test_track_numbers_and_names_carry_no_meaning():
    net, stsg = model(), graph(tracks=5)
    packed = stsg.to_packed()
    numbers = np.array([7, 2, 0, 5, 3])
    relabelled = dataclasses.replace(packed, track=numbers[packed.track], num_tracks=8)
    assert torch.equal(net([relabelled]), net([packed]))
    # Which nodes share a track does matter: swap two tracks in the last two frames.
    late = np.repeat(np.arange(5), packed.lengths) >= 3
    traded = np.where(late & (packed.track < 2), 1 - packed.track, packed.track)
    assert not torch.allclose(net([dataclasses.replace(packed, track=traded)]), net([packed]))


def test_future_frames_do_not_change_the_past():
    net, stsg = model(), graph(tracks=4, frames=6)
    other = graph(seed=1, tracks=4, frames=6)
    for cut in range(1, 6):
        mixed = [
            dataclasses.replace(t, boxes=t.between(0, cut - 1).boxes | u.between(cut, 5).boxes)
            for t, u in zip(stsg.tracklets, other.tracklets, strict=True)
        ]
        changed = dataclasses.replace(stsg, tracklets=tuple(mixed))
        before, after = (by_node(g, net([g.to_packed()])) for g in (stsg, changed))
        # Not bit by bit: the number of later nodes may differ, and so may the order in which a product is summed.
        past = {key for key in before if key[1] < cut}
        assert past and all(torch.allclose(before[key], after[key], atol=1e-12, rtol=0) for key in past)
        common = {key for key in before.keys() & after.keys() if key[1] >= cut}
        assert not common or any(not torch.allclose(before[key], after[key]) for key in common)


def test_a_graph_alone_equals_the_same_graph_in_a_batch():
    net = model()
    graphs = [
        graph(0),
        graph(1, tracks=2, frames=8, gap=3),
        STSG((0.0, 1.0)),
        graph(2, tracks=7, frames=1),
        STSG(()),
    ]
    together = net([g.to_packed(VOCABULARY) for g in graphs])
    alone = torch.cat([net([g.to_packed(VOCABULARY)]) for g in graphs])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        net.embed(graphs), torch.cat([net.embed(g) for g in graphs]), atol=1e-12, rtol=0
    )


def test_one_poisoned_graph_leaves_the_others_finite_and_equal():
    net = model()
    clean, poisoned = graph(0).to_packed(), graph(1).to_packed()
    poisoned = dataclasses.replace(poisoned, boxes=np.full_like(poisoned.boxes, np.nan))
    states = net([clean, poisoned])
    torch.testing.assert_close(states[: len(clean.track)], net([clean]), atol=1e-12, rtol=0)
    assert states[len(clean.track) :].isnan().all()


def test_gradients_are_finite_and_reach_every_parameter():
    net = model(feature_dim=3)
    graphs = [graph(0, frames=6), graph(1, gap=2)]
    features = torch.randn(
        sum(len(g.to_packed().track) for g in graphs), 3, dtype=torch.float64, requires_grad=True
    )
    target = torch.randn(9, 16, dtype=torch.float64)[:8]
    (net.embed(graphs, features) * target).sum().backward()
    for name, parameter in [*net.named_parameters(), ("features", features)]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name
    assert (net.relation_bias.grad.abs() > 0).all() and (features.grad.abs().amax(1) > 0).all()


def test_graphs_without_nodes():
    net = model()
    assert net([]).shape == (0, 16) and net.embed([]).shape == (0, 16)
    nobody = STSG((0.0, 1.0), (Tracklet("o1", "digit 3"),), vocabulary=VOCABULARY)
    assert net([nobody.to_packed()]).shape == (0, 16)
    torch.testing.assert_close(net.embed(nobody)[0], net.readout.bias)


def test_words_the_model_does_not_know_share_one_embedding():
    net = model()
    box = {0: ((0, 0, 1, 1), 1)}

    def embed(label, vocabulary):
        return net.embed(STSG((0.0,), (Tracklet("o1", label, ("red",), box),), vocabulary=vocabulary))

    other = Vocabulary(labels=("digit 7", "cat", "digit 3"), attributes=("blue", "red"))
    assert torch.equal(embed("digit 7", VOCABULARY), embed("digit 7", other))
    assert torch.equal(embed("cat", other), embed("dog", VOCABULARY))
    assert not torch.allclose(embed("cat", other), embed("digit 3", other))


def test_half_precision_runs_in_its_dtype():
    net, stsg = model().to(torch.bfloat16), graph()
    states = net([stsg.to_packed()])
    assert states.dtype == torch.bfloat16
    exact = net.double()([stsg.to_packed()])
    assert (states.double() - exact).abs().max() < 0.1


def test_bad_input_is_named():
    packed = graph().to_packed()
    with pytest.raises(ValueError, match=r"dim must be a multiple of num_heads, got 10 and 4"):
        RecurrentGraphTransformerConfig(VOCABULARY, dim=10)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        RecurrentGraphTransformerConfig(VOCABULARY, num_layers=0)
    with pytest.raises(ValueError, match=r"shape \[\d+, 6\], got none"):
        model(feature_dim=6)([packed])
    with pytest.raises(ValueError, match=r"shape none, got \[3, 6\]"):
        model()([packed], torch.zeros(3, 6).double())
    with pytest.raises(ValueError, match="the model's own vocabulary"):
        model()([graph().to_packed(Vocabulary(attributes=("red",)))])


# --- a task across frames -----------------------------------------------------------------------------------


def passing_by(sides, rows) -> STSG:
    """Tracks that come from the left (0) or the right (1) and meet in the middle, where all look alike."""
    tracklets = []
    for i, (side, row) in enumerate(zip(sides, rows, strict=True)):
        start, middle = 0.2 + 0.4 * side, 0.4
        boxes = {k: ((x, 0.3 * i, x + 0.2, 0.3 * i + 0.2), 1) for k, x in ((1, middle), (2, middle))}
        boxes[0] = ((start, 0.3 * row, start + 0.2, 0.3 * row + 0.2), 1)
        tracklets.append(Tracklet(f"o{i + 1}", "digit 3", (), boxes))
    return STSG((0.0, 1.0, 2.0), tuple(tracklets), vocabulary=VOCABULARY)


def train_on_passing_by(memory: bool, steps: int = 100) -> float:
    """Held-out accuracy of telling, in the last frame, where each track came from."""
    rng = np.random.default_rng(shifted(0))
    torch.manual_seed(shifted(0))
    config = RecurrentGraphTransformerConfig(VOCABULARY, dim=32, num_layers=1, num_heads=2, memory=memory)
    net, head = RecurrentGraphTransformer(config), torch.nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=3e-3)

    def batch(size):
        sides = rng.integers(0, 2, (size, 3))
        graphs = [passing_by(s, rng.permutation(3)).to_packed() for s in sides]
        states = net(graphs).view(size, 3, 3, 32)[:, 2]  # [graph, frame, track, dim], last frame
        return head(states).squeeze(-1), torch.tensor(sides, dtype=torch.float32)

    for _ in range(steps):
        logits, target = batch(32)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, target).backward()
        optimizer.step()
    with torch.no_grad():
        logits, target = batch(128)
    return ((logits > 0) == target.bool()).float().mean().item()


def test_memory_solves_a_task_across_frames():
    assert train_on_passing_by(memory=True) > 0.95


def test_without_memory_the_task_cannot_be_solved():
    """This is not poor training: the last frame's states are the same whatever happened in the first."""
    net = model(memory=False)
    states = [net([passing_by(s, (0, 1, 2)).to_packed()]).view(3, 3, 16)[2] for s in ((0, 0, 0), (1, 0, 1))]
    assert torch.equal(*states)
    with_memory = model()
    states = [
        with_memory([passing_by(s, (0, 1, 2)).to_packed()]).view(3, 3, 16)[2] for s in ((0, 0, 0), (1, 0, 1))
    ]
    assert not torch.allclose(*states)
    assert abs(train_on_passing_by(memory=False) - 0.5) < 0.15
