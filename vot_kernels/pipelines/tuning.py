"""`vot tune`: which of the shipped configs of each kernel is fastest on this GPU.

The candidates of a kernel are the entries that its table has for a call, at most six; ahead-of-time compilation has
checked every one. They are compiled in parallel, compared with the results of the shipped config, and timed in the
whole op with its backward at two sizes, one kernel after the other. What is faster at both sizes together is kept.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vot_kernels import tuning
from vot_kernels.ops.aoe import aoe
from vot_kernels.ops.dense_residual import dense_residual
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.launch import Launch, is_recording, record_launches, target_arch, why_not_triton
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.ops.moe import moe
from vot_kernels.ops.pack_patches import pack_patches
from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.ops.rope_qk_norm import rope_qk_norm
from vot_kernels.ops.size_aware_embedding import size_aware_embedding
from vot_kernels.packing import PackedLayout
from vot_kernels.tuning import Entry, Request
from vot_kernels.tuning.tuned import Tables, path_for, write

SIZES = (4096, 32768)
"""The numbers of tokens at which candidates are timed."""

GAIN = 0.98
"""A candidate is kept below this share of the shipped config's time, so that noise alone changes nothing."""

COMPILING = 0.4
"""The largest share of the time that compiling may take."""

Run = Callable[[int, torch.device], list[Tensor]]
"""`run(tokens, device)` returns the outputs of an op and the gradients of its inputs."""
Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Call:
    """A call of an op that reaches kernels.

    Attributes:
        name: unique, for the reader.
        run: calls the op and its backward; the results depend on the number of tokens alone.
    """

    name: str
    run: Run


@dataclass(frozen=True)
class Found:
    """The outcome of one kernel.

    Attributes:
        call: name of the call that it was timed in.
        request: what was looked up.
        times: seconds at each size by candidate, the shipped one first; those that failed or differ are left out.
        best: the entry to use, None if the shipped one stays.
        left_out: why each candidate without times is left out.
    """

    call: str
    request: Request
    times: dict[str, tuple[float, ...]]
    best: Entry | None
    left_out: dict[str, str]

    def __str__(self) -> str:
        shipped, *_ = self.times.values()
        name = f"{self.request.family}/{self.request.kernel} in {self.call}"
        if self.best is None:
            return f"{name}: the shipped config stays, of {len(self.times) + len(self.left_out)} candidates"
        best = self.times[describe(self.best)]
        ratios = " and ".join(f"{b / a:.2f}" for a, b in zip(shipped, best, strict=True))
        return f"{name}: {describe(self.best)} takes {ratios} of the shipped config's time"


@dataclass
class Tuner:
    """The search on one GPU.

    Attributes:
        arch: of the GPU, such as "sm_90".
        device: where the calls run.
        seconds: time for everything.
        measure: returns the seconds of a function.
        compile_all: compiles launches, to be found in Triton's cache.
        keep: called with all tables whenever one has changed.
        sizes: numbers of tokens.
    """

    arch: str
    device: torch.device
    seconds: float
    measure: Measure
    compile_all: Callable[[Sequence[Launch], float], None]
    keep: Callable[[Tables], None]
    sizes: tuple[int, ...] = SIZES
    tables: Tables = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    def tune(self, calls: Sequence[Call]) -> Iterator[Found]:
        """Yield the outcome of every kernel that has a choice, until the time is over."""
        jobs = list(self._jobs(calls))
        launches = [launch for call, request in jobs for launch in self._launches(call, request)]
        self.compile_all(launches, COMPILING * self.seconds)
        for call, request in jobs:
            if time.monotonic() >= self._end:
                return
            found = self._best(call, request)
            if found.best is not None:
                self._put(found.best, request)
            yield found

    def _jobs(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Request]]:
        """Yield each kernel once, with the first call that reaches it."""
        seen = set()
        for call in calls:
            with record_launches(self.arch) as launches:
                call.run(self.sizes[0], torch.device("cpu"))
            requests = [launch.config.request for launch in launches if launch.config.request is not None]
            for request in dict.fromkeys(requests):
                default = tuning.candidates(request)[:1]
                place = (request.family, request.kernel, str(default))
                if place not in seen and len(tuning.candidates(request)) > 1:
                    seen.add(place)
                    yield call, request

    def _launches(self, call: Call, request: Request) -> list[Launch]:
        found = []
        for entry in tuning.candidates(request):
            with tuning.using(self.arch, self._with(entry, request)), record_launches(self.arch) as launches:
                call.run(self.sizes[0], torch.device("cpu"))
            found += launches
        return found

    def _best(self, call: Call, request: Request) -> Found:
        shipped, *others = tuning.candidates(request)
        with tuning.using(self.arch, self._with(shipped, request)):
            expected = {size: call.run(size, self.device) for size in self.sizes}
            times = {describe(shipped): self._times(call)}
        left_out, best, least = {}, None, GAIN
        for entry in others:
            name = describe(entry)
            if time.monotonic() >= self._end:
                left_out[name] = "no time left"
                continue
            try:
                with tuning.using(self.arch, self._with(entry, request)):
                    _compare({size: call.run(size, self.device) for size in self.sizes}, expected)
                    times[name] = self._times(call)
            except (
                Exception
            ) as error:  # compilers and drivers raise many types for a config that does not fit
                left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            pairs = zip(times[name], times[describe(shipped)], strict=True)
            ratio = prod(own / other for own, other in pairs) ** (1 / len(self.sizes))
            if ratio < least:
                best, least = entry, ratio
        return Found(call.name, request, times, best, left_out)

    def _times(self, call: Call) -> tuple[float, ...]:
        return tuple(self.measure(partial(call.run, size, self.device)) for size in self.sizes)

    def _with(self, entry: Entry, request: Request) -> Tables:
        """Return the tables so far, with an entry in front that serves the requests which the default would."""
        table = dict(self.tables.get(request.family, {}))
        table[request.kernel] = [_as_default(entry, request), *table.get(request.kernel, [])]
        return self.tables | {request.family: table}

    def _put(self, entry: Entry, request: Request) -> None:
        self.tables = self._with(entry, request)
        self.keep(self.tables)


def _as_default(entry: Entry, request: Request) -> Entry:
    """Return the entry as a default for all that the shipped default and the entry itself serve."""
    when = dict(entry.get("when", {}))
    for name, allowed in tuning.candidates(request)[0].get("when", {}).items():
        when[name] = _common(allowed, when.get(name, allowed))
    return {key: x for key, x in entry.items() if key not in ("limits", "why")} | {
        "default": True,
        "when": when,
    }


def _common(one: int | list[int], other: int | list[int]) -> int | list[int]:
    (low, high), (least, most) = (x if isinstance(x, list) else [x, x] for x in (one, other))
    return [max(low, least), min(high, most)]


def describe(entry: Entry) -> str:
    """Return the launch parameters of an entry in words."""
    others = {name: entry[name] for name in ("num_warps", "num_stages", "max_registers") if name in entry}
    words = [entry["variant"]] if "variant" in entry else []
    return " ".join([*words, *(f"{name}={value}" for name, value in (entry["blocks"] | others).items())])


def _compare(found: Mapping[int, list[Tensor]], expected: Mapping[int, list[Tensor]]) -> None:
    """Raise `ValueError` unless results differ by rounding alone."""
    for size, outs in expected.items():
        for a, b in zip(found[size], outs, strict=True):
            error, scale = (a.double() - b.double()).abs().max(), b.double().abs().max()
            if not error <= 4 * torch.finfo(b.dtype).eps * scale:
                raise ValueError(f"the results differ by {error:.2e} where the largest is {scale:.2e}")


def compile_in_parallel(launches: Sequence[Launch], seconds: float) -> None:
    """Compile launches on all cores for the GPU in use; what fails or is late will do so again where it is run."""
    end = time.monotonic() + seconds

    def compile_one(launch: Launch) -> None:
        if time.monotonic() < end:
            with suppress(Exception):
                options = launch.config.compiler_options()
                launch.kernel.warmup(grid=launch.grid, **launch.arguments, **options)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, launches))


def seconds_on_gpu(run: Callable[[], object]) -> float:
    """Return the median seconds of a function on the current stream, with a cold cache."""
    from triton.testing import do_bench

    return 1e-3 * float(do_bench(run, warmup=5, rep=25, return_mode="median"))


def calls(dtype: torch.dtype = torch.bfloat16) -> list[Call]:
    """Return the calls that are tuned, of common sizes, the most valuable first."""
    found = []
    for head_dim in (64, 128):
        for op, options in (
            (packed_attention, {}),
            (hybrid_attention, {"window": (2, 1)}),
            (linear_attention, {}),
        ):
            run = _attention(op, head_dim, dtype, options)
            found.append(Call(f"{op.__name__} d{head_dim}", run))
    return [
        *found,
        Call("aoe d768", lambda tokens, device: _aoe(tokens, device, dtype)),
        Call("moe d2048", lambda tokens, device: _moe(tokens, device, dtype)),
        Call("rope_qk_norm d64", lambda tokens, device: _rope_qk_norm(tokens, device, dtype)),
        Call("dense_residual of 8", lambda tokens, device: _dense_residual(tokens, device, dtype)),
        Call("size_aware_embedding d768", lambda tokens, device: _size_embedding(tokens, device, dtype)),
        Call("pack_patches of 16", lambda tokens, device: _pack_patches(tokens, device, dtype)),
    ]


def _attention(op: Callable[..., Tensor], head_dim: int, dtype: torch.dtype, options: dict[str, Any]) -> Run:
    def run(tokens: int, device: torch.device) -> list[Tensor]:
        lengths = [tokens // 2, tokens // 4, *[tokens // 16] * 4]
        layout = PackedLayout.from_lengths(lengths, group_size=256, device=device)
        q, k, v = _inputs([(tokens, 16, head_dim)] * 3, dtype, device)
        return _with_gradients(op(q, k, v, layout, backend="triton", **options), q, k, v)

    return run


def _aoe(tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    d, experts, rank, hidden = 768, 8, 256, 1024
    shapes = [(experts, rank, d), (experts, hidden, rank), (experts, hidden, d), (experts, hidden, d)]
    x, w_down, w_up, w_p, w_o = leaves = _inputs([(tokens, d), *shapes], dtype, device, d**-0.5)
    return _with_gradients(aoe(x, w_down, w_up, w_p, w_o, 2, backend="triton"), *leaves)


def _moe(tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    d, experts, hidden, top_k = 2048, 16, 768, 2
    x, w_gate_up, w_down = _inputs(
        [(tokens, d), (experts, 2 * hidden, d), (experts, d, hidden)], dtype, device, d**-0.5
    )
    chosen = torch.arange(tokens * top_k, device=device).view(tokens, top_k) % experts
    weights = torch.full((tokens, top_k), 0.5, dtype=dtype, device=device)
    return _with_gradients(moe(x, w_gate_up, w_down, chosen, weights, backend="triton"), x, w_gate_up, w_down)


def _rope_qk_norm(tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    q, k, q_weight, k_weight = leaves = _inputs([(tokens, 12, 64)] * 2 + [(64,)] * 2, dtype, device)
    positions = torch.arange(tokens, device=device)[:, None].expand(tokens, 3)
    outs = rope_qk_norm(q, k, positions, q_weight=q_weight, k_weight=k_weight, backend="triton")
    return _with_gradients(outs, *leaves)


def _dense_residual(tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    *states, weights = _inputs([(tokens, 768)] * 8 + [(8,)], dtype, device)
    return _with_gradients(dense_residual(states, weights, backend="triton"), *states, weights)


def _size_embedding(tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    layout = PackedLayout.from_grid_thw([[1, 16, 16]] * (tokens // 256), device=device)
    leaves = _inputs([(tokens, 768), (48, 48), (48,), (768, 48), (768,)], dtype, device)
    return _with_gradients(size_aware_embedding(leaves[0], layout, *leaves[1:], backend="triton"), *leaves)


def _pack_patches(tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    images = _inputs([(3, 256, 256)] * (tokens // 256), dtype, device)
    return _with_gradients(pack_patches(images, 16, backend="triton")[0], *images)


def _inputs(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def leaf(shape: tuple[int, ...]) -> Tensor:
        values = torch.empty(shape, device=device, dtype=dtype)
        if not is_recording():
            values.normal_(generator=generator).mul_(scale)
        return values.requires_grad_()

    return [leaf(shape) for shape in shapes]


def _with_gradients(outs: Tensor | Sequence[Tensor], *leaves: Tensor) -> list[Tensor]:
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
    return [*(out.detach() for out in outs), *grads]


def tune_gpu(seconds: float, dtype: str) -> tuple[Path, Iterator[Found]]:
    """Return the file of the GPU in use, and the outcomes of its kernels as they become known.

    Raises:
        ValueError: the dtype is not one that kernels take, or there is no GPU for them.
    """
    allowed = ("bfloat16", "float16", "float32")
    if dtype not in allowed:
        raise ValueError(f"dtype must be one of {', '.join(allowed)}, got {dtype!r}.")
    if not torch.cuda.is_available():
        raise ValueError("Tuning needs a CUDA device, and torch finds none.")
    device = torch.device("cuda", torch.cuda.current_device())
    if reasons := why_not_triton(device):
        raise ValueError(f"Tuning needs the Triton kernels: {'; '.join(reasons)}.")
    path = path_for(torch.cuda.get_device_name(device))
    tuner = Tuner(
        target_arch(device), device, seconds, seconds_on_gpu, compile_in_parallel, partial(write, path)
    )
    return path, tuner.tune(calls(getattr(torch, dtype)))
