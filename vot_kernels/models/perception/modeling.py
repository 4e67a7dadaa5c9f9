"""The perception model: from a packed clip to a spatial-temporal scene graph."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from vot_kernels.models.encoder.modeling import VotEncoder, VotEncoderOutput, VotEncoderPreTrainedModel
from vot_kernels.models.perception.configuration import VotPerceptionConfig
from vot_kernels.models.perception.head import HeadOutput, STSGHead
from vot_kernels.ops.pack_patches import unpack_patches


@dataclass
class VotPerceptionOutput(ModelOutput):
    """The output of the perception model.

    Attributes:
        clips: a `HeadOutput` per bucket of clips with equal grids.
        clip_index: for each bucket the positions of its clips in the input.
        pooler_output: `[clips, hidden_size]`, the encoder's pooled clip embeddings.
        domain_distance: `[clips]`, Mahalanobis distance of each clip's mean token from the training clips'.
        balance_loss, expert_load: from the encoder, in training or on request.
    """

    clips: list[HeadOutput] | None = None
    clip_index: list[Tensor] | None = None
    pooler_output: Tensor | None = None
    domain_distance: Tensor | None = None
    balance_loss: Tensor | None = None
    expert_load: Tensor | None = None


class VotPerceptionModel(VotEncoderPreTrainedModel):
    """`VotEncoder` with an STSG head.

    It records what it was trained on: the mean and the precision matrix of the clips' mean tokens are saved with the
    weights, and a clip farther away than `domain_threshold` (Mahalanobis distance; Lee et al., 2018) is reported as
    outside of the checkpoint's domain.
    """

    config: VotPerceptionConfig
    config_class = VotPerceptionConfig  # type: ignore[assignment]
    base_model_prefix = "perception"

    def __init__(self, config: VotPerceptionConfig):
        super().__init__(config)
        self.encoder = VotEncoder(config.encoder)
        self.head = STSGHead(config)
        dim = config.encoder.hidden_size
        self.domain_mean = nn.Buffer(torch.empty(dim))
        self.domain_precision = nn.Buffer(torch.empty(dim, dim))
        self.domain_threshold = nn.Buffer(torch.empty(()))
        self.reset_parameters()
        self.post_init()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set a domain without a limit; encoder and head have a `reset_parameters` of their own."""
        self.domain_mean.zero_()
        self.domain_precision.copy_(torch.eye(len(self.domain_mean)))
        self.domain_threshold.fill_(torch.inf)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        fps: Tensor,
        output_balance: bool | None = None,
        tokens: Tensor | None = None,
    ) -> VotPerceptionOutput:
        """Run the model on clips. With `return_dict=False` the output is a tuple of the fields that are not None.

        Args:
            pixel_values: `[patches, C * tp * p * p]`, from `VotImageProcessor`.
            image_grid_thw: int64 `[clips, 3]`.
            fps: float32 `[clips]`, frames per second.
            output_balance: as in `VotEncoder`.
            tokens: `[patches, hidden_size]`, the encoder's output where it was computed before, as for a stream; then
                nothing is pooled.
        """
        seen = VotEncoderOutput(last_hidden_state=tokens)
        if tokens is None:
            seen = self.encoder(
                pixel_values, image_grid_thw, fps=fps, output_balance=output_balance, return_dict=True
            )
            tokens = seen.last_hidden_state
        assert tokens is not None
        config = self.config.encoder
        frames = unpack_patches(
            pixel_values, image_grid_thw, config.patch_size, temporal_patch_size=config.temporal_patch_size
        )
        of_clip = tokens.split(image_grid_thw.prod(1).tolist())
        buckets: dict[tuple[int, int, int], list[int]] = {}
        for index, grid in enumerate(image_grid_thw.tolist()):
            buckets.setdefault((grid[0], grid[1], grid[2]), []).append(index)
        outputs = [
            self.head(
                torch.stack([of_clip[i] for i in clips]),
                grid,
                torch.stack([frames[i][:: config.temporal_patch_size] for i in clips]),
            )
            for grid, clips in buckets.items()
        ]
        mean_tokens = _segment_means(tokens, image_grid_thw)
        return VotPerceptionOutput(
            clips=outputs,
            clip_index=[torch.tensor(clips) for clips in buckets.values()],
            pooler_output=seen.pooler_output,
            domain_distance=self.domain_distance(mean_tokens),
            balance_loss=seen.balance_loss,
            expert_load=seen.expert_load,
        )

    def mean_tokens(self, pixel_values: Tensor, image_grid_thw: Tensor, fps: Tensor) -> Tensor:
        """Return the mean token of each clip, `[clips, hidden_size]`, as `fit_domain` needs them."""
        seen = self.encoder(pixel_values, image_grid_thw, fps=fps, output_balance=False, return_dict=True)
        return _segment_means(seen.last_hidden_state, image_grid_thw)

    def domain_distance(self, mean_tokens: Tensor) -> Tensor:
        """Return the Mahalanobis distance of mean tokens `[clips, hidden_size]` from the training clips: `[clips]`."""
        offset = (mean_tokens - self.domain_mean).float()
        return torch.einsum("bi,ij,bj->b", offset, self.domain_precision.float(), offset).clamp_min(0).sqrt()

    @torch.no_grad()
    def fit_domain(self, mean_tokens: Tensor, held_out: Tensor, quantile: float = 0.995) -> None:
        """Set the domain from training clips, and its limit from held-out clips, `[clips, hidden_size]` each.

        The limit is 2.75 times the `quantile` of the held-out distances, so that new objects and clips of up to three
        times the length are not a new domain. Of the bundled checkpoint, clips of twice the length lie at up to 2.3
        times it, plain squares that move like digits at 3 times, natural clips at 10 times and more.
        """
        self.domain_mean.copy_(mean_tokens.mean(0))
        covariance = torch.cov(mean_tokens.double().T)
        unit = torch.eye(len(covariance), device=covariance.device)
        shrunk = covariance + 0.05 * covariance.diagonal().mean() * unit
        self.domain_precision.copy_(torch.linalg.inv(shrunk))
        self.domain_threshold.copy_(2.75 * self.domain_distance(held_out).quantile(quantile))

    @property
    def num_parameters_by_part(self) -> dict[str, int]:
        """Count the parameters of the encoder and of the head."""
        parts: Sequence[tuple[str, nn.Module]] = (("encoder", self.encoder), ("head", self.head))
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts}


def _segment_means(tokens: Tensor, grid: Tensor) -> Tensor:
    return torch.stack([part.mean(0) for part in tokens.split(grid.prod(1).tolist())])
