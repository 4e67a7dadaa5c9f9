"""Launchers of the Triton kernels of linear attention: group states, running sums of them, and the rows.

States are float32 `[slots, kv_heads, width * (head_dim + 1)]`: S `[width, head_dim]`, then z `[width]`; see
`kernels/triton/group_states/states.py`. Nothing here asks the device for a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vot_kernels.ops.launch import ceil_div, find_config, launch
from vot_kernels.ops.linear_attention.geometry import Geometry, Inputs, Options, Saved
from vot_kernels.ops.parts.attention import Grads
from vot_kernels.tuning import Config

OP = "linear_attention"
# Bits that a factor of tl.dot keeps: float16 goes as tf32, for sums over a segment leave its range.
_DOT_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that make up a state.

    Attributes:
        features: `[tokens, heads, width]`, width >= 16; `feature_map` is applied to them ("none": taken as
            they are, and of the dtype of the values).
        values: `[tokens, heads, head_dim]`. Columns of both lie side by side in memory.
        weights: float32 `[tokens, heads]`, factors of the features, or None for 1.
        last: float32 `[tokens, heads]`, the column appended to the values, or None for 1.
    """

    features: Tensor
    values: Tensor
    weights: Tensor | None = None
    last: Tensor | None = None


def group_states(rows: Rows, bounds: Tensor, kv_heads: int, feature_map: str) -> Tensor:
    """The state of each group `[groups, kv_heads, width * (head_dim + 1)]`; heads // kv_heads heads add up.

    bounds: int32 `[groups + 1]`, cumulative lengths; rows from bounds[-1] on are not read.
    """
    from vot_kernels.kernels.group_states.states import _reduce_states_kernel

    size = _state_size(rows)
    states = _new_states(rows, bounds.shape[0] - 1, kv_heads)
    partials, tile = _tile_states(rows, bounds, kv_heads, feature_map, states)
    config = _config("reduce_states", rows.values)
    launch(
        _reduce_states_kernel,
        lambda blocks: (states.shape[0] * kv_heads * ceil_div(size, blocks["BLOCK"]),),
        config,
        states_ptr=states,
        partials_ptr=partials,
        bounds_ptr=bounds,
        kv_heads=kv_heads,
        SIZE=size,
        TILE=tile,
    )
    return states


def running_states(
    rows: Rows,
    bounds: Tensor,
    kv_heads: int,
    feature_map: str,
    *,
    log_decay: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """For each tile of each segment the sum of the states of the tiles before it; reverse: after it.

    log_decay: float32 `[kv_heads]`; then kv_heads counts query heads, and several may read one head of `rows`.
    """
    partials, tile = _tile_states(
        rows, bounds, kv_heads, feature_map, None, log_decay, reverse=reverse and log_decay is not None
    )
    return scan_states(partials, bounds, reverse=reverse, tile=tile, log_decay=log_decay)


def scan_states(
    states: Tensor,
    bounds: Tensor,
    *,
    lag: int = 1,
    reverse: bool = False,
    tile: int = 0,
    out: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Sums of the states of the slots j <= i - lag (reverse: j >= i + lag) within each segment.

    Args:
        states: `[slots, kv_heads, size]`.
        bounds: int32 `[segments + 1]`: the first slot of each segment; with `tile` > 0 its first row, the
            slots being tiles of as many rows.
        out: add to this instead of writing a new tensor.
        log_decay: float32 `[kv_heads]`, of each row of the tiles: a sum shrinks from tile to tile.
    """
    from vot_kernels.kernels.group_states.states import _scan_states_kernel

    kv_heads, size = states.shape[1:]
    config = _config("scan_states", states, decay=int(log_decay is not None))
    sums = torch.empty_like(states) if out is None else out

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return ((bounds.shape[0] - 1) * kv_heads * ceil_div(size, blocks["BLOCK"]),)

    launch(
        _scan_states_kernel,
        grid if out is None else grid(config.blocks),  # what adds must not be repeated
        config,
        states_ptr=states,
        sums_ptr=sums,
        log_decay_ptr=log_decay,
        bounds_ptr=bounds,
        kv_heads=kv_heads,
        lag=lag,
        SIZE=size,
        TILE=tile,
        REVERSE=reverse,
        ACCUMULATE=out is not None,
    )
    return sums


def forward(inputs: Inputs, geometry: Geometry, options: Options) -> tuple[Tensor, Tensor]:
    """The output, and 1 / Z float32 `[tokens, heads]`, 0 where Z is 0."""
    q, k, v = map(_addressable, (inputs.q, inputs.k, inputs.v))
    pass_ = _Pass.of(q, k, inputs.log_decay, geometry, options)
    rows = Rows(k, v)
    return pass_.values(q, rows, pass_.states(rows), normalise=True)


def backward(saved: Saved, grads: Grads, geometry: Geometry, options: Options) -> Inputs:
    """Gradients of q, k and v, and that of log_decay if the options want it.

    The states of k and v are made again: they may outweigh the inputs.
    """
    inputs, out, inverse = saved
    d_out, q, k, v = map(_addressable, (grads.d_out, inputs.q, inputs.k, inputs.v))
    pass_ = _Pass.of(q, k, inputs.log_decay, geometry, options)
    keys = Rows(k, v)
    last = torch.empty_like(inverse)  # -do.out, written with dq
    before = pass_.states(keys)
    dq = pass_.features(d_out, q, keys, inverse, last, out, None, before)
    queries = Rows(q, d_out, inverse, last)
    after = pass_.states(queries, reverse=True)
    dv, dv_last = pass_.values(k, queries, after, reverse=True)
    dk = pass_.features(v, k, queries, inverse, last, dv, dv_last, after)
    d_decay = None
    if inputs.log_decay is not None and options.decay_gradient:
        d_decay = pass_.decay(queries, keys, before, after).to(inputs.log_decay.dtype)
    return Inputs(dq, _fold_heads(dk, k), _fold_heads(dv, v), d_decay)


@dataclass(frozen=True, eq=False)
class _Pass:
    """What all launches of one forward or backward share.

    Attributes:
        state_heads: heads that have states: those of k, or with a decay, which tells heads of one key apart, of q.
        log_decay: float32 `[state_heads]`, side by side, or None.
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
    ) -> "_Pass":
        """Of these queries and keys; log_decay in any floating dtype."""
        causal = geometry.causal is not None
        shared = geometry.cu_seqlens, geometry.host_cu_seqlens, options.feature_map, causal
        if log_decay is None:
            return cls(*shared, k.shape[1], None)
        return cls(*shared, q.shape[1], log_decay.to(torch.float32).contiguous())

    def states(self, rows: Rows, *, reverse: bool = False) -> Tensor | None:
        """What each tile begins with; None if every segment is one tile, which finds it on its own."""
        lengths = self.host_cu_seqlens.diff()
        if not lengths.numel() or int(lengths.max()) <= _states_config(rows).blocks["TILE"]:
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

    def values(
        self, x: Tensor, rows: Rows, states: Tensor | None, *, normalise: bool = False, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """phi(x) applied to S, and to z; heads that share one of x are apart."""
        from vot_kernels.kernels.linear_attention.rows import _linear_values_kernel

        out = self._new_rows(x)
        out_last = x.new_empty(out.shape[:2], dtype=torch.float32)
        config = self._config("linear_values", x)
        launch(
            _linear_values_kernel,
            lambda blocks: self._grid(x, rows, blocks["BLOCK_V"]),
            config,
            x_ptr=x,
            **_pointers(rows),
            weights_ptr=rows.weights,
            last_ptr=rows.last,
            log_decay_ptr=self.log_decay,
            states_ptr=states,
            bounds_ptr=self.cu_seqlens,
            out_ptr=out,
            out_last_ptr=out_last,
            **_strides("x", x),
            **self._sizes(x, rows),
            NORMALISE=normalise,
            REVERSE=reverse,
        )
        return out, out_last

    def features(
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
        """The gradient of `own`, q or k, as `values` has it; `out_last` is given on the side of k."""
        from vot_kernels.kernels.linear_attention.rows import _linear_features_kernel

        gradient = self._new_rows(own)
        config = self._config("linear_features", x)
        launch(
            _linear_features_kernel,
            lambda blocks: self._grid(x, rows, blocks["BLOCK_F"]),
            config,
            x_ptr=x,
            own_ptr=own,
            **_pointers(rows),
            weights_ptr=weights,
            last_ptr=last,
            log_decay_ptr=self.log_decay,
            out_ptr=out.contiguous(),
            out_last_ptr=out_last,
            states_ptr=states,
            bounds_ptr=self.cu_seqlens,
            grad_ptr=gradient,
            **_strides("x", x),
            **_strides("own", own),
            **self._sizes(x, rows),
            KEY_SIDE=out_last is not None,
        )
        return gradient

    def decay(self, queries: Rows, keys: Rows, before: Tensor | None, after: Tensor | None) -> Tensor:
        """The gradient of log_decay, float32 `[heads]`."""
        from vot_kernels.kernels.linear_attention import decay as linear_decay

        tokens, heads, head_dim = queries.features.shape
        tile = _states_config(keys).blocks["TILE"]
        tiles = tokens // tile + self.cu_seqlens.shape[0] - 1
        arguments = {
            "query_ptr": queries.features,
            "grad_ptr": queries.values,
            "key_ptr": keys.features,
            "value_ptr": keys.values,
            "weights_ptr": queries.weights,
            "last_ptr": queries.last,
            "log_decay_ptr": self.log_decay,
            "bounds_ptr": self.cu_seqlens,
            **_strides("query", queries.features),
            **_strides("grad", queries.values),
            **_strides("key", keys.features),
            **_strides("value", keys.values),
            "num_segments": self.cu_seqlens.shape[0] - 1,
            "heads": heads,
            "shared": heads // keys.values.shape[1],
            "HEAD_DIM": head_dim,
            "FEATURE_MAP": self.feature_map,
            "TILE": tile,
        }
        config = _config("decay_pairs", keys.values, head_dim=_padded(head_dim))
        sums = keys.values.new_empty((tiles, heads, 1), dtype=torch.float32)
        launch(
            linear_decay._decay_pairs_kernel, lambda _: (tiles * heads,), config, out_ptr=sums, **arguments
        )
        if before is None:
            return sums.sum((0, 2))
        config = _config("decay_states", keys.values, head_dim=_padded(head_dim))
        others = sums.new_empty((tiles, heads, ceil_div(head_dim, config.blocks["BLOCK_V"])))
        launch(
            linear_decay._decay_states_kernel,
            (others.numel(),),
            config,
            before_ptr=before,
            after_ptr=after,
            out_ptr=others,
            **arguments,
        )
        return sums.sum((0, 2)) + others.sum((0, 2))

    def _config(self, kernel: str, x: Tensor) -> Config:
        key = {"causal": int(self.causal), "decay": int(self.log_decay is not None)}
        return _config(kernel, x, head_dim=_padded(x.shape[2]), **key)

    def _heads(self, x: Tensor) -> int:
        """Heads of x, those that share one counted each."""
        return max(x.shape[1], self.state_heads)

    def _new_rows(self, x: Tensor) -> Tensor:
        """Room for rows like those of x, float32 where heads that share one are yet to be added up."""
        heads = self._heads(x)
        dtype = x.dtype if heads == x.shape[1] else torch.float32
        return x.new_empty((x.shape[0], heads, x.shape[2]), dtype=dtype)

    def _grid(self, x: Tensor, rows: Rows, block: int) -> tuple[int]:
        """One program per tile, head and block of columns; the slack is one more segment."""
        tiles = x.shape[0] // _states_config(rows).blocks["TILE"] + self.cu_seqlens.shape[0]
        return (tiles * self._heads(x) * ceil_div(x.shape[2], block),)

    def _sizes(self, x: Tensor, rows: Rows) -> dict[str, int | bool | str]:
        heads, other_heads = self._heads(x), self._heads(rows.values)
        return {
            **_strides("features", rows.features),
            **_strides("values", rows.values),
            "num_tokens": x.shape[0],
            "num_segments": self.cu_seqlens.shape[0] - 1,
            "heads": heads,
            "other_heads": other_heads,
            "repeats": max(other_heads // heads, 1),
            "shared": self.state_heads // min(x.shape[1], rows.values.shape[1]),
            "HEAD_DIM": x.shape[2],
            "FEATURE_MAP": self.feature_map,
            "CAUSAL": self.causal,
            "TILE": _states_config(rows).blocks["TILE"],
        }


def _tile_states(
    rows: Rows,
    bounds: Tensor,
    kv_heads: int,
    feature_map: str,
    states: Tensor | None,
    log_decay: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, int]:
    """The state of each tile, and the rows of a tile; `states` gets those of groups of one tile instead."""
    from vot_kernels.kernels.group_states.states import _group_states_kernel

    config = _states_config(rows)
    tokens, heads, width = rows.features.shape
    tiles = tokens // config.blocks["TILE"] + bounds.shape[0] - 1
    partials = _new_states(rows, tiles, kv_heads)
    launch(
        _group_states_kernel,
        lambda blocks: (tiles * kv_heads * ceil_div(rows.values.shape[2], blocks["BLOCK_V"]),),
        config,
        **_pointers(rows),
        weights_ptr=rows.weights,
        last_ptr=rows.last,
        log_decay_ptr=log_decay,
        bounds_ptr=bounds,
        states_ptr=states,
        partials_ptr=partials,
        **_strides("features", rows.features),
        **_strides("values", rows.values),
        num_groups=bounds.shape[0] - 1,
        kv_heads=kv_heads,
        repeats=max(heads // kv_heads, 1),
        shared=max(kv_heads // heads, 1),
        WIDTH=width,
        HEAD_DIM=rows.values.shape[2],
        FEATURE_MAP=feature_map,
        REVERSE=reverse,
    )
    return partials, config.blocks["TILE"]


def _states_config(rows: Rows) -> Config:
    width, head_dim = _padded(rows.features.shape[2]), _padded(rows.values.shape[2])
    return _config("group_states", rows.values, width=width, head_dim=head_dim)


def _config(kernel: str, x: Tensor, **key: int) -> Config:
    return find_config(OP, kernel, x.device, dot_bits=_DOT_BITS[x.dtype], **key)


def _new_states(rows: Rows, slots: int, kv_heads: int) -> Tensor:
    return rows.values.new_empty((slots, kv_heads, _state_size(rows)), dtype=torch.float32)


def _state_size(rows: Rows) -> int:
    return rows.features.shape[2] * (rows.values.shape[2] + 1)


def _fold_heads(x: Tensor, like: Tensor) -> Tensor:
    """`x`, the heads that share one of `like` added up."""
    return x if x.shape == like.shape else x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)


def _pointers(rows: Rows) -> dict[str, Tensor]:
    return {"features_ptr": rows.features, "values_ptr": rows.values}


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_token_stride": x.stride(0), f"{name}_head_stride": x.stride(1)}


def _addressable(x: Tensor) -> Tensor:
    """`x`, or one copy of it: columns lie side by side, and a block of 128 tokens spans less than 2**31 numbers.

    Any other stride of tokens and heads is taken as it is.
    """
    side_by_side = x.stride(2) == 1 or x.shape[2] == 1
    return x if side_by_side and x.stride(0) < 2**24 else x.contiguous()


def _padded(width: int) -> int:
    """Columns of a block that holds `width` of them: a power of two that tl.dot takes."""
    return max(16, 1 << (width - 1).bit_length())
