"""Pretraining objectives of the encoder: distillation from a frozen teacher, contrast with captions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.nn.mlp import SwiGLU
from vot_kernels.nn.pooling import PackedAttentionPooling
from vot_kernels.nn.rotary import RotaryEmbedding
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.packing import PackedLayout

_START = 256  # follows the bytes, so that the empty caption has a token too


class TokenDistillation(nn.Module):
    """The loss for a student that predicts a frozen teacher: every token, and one pooled vector per segment.

    Two linear heads map the student's width to the teacher's. A distance is
    `cosine_weight · (1 - cosine) + (1 - cosine_weight) · smooth L1`. Targets are first standardised per channel (see
    `fit_targets`), so that a student which has learned only the mean has a cosine of 0.

    Args:
        student_dim, teacher_dim: widths of tokens and pooled vectors.
        cosine_weight: in [0, 1]; the rest goes to smooth L1.

    Source: the distance is from Ranzinger et al., AM-RADIO, CVPR 2024 (arXiv 2312.06709), section 3.3.
    """

    token_statistics: Tensor
    pooled_statistics: Tensor

    def __init__(self, student_dim: int, teacher_dim: int, cosine_weight: float = 0.9):
        super().__init__()
        if not 0 <= cosine_weight <= 1:
            raise ValueError(f"cosine_weight must be from 0 to 1, got {cosine_weight}.")
        self.cosine_weight = cosine_weight
        self.token_head = nn.Linear(student_dim, teacher_dim)
        self.pooled_head = nn.Linear(student_dim, teacher_dim)
        neutral = torch.stack([torch.zeros(teacher_dim), torch.ones(teacher_dim)])
        self.register_buffer("token_statistics", neutral)
        self.register_buffer("pooled_statistics", neutral.clone())

    @torch.no_grad()
    def fit_targets(self, tokens: Tensor, pooled: Tensor) -> None:
        """Compute mean and deviation of each channel from teacher tokens `[tokens, teacher_dim]` and pooled
        vectors `[segments, teacher_dim]` of a few training batches, at least two rows each."""
        for statistics, values in ((self.token_statistics, tokens), (self.pooled_statistics, pooled)):
            if len(values) < 2:
                raise ValueError(f"A deviation needs at least two rows, got {len(values)}.")
            statistics.copy_(torch.stack([values.mean(0), values.std(0).clamp_min(1e-6)]))

    def forward(
        self,
        tokens: Tensor,
        pooled: Tensor,
        teacher_tokens: Tensor,
        teacher_pooled: Tensor,
        layout: PackedLayout,
        teacher_layout: PackedLayout,
    ) -> dict[str, Tensor]:
        """Return the distances "tokens" and "pooled", scalars. No gradient reaches the teacher.

        Args:
            tokens: `[tokens, student_dim]`; rows past the layout's tokens are slack and left out.
            pooled: `[segments, student_dim]`.
            teacher_tokens, teacher_pooled: the same rows, `[..., teacher_dim]`.
            layout, teacher_layout: the layouts of the two; their groups may differ, but not their grids.

        Raises:
            ValueError: the two are packed differently.
        """
        _check_same_grids(layout, teacher_layout)
        count = layout.num_tokens
        return {
            "tokens": self._distance(
                self.token_head(tokens[:count]), teacher_tokens[:count], self.token_statistics
            ),
            "pooled": self._distance(self.pooled_head(pooled), teacher_pooled, self.pooled_statistics),
        }

    def _distance(self, predicted: Tensor, target: Tensor, statistics: Tensor) -> Tensor:
        mean, deviation = statistics
        target = ((target.detach() - mean) / deviation).to(predicted.dtype)
        cosine = 1 - F.cosine_similarity(predicted, target, dim=-1).mean()
        return self.cosine_weight * cosine + (1 - self.cosine_weight) * F.smooth_l1_loss(predicted, target)


def mean_tokens(tokens: Tensor, layout: PackedLayout) -> Tensor:
    """Average the tokens of each segment: `[tokens, dim]` to `[segments, dim]`; an empty segment gives 0."""
    total = tokens.new_zeros(layout.num_segments, tokens.shape[1])
    total = total.index_add(0, layout.token_segments, tokens[: layout.num_tokens])
    return total / layout.cu_seqlens.diff().clamp_min(1)[:, None]


def sigmoid_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    chunk_size: int = 1024,
) -> Tensor:
    """Return the loss in which each of the N × N pairs is a binary decision: do image and text belong together?

    -Σᵢⱼ log sigmoid(zᵢⱼ (exp(logit_scale) xᵢ·yⱼ + logit_bias)) / N with zᵢⱼ = 1 for i = j, else -1. The rows
    are processed `chunk_size` at a time and recomputed in the backward pass, so that memory is O(chunk_size · N),
    where the whole matrix needs O(N²).

    Args:
        image_embeds, text_embeds: `[N, dim]`, floating, usually of length 1; row i of one belongs to row i
            of the other.
        logit_scale, logit_bias: scalars; the first is the log of the factor.
        chunk_size: number of images at a time; it need not divide N.

    Returns:
        A scalar, float32 (float64 for float64 inputs), equal to the loss of the whole matrix; so are its gradients.

    Raises:
        ValueError: the shapes differ, there are no rows, or the chunk size is below 1.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023 (arXiv 2303.15343), section 3.
    """
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape or len(image_embeds) == 0:
        raise ValueError(
            "image_embeds and text_embeds must both be [N, dim] with N >= 1, "
            f"got {list(image_embeds.shape)} and {list(text_embeds.shape)}."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}.")
    wide = accumulator(image_embeds.dtype)
    images, texts, scale, bias = (
        x.to(wide) for x in (image_embeds, text_embeds, logit_scale.exp(), logit_bias)
    )
    loss = images.new_zeros(())
    for first in range(0, len(images), chunk_size):
        rows = images[first : first + chunk_size]
        loss = loss + checkpoint(
            _rows_loss, rows, texts, scale, bias, first, use_reentrant=False, preserve_rng_state=False
        )
    return loss / len(images)


def _rows_loss(rows: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    """Sum over the pairs of some images, `rows`; the first image belongs to text `first`."""
    logits = scale * rows @ texts.T + bias
    matching = logits.diagonal(first)
    # -log sigmoid(-s) everywhere; the matching pairs need -log sigmoid(s) instead, which is smaller by s.
    return F.softplus(logits).sum() - matching.sum()


class ContrastiveHead(nn.Module):
    """Maps pooled vectors of images and texts into one space, with the learned scale and bias of the logits.

    Each side is standardised over the batch and then projected. The pooled vectors of a fresh encoder differ from each
    other by a thousandth of their length. Projected without standardisation, all images would point the same way, and
    training would stop where no logit depends on its pair. Outside of training, running statistics are used, so that a
    row depends only on itself.

    Args:
        image_dim, text_dim: widths of the pooled vectors.
        projection_size: width of the shared space.
        scale, bias: initial factor and bias of the logits. The bias should be about minus the log
            of the texts in a batch, so that the many pairs that do not match start as such.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        projection_size: int,
        scale: float = 10.0,
        bias: float = -10.0,
    ):
        super().__init__()
        self.image = _projection(image_dim, projection_size)
        self.text = _projection(text_dim, projection_size)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, image_pooled: Tensor, text_pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[N, image_dim]` and `[M, text_dim]` to `[N, projection_size]` and `[M, projection_size]`, every row of
        length 1. In training N and M must be at least 2."""
        return F.normalize(self.image(image_pooled), dim=-1), F.normalize(self.text(text_pooled), dim=-1)

    def loss(self, image_pooled: Tensor, text_pooled: Tensor, chunk_size: int = 1024) -> Tensor:
        """Return `sigmoid_contrastive_loss` of pooled vectors whose rows belong together."""
        image_embeds, text_embeds = self(image_pooled, text_pooled)
        return sigmoid_contrastive_loss(
            image_embeds, text_embeds, self.logit_scale, self.logit_bias, chunk_size
        )


def _projection(dim: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, size, bias=False))


class CaptionEncoder(nn.Module):
    """A small text encoder over bytes; captions of any lengths are packed without padding.

    Args:
        dim: width of the tokens and the pooled vector; a multiple of `num_heads`.
        num_layers: transformer blocks.
        num_heads: heads of the attention and of the pooling.
    """

    def __init__(self, dim: int = 96, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_START + 1, dim)
        self.blocks = nn.ModuleList(_CaptionBlock(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.pooling = PackedAttentionPooling(dim, num_heads)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, PackedLayout]:
        """Return UTF-8 bytes after a start token: int64 `[tokens]` and their layout, on the module's device."""
        device = self.embedding.weight.device
        captions = [[_START, *text.encode()] for text in texts]
        tokens = torch.tensor([token for caption in captions for token in caption], dtype=torch.int64)
        return tokens.to(device), PackedLayout.from_lengths([len(c) for c in captions], device=device)

    def forward(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        """Map int64 `[tokens]` to one vector per caption, `[captions, dim]`."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, layout)
        return self.pooling(self.norm(x), layout)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode captions to `[captions, dim]`."""
        return self(*self.tokenize(texts))


class _CaptionBlock(nn.Module):
    """Pre-norm block: attention within each caption, then a SwiGLU."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.attention = HybridAttention(dim, num_heads, window=None, rotary=RotaryEmbedding(10_000.0))
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, 8 * dim // 3)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Map `[tokens, dim]` to `[tokens, dim]`."""
        x = x + self.attention(self.attention_norm(x), layout)
        return x + self.mlp(self.mlp_norm(x))


def _check_same_grids(layout: PackedLayout, other: PackedLayout) -> None:
    if layout is other:
        return
    if layout.num_segments != other.num_segments or not torch.equal(layout.sizes, other.sizes):
        raise ValueError(
            "Student and teacher must see the same grids of patches, "
            f"got {layout.sizes.tolist()[:4]} and {other.sizes.tolist()[:4]}."
        )
