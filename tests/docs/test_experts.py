"""The table of experts is what the installed transformers gives, and wrong experts would be found."""

import importlib

import listing
import pytest
import torch
import transformers

from vot_kernels.integrations import transformers as integration


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("list_experts")


def test_the_table(script):
    """No experts may be wrong; for the version of transformers that the page is about, every row is as written."""
    findings = {experts: script.examine(experts) for experts in script.all_experts()}
    assert [experts.name for experts, found in findings.items() if found.status == "wrong"] == []
    exact = {experts.name for experts, found in findings.items() if found.status == "exact"}
    assert exact >= {"MixtralExperts", "OlmoeExperts", "Qwen3MoeExperts", "Qwen3VLMoeTextExperts"}
    page = script.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" in page:
        rows = script.table(findings)
        assert listing.written(page, script.MARK, script.lines(rows)) == page, (
            "run python docs/list_experts.py"
        )


@pytest.fixture
def mixtral(script):
    [experts] = [experts for experts in script.all_experts() if experts.family == "mixtral"]
    module = script.build(experts)
    return module, *script.inputs_of(module)


@pytest.mark.parametrize("wrong", ["other experts", "no weights", "gradient"])
def test_wrong_experts_are_found(wrong, script, mixtral, monkeypatch):
    op = integration.moe

    def broken(x, gate_up, down, index, weights):
        if wrong == "other experts":
            index = index.flip(1)
        elif wrong == "no weights":
            weights = torch.ones_like(weights)
        out = op(x, gate_up, down, index, weights)
        return out.detach() + (out - out.detach()) * 0.99 if wrong == "gradient" else out

    monkeypatch.setattr(integration, "moe", broken)
    found = script.compare(*mixtral)
    assert found.status == "wrong" and "differ" in found.reason


def test_an_op_that_is_not_called_is_found(script, mixtral, monkeypatch):
    monkeypatch.setattr(integration, "register_experts", lambda name: name)
    eager = type(mixtral[0]).forward.__wrapped__
    table = type(integration.ALL_EXPERTS_FUNCTIONS)._global_mapping
    monkeypatch.setitem(table, "vot_kernels", eager)
    assert script.compare(*mixtral).reason == "0 calls"


def test_what_is_refused_says_why(script, mixtral):
    mixtral[0].act_fn = torch.nn.GELU()
    found = script.compare(*mixtral)
    assert found.status == "refused" and found.reason == "their activation is GELU, not SiLU."
