"""Linear attention on the Triton kernels: running sums of group states, then the rows.

No function here waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, ceil_div, contiguous, padded, rows_contiguous, strides
from vot_kernels.ops.linear_attention.geometry import Geometry, Inputs, Options, Saved
from vot_kernels.ops.parts.attention import Grads
from vot_kernels.ops.parts.group_states.triton import (
    Rows,
    dot_bits,
    group_states,
    running_states,
    states_config,
)
from vot_kernels.ops.parts.plans import keep_with

SCALE = 1.0  # as in `vot_kernels.ops.linear_attention.torch`
_APPLY = Kernel("linear_attention", "apply", "linear_attention.rows:_linear_apply_kernel")
_FEATURE_GRAD = Kernel(
    "linear_attention", "feature_grad", "linear_attention.rows:_linear_feature_grad_kernel"
)
_DECAY_PAIRS = Kernel("linear_attention", "decay_pairs", "linear_attention.decay:_decay_pairs_kernel")
_DECAY_STATES = Kernel("linear_attention", "decay_states", "linear_attention.decay:_decay_states_kernel")


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output and 1 / Z float32 `[tokens, heads]`, which is 0 where Z is 0."""
    q, k, v = (rows_contiguous(x, compact=True) for x in (inputs.q, inputs.k, inputs.v))
    shared = _LinearLaunch.of(q, k, inputs.log_decay, geometry, options)
    rows = Rows(k, v)
    return shared.apply(q, rows, shared.states(rows), normalise=True)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Return the gradients of q, k and v, and that of log_decay if the options ask for it.

    The states of k and v are recomputed, because they may be larger than the inputs.
    """
    inputs, out, inverse = saved
    tensors = (grads.d_out, inputs.q, inputs.k, inputs.v)
    d_out, q, k, v = (rows_contiguous(x, compact=True) for x in tensors)
    inverse = inverse.contiguous()
    shared = _LinearLaunch.of(q, k, inputs.log_decay, geometry, options)
    keys = Rows(k, v)
    last = torch.empty_like(inverse)  # -do.out, written together with dq
    before = shared.states(keys)
    dq = shared.feature_grad(d_out, q, keys, inverse, last, out, None, before)
    queries = Rows(q, d_out, inverse, last)
    after = shared.states(queries, reverse=True)
    dv, dv_last = shared.apply(k, queries, after, reverse=True)
    dk = shared.feature_grad(v, k, queries, inverse, last, dv, dv_last, after)
    d_decay = None
    if inputs.log_decay is not None and options.decay_gradient:
        d_decay = shared.decay(queries, keys, before, after).to(inputs.log_decay.dtype)
    return Inputs(dq, _fold_heads(dk, k), _fold_heads(dv, v), d_decay)


@dataclass(frozen=True, eq=False)
class _LinearLaunch:
    """The arguments that all launches of one forward or backward share.

    Attributes:
        state_heads: heads that have states: those of k, or with a decay, which differs between heads of one key, of q.
        log_decay: float32 `[state_heads]`, contiguous, or None.
    """

    cu_seqlens: Tensor
    host_cu_seqlens: Tensor
    feature_map: str
    causal: bool
    state_heads: int
    log_decay: Tensor | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, log_decay: Tensor | None, geometry: Geometry, options: Options
    ) -> "_LinearLaunch":
        """Make it from these queries and keys, with log_decay of any floating dtype."""
        bounds = geometry.cu_seqlens.contiguous(), geometry.host_cu_seqlens
        heads = k.shape[1] if log_decay is None else q.shape[1]
        log_decay = contiguous(log_decay, torch.float32)
        return cls(*bounds, options.feature_map, geometry.causal is not None, heads, log_decay)

    def states(self, rows: Rows, *, reverse: bool = False) -> Tensor | None:
        """Return the state before each tile; None if every segment is one tile, whose kernel needs none."""
        bounds = self.host_cu_seqlens
        longest = keep_with(bounds, "longest", lambda: int(np.diff(bounds.numpy()).max(initial=0)))
        if longest <= states_config(rows).blocks["TILE"]:
            return None
        if self.causal:
            return running_states(
                rows,
                self.cu_seqlens,
                self.state_heads,
                self.feature_map,
                log_decay=self.log_decay,
                reverse=reverse,
            )
        return group_states(rows, self.cu_seqlens, self.state_heads, self.feature_map)

    def apply(
        self, x: Tensor, rows: Rows, states: Tensor | None, *, normalise: bool = False, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return phi(x) applied to S and to z; heads that share one of x are separate."""
        out = self._new_rows(x)
        out_last = x.new_empty(out.shape[:2], dtype=torch.float32)
        _APPLY.launch(
            lambda blocks: self._grid(x, rows, blocks["BLOCK_V"]),
            key=self._key(x),
            x_ptr=x,
            features_ptr=rows.features,
            values_ptr=rows.values,
            weights_ptr=rows.weights,
            last_ptr=rows.last,
            log_decay_ptr=self.log_decay,
            states_ptr=states,
            bounds_ptr=self.cu_seqlens,
            out_ptr=out,
            out_last_ptr=out_last,
            **strides(x=x, features=rows.features, values=rows.values),
            **self._sizes(x, rows),
            NORMALISE=normalise,
            REVERSE=reverse,
        )
        return out, out_last

    def feature_grad(
        self,
        x: Tensor,
        own: Tensor,
        rows: Rows,
        weights: Tensor,
        last: Tensor,
        out: Tensor,
        out_last: Tensor | None,
        states: Tensor | None,
    ) -> Tensor:
        """Return the gradient of `own`, q or k, as `apply` does; `out_last` is given on the side of k."""
        d_own = self._new_rows(own)
        _FEATURE_GRAD.launch(
            lambda blocks: self._grid(x, rows, blocks["BLOCK_F"]),
            key=self._key(x),
            x_ptr=x,
            own_ptr=own,
            features_ptr=rows.features,
            values_ptr=rows.values,
            weights_ptr=weights,
            last_ptr=last,
            log_decay_ptr=self.log_decay,
            out_ptr=out.contiguous(),
            out_last_ptr=out_last,
            states_ptr=states,
            bounds_ptr=self.cu_seqlens,
            d_own_ptr=d_own,
            **strides(x=x, own=own, features=rows.features, values=rows.values),
            **self._sizes(x, rows),
            KEY_SIDE=out_last is not None,
        )
        return d_own

    def decay(self, queries: Rows, keys: Rows, before: Tensor | None, after: Tensor | None) -> Tensor:
        """Return the gradient of log_decay, float32 `[heads]`."""
        tokens, heads, head_dim = queries.features.shape
        tile = states_config(keys).blocks["TILE"]
        tiles = tokens // tile + self.cu_seqlens.shape[0] - 1
        key = {"dot_bits": dot_bits(keys.values), "head_dim": padded(head_dim)}
        tensors = {
            "query": queries.features,
            "d_out": queries.values,
            "key": keys.features,
            "value": keys.values,
        }
        arguments: dict[str, Any] = {
            **{f"{name}_ptr": x for name, x in tensors.items()},
            **strides(**tensors),
            "weights_ptr": queries.weights,
            "last_ptr": queries.last,
            "log_decay_ptr": self.log_decay,
            "bounds_ptr": self.cu_seqlens,
            "num_segments": self.cu_seqlens.shape[0] - 1,
            "heads": heads,
            "shared": heads // keys.values.shape[1],
            "HEAD_DIM": head_dim,
            "FEATURE_MAP": self.feature_map,
            "TILE": tile,
        }
        sums = keys.values.new_empty((tiles, heads, 1), dtype=torch.float32)
        _DECAY_PAIRS.launch(lambda _: (tiles * heads,), key=key, out_ptr=sums, **arguments)
        if before is None:
            return sums.sum((0, 2))
        config = _DECAY_STATES.config(sums.device, key)
        others = sums.new_empty((tiles, heads, ceil_div(head_dim, config.blocks["BLOCK_V"])))
        _DECAY_STATES.launch(
            (others.numel(),),  # fixed, because `others` has a row for each block of columns
            config=config,
            before_ptr=before,
            after_ptr=after,
            out_ptr=others,
            **arguments,
        )
        return sums.sum((0, 2)) + others.sum((0, 2))

    def _key(self, x: Tensor) -> dict[str, int]:
        key = {"causal": int(self.causal), "decay": int(self.log_decay is not None)}
        return {**key, "head_dim": padded(x.shape[2]), "dot_bits": dot_bits(x)}

    def _heads(self, x: Tensor) -> int:
        """Return the number of heads of x, counting each of those that share one."""
        return max(x.shape[1], self.state_heads)

    def _new_rows(self, x: Tensor) -> Tensor:
        """Allocate rows like those of x, in float32 where heads that share one are still to be summed."""
        heads = self._heads(x)
        dtype = x.dtype if heads == x.shape[1] else torch.float32
        return x.new_empty((x.shape[0], heads, x.shape[2]), dtype=dtype)

    def _grid(self, x: Tensor, rows: Rows, block: int) -> tuple[int]:
        """One program per tile, head and block of columns; the slack is one more segment."""
        tiles = x.shape[0] // states_config(rows).blocks["TILE"] + self.cu_seqlens.shape[0]
        return (tiles * self._heads(x) * ceil_div(x.shape[2], block),)

    def _sizes(self, x: Tensor, rows: Rows) -> dict[str, Any]:
        heads, other_heads = self._heads(x), self._heads(rows.values)
        return {
            "num_tokens": x.shape[0],
            "num_segments": self.cu_seqlens.shape[0] - 1,
            "heads": heads,
            "other_heads": other_heads,
            "repeats": max(other_heads // heads, 1),
            "shared": self.state_heads // min(x.shape[1], rows.values.shape[1]),
            "HEAD_DIM": x.shape[2],
            "FEATURE_MAP": self.feature_map,
            "CAUSAL": self.causal,
            "TILE": states_config(rows).blocks["TILE"],
        }


def _fold_heads(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` with the heads that share one of `like` summed."""
    return x if x.shape == like.shape else x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
