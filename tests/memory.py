"""What Triton's interpreter never fails at and a GPU does: memory outside the arguments, and races.

The interpreter runs the programs of a launch in turn, and each instruction for all threads of a program before the
next. A GPU runs programs in any order and at once, and the threads of one wait for each other at barriers alone. So an
interpreted kernel may compute the right numbers from what another program wrote before, or from a thread's store that
another thread loads at once, and no comparison of numbers shows it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


class MemoryFault(AssertionError):
    """A kernel uses memory in a way that a GPU does not allow, or whose outcome it leaves open."""


@contextlib.contextmanager
def checked_memory(*also: torch.Tensor, arguments: bool = True) -> Iterator[set[str]]:
    """Check all interpreted launches in this context, and give the names of their kernels.

    Args:
        also: tensors that are no arguments, whose addresses a kernel finds in a table.
        arguments: whether memory must be that of an argument or of these tensors.

    Raises:
        MemoryFault: inside a kernel wrapped into an InterpreterError. A program loads, stores or changes what is in no
            argument; two programs of a launch use the same address, and one of them stores to it (two that change it
            by atomic operations may); a program loads or stores what it stored, without a barrier since; or one store
            writes to an address twice.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    run = executor.__call__
    watch, kernels = _Watch(arguments), set[str]()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        kernels.add(self.fn.__name__)
        watch.begin(self.fn.__name__, [*args, *kwargs.values(), *also])
        run(self, *args, **kwargs)
        watch.end()

    def place(x: int, y: int, z: int) -> None:
        watch.next_program((x, y, z))
        type(builder).set_grid_idx(builder, x, y, z)

    def load(ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        watch.load(_addresses(ptrs, mask), _size(ptrs))
        return type(builder).create_masked_load(builder, ptrs, mask, *rest, **options)

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        watch.store(_addresses(ptrs, mask), _size(ptrs))
        return type(builder).create_masked_store(builder, ptrs, value, mask, *rest, **options)

    def change(kind: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.change(_addresses(ptrs, mask), _size(ptrs))
        return type(builder).create_atomic_rmw(builder, kind, ptrs, value, mask, *rest)

    def swap(ptrs: Any, *rest: Any) -> Any:
        watch.change(np.ravel(ptrs.data).astype(np.uint64), _size(ptrs))
        return type(builder).create_atomic_cas(builder, ptrs, *rest)

    hooks = {
        "set_grid_idx": place,
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": change,
        "create_atomic_cas": swap,
        "create_barrier": watch.barrier,
    }
    executor.__call__ = launch
    vars(builder).update(hooks)
    try:
        yield kernels
    finally:
        executor.__call__ = run
        for name in hooks:
            del vars(builder)[name]


class _Watch:
    """The accesses of a launch by program, as addresses of elements."""

    def __init__(self, arguments: bool) -> None:
        self.arguments = arguments

    def begin(self, kernel: str, arguments: Iterable[Any]) -> None:
        self.kernel = kernel
        spans = sorted(span for argument in arguments for span in _spans(argument))
        self.starts = np.array([start for start, _ in spans], np.uint64)
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))
        self.programs: list[tuple[int, int, int]] = []
        self.loaded, self.stored, self.changed = _Accesses(), _Accesses(), _Accesses()
        self.fresh: list[np.ndarray] = []

    def next_program(self, program: tuple[int, int, int]) -> None:
        if self.programs:
            self._end_program()
        self.programs.append(program)

    def load(self, addresses: np.ndarray, size: int) -> None:
        self._check_arguments("loads", addresses, size)
        self._check_fresh("loads", addresses)
        self.loaded.add(addresses)

    def store(self, addresses: np.ndarray, size: int) -> None:
        self._check_arguments("stores", addresses, size)
        self._check_fresh("stores", addresses)
        if len(np.unique(addresses)) < len(addresses):
            self._fail("stores to one address twice, at once")
        self.stored.add(addresses)
        self.fresh.append(addresses)

    def change(self, addresses: np.ndarray, size: int) -> None:
        self._check_arguments("changes", addresses, size)
        self._check_fresh("changes", addresses)
        self.changed.add(addresses)

    def barrier(self) -> None:
        self.fresh.clear()

    def end(self) -> None:
        """Compare the programs."""
        if self.programs:  # a grid may have none
            self._end_program()
        loaded, stored, changed = (accesses.all() for accesses in (self.loaded, self.stored, self.changed))
        pairs = (
            ("store to", stored, stored),
            ("load and store to", loaded, stored),
            ("change and store to", changed, stored),
            ("load and change", loaded, changed),
        )
        for what, (ours, our_programs), (theirs, their_programs) in pairs:
            shared = _first_shared(ours, our_programs, theirs, their_programs)
            if shared is not None:
                one, other = (self.programs[number] for number in shared)
                raise MemoryFault(f"{self.kernel}: programs {one} and {other} {what} the same address.")

    def _end_program(self) -> None:
        for accesses in (self.loaded, self.stored, self.changed):
            accesses.end(len(self.programs) - 1)
        self.fresh.clear()

    def _check_arguments(self, does: str, addresses: np.ndarray, size: int) -> None:
        span = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = span >= 0
        inside[inside] = addresses[inside] + np.uint64(size) <= self.ends[span[inside]]
        if self.arguments and not inside.all():
            self._fail(f"{does} {(~inside).sum()} elements that are in no argument")

    def _check_fresh(self, does: str, addresses: np.ndarray) -> None:
        if any(np.isin(addresses, stored).any() for stored in self.fresh):
            self._fail(f"{does} what it stored, without a barrier since")

    def _fail(self, what: str) -> None:
        raise MemoryFault(f"{self.kernel}: program {self.programs[-1]} {what}.")


class _Accesses:
    """Accesses of one kind: those of the present program, and each address once for every earlier one."""

    def __init__(self) -> None:
        self.now: list[np.ndarray] = []
        self.earlier: list[np.ndarray] = []
        self.programs: list[np.ndarray] = []

    def add(self, addresses: np.ndarray) -> None:
        self.now.append(addresses)

    def end(self, program: int) -> None:
        if self.now:
            self.earlier.append(np.unique(np.concatenate(self.now)))
            self.programs.append(np.full(len(self.earlier[-1]), program))
            self.now.clear()

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Return addresses in order, and the programs that use them."""
        if not self.earlier:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        addresses, programs = np.concatenate(self.earlier), np.concatenate(self.programs)
        order = np.argsort(addresses, kind="stable")
        return addresses[order], programs[order]


def _first_shared(
    ours: np.ndarray, our_programs: np.ndarray, theirs: np.ndarray, their_programs: np.ndarray
) -> tuple[int, int] | None:
    """Return two programs that use an address, ours first; None if all that use the same are one.

    Of theirs, the first and the last program of an address stand for all.
    """
    for side, shift in (("left", 0), ("right", -1)):
        place = np.searchsorted(theirs, ours, side=side) + shift
        found = (place >= 0) & (place < len(theirs))
        found[found] = theirs[place[found]] == ours[found]
        found[found] = their_programs[place[found]] != our_programs[found]
        if found.any():
            first = int(found.argmax())
            return int(our_programs[first]), int(their_programs[place[first]])
    return None


def _spans(argument: Any) -> Iterator[tuple[int, int]]:
    """Yield the first address of a tensor and the one behind its last element."""
    if isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _spans(item)
    elif hasattr(argument, "base") and hasattr(argument, "block_shape"):
        yield from _spans(argument.base)
    elif isinstance(argument, torch.Tensor) and argument.numel():
        last = sum(
            (size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True)
        )
        start = argument.data_ptr()
        yield start, start + (last + 1) * argument.element_size()


def _addresses(ptrs: Any, mask: Any) -> np.ndarray:
    data = np.asarray(ptrs.data)
    chosen = np.broadcast_to(np.asarray(mask.data, bool), data.shape)
    return data[chosen].astype(np.uint64).ravel()


def _size(ptrs: Any) -> int:
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
