"""Answers of a video-language model to questions about clips."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vot_kernels.data.digitworld.traces import ask, read_reply
from vot_kernels.models.vot.processing import VotProcessor
from vot_kernels.reasoning.llm import LanguageModelError, Thought
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.relations import GEOMETRIC_PREDICATES
from vot_kernels.train.vlm.conversations import Clip

MAX_NEW_TOKENS = 192
_BATCH = 8


@dataclass(frozen=True)
class Asked:
    """A question about a clip, with its graph, true or seen, if there is one, and the answers to choose from.

    `reads` says as what the model reads the graph: as tokens, as text, or both.
    """

    clip: Clip
    graph: STSG | None
    question: str
    candidates: Sequence[str] | None
    reads: Collection[str] = ("tokens", "text")


def first_prompt(graph: STSG | None, question: str) -> str:
    """Return what the user says first: the graph, if there is one, then the question.

    Of the graph it has the tracklets with a few boxes, the events, and the relations that do not follow from boxes. The
    boxes are where a tracklet begins and ends, and at the ends of the first and the last quarter of the clip.
    """
    if graph is None:
        return question
    relations = tuple(r for r in graph.relations if r.predicate not in GEOMETRIC_PREDICATES)
    last, quarter = graph.num_frames - 1, -(-graph.num_frames // 4)
    frames = {0, quarter - 1, last - quarter + 1, last}
    tracklets = tuple(
        replace(t, boxes={k: t.boxes[k] for k in t.frames if k in frames or k in (t.frames[0], t.frames[-1])})
        for t in graph.tracklets
    )
    return f"{replace(graph, tracklets=tracklets, relations=relations).to_text(every=1)}\n{question}"


@torch.no_grad()
def replies(model: Any, processor: VotProcessor, asked: Sequence[Asked]) -> Iterator[str]:
    """Yield the greedy reply to each question, in batches of eight."""
    for start in range(0, len(asked), _BATCH):
        messages = [[{"role": "user", "content": _content(item)}] for item in asked[start : start + _BATCH]]
        inputs = prompt_inputs(processor, messages).to(model.device)
        new = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        yield from processor.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def think(model: Any, processor: VotProcessor, asked: Asked) -> Thought:
    """Return the greedy reply to a question, and how likely its answer is after its thought.

    Raises:
        LanguageModelError: the prompt is longer than the model allows.
    """
    content = _content(asked)
    inputs = prompt_inputs(processor, [[{"role": "user", "content": content}]]).to(model.device)
    length = inputs["input_ids"].shape[1]
    limit = model.config.get_text_config().max_position_embeddings
    if length + MAX_NEW_TOKENS > limit:
        raise LanguageModelError(
            f"The scene graph and the question take {length} tokens; with {MAX_NEW_TOKENS} of a reply the model "
            f"allows {limit - MAX_NEW_TOKENS}."
        )
    new = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = new.sequences[0, length:]
    likelihoods = torch.cat(new.logits).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    reply = processor.decode(tokens, skip_special_tokens=True)
    told = read_reply(reply)
    answer = told[1] if told else ""
    begin = _tokens_of_thought(processor, tokens) if told else 0
    prompt = str(content[-1]["text"])
    return Thought(prompt, reply, answer, float(likelihoods[begin:].sum().exp()))


def _tokens_of_thought(processor: VotProcessor, tokens: torch.Tensor) -> int:
    """Return how many tokens of a reply come before its answer."""
    return next(i for i in range(len(tokens)) if "<answer>" in processor.decode(tokens[: i + 1]))


def prompt_inputs(processor: VotProcessor, messages: Sequence[Sequence[Mapping[str, Any]]]) -> Any:
    """Return the inputs of `generate` for a batch of conversations, padded on the left."""
    given: Any = messages
    return processor.apply_chat_template(
        given,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
    )


def _content(item: Asked) -> list[dict[str, Any]]:
    text, tokens = (item.graph if kind in item.reads else None for kind in ("text", "tokens"))
    asked = {"type": "text", "text": first_prompt(text, ask(item.question, item.candidates))}
    graph = [] if tokens is None else [{"type": "graph", "graph": tokens}]
    return [{"type": "video", "video": item.clip}, *graph, asked]
