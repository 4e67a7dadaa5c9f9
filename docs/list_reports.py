"""Write the table in docs/tested-on.md from the marks of the tests.

A test names a report, `@pytest.mark.tested_on("flash-attention#1537")`, and `python docs/list_reports.py` rewrites the
table. This file says what went wrong there and, for a report that cannot be tested here, why.
"""

import ast
from pathlib import Path

import listing

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tested-on.md"
MARK = "reports"
SYMPTOMS = {
    "flash-attention#1537": "a shape error where segments are empty and query heads share keys",
    "flash-attention#2562": "an illegal access in the backward where segments have keys and no queries",
    "flash-attention#2324": "gradients of rows past the last segment were never written",
    "flash-attention#2333": "spare tiles read out of bounds: one token among 63 empty segments",
    "exllamav3#316": "head size 72 read uninitialised memory, runs differed",
    "verl#4670": "head sizes of vision towers were slow",
    "LlamaFactory#10639": "a crash that depended on the type of max_seqlen",
    "transformers#47170": "without max_length attention crossed packed sequences, silently",
    "transformers (documentation)": "a causal model attends to the future where no mask function is registered",
    "Qwen3-VL#206": "every block waited for the GPU",
    "transformers#45750": "a convolution as patch embedding was many times too slow",
    "transformers#43519": "timestamps came from the spatial merge size",
    "Qwen3-VL#2117": "frame indices were lost",
    "VeOmni#1165": "frame indices were divided by the wrong rate",
    "vllm#35909": "more frames were asked for than there are",
    "lmms-eval#874": "more frames were asked for than there are",
    "torchcodec#1339": "a stale frame after seeking back in HEVC",
    "PyAV#1117": "memory leaked where decoding stops early",
    "axolotl#3805": "the backward of experts mixed dtypes under autocast",
    "axolotl#3667": "int32 offsets overflowed",
    "Liger#1248": "int32 offsets overflowed",
    "sonic-moe#63": "a wrong kernel passed a test whose outputs were around 1e-5",
    "Liger#911": "a patch did nothing, silently",
    "ms-swift#7304": "a patch did nothing, silently",
    "transformers#46743": "grouped products wanted rows of 16 bytes; expanded gradients failed",
    "fla#1187": "states in float16 overflowed",
    "pytorch#148752": "no CPU backward for varied lengths",
    "trl#4144": "the video was dropped in the rollout",
    "Video-R1#74": "a reward forgot a factor",
    "Video-R1#86": "a format reward never matched",
    "musubi-tuner#1129": "HEVC decoding deadlocked with an old FFmpeg",
    "PyAV#1962": "HEVC decoding deadlocked with an old FFmpeg",
    "Qwen3-VL#1029": "scores differed by frames, pixels and rates that nobody stated",
    "lmms-eval#603": "scores differed by frames, pixels and rates that nobody stated",
}
NOT_HERE = {
    "transformers#45750": "the encoder's patch embedding is a linear layer",
}


def tests() -> dict[str, list[str]]:
    """For each report the tests that name it, as `tests/field/test_video.py: test_name`."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        aliases = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.value) == "pytest.mark.tested_on"
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            for mark in getattr(node, "decorator_list", []):
                if not isinstance(mark, ast.Call) or ast.unparse(mark.func) not in aliases | {
                    "pytest.mark.tested_on"
                }:
                    continue
                for report in mark.args:
                    place = f"`{path.relative_to(ROOT)}`: {node.name}"
                    found.setdefault(ast.literal_eval(report), []).append(place)
    return found


def lines() -> list[str]:
    """The table as the marks have it now; a report without a test and without a reason has an empty cell."""
    marked, rows = tests(), []
    for report, symptom in SYMPTOMS.items():
        here = "<br>".join(marked.get(report, [])) or NOT_HERE.get(report, "")
        rows.append(f"| {report} | {symptom} | {here} |")
    return listing.table(["seen in", "what went wrong there", "here"], rows)


if __name__ == "__main__":
    listing.write(PAGE, MARK, lines())
