"""Graph tokens in TRL, whose trainer hands on token ids and images alone.

The processor remembers the scene graph of each text that it prepares with one. For the update TRL prepares each text
once more without, and calls the model with ids and pixels: the processor then finds the graph again by the text, and
the model by the ids that follow its placeholders.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from vot_kernels.models.graph.tensors import GRAPH_INPUTS, graph_tensors
from vot_kernels.models.vot import VotForConditionalGeneration, VotProcessor
from vot_kernels.models.vot.processing import GRAPH
from vot_kernels.scene_graph.graph import STSG, Vocabulary


class GraphMemory(VotProcessor):
    """A processor that remembers the graph of each text, of which a text has at most one; make it by `of`."""

    by_text: dict[str, STSG]
    by_ids: dict[tuple[int, ...], STSG]

    @classmethod
    def of(cls, processor: VotProcessor) -> "GraphMemory":
        """Return one that otherwise does what `processor` does."""
        memory = cls(
            processor.image_processor,
            processor.tokenizer,
            str(processor.chat_template),
            processor.vocabulary,
            processor.tokens_per_track,
            processor.num_frames,
        )
        memory.by_text, memory.by_ids = {}, {}
        return memory

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, graphs: Any = None, **options: Any
    ) -> BatchFeature:
        """Prepare a batch as `VotProcessor` does; where no graphs are given, those of the texts are remembered and do
        not become tensors."""
        texts = [text] if isinstance(text, str) else list(text)
        placed = [t for t in texts if GRAPH in t]
        given = [graph for group in graphs or () for graph in group]
        known = given or [self.by_text[t] for t in placed if t in self.by_text]
        found = super().__call__(images, texts, videos, known or None, **options)
        self.by_text |= zip(placed, known, strict=True)
        rows = [row for row, t in zip(found["input_ids"], texts, strict=True) if GRAPH in t]
        self.by_ids |= {self._key(row): graph for row, graph in zip(rows, known, strict=True)}
        for name in () if given else GRAPH_INPUTS:
            found.pop(name, None)
        return found

    def attach(self, model: nn.Module) -> Any:
        """Give the model the graphs of ids that come without them; `remove()` of what is returned ends it."""
        (whole,) = [m for m in model.modules() if isinstance(m, VotForConditionalGeneration)]
        return whole.model.register_forward_pre_hook(self._give, with_kwargs=True)

    def _give(
        self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        ids: Tensor | None = given.get("input_ids")
        if ids is None or given.get(GRAPH_INPUTS[0]) is not None:
            return None
        rows = ids[(ids == self.graph_token_id).any(1)]
        if not len(rows):
            return None
        words = Vocabulary(**{name: tuple(words) for name, words in self.vocabulary.items()})
        tensors = graph_tensors([self.by_ids[self._key(row)].to_packed(words) for row in rows])
        return args, given | {name: tensor.to(ids.device) for name, tensor in tensors.items()}

    def _key(self, row: Tensor | Sequence[int]) -> tuple[int, ...]:
        """Return the ids from the last placeholder to the end of what is asked, whatever stands before and after."""
        ids = torch.as_tensor(row)
        after = ids[int((ids == self.graph_token_id).nonzero().max()) + 1 :].tolist()
        return tuple(after[: after.index(self.tokenizer.eos_token_id)])
