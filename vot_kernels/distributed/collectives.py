"""The collectives that the distributed ops are made of, with an error in words if another rank is gone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from vot_kernels.packing import brief

Group = ProcessGroup | DeviceMesh


def group_of(group: Group) -> ProcessGroup:
    """The process group itself, given one or a DeviceMesh of one dimension.

    Raises:
        TypeError: it is neither.
        ValueError: the mesh has several dimensions.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            raise ValueError(
                f"group must be one dimension of a DeviceMesh, such as mesh[{(*names, 'cp')[0]!r}], got a mesh of "
                f"{group.ndim} dimensions."
            )
        return group.get_group()
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or one dimension of a DeviceMesh, got {brief(group)}.")
    return group


def rank_of(group: ProcessGroup) -> int:
    """The rank of this process in the group."""
    return dist.get_rank(group)


def size_of(group: ProcessGroup) -> int:
    """The number of ranks in the group."""
    return dist.get_world_size(group)


def exchange(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup, what: str
) -> Tensor:
    """Send the first sent[0] rows to rank 0, the next ones to rank 1 and so on; return the rows received, by rank.

    Swapping `sent` and `received` gives the transposed exchange, which takes gradients back.
    """
    found = rows.new_empty(sum(received), *rows.shape[1:])
    with _partners(group, what):
        dist.all_to_all_single(found, rows.contiguous(), list(received), list(sent), group=group)
    return found


def all_gather(rows: Tensor, group: ProcessGroup, what: str = "comparison of layouts") -> Tensor:
    """The rows of all ranks, which have equally many, in the order of the ranks."""
    found = rows.new_empty(size_of(group) * rows.shape[0], *rows.shape[1:])
    with _partners(group, what):
        _newer("all_gather_single", "all_gather_into_tensor")(found, rows.contiguous(), group=group)
    return found


def reduce_scatter(rows: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """This rank's share of the sum of `rows` over the ranks: the transposed `all_gather`."""
    found = rows.new_empty(rows.shape[0] // size_of(group), *rows.shape[1:])
    with _partners(group, what):
        _newer("reduce_scatter_single", "reduce_scatter_tensor")(found, rows.contiguous(), group=group)
    return found


def all_reduce(x: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """The sum of `x` over the ranks."""
    total = x.clone(memory_format=torch.contiguous_format)
    with _partners(group, what):
        dist.all_reduce(total, group=group)
    return total


def _newer(name: str, older: str) -> Any:
    """A function of torch.distributed under its new name where torch has that."""
    return getattr(dist, name, None) or getattr(dist, older)


@contextmanager
def _partners(group: ProcessGroup, what: str) -> Iterator[None]:
    """Say which exchange failed, because the error of a transport names an address at best."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"The {what} failed on rank {rank_of(group)} of {size_of(group)}, because another rank has ended, does "
            f"not answer within the timeout of the group, or made another call: {reason[:200]}"
        ) from error
