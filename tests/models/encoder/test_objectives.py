"""The encoder's objectives: chunks change nothing, the teacher does not change, captions do not mix."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vot_kernels.models.encoder.objectives import (
    CaptionEncoder,
    ContrastiveHead,
    TokenDistillation,
    mean_tokens,
    sigmoid_contrastive_loss,
)
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import shifted

GRIDS = [[2, 2, 3], [1, 1, 4], [3, 2, 1]]


def pairs(n, width=5, dtype=torch.float64):
    images, texts = (F.normalize(torch.randn(n, width, dtype=dtype), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(1.3, dtype=dtype), torch.tensor(-2.0, dtype=dtype)
    return [x.requires_grad_() for x in (images, texts, scale, bias)]


def whole_matrix_loss(images, texts, scale, bias):
    """The formula as written in the paper."""
    signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -F.logsigmoid(signs * (scale.exp() * images @ texts.T + bias)).sum() / len(images)


class TestSigmoidContrastiveLoss:
    @pytest.mark.parametrize("chunk_size", [1, 3, 4, 11, 12, 100])
    def test_chunks_equal_the_whole_matrix(self, chunk_size):
        inputs = pairs(11)
        whole = whole_matrix_loss(*inputs)
        chunked = sigmoid_contrastive_loss(*inputs, chunk_size=chunk_size)
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
        for ours, wanted in zip(
            torch.autograd.grad(chunked, inputs), torch.autograd.grad(whole, inputs), strict=True
        ):
            torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-12)

    def test_finite_differences(self):
        assert torch.autograd.gradcheck(lambda *x: sigmoid_contrastive_loss(*x, chunk_size=2), pairs(5, 3))

    def test_extreme_logits_stay_finite(self):
        images, texts, _, bias = pairs(6)
        loss = sigmoid_contrastive_loss(images, texts, torch.tensor(9.0).double(), bias, 4)
        loss.backward()
        assert loss.isfinite() and images.grad.isfinite().all()

    def test_half_precision_is_computed_in_float32(self):
        images, texts, scale, bias = (x.detach() for x in pairs(9, dtype=torch.float32))
        half = sigmoid_contrastive_loss(images.bfloat16(), texts.bfloat16(), scale, bias)
        assert half.dtype == torch.float32
        torch.testing.assert_close(
            half, whole_matrix_loss(images.bfloat16().float(), texts.bfloat16().float(), scale, bias)
        )

    def test_memory_is_that_of_a_chunk(self):
        n, chunk = 512, 16
        inputs = pairs(n, 4, torch.float32)
        chunked, whole = (
            peak_bytes(lambda size=size: sigmoid_contrastive_loss(*inputs, chunk_size=size).backward())
            for size in (chunk, n)
        )
        assert whole > 4 * n * n  # at least one matrix of float32
        assert chunked < 8 * 4 * chunk * n

    @pytest.mark.parametrize(
        ("shapes", "chunk_size", "message"),
        [
            (((3, 2), (4, 2)), 2, r"\[3, 2\] and \[4, 2\]"),
            (((0, 2), (0, 2)), 2, "N >= 1"),
            (((3,), (3,)), 2, r"\[N, dim\]"),
            (((3, 2), (3, 2)), 0, "chunk_size must be >= 1, got 0"),
        ],
    )
    def test_bad_inputs(self, shapes, chunk_size, message):
        zero = torch.zeros(())
        with pytest.raises(ValueError, match=message):
            sigmoid_contrastive_loss(*(torch.zeros(s) for s in shapes), zero, zero, chunk_size)


def peak_bytes(run) -> int:
    """Most bytes alive at once among the storages that `run` creates."""

    class Watch(TorchDispatchMode):
        alive, peak, known = 0, 0, {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                    self.add(tensor.untyped_storage())
            return out

        def add(self, storage):
            key, size = storage._cdata, storage.nbytes()
            self.known[key] = weakref.finalize(storage, self.drop, key, size)
            self.alive += size
            self.peak = max(self.peak, self.alive)

        def drop(self, key, size):
            del self.known[key]
            self.alive -= size

    with Watch() as watch:
        run()
    return watch.peak


class TestTokenDistillation:
    def setup_method(self):
        torch.manual_seed(shifted(1))
        self.layout = PackedLayout.from_grid_thw(GRIDS)
        self.objective = TokenDistillation(6, 10)
        self.student = torch.randn(self.layout.num_tokens, 6, requires_grad=True)
        self.pooled = torch.randn(3, 6, requires_grad=True)
        self.teacher = torch.randn(self.layout.num_tokens, 10, requires_grad=True)
        self.teacher_pooled = torch.randn(3, 10, requires_grad=True)

    def distances(self, **changed):
        given = {
            "tokens": self.student,
            "pooled": self.pooled,
            "teacher_tokens": self.teacher,
            "teacher_pooled": self.teacher_pooled,
            "layout": self.layout,
            "teacher_layout": PackedLayout.from_grid_thw(GRIDS, 4),
        }
        return self.objective(**(given | changed))

    def test_the_teacher_receives_no_gradient(self):
        sum(self.distances().values()).backward()
        assert self.teacher.grad is None and self.teacher_pooled.grad is None
        learners = [self.student, self.pooled, *self.objective.parameters()]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learners)

    def test_is_cosine_and_smooth_l1(self):
        predicted = self.objective.token_head(self.student)
        cosine = (F.normalize(predicted, dim=1) * F.normalize(self.teacher, dim=1)).sum(1).mean()
        error = (predicted - self.teacher).abs()
        smooth = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
        torch.testing.assert_close(self.distances()["tokens"], 0.9 * (1 - cosine) + 0.1 * smooth)

    def test_a_perfect_student_has_distance_0(self):
        self.objective = TokenDistillation(10, 10)
        self.objective.fit_targets(self.teacher, self.teacher_pooled)
        for head, (mean, deviation) in (
            (self.objective.token_head, self.objective.token_statistics),
            (self.objective.pooled_head, self.objective.pooled_statistics),
        ):
            head.weight.data = torch.diag(1 / deviation)
            head.bias.data = -mean / deviation
        distances = self.distances(tokens=self.teacher, pooled=self.teacher_pooled)
        assert max(d.item() for d in distances.values()) < 1e-5

    def test_knowing_the_mean_alone_is_no_achievement(self):
        """A constant part of the teacher, however large, must not make the distance small."""
        teacher = self.teacher.detach() + 100
        self.objective.fit_targets(teacher, self.teacher_pooled)
        self.objective.token_head.weight.data.zero_()
        assert self.distances(teacher_tokens=teacher)["tokens"] > 0.8

    def test_slack_rows_are_left_out(self):
        slack = torch.full((5, 6), float("nan"))
        teacher = torch.cat([self.teacher, torch.full((5, 10), float("nan"))])
        with_slack = self.distances(tokens=torch.cat([self.student, slack]), teacher_tokens=teacher)
        assert torch.equal(with_slack["tokens"], self.distances()["tokens"])

    def test_the_projection_learns(self):
        map_ = torch.randn(6, 10)
        tokens, pooled = self.student.detach(), self.pooled.detach()
        changed = {
            "tokens": tokens,
            "pooled": pooled,
            "teacher_tokens": tokens @ map_,
            "teacher_pooled": pooled @ map_,
        }
        optimizer = torch.optim.Adam(self.objective.parameters(), lr=0.03)
        before = sum(self.distances(**changed).values()).item()
        for _ in range(200):
            optimizer.zero_grad()
            sum(self.distances(**changed).values()).backward()
            optimizer.step()
        assert sum(self.distances(**changed).values()) < 0.05 * before

    @pytest.mark.parametrize("grids", [GRIDS[:2], [[2, 3, 2], *GRIDS[1:]]])
    def test_other_grids_are_refused(self, grids):
        with pytest.raises(ValueError, match="same grids"):
            self.distances(teacher_layout=PackedLayout.from_grid_thw(grids))

    def test_bad_options(self):
        with pytest.raises(ValueError, match="cosine_weight must be from 0 to 1, got 2"):
            TokenDistillation(2, 2, 2.0)
        with pytest.raises(ValueError, match="at least two rows, got 1"):
            self.objective.fit_targets(self.teacher[:1], self.teacher_pooled)


def test_mean_tokens():
    layout = PackedLayout.from_lengths([2, 0, 3])
    tokens = torch.randn(7, 4)  # two rows of slack
    wanted = torch.stack([tokens[:2].mean(0), torch.zeros(4), tokens[2:5].mean(0)])
    torch.testing.assert_close(mean_tokens(tokens, layout), wanted)


class TestContrastiveHead:
    def test_rows_have_length_1_and_everything_learns(self):
        head = ContrastiveHead(6, 4, 8)
        images, texts = torch.randn(5, 6), torch.randn(5, 4)
        for embeds in head(images, texts):
            assert embeds.shape == (5, 8)
            torch.testing.assert_close(embeds.norm(dim=1), torch.ones(5))
        head.loss(images, texts, chunk_size=2).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
        assert {"logit_scale", "logit_bias"} <= dict(head.named_parameters()).keys()

    def test_what_all_rows_share_does_not_count(self):
        head = ContrastiveHead(6, 4, 8)
        images, texts = 0.01 * torch.randn(32, 6), torch.randn(32, 4)
        plain, shifted = head(images, texts)[0], head(images + 10, texts)[0]
        torch.testing.assert_close(plain, shifted, rtol=0, atol=0.02)
        assert (plain @ plain.T).mean() < 0.1

    def test_a_row_depends_on_itself_alone_after_training(self):
        head = ContrastiveHead(6, 4, 8)
        images, texts = torch.randn(5, 6), torch.randn(5, 4)
        head(images, texts)
        head.eval()
        torch.testing.assert_close(head(images, texts)[0][:1], head(images[:1], texts[:1])[0])


class TestCaptionEncoder:
    TEXTS = ["red digit 3 hits blue digit 7", "", "é", "a rather longer caption than the others are"]

    def test_tokens_are_bytes_after_a_start(self):
        tokens, layout = CaptionEncoder(16, 1, 2).tokenize(["ab", "", "é"])
        assert tokens.tolist() == [256, 97, 98, 256, 256, 0xC3, 0xA9]
        assert layout.lengths == (3, 1, 3)

    def test_packed_equals_one_by_one(self):
        encoder = CaptionEncoder(16, 2, 2).double()
        together = encoder.encode(self.TEXTS)
        assert together.shape == (4, 16)
        torch.testing.assert_close(together, torch.cat([encoder.encode([text]) for text in self.TEXTS]))

    def test_order_matters(self):
        encoder = CaptionEncoder(16, 2, 2).double()
        one, other = encoder.encode(["red hits blue", "blue hits red"])
        assert (one - other).abs().max() > 1e-4

    def test_everything_learns(self):
        encoder = CaptionEncoder(16, 2, 2)
        encoder.encode(self.TEXTS).square().sum().backward()
        assert [
            n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
        ] == []
