"""Launchers of the range attention kernels: packed, windowed, causal and near attention, forward and backward.

All of these differ for the kernels only in the range of keys that each row sees. `KeyRanges` describes these ranges;
a small kernel computes them per call, so that nothing waits for the device, and every packing, window and causal
mode runs the same compiled kernel. A window that covers a segment gives the same bits as exact attention.

Five variants are named in `tuning/configs/<arch>/range_attention.json`, which also says which one is the default:

* "tma": the forward and the kernel of dq load keys and values through tensor descriptors, on sm_90 and newer, with
  bitwise equal results for equal blocks.
* "warp_specialized": as "tma", but separate warps do the loading. If the table has no such entry, as for a far part,
  a launch that asks for it gets "tma".
* "gluon": another forward for sm_90 and head_dim 64 or 128 in 16 bits without a far part, written in Gluon. It computes
  the scores of the next block during the exponentials of this one. No launch takes it by default, and where it cannot
  serve a launch that asks for it, the default forward does.
* "fused": the backward computes 5 matrix products per block instead of 7, see `kernels/triton/range_attention/bwd.py`.
  It sums dq in no fixed order, and so is never the default under `torch.use_deterministic_algorithms(True)`.
* "eight_warps": the forms of heads of 64 on sm_90 that were the default before those with 4 warps: 8 warps, and no
  descriptors. No launch takes them by this name; `vot tune` and the sweep of `benchmarks.first_light` try them.

A launch uses the default unless its `variant` names another one; "plain" names the kernels without a variant, whose
backward sums dq in one order. If a variant cannot serve the inputs or the GPU, the
plain kernels run: descriptors need aligned inputs and sm_90.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, contiguous, padded, rows_contiguous, strides, target_arch
from vot_kernels.ops.parts.plans import keep_with
from vot_kernels.tuning import INTERPRETER, Config

_KEY_RANGES = Kernel("range_attention", "key_ranges", "common.ranges:_key_ranges_kernel")
_FWD = Kernel("range_attention", "fwd", "range_attention.fwd:_range_attention_fwd_kernel")
_GLUON_FWD = Kernel(
    "range_attention", "fwd_gluon", "range_attention.gluon_fwd:_range_attention_gluon_fwd_kernel"
)
_DQ = Kernel("range_attention", "bwd_dq", "range_attention.bwd:_range_attention_dq_kernel")
_START = Kernel("range_attention", "bwd_start", "range_attention.bwd:_range_attention_dq_kernel")
_DKDV = Kernel("range_attention", "bwd_dkdv", "range_attention.bwd:_range_attention_dkdv_kernel")
_PREFERENCES: dict[str | None, dict[str, tuple[str, ...]]] = {
    None: {},
    "plain": {"exclude": ("tma", "warp_specialized")},
    "tma": {"prefer": ("tma",)},
    "warp_specialized": {"prefer": ("warp_specialized", "tma")},
    "gluon": {},
    "fused": {},
}
"""What a variant asks of the tables of the forward and of dq; see `vot_kernels.tuning.lookup`."""
_UNLIMITED = 2**31 - 1
_DESCRIPTOR_BYTES = 16  # bases and strides in a tensor descriptor must be multiples of this


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """The keys that each row of a packed buffer sees: groups near its own, and tokens near its counterpart.

    Rows and keys are cut into the same number of segments, and each segment into the same number of groups. The last
    row and the last key of a segment are counterparts, and so on backwards from there.

    Attributes:
        cu_rows, cu_keys: int32 `[segments + 1]`, cumulative lengths of the segments.
        row_groups, key_groups: int32 `[groups + 1]`, likewise of the groups.
        segment_groups: int32 `[segments + 1]`, first group of each segment; None if each is one group.
        left, right: groups seen before and after the own one; None for all of the segment.
        tokens_left, tokens_right: tokens seen before and after the counterpart, None for all; 0 on the right means
            causal attention.
        of_layout: the tensors belong to one layout, so that what is computed from them is kept with it.
    """

    cu_rows: Tensor
    cu_keys: Tensor
    row_groups: Tensor
    key_groups: Tensor
    segment_groups: Tensor | None = None
    left: int | None = None
    right: int | None = None
    tokens_left: int | None = None
    tokens_right: int | None = None
    of_layout: bool = False

    def __post_init__(self) -> None:
        for name in ("cu_rows", "cu_keys", "row_groups", "key_groups", "segment_groups"):
            x = getattr(self, name)  # the kernels take no strides for them
            if x is not None and not x.is_contiguous():
                object.__setattr__(self, name, x.contiguous())

    @classmethod
    def of_segments(
        cls,
        cu_rows: Tensor,
        cu_keys: Tensor,
        tokens_left: int | None = None,
        tokens_right: int | None = None,
        *,
        of_layout: bool = False,
    ) -> "KeyRanges":
        """Give each row all keys of its own segment, or those around its counterpart."""
        sides = None, None, tokens_left, tokens_right
        return cls(cu_rows, cu_keys, cu_rows, cu_keys, None, *sides, of_layout)

    def mirrored(self) -> "KeyRanges":
        """Return which rows see each key."""
        return KeyRanges(
            self.cu_keys,
            self.cu_rows,
            self.key_groups,
            self.row_groups,
            self.segment_groups,
            self.right,
            self.left,
            self.tokens_right,
            self.tokens_left,
            self.of_layout,
        )

    def tensor(self, rows: int) -> Tensor:
        """Return int32 `[2, rows]`: first key of each row and one past the last; slack rows are uninitialized."""
        if not self.of_layout:
            return self._compute(rows)
        sides = self.left, self.right, self.tokens_left, self.tokens_right
        others = (self.cu_rows, self.cu_keys, self.key_groups, self.segment_groups)
        known = tuple([(id(x), None if x is None else x._version) for x in others])
        key = ("ranges", rows, target_arch(self.cu_rows.device), sides, known)
        return keep_with(self.row_groups, key, lambda: self._compute(rows))

    def _compute(self, rows: int) -> Tensor:
        ranges = torch.empty(2, rows, dtype=torch.int32, device=self.cu_rows.device)
        groups = self.row_groups.shape[0] - 1
        _KEY_RANGES.launch(
            lambda blocks: (rows // blocks["BLOCK_T"] + groups if groups else 0,),
            ranges_ptr=ranges,
            row_groups_ptr=self.row_groups,
            key_groups_ptr=self.key_groups,
            segment_groups_ptr=self.segment_groups,
            groups=groups,
            segments=self.cu_rows.shape[0] - 1,
            rows=rows,
            left=_limit(self.left),
            right=_limit(self.right),
            tokens_left=_limit(self.tokens_left),
            tokens_right=_limit(self.tokens_right),
        )
        return ranges


@dataclass(frozen=True, eq=False)
class FarPart:
    """Linear attention of every row to the groups that it does not see, under the same normaliser.

    Attributes:
        states, normalisers: the sums S `[groups, kv_heads, width, head_dim]` and z `[groups, kv_heads, width]` over
            the groups far from each group, as `far_states` returns them.
        features: `[rows, heads, width]` with contiguous columns: q, or given features.
        feature_map: the map to apply to them: "softmax", "elu", "relu", or "none".
        beta: `[heads]`, log of the weight of far tokens; None means 0.
    """

    states: Tensor
    normalisers: Tensor
    features: Tensor
    feature_map: str
    beta: Tensor | None = None


def range_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    scale: float,
    far: FarPart | None = None,
    *,
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention of every row to its keys, and with `far` linear attention to the other groups.

    Args:
        q: `[rows, heads, head_dim]`, float16, bfloat16 or float32, head_dim 16 to 256. Rows past the last
            segment are slack and never read.
        k, v: `[keys, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        ranges: which keys each row sees.
        scale: factor on q.k.
        far: the far part of hybrid attention; its groups are those of `ranges`.
        variant: the variant to use where the table has an entry for it, or None for the default.

    Returns:
        The output in the dtype and shape of q, and lse float32 `[rows, heads]`, natural log; 0 and -inf for
        rows that see nothing.
    """
    if scale < 0:  # with a negative scale, the maximum of the scores would become the minimum
        q, scale = -q, -scale
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    rows, heads, head_dim = q.shape
    features = q if far is None else far.features
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    segments = ranges.cu_rows.shape[0] - 1
    if not segments or not rows:
        return out.zero_(), lse.fill_(-torch.inf)
    key = _key(q, far is not None, descriptors=_loads_by_descriptors(target_arch(q.device), q, k, v))
    shared: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "lse_ptr": lse,
        "ranges_ptr": ranges.tensor(rows),
        "cu_rows_ptr": ranges.cu_rows,
        "segments": segments,
        "rows": rows,
        "repeats": heads // k.shape[1],
        "scale": scale,
        "HEAD_DIM": head_dim,
    }

    def grid(blocks: Mapping[str, int]) -> tuple[int, ...]:
        return rows // blocks["BLOCK_Q"] + segments, heads

    gluon = _gluon_config(q, key) if variant == "gluon" else None
    if gluon is not None:
        _GLUON_FWD.launch(grid, config=gluon, **shared, **strides(q=q, k=k, v=v))
        return out, lse
    config = _FWD.config(q.device, key, **_PREFERENCES[variant])
    if config.blocks.get("WARP_SPECIALIZE"):
        shared["LEFT_BOUND"] = ranges.left is not None or ranges.tokens_left is not None
    _FWD.launch(
        grid,
        config=config,
        **shared,
        **_far_arguments(far, features),
        beta_ptr=None if far is None else contiguous(far.beta, torch.float32),
        row_groups_ptr=ranges.row_groups,
        groups=ranges.row_groups.shape[0] - 1,
        BLOCK_D=padded(head_dim),
        **strides(q=q, k=k, v=v, features=features),
    )
    return out, lse


def _gluon_config(q: Tensor, key: Mapping[str, int]) -> Config | None:
    """Return the config of the forward in Gluon, None where it cannot run."""
    if q.shape[2] not in (64, 128) or not _has_gluon():
        return None
    try:
        return _GLUON_FWD.config(q.device, key)
    except LookupError:  # its table has what it can run, and it is there for few GPUs
        return None


@cache
def _has_gluon() -> bool:
    """Whether this version of Triton has what the Gluon kernel imports."""
    try:
        return find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None
    except ModuleNotFoundError:
        return False


def range_attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    scale: float,
    variant: str | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv without a far part, in the dtypes of q, k and v; 0 in slack rows.

    Args:
        d_out: gradient of out, `[rows, heads, head_dim]`.
        d_lse: gradient of lse, `[rows, heads]`, or None.
        out, lse: the results of the forward, or these merged with those for other keys.
        q, k, v, ranges, scale: as in the forward.
        variant, deterministic: see `fuses_backward`.
    """
    fused = fuses_backward(q, variant, deterministic)
    near = q, k, v, ranges, scale
    rows = range_attention_rows_backward(d_out, d_lse, out, lse, *near, fused=fused, variant=variant)
    dq = rows.dq if fused else None
    dk, dv, _ = range_attention_keys_backward(d_out, rows, *near, dq=dq)
    return rows.dq.to(q.dtype), dk, dv


def fuses_backward(
    q: Tensor, variant: str | None = None, deterministic: bool = False, *, far: bool = False
) -> bool:
    """Say whether the backward runs in the fused form, in which the second half also adds to dq, in no fixed order.

    Args:
        q: as in the forward.
        variant: "fused" to use it where the table has an entry for it, "plain" to not use it, or None for the default.
        deterministic: whether the bits must repeat, in which case the fused form is not the default. It is not
            under `torch.use_deterministic_algorithms(True)` either.
        far: whether there is a far part.
    """
    if variant == "fused":
        return _keys_config(q, far, prefer=("fused",)).variant == "fused"
    if variant == "plain" or deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    return _keys_config(q, far).variant == "fused"


def _keys_config(q: Tensor, far: bool, **variants: tuple[str, ...]) -> Config:
    """Return the config of the second half of the backward; variants: see `Kernel.config`."""
    key = _key(q, far, descriptors=_adds_by_descriptors(target_arch(q.device), q.shape[2]))
    return _DKDV.config(q.device, key, **variants)


def _adds_by_descriptors(arch: str, head_dim: int) -> bool:
    """Whether kernels on `arch` can add to blocks of a float32 `[rows, heads, head_dim]` through descriptors."""
    known = arch != INTERPRETER and int(arch.removeprefix("sm_")) >= 90
    return known and head_dim * torch.float32.itemsize % _DESCRIPTOR_BYTES == 0


@dataclass(frozen=True, eq=False)
class RowGradients:
    """The results of the first half of the backward, for each row.

    Attributes:
        dq: in the dtype of q. It includes the gradient through the feature map, unless the features were given. In
            the fused form it is float32 and lacks the near part, which the second half adds.
        log2_lse: float32 `[heads, rows]`, lse in powers of two, +inf for rows that see nothing; uninitialized in
            slack rows.
        minus_delta: float32 `[heads, rows]`, -D = dlse - do.o; uninitialized in slack rows.
        far_weight: float32 `[heads, rows]`, exp(beta - lse), the weight of phi(q) in the gradient of the far
            states; None without a far part.
        d_beta: float32 `[heads, rows]`, to be summed over the rows; None without a far part.
        d_features: gradient of given features (feature_map "none"), else None.
    """

    dq: Tensor
    log2_lse: Tensor
    minus_delta: Tensor
    far_weight: Tensor | None = None
    d_beta: Tensor | None = None
    d_features: Tensor | None = None


def range_attention_rows_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    scale: float,
    far: FarPart | None = None,
    *,
    fused: bool = False,
    variant: str | None = None,
) -> RowGradients:
    """Run the first half of the backward.

    Args:
        far: that of the forward.
        fused: the result of `fuses_backward`.
        variant: as in the forward; the fused form has one form alone.
    """
    d_out, out, q, k, v = (rows_contiguous(x) for x in (d_out, out, q, k, v))
    rows, heads, head_dim = q.shape
    features = q if far is None else far.features
    numbers = torch.empty(4 if far is not None else 2, heads, rows, dtype=torch.float32, device=q.device)
    given = far is not None and far.feature_map == "none"
    found = RowGradients(
        torch.empty(q.shape, dtype=torch.float32 if fused else q.dtype, device=q.device),
        numbers[0],
        numbers[1],
        None if far is None else numbers[2],
        None if far is None else numbers[3],
        torch.empty_like(features, memory_format=torch.contiguous_format) if given else None,
    )
    segments = ranges.cu_rows.shape[0] - 1
    if not segments:
        for x in (found.dq, numbers, found.d_features):
            if x is not None:
                x.zero_()
        return found
    if fused:
        kernel, config = _START, _START.config(q.device, _key(q, far is not None))
        skipped: dict[str, Any] = {"SKIP_NEAR": True, "BLOCK_K": 0}
    else:
        descriptors = _loads_by_descriptors(target_arch(q.device), k, v)
        key = _key(q, far is not None, descriptors=descriptors)
        kernel, config, skipped = _DQ, _DQ.config(q.device, key, **_PREFERENCES[variant]), {}
    kernel.launch(
        lambda blocks: (rows // blocks["BLOCK_Q"] + segments, heads),
        config=config,
        d_out_ptr=d_out,
        d_lse_ptr=contiguous(d_lse, torch.float32),
        out_ptr=out,
        lse_ptr=lse.contiguous(),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        dq_ptr=found.dq,
        log2_lse_ptr=found.log2_lse,
        minus_delta_ptr=found.minus_delta,
        ranges_ptr=None if fused else ranges.tensor(rows),
        cu_rows_ptr=ranges.cu_rows,
        **_far_arguments(far, features),
        HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim),
        beta_ptr=None if far is None else contiguous(far.beta, torch.float32),
        d_features_ptr=found.d_features,
        d_beta_ptr=found.d_beta,
        far_weight_ptr=found.far_weight,
        row_groups_ptr=ranges.row_groups,
        segments=segments,
        groups=ranges.row_groups.shape[0] - 1,
        rows=rows,
        repeats=heads // k.shape[1],
        scale=scale,
        **strides(d_out=d_out, out=out, q=q, k=k, v=v, features=features),
        BLOCK_W=padded(features.shape[2]),
        **skipped,
    )
    return found


def range_attention_keys_backward(
    d_out: Tensor,
    rows: RowGradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    scale: float,
    far: FarPart | None = None,
    *,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the second half of the backward.

    Args:
        rows: what the first half returned.
        far: the side of the keys: for each group, the gradient states of the groups from which it is far, summed over
            the heads of each kv head, and the features of k, `[keys, kv_heads, width]`. Its beta is not used.
        dq: that of the first half in the fused form; this function adds the near part to it.

    Returns:
        dk, dv, and the gradient of given features of k, or None.
    """
    d_out, q, k, v = (rows_contiguous(x) for x in (d_out, q, k, v))
    keys, kv_heads, head_dim = k.shape
    heads = q.shape[1]
    features = k if far is None else far.features
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    given = far is not None and far.feature_map == "none"
    d_features = torch.empty_like(features, memory_format=torch.contiguous_format) if given else None
    segments = ranges.cu_rows.shape[0] - 1
    if not segments:
        return dk.zero_(), dv.zero_(), None if d_features is None else d_features.zero_()
    fused = {"exclude": ("fused",)} if dq is None else {"prefer": ("fused",)}
    config = _keys_config(q, far is not None, **fused)

    def grid(blocks: Mapping[str, int]) -> tuple[int, ...]:
        return keys // blocks["BLOCK_K"] + segments, kv_heads

    _DKDV.launch(
        grid,
        config=config,
        d_out_ptr=d_out,
        log2_lse_ptr=rows.log2_lse,
        minus_delta_ptr=rows.minus_delta,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        dk_ptr=dk,
        dv_ptr=dv,
        dq_ptr=dq,
        ranges_ptr=ranges.mirrored().tensor(keys),
        cu_keys_ptr=ranges.cu_keys,
        **_far_arguments(far, features),
        HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim),
        d_features_ptr=d_features,
        key_groups_ptr=ranges.key_groups,
        segments=segments,
        groups=ranges.key_groups.shape[0] - 1,
        keys=keys,
        rows=q.shape[0],
        heads=heads,
        repeats=heads // kv_heads,
        scale=scale,
        **strides(d_out=d_out, q=q, k=k, v=v, features=features),
        BLOCK_W=padded(features.shape[2]),
    )
    return dk, dv, d_features


def _far_arguments(far: FarPart | None, features: Tensor) -> dict[str, Any]:
    """Return the arguments that the kernels share for a far part or its absence."""
    width = features.shape[2]
    if far is None:
        nothing = {"far_ptr": None, "far_z_ptr": None, "features_ptr": None}
        return {**nothing, "WIDTH": width, "FEATURE_MAP": "none", "BLOCK_F": 0}
    pointers = {"far_ptr": far.states, "far_z_ptr": far.normalisers, "features_ptr": features}
    return {**pointers, "WIDTH": width, "FEATURE_MAP": far.feature_map}


def _loads_by_descriptors(arch: str, *tensors: Tensor) -> bool:
    """Whether kernels on `arch` can load blocks of rows of `tensors` through tensor descriptors.

    tensors: `[rows, heads, head_dim]`. Descriptors need bases and strides that are multiples of 16 bytes, and row
    strides of at most 40 bits.
    """
    if arch != INTERPRETER and int(arch.removeprefix("sm_")) < 90:
        return False
    first = tensors[0]
    return _strides_fit(
        tuple([x.stride() for x in tensors]), first.itemsize, tuple([x.shape[2] for x in tensors])
    ) and not any([x.data_ptr() % _DESCRIPTOR_BYTES for x in tensors])


@lru_cache(maxsize=256)
def _strides_fit(
    strides: tuple[tuple[int, int, int], ...], itemsize: int, head_dims: tuple[int, ...]
) -> bool:
    for (row, head, column), head_dim in zip(strides, head_dims, strict=True):
        aligned = row * itemsize % _DESCRIPTOR_BYTES == head * itemsize % _DESCRIPTOR_BYTES == 0
        if column != 1 or not aligned or not 0 < row * itemsize < 2**40 or head_dim != padded(head_dim):
            return False
    return True


def _key(q: Tensor, far: bool, descriptors: bool | None = None) -> dict[str, int]:
    return _sizes(q.shape[2], q.itemsize, far, descriptors)


@lru_cache(maxsize=64)
def _sizes(head_dim: int, itemsize: int, far: bool, descriptors: bool | None) -> dict[str, int]:
    known = {} if descriptors is None else {"descriptors": int(descriptors)}
    return {"head_dim": padded(head_dim), "bits": 8 * itemsize, "far": int(far), **known}


def _limit(count: int | None) -> int:
    return _UNLIMITED if count is None else min(count, _UNLIMITED)
