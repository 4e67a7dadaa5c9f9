"""Layers for the Hub's `kernels` package: stateless modules whose forward takes the place of a layer's own.

They have no constructor and read what they need from the layer that adopts them.
"""

from collections.abc import Callable

from torch import Tensor, nn

from vot_kernels.ops.moe import moe


class SwiGLUExperts(nn.Module):
    """Packed experts of a mixture as transformers 5 has them, on `moe`."""

    can_torch_compile = True

    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden_states: `[tokens, dim]`, in the dtype of the weights `[experts, 2 * hidden, dim]` and
                `[experts, dim, hidden]`.
            top_k_index: integer `[tokens, k]`.
            top_k_weights: `[tokens, k]`.

        Returns:
            `[tokens, dim]`.

        Raises:
            ValueError: the activation of the layer is not SiLU.
        """
        name = getattr(
            self.act_fn, "__name__", type(self.act_fn).__name__
        )  # a function's, or a module's class
        if "silu" not in name.lower():
            raise ValueError(f"SwiGLUExperts needs the activation SiLU, got {name}.")
        return moe(hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights)
