"""A memory of plans of packings, by contents: all layers of a model share a packing, and each asks for its plan.

Most of them have the very tensors of the layer before, which are told apart faster than their contents are read.
"""

import weakref
from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_MOST_KEPT = 32  # results of a function, and results with one tensor

_forget: list[Callable[[], None]] = []


def remember(make: Callable[..., T]) -> Callable[..., T]:
    """Cache the last 32 results of `make`.

    Arguments are positional: hashable values, tensors, and tuples of these. Tensors on the host are compared by their
    contents. Tensors elsewhere are compared by their device alone, because reading them would wait for it: their
    contents must follow from the other arguments.
    """

    @lru_cache(maxsize=32)
    def make_once(arguments: _Arguments) -> T:
        with torch.inference_mode(False):  # a plan made in a validation step may be used in training later
            return _marked(make(*arguments.take()))

    seen: dict[tuple[Any, ...], _Seen[T]] = {}
    _forget.extend((make_once.cache_clear, seen.clear))

    @wraps(make)
    def remembered(*arguments: Any) -> T:
        values = _leaves(arguments)
        names = tuple([id(x) if isinstance(x, Tensor) else x for x in values])
        known = seen.get(names)
        if known is not None and known.has(values):
            return known.result
        result = make_once(_Arguments(arguments))
        if not any(
            isinstance(x, Tensor) and x.is_inference() for x in values
        ):  # whose changes are not counted
            if len(seen) >= _MOST_KEPT:
                seen.clear()
            seen[names] = _Seen(values, result)
        return result

    return remembered


def keep_with(owner: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """Return `make()`, kept as long as `owner` lives, for calls with the same key and unchanged contents of `owner`.

    This is for what kernels compute from a layout, whose tensors share a life. Nothing is kept while a CUDA graph is
    captured, because the graph must compute it from the contents at each replay, and none is kept of inference tensors,
    whose changes PyTorch does not count. `key` names all else that the result depends on; so does the current stream.
    """
    stream = 0
    if owner.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make()
        stream = torch.cuda.current_stream(owner.device).cuda_stream
    if owner.is_inference():
        return make()
    kept: dict[Any, Any] = owner.__dict__.setdefault("_vot_kernels_kept", {})
    whole = (key, stream, owner._version)
    found = kept.get(whole)
    if found is None:
        if len(kept) >= _MOST_KEPT:
            kept.clear()
        with torch.inference_mode(False):  # as for plans
            found = kept[whole] = _marked(make())
    return found


def is_kept(x: Tensor) -> bool:
    """Whether this is a result of `remember` or `keep_with`, or a part of one, and so the same in later calls."""
    return getattr(x, "_vot_kernels_is_kept", False)


def _marked(result: T) -> T:
    for x in _leaves((result,)):
        if isinstance(x, Tensor):
            x.__dict__["_vot_kernels_is_kept"] = True
    return result


def forget_plans() -> None:
    """Drop all plans, so that every op plans anew, as it does for the first layer on a new batch."""
    for forget in _forget:
        forget()


class _Seen(Generic[T]):
    """A result, and the tensors that it was made for; none is kept alive."""

    def __init__(self, values: list[Any], result: T) -> None:
        tensors = ((i, x) for i, x in enumerate(values) if isinstance(x, Tensor))
        self._tensors = [(i, weakref.ref(x), x._version) for i, x in tensors]
        self.result = result

    def has(self, values: list[Any]) -> bool:
        """Whether the tensors among `values` are those, and have not changed since."""
        return all(ref() is values[i] and values[i]._version == version for i, ref, version in self._tensors)


def _leaves(values: tuple[Any, ...]) -> list[Any]:
    leaves = []
    for x in values:
        if isinstance(x, tuple):
            leaves += _leaves(x)
        else:
            leaves.append(x)
    return leaves


class _Arguments:
    """Arguments, equal if their contents are. `take` hands the tensors over, so that no key keeps them alive."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self._values = values
        self._contents = _contents(values)

    def take(self) -> tuple[Any, ...]:
        values, self._values = self._values, ()
        return values

    def __hash__(self) -> int:
        return hash(self._contents)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Arguments) and self._contents == other._contents


def _contents(value: Any) -> Any:
    if value is None or type(value) is int:  # most of them are
        return value
    if isinstance(value, tuple):
        return tuple(map(_contents, value))
    if isinstance(value, Tensor):
        return value.numpy().tobytes() if value.device.type == "cpu" else value.device
    return value
