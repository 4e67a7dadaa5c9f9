"""Attributes that a patch writes to objects of a model: all of them or none, and back."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Absent:
    """What an attribute was that its object did not have itself."""


class Write(NamedTuple):
    """An attribute of an object, what it becomes and what it was.

    A model that keeps its writes can be copied and pickled: they refer to the objects of the copy then.
    """

    target: Any
    name: str
    value: Any
    before: Any


def planned(target: Any, name: str, value: Any) -> Write:
    """A write that is yet to be done."""
    return Write(target, name, value, vars(target).get(name, Absent))


def write_all(writes: Iterable[Write]) -> None:
    """Do the writes in their order; where one raises, none is done."""
    done: list[Write] = []
    try:
        for write in writes:
            setattr(write.target, write.name, write.value)
            done.append(write)
    except BaseException:
        take_back(done)
        raise


def take_back(writes: Iterable[Write]) -> None:
    """Undo writes, but for attributes that somebody has written to since."""
    for target, name, value, before in reversed(list(writes)):
        if vars(target).get(name, Absent) != value:
            continue
        if before is Absent:
            delattr(target, name)
        else:
            setattr(target, name, before)
