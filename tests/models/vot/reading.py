"""What a video-language model replies to questions about true scene graphs that it reads without frames."""

from collections.abc import Sequence
from pathlib import Path

from vot_kernels.data.digitworld.question_sets import AskedEpisode
from vot_kernels.data.digitworld.traces import ask
from vot_kernels.train.vlm.answers import MAX_NEW_TOKENS, first_prompt, prompt_inputs
from vot_kernels.train.vlm.model import load_vlm


def replies_from_graphs(folder: Path, asked: Sequence[AskedEpisode]) -> list[str]:
    """The greedy replies of the model in a folder, all in one batch."""
    model, processor = load_vlm(folder)
    messages = []
    for item in asked:
        graph, question = item.episode.stsg, ask(item.question.text, item.question.candidates)
        text = {"type": "text", "text": first_prompt(graph, question)}
        messages.append([{"role": "user", "content": [{"type": "graph", "graph": graph}, text]}])
    inputs = prompt_inputs(processor, messages)
    new = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return processor.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
