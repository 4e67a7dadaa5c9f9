"""From a clip to an answer: a GPU, and each backend of attention on it, answers as the CPU does."""

import pytest

OP = "hybrid_attention"
pytestmark = pytest.mark.gpu


class NoOpinion:
    """A language model to which every continuation is equally likely: what is answered was seen."""

    name = "no opinion"

    def generate(self, prompt, *, max_new_tokens=64):
        return ""

    def generate_batch(self, prompts, *, max_new_tokens=64):
        return ["" for _ in prompts]

    def score(self, prompt, continuations):
        return [-1.0 for _ in continuations]


def test_the_same_answer_from_the_same_evidence_as_on_the_cpu(backend, device):
    pytest.importorskip("av")
    pytest.importorskip("transformers")
    from vot_kernels.data.sample_clips import digitworld_clip
    from vot_kernels.pipelines.video_qa import VideoQA, load_eyes

    clip, question, candidates = digitworld_clip()

    def ask(where, name):
        eyes = load_eyes()
        eyes.model.to(where).encoder.set_attention_backend(name)
        return VideoQA(eyes, NoOpinion()).ask(clip, question, candidates)

    found, wanted = ask(device, backend), ask("cpu", "torch")
    assert found.answer.text == wanted.answer.text
    assert found.answer.warning is None and found.sight.in_domain
    seen, expected = found.sight.stsg, wanted.sight.stsg
    assert [t.attributes for t in seen.tracklets] == [t.attributes for t in expected.tracklets]
    for a, b in zip(seen.tracklets, expected.tracklets, strict=True):
        assert a.boxes.keys() == b.boxes.keys()
        assert all(a.box(frame).iou(b.box(frame)) > 0.9 for frame in a.boxes)
