"""The models and DigitWorld for lmms-eval: two models behind its entry points, and a task with local data.

lmms-eval finds the models by the entry-point group `lmms_eval.models`: `vot_kernels_qa`, the video question answering
of `vot ask`, and `vot_kernels_vlm`, any vision-language model of transformers on the attention of this package. The
command `python -m vot_kernels.pipelines.lmms_eval OUT` writes the task `digitworld`, with the questions of
`vot eval digitworld`, into a folder for its option `--include_path`.

Source: lmms-eval 0.7, `models/registry_v2.py` and `api/model.py`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from vot_kernels.data.digitworld.codec import h264_bytes
from vot_kernels.data.digitworld.question_sets import generate_questions
from vot_kernels.data.video import load_video
from vot_kernels.extras import imports_for
from vot_kernels.files import new_folder
from vot_kernels.pipelines import video_qa
from vot_kernels.watching.frames import metadata
from vot_kernels.watching.protocols import DeferredModel

TASK = """\
task: digitworld
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function vot_kernels.pipelines.lmms_eval.doc_to_visual
doc_to_text: !function vot_kernels.pipelines.lmms_eval.doc_to_text
doc_to_target: answer
process_results: !function vot_kernels.pipelines.lmms_eval.process_results
generation_kwargs:
  max_new_tokens: 16
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""


def manifests() -> list[Any]:
    """What the entry point gives to lmms-eval: the names of the models, and where their classes are."""
    with imports_for("Evaluation with lmms-eval", "lmms"):
        from lmms_eval.models.registry_v2 import ModelManifest

    here = "vot_kernels.pipelines.lmms_eval"
    return [
        ModelManifest("vot_kernels_qa", simple_class_path=f"{here}.VideoQAModel"),
        ModelManifest("vot_kernels_vlm", simple_class_path=f"{here}.PatchedModel"),
    ]


def __getattr__(name: str) -> Any:
    """The classes, made when lmms-eval asks for them: it is still being imported when it reads the entry point."""
    makers = {"VideoQAModel": _video_qa_model, "PatchedModel": _patched_model}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return makers[name]()


@cache
def _video_qa_model() -> type:
    with imports_for("Evaluation with lmms-eval", "lmms"):
        from lmms_eval.api.model import lmms

    class VideoQAModel(lmms):
        """Video question answering as in `vot ask`, also about clips that the checkpoint does not know.

        Args:
            checkpoint: folder of a perception checkpoint; the bundled one if None.
            llm: folder of a causal language model; the one of `vot ask` if None.
            device: where both run.
            batch_size, max_batch_size: not used; questions are answered one by one.
        """

        def __init__(
            self,
            checkpoint: str | None = None,
            llm: str | None = None,
            device: str = "cpu",
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            language_model = DeferredModel(partial(video_qa.load_language_model, llm, device))
            self._qa = video_qa.VideoQA(video_qa.load_eyes(checkpoint, device), language_model, anyway=True)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """The answers; a document with "candidates" gets one of them."""
            return [self._answer(*request.args) for request in requests]

        def _answer(
            self, context: str, options: dict, to_visual: Any, doc_id: Any, task: str, split: str
        ) -> str:
            document = self.task_dict[task][split][doc_id]
            visuals = to_visual(document)
            if len(visuals) != 1 or not isinstance(visuals[0], (str, os.PathLike)):
                raise ValueError(f"vot_kernels_qa needs the path of one video or image, got {visuals!r:.80}.")
            candidates = document.get("candidates")
            question = document["question"] if candidates else context
            answer = self._qa.ask(visuals[0], question, candidates).answer
            return answer.choice or answer.text

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Not there: raises NotImplementedError."""
            raise NotImplementedError(
                "vot_kernels_qa answers questions; it has no likelihoods of continuations."
            )

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Not there: raises NotImplementedError."""
            raise NotImplementedError("vot_kernels_qa answers questions in one round.")

    return VideoQAModel


@cache
def _patched_model() -> type:
    with imports_for("Evaluation with lmms-eval", "lmms"):
        from lmms_eval.api.model import lmms

    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vot_kernels.integrations.patching import patch
    from vot_kernels.reasoning.llm import render_chat

    class PatchedModel(lmms):
        """A vision-language model of transformers after `vot_kernels.patch`, answering greedily, one by one.

        Args:
            pretrained: its folder, with safetensors and a processor that has a chat template.
            device: where it runs.
            dtype: of the weights, "auto" for that of the files.
            num_frames: frames of a clip that it sees, evenly spread.
            batch_size, max_batch_size: not used.
        """

        def __init__(
            self,
            pretrained: str,
            device: str = "cpu",
            dtype: str = "auto",
            num_frames: int = 16,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            local = {"local_files_only": True}
            model: Any = AutoModelForImageTextToText.from_pretrained(
                pretrained, dtype=dtype, use_safetensors=True, **local
            )
            self.name = pretrained
            self.model, self.num_frames = model.to(device).eval(), int(num_frames)
            self.processor = AutoProcessor.from_pretrained(pretrained, **local)
            self.patch_report = patch(self.model)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """The answers."""
            return [self._answer(*request.args) for request in requests]

        @torch.no_grad()
        def _answer(
            self, context: str, options: dict, to_visual: Any, doc_id: Any, task: str, split: str
        ) -> str:
            visuals = [self._see(each) for each in to_visual(self.task_dict[task][split][doc_id])]
            content = [*({"type": kind} for kind, *_ in visuals), {"type": "text", "text": context}]
            message = [{"role": "user", "content": content}]
            prompt = render_chat(self.processor, message, self.name, add_generation_prompt=True)
            media: dict[str, Any] = {}
            for kind, pixels, times in visuals:
                media.setdefault(f"{kind}s", []).append(pixels)
                if times is not None:
                    media.setdefault("video_metadata", []).append(times)
            if "videos" in media:
                media["do_sample_frames"] = False  # they are sampled already
            inputs = self.processor(text=[prompt], return_tensors="pt", **media).to(self.model.device)
            longest = int(options.get("max_new_tokens", 64))
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=longest)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            return self.processor.batch_decode(new, skip_special_tokens=True)[0].strip()

        def _see(self, visual: Any) -> tuple[str, Any, dict[str, Any] | None]:
            """ "image" or "video", its pixels, and when a video's frames are; a file of one frame is an image."""
            if not isinstance(visual, (str, os.PathLike)):
                return "image", visual, None
            clip = load_video(visual, num_frames=self.num_frames)
            if len(clip.frames) == 1:
                return "image", clip.frames[0], None
            return "video", clip.frames, metadata(clip)

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Not there: raises NotImplementedError."""
            raise NotImplementedError("vot_kernels_vlm generates; it has no likelihoods of continuations.")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Not there: raises NotImplementedError."""
            raise NotImplementedError("vot_kernels_vlm answers questions in one round.")

    return PatchedModel


def doc_to_visual(document: dict[str, Any]) -> list[str]:
    """The path of the clip."""
    return [document["video"]]


def doc_to_text(document: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question with its candidates, for models that read text alone."""
    return f"{document['question']}\nAnswer with one of: {', '.join(document['candidates'])}."


def process_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is the right candidate, whatever its case and full stop."""
    given = results[0].strip().rstrip(".").casefold()
    return {"accuracy": float(given == document["answer"].casefold())}


def write_task(out: str | os.PathLike[str], videos: int = 300, seed: int = 0) -> Path:
    """Write the task: digitworld.yaml, questions.jsonl and the clips of the questions, as H.264 files.

    The questions and clips are those of `vot eval digitworld` with the same numbers.

    Args:
        out: the folder, which must not exist or be empty; it stays where it is, for the paths in it are absolute.
        videos: clips, with one question each.
        seed: of the clips.

    Returns:
        The folder.

    Raises:
        FileExistsError: there is something in the folder.
        OSError: it can be neither written to nor made.
    """
    folder = Path(out).absolute()
    with new_folder(out) as whole:
        asked = generate_questions("test", videos, seed=seed)
        with (whole / "questions.jsonl").open("w", encoding="utf-8") as lines:
            for item in asked:
                clip, question = f"{item.episode.name}.mkv", item.question
                (whole / clip).write_bytes(h264_bytes(item.episode.frames(), fps=item.episode.scene.fps))
                document = {
                    "video": str(folder / clip),
                    "question": question.text,
                    "candidates": list(question.candidates),
                    "answer": question.answer,
                    "kind": question.kind,
                }
                lines.write(json.dumps(document, ensure_ascii=False) + "\n")
        task = TASK.format(questions=json.dumps(str(folder / "questions.jsonl")))
        (whole / "digitworld.yaml").write_text(task, encoding="utf-8")
    return folder


def main() -> int:
    """The command; an error is one sentence on stderr and the exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vot_kernels.pipelines.lmms_eval",
        description="Write DigitWorld as a task of lmms-eval.",
    )
    parser.add_argument("out", type=Path, help="the folder to write, which must not exist or be empty")
    parser.add_argument("--videos", type=int, default=300, help="clips, with one question each (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the clips (default 0)")
    options = parser.parse_args()
    try:
        print(write_task(options.out, options.videos, options.seed))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
