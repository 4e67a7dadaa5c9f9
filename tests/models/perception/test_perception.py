"""The STSG head, its loss, and the graph made from its output."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from vot_kernels.data.digitworld import generate_episode
from vot_kernels.data.digitworld.batches import episode_batch
from vot_kernels.models.encoder import VotEncoderConfig
from vot_kernels.models.perception import VotPerceptionConfig, VotPerceptionModel, detect, to_stsg
from vot_kernels.models.perception.head import HeadOutput, take_glimpses
from vot_kernels.models.perception.loss import Targets, match, perception_loss
from vot_kernels.testing import shifted
from vot_kernels.train.perception.batches import TrainingBatches, dense_targets, digitworld_config
from vot_kernels.train.perception.stage import make_processor

KINDS = {
    "labels": 10,
    "attributes": 8,
    "pair_events": 1,
    "unary_events": 1,
    "pair_relations": 6,
    "unary_relations": 4,
}


@pytest.fixture(scope="module")
def episodes():
    return [generate_episode("train", index, 3) for index in range(4)]


@pytest.fixture(scope="module")
def targets(episodes):
    return dense_targets(episode_batch(episodes), episodes)


def small_model(seed: int = 0, **overrides) -> VotPerceptionModel:
    torch.manual_seed(shifted(seed))
    encoder = VotEncoderConfig.preset(
        "nano",
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        expert_rank=8,
        intermediate_size=64,
    )
    config = digitworld_config()
    config.encoder = encoder
    for name, value in overrides.items():
        setattr(config, name, value)
    return VotPerceptionModel(config).eval()


def perfect_output(targets: Targets, order: list[int], queries: int = 8) -> HeadOutput:
    """Return what a perfect head would output, with object n in query order[n]."""
    clips, _, length = targets.present.shape
    out = HeadOutput(
        centers=torch.full((clips, queries, length, 2), 0.5),
        coarse_centers=torch.full((clips, queries, length, 2), 0.5),
        sizes=torch.full((clips, queries, length, 2), 0.2),
        heat=torch.zeros(clips, queries, length, 64),
        presence=torch.full((clips, queries, length), -20.0),
        labels=torch.zeros(clips, queries, KINDS["labels"]),
        attributes=torch.zeros(clips, queries, KINDS["attributes"]),
        sought=torch.zeros(clips, queries, KINDS["attributes"]),
        pair_events=torch.full((clips, queries, queries, length, 1), -20.0),
        unary_events=torch.full((clips, queries, length, 1), -20.0),
        pair_relations=torch.full((clips, queries, queries, length, 6), -20.0),
        unary_relations=torch.full((clips, queries, length, 4), -20.0),
    )
    for b in range(clips):
        for n in targets.exists[b].nonzero().flatten().tolist():
            q = order[n]
            out.centers[b, q] = out.coarse_centers[b, q] = targets.centers[b, n]
            out.sizes[b, q] = targets.sizes[b, n]
            out.presence[b, q] = 20.0
            out.labels[b, q, targets.labels[b, n]] = 40.0
            out.attributes[b, q, targets.attributes[b, n]] = 40.0
            out.sought[b, q, targets.attributes[b, n]] = 40.0
            cell = (targets.centers[b, n] * 8).long()
            out.heat[b, q, torch.arange(length), cell[:, 1] * 8 + cell[:, 0]] = 40.0
            for name in ("unary_events", "unary_relations"):
                getattr(out, name)[b, q] = torch.where(getattr(targets, name)[b, n], 20.0, -20.0)
            for m in targets.exists[b].nonzero().flatten().tolist():
                for name in ("pair_events", "pair_relations"):
                    getattr(out, name)[b, q, order[m]] = torch.where(
                        getattr(targets, name)[b, n, m], 20.0, -20.0
                    )
    return out


ORDER = [6, 2, 0, 7, 3]


def test_matching_finds_the_permutation(targets):
    for b, (queries, objects) in enumerate(match(perfect_output(targets, ORDER), targets)):
        assert sorted(objects.tolist()) == targets.exists[b].nonzero().flatten().tolist()
        assert [ORDER[n] for n in objects.tolist()] == queries.tolist()


def test_the_loss_of_a_faultless_head_is_zero_and_any_fault_costs(targets):
    faultless = perfect_output(targets, ORDER)
    pairs = match(faultless, targets)
    terms = perception_loss(faultless, targets, pairs, (8, 8))
    assert all(term < 1e-4 for term in terms.values()), terms
    faults = {
        "center": {"centers": faultless.centers + 0.05},
        "size": {"sizes": faultless.sizes * 1.5},
        "presence": {"presence": faultless.presence.flip(2).neg()},
        "heat": {"heat": faultless.heat.roll(1, -1)},
        "label": {"labels": faultless.labels.roll(1, -1)},
        "attribute": {"attributes": faultless.attributes.roll(1, -1)},
        "sought": {"sought": faultless.sought.roll(1, -1)},
        "unary_events": {"unary_events": faultless.unary_events.roll(3, 2)},
        "pair_events": {"pair_events": faultless.pair_events.roll(3, 3)},
        "unary_relations": {"unary_relations": -faultless.unary_relations},
        "pair_relations": {"pair_relations": -faultless.pair_relations},
    }
    assert faults.keys() == terms.keys()
    for name, change in faults.items():
        assert perception_loss(replace(faultless, **change), targets, pairs, (8, 8))[name] > 0.01, name


def test_reading_a_faultless_output_gives_the_true_graph(episodes, targets):
    config = digitworld_config()
    for row, episode in enumerate(episodes):
        stsg, queries = to_stsg(perfect_output(targets, ORDER), row, config, episode.times)
        assert stsg.validate() == []
        truth = episode.stsg
        index = {q: n for n, q in enumerate(ORDER)}
        names = {t.id: f"o{index[q] + 1}" for t, q in zip(stsg.tracklets, queries, strict=True)}
        assert {(names[t.id], t.name) for t in stsg.tracklets} == {(t.id, t.name) for t in truth.tracklets}
        for tracklet in stsg.tracklets:
            for frame, (box, _) in tracklet.boxes.items():
                assert box == pytest.approx(truth.tracklet(names[tracklet.id]).box(frame), abs=1e-4)
        found = {(e.kind, e.t, frozenset(names[p] for p in e.participants)) for e in stsg.events}
        assert found == {(e.kind, e.t, frozenset(e.participants)) for e in truth.events}
        said = {(names[r.subject], r.predicate, names[r.object], r.t0, r.t1) for r in stsg.relations}
        assert {(r.subject, r.predicate, r.object, r.t0, r.t1) for r in truth.relations} <= said


def test_reading_drops_the_uncertain_the_brief_and_the_double(targets):
    config = digitworld_config()
    times = np.arange(16) / 8
    count = int(targets.exists[0].sum())
    output = perfect_output(targets, ORDER)
    assert len(to_stsg(output, 0, config, times)[0].tracklets) == count
    output.presence[0, 6] = -1.0  # unsure everywhere
    assert len(to_stsg(output, 0, config, times)[0].tracklets) == count - 1
    output.presence[0, 6, :3] = 5.0  # seen in three frames of sixteen
    assert len(to_stsg(output, 0, config, times)[0].tracklets) == count - 1
    output.presence[0, 6, :5] = 5.0
    brief = next(t for t in to_stsg(output, 0, config, times)[0].tracklets if len(t.boxes) == 5)
    assert brief.frames == (0, 1, 2, 3, 4)
    output.centers[0, 5], output.presence[0, 5] = (
        output.centers[0, 2] + 0.01,
        3.0,
    )  # a second query on one object
    assert len(to_stsg(output, 0, config, times)[0].tracklets) == count


def test_an_event_split_over_two_frames_is_one_event(targets):
    output = perfect_output(targets, ORDER)
    output.unary_events.fill_(-20.0)
    output.unary_events[0, 6, 4:6, 0] = -0.3  # 0.43 each
    stsg, _ = to_stsg(output, 0, digitworld_config(), np.arange(16) / 8)
    bounces = [e for e in stsg.events if e.kind == "bounces"]
    assert len(bounces) == 1 and bounces[0].t in (4, 5)
    output.unary_events[0, 6, 4:6, 0] = -2.0  # 0.12 each: not enough
    assert not [
        e for e in to_stsg(output, 0, digitworld_config(), np.arange(16) / 8)[0].events if e.kind == "bounces"
    ]


def test_glimpses_show_what_is_there():
    frames = torch.zeros(1, 2, 3, 32, 48)
    frames[0, 1, 0, 8:16, 24:36] = 1.0  # a red block: x 0.5–0.75, y 0.25–0.5
    centers = torch.tensor([[[[0.625, 0.375]] * 2, [[0.1, 0.9]] * 2]])
    sizes = torch.full((1, 2, 2, 2), 0.25)
    glimpses = take_glimpses(frames, centers, sizes, 4).view(1, 2, 2, 3, 4, 4)
    assert torch.equal(glimpses[0, 0, 1, 0], torch.ones(4, 4))  # query 0, frame 1
    glimpses[0, 0, 1, 0] = 0
    assert not glimpses.any()


def test_clips_are_independent_and_mixed_sizes_go_together():
    model = small_model()
    processor = make_processor(model)
    clips = [
        generate_episode("train", i, 0, size=size).frames()
        for i, size in enumerate([(64, 64), (56, 72), (64, 64)])
    ]
    times = [np.arange(16) / 8] * 3
    together = detect(model, processor, clips, times)
    for clip, time, seen in zip(clips, times, together, strict=True):
        (alone,) = detect(model, processor, [clip], [time])
        assert alone.domain_distance == pytest.approx(seen.domain_distance, rel=1e-4)
        assert len(alone.stsg.tracklets) == len(seen.stsg.tracklets)
        for a, b in zip(alone.stsg.tracklets, seen.stsg.tracklets, strict=True):
            assert a.name == b.name and a.frames == b.frames


def test_queries_begin_apart_from_each_other_also_where_they_are_missing(tmp_path):
    model = small_model()
    state = model.state_dict()
    assert torch.equal(state["domain_precision"], torch.eye(32)) and state["domain_threshold"] == torch.inf
    for missing in ("head.queries.weight", "domain_precision", "domain_threshold"):
        kept = {name: value for name, value in state.items() if name != missing}
        loaded = VotPerceptionModel.from_pretrained(None, config=model.config, state_dict=kept).state_dict()
        assert all(torch.equal(loaded[name], kept[name]) for name in kept)
        queries = loaded["head.queries.weight"]
        torch.testing.assert_close(queries @ queries.T, torch.eye(len(queries)), rtol=0, atol=1e-5)
        if missing.startswith("domain"):
            assert torch.equal(loaded[missing], state[missing])


def test_every_parameter_of_the_head_learns(targets):
    model = small_model().train()
    torch.nn.init.normal_(
        model.encoder.size_embedding.fc2.weight
    )  # its zeros would block the gradient of fc1
    batch = TrainingBatches(0, 4)[0]
    output = model(**make_processor(model)(list(batch.clips), fps=batch.fps))
    (head,) = output.clips
    grid = (batch.clips.shape[2] // 8, batch.clips.shape[3] // 8)
    terms = perception_loss(head, batch.targets, match(head, batch.targets), grid)
    (sum(terms.values()) + output.balance_loss).backward()
    unused = {"encoder.pooling"}  # pooled features serve retrieval, not the graph
    silent = [
        name
        for name, p in model.named_parameters()
        if (p.grad is None or not p.grad.abs().max() > 0) and not any(name.startswith(u) for u in unused)
    ]
    assert silent == []


def test_domain_distance_separates_and_survives_saving(tmp_path):
    model = small_model()
    generator = torch.Generator().manual_seed(shifted(0))
    known = torch.randn(300, 32, generator=generator) * torch.linspace(0.1, 2, 32)
    model.fit_domain(known[:200], known[200:])
    assert (model.domain_distance(known) < model.domain_threshold).all()
    assert (model.domain_distance(known + 5) > model.domain_threshold).all()
    model.save_pretrained(tmp_path)
    again = VotPerceptionModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.domain_precision, model.domain_precision)
    assert again.domain_threshold == model.domain_threshold
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert isinstance(again.config, VotPerceptionConfig) and isinstance(
        again.config.encoder, VotEncoderConfig
    )


def test_truth_is_padded_and_complete(episodes, targets):
    for b, episode in enumerate(episodes):
        count = len(episode.scene.digits)
        assert targets.exists[b].sum() == count
        hits = targets.pair_events[b].sum()
        assert hits == 2 * len({(e.t, e.participants) for e in episode.stsg.events if e.kind == "hits"})
        for field in fields(targets):
            assert not getattr(targets, field.name)[b, count:].any() or field.name in ("sizes",)
