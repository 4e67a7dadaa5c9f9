"""Calls on Triton kernels that are repeated without the Python that leads to them.

Before its kernels start, an op plans, looks up configs, computes strides and allocates: a hundred steps of Python, for
which a GPU waits when there are few tokens. With the same layout, shapes and options they end in the same launches. So
the launches are recorded at the second call of a kind, and every later one repeats them with its own tensors.

A record holds no tensor of a call: each is a place, which is filled with an argument, or with new memory that is given
back after the last step that needs it. What ops keep from call to call, as `keep_with` does with a layout, the record
keeps too, and lives as long as the layout.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vot_kernels import tuning
from vot_kernels.ops.launch import Grid, fitting, start, target_arch, watched_launches
from vot_kernels.ops.parts.plans import is_kept, keep_with
from vot_kernels.tuning import Config

_MOST_KEPT = 64  # kinds of calls of an op without a layout
_ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for pointers that are no multiples of it
_SEQUENCES = frozenset({list, tuple})
_OPTIONS = frozenset({bool, int, float, str, torch.dtype, type(None)})
_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
_Values = list[Any]  # the tensor in each place, or None
_Step = Callable[[_Values], None]


class Replayed:
    """A function whose calls on the backend "triton" are recorded and repeated.

    Calls are of one kind if their options are equal, and their tensors have the same shapes, strides, dtypes and
    alignment. Those of the layout must be the same tensors, unchanged: ops read them, and keep what follows from them.

    Args:
        function: it has an argument `backend`, and returns tensors and None, in tuples and lists.
        layout: the names of its arguments that are the tensors of a layout.
    """

    def __init__(self, function: Callable[..., Any], layout: Sequence[str] = ()) -> None:
        names = [*signature(function).parameters]
        self._function, self._backend = function, names.index("backend")
        self._layout = tuple([names.index(name) for name in layout])
        self._kinds: dict[Any, _Kind] = {}  # without a layout

    def __call__(self, *arguments: Any) -> Any:
        if arguments[self._backend] != "triton" or torch._C._is_any_autocast_enabled():
            return self._function(*arguments)
        try:
            tensors, key = self._signature(arguments)
        except RuntimeError:  # inference tensors count no changes, and some others have no address
            return self._function(*arguments)
        kind = self._kind(arguments, key)
        if kind.record is not None:
            return kind.record.repeat(tensors)
        if kind.known and not kind.refused and self._all_differ(arguments, tensors):
            return kind.recorded(self._function, arguments, tensors)
        kind.known = True
        return self._function(*arguments)

    def _signature(self, arguments: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Return the tensors among the arguments, and what a call of the same kind has in common with this one."""
        tensors: list[Tensor] = []
        key: list[Any] = [tuning.state(), torch.are_deterministic_algorithms_enabled()]
        for i, x in enumerate(arguments):
            if type(x) in _OPTIONS:
                key.append(x)
            elif i in self._layout:
                tensors.append(x)
                key += (id(x), x._version)
            elif type(x) in _SEQUENCES:
                key.append(len(x))
                for y in x:
                    if type(y) in _OPTIONS:
                        key.append(y)
                    else:
                        tensors.append(y)
                        key += (y.shape, y.stride(), y.dtype, y.data_ptr() % _ALIGNMENT)
            else:
                tensors.append(x)
                key += (x.shape, x.stride(), x.dtype, x.data_ptr() % _ALIGNMENT)
        device = tensors[0].device
        key += (device, target_arch(device))
        return tensors, tuple(key)

    def _kind(self, arguments: Sequence[Any], key: tuple[Any, ...]) -> "_Kind":
        if self._layout:
            layout = [arguments[i] for i in self._layout]
            kind = keep_with(layout[0], (self, key), lambda: _Kind(layout))
            if not kind.is_of(layout):  # another tensor has the id of one that is no more
                kind.reset(layout)
            return kind
        if key not in self._kinds and len(self._kinds) >= _MOST_KEPT:
            self._kinds.clear()
        return self._kinds.setdefault(key, _Kind(()))

    def _all_differ(self, arguments: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
        """Whether no tensor is there twice, for a record could not tell its places apart; a layout's do not change."""
        layout = {id(arguments[i]) for i in self._layout}
        others = [id(x) for x in tensors if id(x) not in layout]
        return len(others) == len({*others})


class _Kind:
    """Calls of one kind: whether there was one, and the record of the second."""

    record: "_Record | None"

    def __init__(self, layout: Sequence[Tensor]) -> None:
        self.reset(layout)

    def reset(self, layout: Sequence[Tensor]) -> None:
        """Forget the calls; those to come have the tensors of this layout."""
        self.known, self.refused, self.record = False, False, None
        self._layout = [weakref.ref(x) for x in layout]

    def is_of(self, layout: Sequence[Tensor]) -> bool:
        """Whether these are the tensors of the layout."""
        return all([ref() is x for ref, x in zip(self._layout, layout, strict=True)])

    def recorded(
        self, function: Callable[..., Any], arguments: Sequence[Any], tensors: Sequence[Tensor]
    ) -> Any:
        """Return the results of a call, and keep its record, if it can be repeated."""
        recorder = _Recorder(tensors)
        with recorder, watched_launches(recorder.launching):
            results = function(*arguments)
        self.record = recorder.record(results)
        self.refused = self.record is None
        return results


class _Record:
    """The steps of a call, each with the places that are empty after it, and which places the results are in."""

    def __init__(self, steps: list[tuple[_Step, tuple[int, ...]]], places: int, results: Any) -> None:
        self._steps, self._places, self._results = steps, places, results

    def repeat(self, tensors: list[Tensor]) -> Any:
        """Take the steps with these arguments, and return the results."""
        values: _Values = tensors + [None] * (self._places - len(tensors))
        for step, over in self._steps:
            step(values)
            for place in over:
                values[place] = None
        return _filled(self._results, values)


class _Place(int):
    """Where a tensor goes, in what is otherwise constant."""


class _Recorder(TorchDispatchMode):
    """Writes down what a call does: kernels, allocations, and other operators of PyTorch."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._living: list[Tensor] = []  # kept, so that no other tensor gets the id of one in `_place_of`
        self._places = 0
        self._place_of: dict[int, _Place] = {}
        # Steps with the places that they touch, and those that they make; None if they change what is there.
        self._steps: list[tuple[_Step, frozenset[int], frozenset[int] | None]] = []
        self._within = False
        self._cannot = False
        self._given = len(tensors)
        for x in tensors:
            self._new(x)
        self._arguments, self._living = self._living, []  # these live as long as the call

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to do so, PyTorch would import Dynamo, which takes a second; nothing compiles this

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._within:
            return func(*args, **kwargs)
        self._drop_dead()
        self._within = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._within = False
        if func is _aten.detach.default and id(args[0]) in self._place_of:  # as every allocation ends with
            self._place_of[id(result)] = self._place_of[id(args[0])]
            self._living.append(result)
        elif func in _ALLOCATIONS:
            place = self._new(result)
            self._write(_allocation(place, result), {place}, {place})
        else:
            self._write_operator(func, args, kwargs, result)
        return result

    @contextmanager
    def launching(
        self, kernel: Any, grid: Grid, config: Config, arguments: Mapping[str, Any]
    ) -> Iterator[None]:
        """Write a launch down; what happens meanwhile is part of it."""
        if self._within:
            yield
            return
        config = fitting(config)
        programs = grid(config.blocks) if callable(grid) else grid
        fixed, alone, several = {}, [], {}
        for name, x in arguments.items():
            marked = _map(self._marked, x) if type(x) in _SEQUENCES else self._marked(x)
            if type(marked) is _Place:
                alone.append((name, marked))
            elif type(x) in _SEQUENCES and _places(marked):
                several[name] = marked
            else:
                fixed[name] = marked

        def step(values: _Values) -> None:
            found = fixed | {name: values[place] for name, place in alone}
            start(kernel, programs, config, found | _filled(several, values) if several else found)

        touched = _places(several).union([place for _, place in alone])
        self._write(step, touched, None)
        self._within = True
        try:
            yield
        finally:
            self._within = False

    def record(self, results: Any) -> _Record | None:
        """Return the record of a call with these results; None if it cannot be repeated."""
        places = _map(self._marked, results)
        if self._cannot or any(isinstance(x, Tensor) for x in _leaves(places)):
            return None
        needed = _places(places) | {*range(self._given)}  # the caller keeps the arguments in any case
        steps: list[tuple[_Step, tuple[int, ...]]] = []
        for step, touched, made in reversed(self._steps):
            if made is None or made & needed:
                steps.append((step, tuple(touched - needed)))
                needed |= touched
        return _Record(steps[::-1], self._places, places)

    def _new(self, x: Tensor) -> _Place:
        place = self._place_of[id(x)] = _Place(self._places)
        self._places += 1
        self._living.append(x)
        return place

    def _drop_dead(self) -> None:
        """Give back the memory of tensors that nobody else has, as a call does that is not recorded."""
        living: list[Any] = []
        while self._living:
            x: Any = self._living.pop()
            if getrefcount(x) > 2 or x._use_count() > 1:  # `x`, and the argument of getrefcount
                living.append(x)
            else:
                del self._place_of[id(x)]
        self._living = living

    def _marked(self, x: Any) -> Any:
        """Return the place of a tensor, and anything else as it is.

        A tensor without a place must be one that ops keep. Another one may hold what is true of this call alone, as the
        addresses of its tensors.
        """
        if not isinstance(x, Tensor):
            return x
        place = self._place_of.get(id(x))
        self._cannot |= place is None and not is_kept(x)
        return x if place is None else place

    def _write(self, step: _Step, touched: set[_Place], made: set[_Place] | None) -> None:
        self._steps.append((step, frozenset(touched), None if made is None else frozenset(made)))

    def _write_operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        marked_args, marked_kwargs = _map(self._marked, args), _map(self._marked, kwargs)
        outputs = _leaves(result)
        if not all(isinstance(x, Tensor) for x in outputs):
            # A number that was read from a tensor differs from call to call, one about dtypes does not.
            self._cannot |= any(isinstance(x, Tensor) for x in _leaves((args, kwargs)))
            return
        places = [self._place_of[id(x)] if id(x) in self._place_of else self._new(x) for x in outputs]

        def step(values: _Values) -> None:
            found = func(*_filled(marked_args, values), **_filled(marked_kwargs, values))
            for place, x in zip(places, _leaves(found), strict=True):
                values[place] = x

        read = _places((marked_args, marked_kwargs))
        self._write(step, read.union(places), None if func._schema.is_mutable else {*places})


def _allocation(place: int, like: Tensor) -> _Step:
    size, stride, dtype, device = like.shape, like.stride(), like.dtype, like.device

    def step(values: _Values) -> None:
        values[place] = torch.empty_strided(size, stride, dtype=dtype, device=device)

    return step


def _filled(marked: Any, values: _Values) -> Any:
    return _map(lambda x: values[x] if type(x) is _Place else x, marked)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Return what is made of tuples, lists and dicts with every leaf changed."""
    if isinstance(value, tuple):
        return tuple([_map(change, x) for x in value])
    if isinstance(value, list):
        return [_map(change, x) for x in value]
    if isinstance(value, dict):
        return {key: _map(change, x) for key, x in value.items()}
    return change(value)


def _places(marked: Any) -> set[_Place]:
    return {x for x in _leaves(marked) if type(x) is _Place}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for x in value for leaf in _leaves(x)]
    if isinstance(value, dict):
        return [leaf for x in value.values() for leaf in _leaves(x)]
    return [value]
