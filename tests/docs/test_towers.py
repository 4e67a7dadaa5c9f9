"""The table of vision towers matches the installed transformers, and a wrong tower would be found."""

import importlib
import re

import listing
import pytest
import torch
import transformers
from torch import nn

from vot_kernels.integrations import attention

FIRST = {
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
}


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("list_towers")


def test_the_page_is_as_the_script_writes_it(script):
    """The header and the counts of the statuses; that the rows are right is what the next tests compare."""
    page = script.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" in page:
        rows = [line for line in page.splitlines() if re.match(r"\| \w+ \| `", line)]
        assert len(rows) > 50 and listing.written(page, script.MARK, script.lines(rows)) == page
        assert listing.written(page, script.MARK, script.lines(rows[1:])) != page


def check_table(script, towers):
    """Check that no tower is wrong and, for the version of transformers on the page, that every row is as written."""
    findings = {tower: script.examine(tower) for tower in towers}
    assert [tower.name for tower, found in findings.items() if found.status == "wrong"] == []
    page = script.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" in page:
        layout = towers[0].layout
        rows = [line for line in page.splitlines() if f" | {layout} | " in line]
        assert script.table(findings) == rows, "run python docs/list_towers.py"
    return {tower.name for tower, found in findings.items() if found.status == "exact"}


def test_packed_towers(script):
    exact = check_table(script, script.packed_towers())
    assert exact >= FIRST and len(exact) >= 25


@pytest.mark.slow
def test_towers_with_an_image_in_a_row(script):
    exact = check_table(script, script.padded_towers())
    assert exact >= {"SiglipVisionModel", "CLIPVisionModel", "ViTModel", "Dinov2Model", "VideoMAEModel"}


@pytest.fixture
def qwen2_5_vl(script):
    [tower] = [tower for tower in script.packed_towers() if tower.family == "qwen2_5_vl"]
    model = script.build(tower)
    return model, next(script.inputs_of(tower, model))


@pytest.mark.parametrize("wrong", ["causal", "one segment", "swapped heads", "gradient"])
def test_a_wrong_attention_is_found(wrong, script, qwen2_5_vl, monkeypatch):
    op = attention.flash_attn_varlen_func

    def broken(q, k, v, cu_q, cu_k, *lengths, **options):
        if wrong == "causal":
            options["causal"] = True
        elif wrong == "one segment":
            cu_q, cu_k = cu_q[[0, -1]], cu_k[[0, -1]]
        out = op(q, k, v, cu_q, cu_k, *lengths, **options)
        if wrong == "gradient":
            return out.detach() + (out - out.detach()) * 0.99
        return out.flip(1) if wrong == "swapped heads" else out

    monkeypatch.setattr(attention, "flash_attn_varlen_func", broken)
    found = script.compare(*qwen2_5_vl)
    assert found.status == "wrong" and "differ" in found.reason


def test_a_function_that_is_not_called_is_found(script, qwen2_5_vl, monkeypatch):
    from vot_kernels.integrations import attention

    monkeypatch.setattr(attention, "register_attention", lambda: None)
    sdpa = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        type(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)._global_mapping, attention.NAME, sdpa
    )
    assert script.compare(*qwen2_5_vl).reason == "0 calls for 2 modules"


def test_what_is_refused_says_why(script):
    found = script.compare(Alone(), {"x": torch.ones(2, 3)})
    assert found.status == "refused" and found.reason == "none at all."


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x)


def test_numbers_that_are_not_finite_are_wrong(script):
    nan = torch.tensor([float("nan"), 1.0])
    assert listing.relative(nan, torch.ones(2)) == float("inf")
    assert listing.relative(torch.ones(2), torch.tensor([1.0, 2.0])) == 0.5
