"""Training over the ranks of torchrun: each has a share of every batch, and all take the same step.

A rank returns terms of a loss whose average over the ranks is the loss of the whole batch; `Ranks` averages gradients
accordingly. A mean over rows that are spread over the ranks is weighted by the rank's share of them (`weight`). What
needs all rows at once, as contrast does, is computed on every rank from the rows of all (`joined`).
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vot_kernels.distributed.collectives import all_reduce
from vot_kernels.distributed.experts import balance_over_ranks
from vot_kernels.distributed.sharding import assign
from vot_kernels.nn.autonomy_of_experts import AutonomyOfExperts
from vot_kernels.packing import PackedLayout


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together; by default this one alone.

    Attributes:
        rank: of this process.
        size: number of processes.
        group: of all of them; None if there is but one.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, layout: PackedLayout, **options: Any) -> list[int]:
        """Return this rank's segments of a batch, balanced by counted cost; options as of `assign`.

        Raises:
            ValueError: there are fewer segments than ranks.
        """
        self._check_enough(layout.num_segments)
        return assign(layout, self.size, **options)[self.rank]

    def part(self, clips: int) -> slice:
        """Return which of `clips` clips of one size are this rank's; those of all follow each other in order.

        Raises:
            ValueError: there are fewer clips than ranks.
        """
        self._check_enough(clips)
        return slice(self.rank * clips // self.size, (self.rank + 1) * clips // self.size)

    def _check_enough(self, clips: int) -> None:
        if clips < self.size:
            raise ValueError(
                f"A batch must have at least one clip for each of the {self.size} processes, got {clips}."
            )

    def weight(self, rows: int) -> float:
        """Return by how much a mean over `rows` rows of this rank counts: 1 if all ranks have equally many."""
        if self.group is None:
            return 1.0
        total = all_reduce(torch.tensor(float(rows), dtype=torch.float64), self.group, "sum of rows")
        return self.size * rows / float(total)

    def weights(self, rows: Sequence[int]) -> list[float]:
        """Return by how much means over so many rows each, the parts of this rank's batch, count in a whole step."""
        whole, total = self.weight(sum(rows)), sum(rows)
        return [whole * count / total if total else 0.0 for count in rows]

    def joined(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks in their order, differentiable; all ranks go on with them in the same way."""
        return rows if self.group is None else _Joined.apply(rows, self)

    def joined_texts(self, texts: list[str]) -> list[str]:
        """Return the texts of all ranks in their order."""
        if self.group is None:
            return texts
        found: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, texts, group=self.group)
        return [text for part in found for text in part]

    @contextmanager
    def balance(self, model: nn.Module) -> Iterator[None]:
        """Balance a model's experts over the tokens of all ranks, for the time of its training."""
        if self.group is None:
            yield
            return
        balance_over_ranks(model, self.group)
        try:
            yield
        finally:
            for layer in model.modules():
                if isinstance(layer, AutonomyOfExperts):
                    layer.spread = None

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its average over the ranks; a rank that has none of a parameter counts as 0.

        What no rank has a gradient of is left without, as in one process.
        """
        if self.group is None:
            return
        trained = [p for p in parameters if p.requires_grad]
        has = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        anywhere = all_reduce(has, self.group, "exchange of what has a gradient").tolist()
        for parameter, found in zip(trained, anywhere, strict=True):
            if found and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in trained if p.grad is not None]
        for dtype in {gradient.dtype for gradient in gradients}:
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in alike]) / self.size
            flat = all_reduce(flat, self.group, "average of gradients")
            for gradient, mean in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def mean(self, values: Tensor) -> Tensor:
        """Return the average of `values` over the ranks, without a gradient."""
        values = values.detach()
        return values if self.group is None else all_reduce(values / self.size, self.group, "average")

    def average(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the averages of scalars over the ranks."""
        values = self.mean(torch.stack([term.detach().double() for term in terms.values()]))
        return dict(zip(terms, values.tolist(), strict=True))


ALONE = Ranks()


class _Joined(torch.autograd.Function):
    """The rows of all ranks. Every rank has the whole gradient of them, and gradients are averaged in the end."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        counts = torch.zeros(ranks.size, dtype=torch.int64, device=rows.device)
        counts[ranks.rank] = rows.shape[0]
        assert ranks.group is not None
        ends = all_reduce(counts, ranks.group, "exchange of counts").cumsum(0).tolist()
        ctx.size, ctx.rows = ranks.size, slice(ends[ranks.rank] - rows.shape[0], ends[ranks.rank])
        whole = rows.new_zeros(ends[-1], *rows.shape[1:])
        whole[ctx.rows] = rows
        return all_reduce(whole, ranks.group, "exchange of rows")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.size * gradients[0][ctx.rows], None


@contextmanager
def torchrun(device: str) -> Iterator[tuple[Ranks, str]]:
    """Yield the ranks that torchrun has started, and this one's device: its GPU of those on "cuda".

    A process that torchrun has not started is alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Counts of rows are on the CPU, also where tensors are on GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), device
    finally:
        dist.destroy_process_group()
