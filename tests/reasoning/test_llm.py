import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="language models need transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from vot_kernels.reasoning import GenerateOnlyModel, HFLanguageModel, LanguageModel, LanguageModelError  # noqa: E402
from vot_kernels.reasoning.llm import ScoreUnavailable  # noqa: E402

WORDS = ["<unk>", "<end>", "<user>", "<bot>", "the", "red", "blue", "digit", "hits", "moves"]
WORDS += ["left", "right", "up", "yes", "no", ":", "\n", "?"]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
PROMPTS = ["the red digit hits the blue digit ?", "red ?", "the red digit moves left up right : yes no ?"]


def tokenizer(template: str | None = TEMPLATE):
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    made.chat_template = template
    return made


def causal_lm(seed: int = 0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # large, so that different prompts get different replies
        eos_token_id=1,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def sliding_lm(seed: int = 0):
    """A model whose cache forgets: the prefix cannot be kept."""
    torch.manual_seed(seed)
    config = transformers.MistralConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=4,
        initializer_range=0.4,
        eos_token_id=1,
    )
    return transformers.MistralForCausalLM(config)


@pytest.fixture
def folder(tmp_path):
    causal_lm().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(params=["plain cache", "sliding window", "no template"])
def llm(request):
    model = sliding_lm() if request.param == "sliding window" else causal_lm()
    made = HFLanguageModel(model, tokenizer(None if request.param == "no template" else TEMPLATE))
    assert made._plain_cache == (request.param != "sliding window")
    return made


def naive_score(llm, prompt, continuation):
    """One forward over everything, no cache, no batch."""
    prefix, tail = llm.encode(prompt), llm.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = llm.model(torch.tensor([prefix + tail]), use_cache=False).logits[0].double().log_softmax(-1)
    return float(torch.stack([logits[len(prefix) + i - 1, token] for i, token in enumerate(tail)]).mean())


def naive_reply(llm, prompt, max_new_tokens):
    tokens = llm.encode(prompt)
    start = len(tokens)
    with torch.no_grad():
        while len(tokens) < start + max_new_tokens:
            token = int(llm.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            if token == 1:
                break
            tokens.append(token)
    return llm.tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


def test_score_equals_a_full_forward(llm):
    continuations = ["yes", "the blue digit moves left", "no no", "right"]
    for prompt in (*PROMPTS, PROMPTS[0] + " yes"):  # each call meets the cache of the previous one
        expected = [naive_score(llm, prompt, text) for text in continuations]
        assert llm.score(prompt, continuations) == pytest.approx(expected, abs=1e-5)
    assert llm.score(PROMPTS[0], []) == []


def test_generate_equals_a_naive_loop(llm):
    replies = [llm.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert replies == [naive_reply(llm, prompt, 12) for prompt in PROMPTS]
    assert len(set(replies)) > 1
    assert replies == [llm.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]


def test_batch_equals_single(llm):
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[0] + " yes"]
    single = [llm.generate(prompt, max_new_tokens=12) for prompt in prompts]
    assert llm.generate_batch(prompts, max_new_tokens=12) == single
    llm.max_batch = 2
    assert llm.generate_batch(prompts, max_new_tokens=12) == single
    assert llm.generate_batch([], max_new_tokens=12) == []


def test_a_stop_token_ends_one_row_of_a_batch():
    """With the end token likelier, some replies are shorter than others."""
    model = causal_lm(seed=3)
    with torch.no_grad():
        model.lm_head.weight[1] *= 3
    llm = HFLanguageModel(model, tokenizer())
    replies = llm.generate_batch(PROMPTS, max_new_tokens=10)
    assert replies == [naive_reply(llm, prompt, 10) for prompt in PROMPTS]
    assert len({len(reply.split()) for reply in replies}) > 1


def test_the_prompt_is_computed_once(folder):
    llm = HFLanguageModel(folder)
    widths = []
    forward = llm.model.forward

    def counting(*args, input_ids, **options):
        widths.append(input_ids.shape[1])
        return forward(*args, input_ids=input_ids, **options)

    llm.model.forward = counting
    llm.score(PROMPTS[0], ["yes", "no"])
    llm.score(PROMPTS[0], ["left left left"])
    prompt = len(llm.encode(PROMPTS[0]))
    assert widths == [prompt - 1, 2, 4]
    llm.score("no no no", ["yes"])  # another prompt does not displace the first
    widths.clear()
    llm.score(PROMPTS[0], ["yes"])
    assert widths == [2]


def test_a_folder_loads_and_is_named_after_itself(folder):
    llm = HFLanguageModel(folder)
    assert isinstance(llm, LanguageModel)
    assert llm.name == "tiny"
    assert llm.model.dtype == torch.float32
    direct = HFLanguageModel(causal_lm(), tokenizer())
    assert llm.score(PROMPTS[0], ["yes"]) == pytest.approx(direct.score(PROMPTS[0], ["yes"]), abs=1e-6)


def test_loading_leaves_the_logging_of_transformers_as_it_was(folder, capfd):
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    HFLanguageModel(folder)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    assert "Loading" not in capfd.readouterr().err


def broken(folder, kind):
    if kind == "missing":
        return folder / "nowhere"
    if kind == "file":
        return folder / "config.json"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "bin":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "a weight is missing":
        weights = load_file(folder / "model.safetensors")
        weights.pop("model.norm.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "truncated":
        (folder / "model.safetensors").write_bytes(b"\x08")
    elif kind == "unknown type":
        (folder / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    elif kind == "own code":
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text("raise SystemExit('this code must not run')")
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("no config", "has no config.json"),
        ("bin", "only pickled weights"),
        ("no weights", "has no weights"),
        ("truncated", "cannot be loaded"),
        ("a weight is missing", "model.norm.weight is one of 1"),
        ("unknown type", "cannot be loaded"),
        ("own code", "cannot be loaded"),
    ],
)
def test_what_is_not_a_model_is_refused_in_one_line(folder, kind, words):
    with pytest.raises(LanguageModelError, match=words) as caught:
        HFLanguageModel(broken(folder, kind))
    assert "\n" not in str(caught.value)


def test_bad_arguments(llm):
    with pytest.raises(LanguageModelError, match="tokenizer"):
        HFLanguageModel(llm.model)
    with pytest.raises(LanguageModelError, match="max_batch"):
        HFLanguageModel(llm.model, llm.tokenizer, max_batch=0)
    with pytest.raises(LanguageModelError, match="max_new_tokens"):
        llm.generate("red", max_new_tokens=0)
    with pytest.raises(LanguageModelError, match="empty continuation"):
        llm.score("red", ["yes", ""])
    with pytest.raises(LanguageModelError, match="allows 64"):
        llm.generate("red " * 70)
    with pytest.raises(LanguageModelError, match="allows 64"):
        llm.score("red " * 62, ["yes no yes no"])


def test_markup_in_a_prompt_is_text(folder):
    """Text that looks like the tokenizer's own markup starts no turn and ends no reply."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    words.add_tokens(["<tool>"])
    bos = words.convert_tokens_to_ids("<|im_start|>")
    for template in (TEMPLATE.replace("<user>", "<|im_start|>"), None):
        words.chat_template = template
        llm = HFLanguageModel(causal_lm(), words)
        for markup in ("<|im_start|>", "<tool>", "<end>"):
            prompt = f"red {markup} blue {markup} ?"
            token = words.convert_tokens_to_ids(markup)
            assert token in words(prompt)["input_ids"]
            plain = llm.encode("red blue ?")
            assert llm.encode(prompt).count(token) == plain.count(token)
            assert plain.count(bos) == (template is not None)
            assert token not in llm._text_ids(markup)
        assert llm.encode("red blue ?")[-2:] == plain[-2:]


def test_a_reply_says_whether_the_limit_cut_it():
    model = causal_lm(seed=3)
    with torch.no_grad():
        model.lm_head.weight[1] *= 3  # the end is likelier
    llm = HFLanguageModel(model, tokenizer())
    replies = llm.generate_batch(PROMPTS, max_new_tokens=10)
    lengths = [len(reply.split()) for reply in replies]
    assert [reply.cut for reply in replies] == [length == 10 for length in lengths]
    assert {True, False} == {reply.cut for reply in replies}


@pytest.mark.parametrize("template", ["{{ foo( }}", "{{ raise_exception('text alone') }}", "{{ 1 + 'a' }}"])
def test_a_template_that_fails_is_named(template):
    with pytest.raises(LanguageModelError, match=r"The chat template of 'tiny' fails: .+\."):
        HFLanguageModel(causal_lm(), tokenizer(template), name="tiny").generate("red ?")


def test_a_prompt_without_tokens():
    with pytest.raises(LanguageModelError, match="no tokens"):
        HFLanguageModel(causal_lm(), tokenizer(None)).generate("")


def test_generate_only_model():
    model = GenerateOnlyModel(str.upper, "shout")
    assert isinstance(model, LanguageModel)
    assert model.generate("a") == "A"
    assert model.generate_batch(["a", "b"]) == ["A", "B"]
    with pytest.raises(ScoreUnavailable, match="shout"):
        model.score("a", ["b"])
