"""Language models as the reasoning steps use them: text in, text or log-likelihoods out."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from vot_kernels.extras import imports_for
from vot_kernels.scene_graph.graph import STSG

KEPT_PREFIXES = 2  # one prompt with the video and one without
SLOT = "\ue000"  # stands for the prompt while the chat template is filled in


class LanguageModelError(ValueError):
    """A language model cannot be loaded or cannot take the given text; the message is one sentence."""


class Reply(str):
    """A model's reply that also records whether the token limit cut it off.

    Attributes:
        cut: whether the reply was cut off at the limit.
    """

    cut: bool

    def __new__(cls, text: str, cut: bool = False) -> Reply:
        made = super().__new__(cls, text)
        made.cut = cut
        return made


def render_chat(renderer: Any, messages: Sequence[Mapping[str, Any]], name: str, **options: Any) -> str:
    """Return messages as the text that a chat template makes of them.

    Args:
        renderer: the tokenizer or processor that has the template.
        messages: "role" and "content" of each.
        name: the model, for the error.
        options: what else the template is given.

    Raises:
        LanguageModelError: the template is broken or refuses the messages.
    """
    try:
        return renderer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of the model's author
        raise LanguageModelError(f"The chat template of '{name}' fails: {str(error).rstrip('.')}.") from error


class ScoreUnavailable(NotImplementedError):
    """Raised by `score` of a model that can only generate; the reasoning then uses the model's words alone."""


@runtime_checkable
class LanguageModel(Protocol):
    """What the reasoning steps need of a language model; prompts are plain text, without chat markup.

    A model that sees the video itself also has an attribute `blind`, the same model without it.
    """

    name: str

    def generate(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        """Return the model's reply to `prompt`, at most `max_new_tokens` tokens long."""
        ...

    def generate_batch(self, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Return one reply per prompt, equal to calling `generate` on each."""
        ...

    def score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        """Return the mean log-likelihood per token (nats) of each continuation as the reply to `prompt`."""
        ...


class GenerateOnlyModel:
    """A language model made of any `generate(prompt) -> str`; it cannot score."""

    def __init__(self, generate: Callable[[str], str], name: str = "callable") -> None:
        self._generate = generate
        self.name = name

    def generate(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        return self._generate(prompt)

    def generate_batch(self, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        return [self._generate(prompt) for prompt in prompts]

    def score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        raise ScoreUnavailable(f"The model '{self.name}' only generates text; it gives no likelihoods.")


class Thought(NamedTuple):
    """What a model that was trained to think about a scene graph says of a question.

    Attributes:
        prompt: what it read.
        reply: its thought and its answer, as it wrote them.
        answer: the answer alone; "" if the reply has none.
        likelihood: the probability of the answer's tokens after the thought.
    """

    prompt: str
    reply: str
    answer: str
    likelihood: float


class ThinkingModel(GenerateOnlyModel):
    """A language model that was trained to read a scene graph, think and answer; to any other prompt it says nothing.

    Args:
        think: `think(question, candidates, graph)` returns its thought.
        name: of the model in traces.
    """

    def __init__(self, think: Callable[[str, Sequence[str], STSG], Thought], name: str) -> None:
        super().__init__(lambda prompt: "", name)
        self.think = think


def without_video(model: LanguageModel) -> LanguageModel | None:
    """Return the same model without the video that it sees, None if it sees none."""
    return getattr(model, "blind", None)


def as_language_model(model: LanguageModel | Callable[[str], str]) -> LanguageModel:
    """Return a language model as it is, and any `generate(prompt) -> str` as one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, LanguageModel):
        return model
    if not callable(model):
        raise TypeError(f"llm must be a LanguageModel or a function of a prompt, got {type(model).__name__}.")
    return GenerateOnlyModel(model)


class HFLanguageModel:
    """A local Hugging Face causal language model, decoded greedily.

    Prompts become one user message of the tokenizer's chat template, if it has one; otherwise the prompt is used as it
    is, followed by a line break. Keys and values of the last two kinds of prompt are cached, so that a prompt with the
    same beginning as one of them costs only its new tokens.

    Args:
        model: a folder with `config.json`, `*.safetensors` and a tokenizer, or a loaded model.
        tokenizer: required with a loaded model; read from the folder otherwise.
        dtype: compute dtype of a model read from a folder, a name such as "float32" or a `torch.dtype`.
        device: where to run, e.g. "cpu" or "cuda:0".
        name: name of the model in traces; the folder's name by default.
        max_batch: largest number of sequences in one forward pass, which bounds memory.

    Raises:
        LanguageModelError: the folder is missing, holds no model, or holds no safetensors weights.
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Any,
        tokenizer: Any = None,
        *,
        dtype: Any = "float32",
        device: str = "cpu",
        name: str | None = None,
        max_batch: int = 8,
    ) -> None:
        if max_batch < 1:
            raise LanguageModelError(f"max_batch must be at least 1, got {max_batch}.")
        if isinstance(model, (str, os.PathLike)):
            folder = Path(model).expanduser()
            model, loaded = load_causal_lm(folder, dtype)
            tokenizer = tokenizer if tokenizer is not None else loaded
            name = name or folder.resolve().name
        elif tokenizer is None:
            raise LanguageModelError("A loaded model needs its tokenizer: HFLanguageModel(model, tokenizer).")
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.name = name or type(model).__name__
        self.max_batch = max_batch
        self._kept: list[Prefix] = []
        self._stop = _stop_tokens(model, tokenizer)
        self._plain_cache = _has_plain_cache(model)
        tokens = sorted(filter(_is_markup, tokenizer.get_added_vocab()), key=len, reverse=True)
        self._markup = re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def generate(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        """Return the greedy reply to `prompt`, at most `max_new_tokens` tokens, without outer spaces."""
        return self.generate_batch([prompt], max_new_tokens=max_new_tokens)[0]

    def generate_batch(self, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """Return the greedy reply to each prompt; their common prefix is computed once."""
        if max_new_tokens < 1:
            raise LanguageModelError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        replies: list[str] = []
        for chunk in _chunks([self.encode(prompt) for prompt in prompts], self.max_batch):
            self._check_length(max(map(len, chunk)) + max_new_tokens)
            decode = self._decode if self._plain_cache else self._decode_hf
            for row in decode(chunk, max_new_tokens):
                words = self.tokenizer.decode(row, skip_special_tokens=True).strip()
                replies.append(Reply(words, cut=len(row) >= max_new_tokens))
        return replies

    def score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        """Return the mean log-likelihood per token (nats) of each continuation as the reply to `prompt`.

        The prompt is computed once and its keys and values serve every continuation.

        Raises:
            LanguageModelError: a continuation has no tokens, or prompt and continuation exceed the context.
        """
        prefix = self.encode(prompt)
        tails = [self._text_ids(text) for text in continuations]
        if not all(tails):
            raise LanguageModelError(
                "An empty continuation has no likelihood; give text with at least one token."
            )
        scores: list[float] = []
        for chunk in _chunks(tails, self.max_batch):
            self._check_length(len(prefix) + max(map(len, chunk)))
            scores += self._score(prefix, chunk)
        return scores

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids the model sees for `prompt`, up to where its reply begins.

        The prompt is treated as text throughout: "<|im_start|>" in it is read letter by letter and starts no turn.
        """
        marked = self._markup.search(prompt) is not None
        text = self._chat(SLOT if marked else prompt)
        if text is not None:
            head, *tails = text.split(SLOT) if marked else [text]
            ids = list(self.tokenizer(head, add_special_tokens=False)["input_ids"])
            for tail in tails:
                ids += self._text_ids(prompt)
                ids += self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        elif marked:
            alone, whole = (
                self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
            )
            ids = whole[: whole.index(alone[0])] + self._text_ids(prompt + "\n")
        else:
            ids = self.tokenizer(prompt + "\n")["input_ids"]
        if not ids:
            raise LanguageModelError("The prompt has no tokens; give some text.")
        return list(ids)

    def _chat(self, text: str) -> str | None:
        """Return `text` as the user's message in the chat template, None if there is no template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        message = [{"role": "user", "content": text}]
        return render_chat(self.tokenizer, message, self.name, add_generation_prompt=True)

    def _text_ids(self, text: str) -> list[int]:
        """Return the token ids of plain text; whatever the tokenizer would take for its own markup is split in two."""
        cuts = [0, *(match.start() + 1 for match in self._markup.finditer(text)), len(text)]
        pieces = (text[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        return [
            id
            for piece in pieces
            if piece
            for id in self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]

    def _check_length(self, length: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise LanguageModelError(
                f"The prompt and its reply take {length} tokens; the model '{self.name}' allows {limit}."
            )

    def _score(self, prefix: list[int], tails: list[list[int]]) -> list[float]:
        import torch

        # Padding is on the right, after everything that a causal model attends to, so no mask is needed.
        width = max(map(len, tails))
        shared = prefix[:-1] if self._plain_cache else []
        rows = [prefix[len(shared) :] + tail + [0] * (width - len(tail)) for tail in tails]
        tokens = torch.tensor(rows, device=self.model.device)
        with torch.inference_mode():
            options = {}
            if self._plain_cache:
                options = self._after(self._cache_of(shared, len(tails)), len(shared), tokens)
            logits = self.model(input_ids=tokens, **options).logits
        return mean_likelihoods(logits, tokens, tails)

    def _decode(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Decode left-padded prompts greedily after their common prefix."""
        import torch

        device = self.model.device
        shared = _common_prefix(prompts)
        shared = shared[
            : min(map(len, prompts)) - 1
        ]  # every prompt keeps a token whose logits start the reply
        rest = [prompt[len(shared) :] for prompt in prompts]
        width = max(map(len, rest))
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in rest], device=device)
        pads = torch.tensor([width - len(row) for row in rest], device=device)[:, None]
        mask = torch.ones(len(rest), len(shared) + width, dtype=torch.long, device=device)
        columns = torch.arange(width, device=device)
        mask[:, len(shared) :] = columns >= pads
        positions = (self._position(len(shared)) + columns - pads).clamp_min(0)
        replies: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        with torch.inference_mode():
            cache = self._cache_of(shared, len(prompts))
            for _ in range(max_new_tokens):
                logits = self.model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)
                for row, token in enumerate(tokens[:, 0].tolist()):
                    if row in open_rows and token in self._stop:
                        open_rows.discard(row)
                    elif row in open_rows:
                        replies[row].append(token)
                if not open_rows:
                    break
                mask = torch.cat([mask, mask.new_ones(len(rest), 1)], dim=1)
                positions = positions[:, -1:] + 1
        return replies

    def _decode_hf(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Decode greedily with transformers, for models whose cache is not plain keys and values."""
        import torch

        width = max(map(len, prompts))
        device = self.model.device
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=next(iter(self._stop), 0),
            )
        return [_until(row, self._stop) for row in out[:, width:].tolist()]

    def _cache_of(self, prefix: list[int], batch: int) -> Any:
        """Return a cache of `batch` rows that all hold `prefix`; compute only what no cached prefix begins with."""
        import torch

        if not prefix:
            return _cache_from([])
        nearest = max(
            self._known(), key=lambda kept: len(_common_prefix([kept.ids, prefix])), default=Prefix([], [])
        )
        common = len(_common_prefix([nearest.ids, prefix]))
        cache = _cache_from([(keys[:, :, :common], values[:, :, :common]) for keys, values in nearest.layers])
        if common < len(prefix):
            tokens = torch.tensor([prefix[common:]], device=self.model.device)
            options = {**self._after(cache, common, tokens), "use_cache": True, "logits_to_keep": 1}
            cache = self.model(input_ids=tokens, **options).past_key_values
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        # A prompt that begins like a cached one replaces it; any other replaces the oldest.
        continues = 2 * common >= len(nearest.ids)
        others = [kept for kept in self._kept if kept is not nearest] if continues else self._kept
        self._kept = [Prefix(prefix, layers), *others][:KEPT_PREFIXES]
        return _cache_from([(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in layers])

    def _known(self) -> list[Prefix]:
        """Return the prefixes with which a prompt may begin."""
        return self._kept

    def _position(self, place: int) -> int:
        """Return the position of the token at `place` of a prompt."""
        return place

    def _after(self, cache: Any, place: int, tokens: Any) -> dict[str, Any]:
        """Return the arguments with which the model reads `tokens` after a prompt up to `place`, held by `cache`."""
        return {"past_key_values": cache}


class Prefix(NamedTuple):
    """Token ids, and their keys and values per layer."""

    ids: list[int]
    layers: list[tuple[Any, Any]]


def mean_likelihoods(logits: Any, tokens: Any, tails: Sequence[list[int]]) -> list[float]:
    """Return the mean log-likelihood per token of each tail.

    Args:
        logits: `[tails, length, vocabulary]`.
        tokens: int64 `[tails, length]`; a row ends with its tail, and with padding up to the longest tail.
    """
    width = max(map(len, tails))
    likelihood = logits[:, -width - 1 : -1].float().log_softmax(-1)
    taken = likelihood.gather(-1, tokens[:, -width:, None]).squeeze(-1).cpu()
    return [float(row[: len(tail)].double().mean()) for row, tail in zip(taken, tails, strict=True)]


def load_causal_lm(folder: Path, dtype: Any = "float32") -> tuple[Any, Any]:
    """Return (model, tokenizer) read from a local folder; safetensors weights only, no code from the folder.

    Raises:
        LanguageModelError: the folder is missing or does not hold a causal language model.
        ImportError: transformers is not installed.
    """
    check_model_folder(folder)
    with imports_for("A language model", "llm"):
        from transformers import AutoModelForCausalLM, AutoTokenizer
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, dtype=dtype, output_loading_info=True, **options
            )
    except Exception as error:  # transformers raises many types for many broken folders
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise LanguageModelError(
            f"'{folder}' cannot be loaded as a causal language model: {reason}"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise LanguageModelError(
            f"'{folder}' does not hold all weights that its config.json describes: {missing[0]} is one of "
            f"{len(missing)} that are missing."
        )
    return model, tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars, which would otherwise run over ours, and its warnings."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that cannot hold a causal language model, without importing anything.

    Raises:
        LanguageModelError: it is missing, or has no config.json or no safetensors weights.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise LanguageModelError(
            f"A language model is a folder with config.json and *.safetensors; '{folder}' {what}."
        )
    if not (folder / "config.json").is_file():
        raise LanguageModelError(f"'{folder}' is not a language model: it has no config.json.")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise LanguageModelError(
            f"'{folder}' has only pickled weights, which can run code when read; convert them to safetensors."
        )
    raise LanguageModelError(f"'{folder}' has no weights: no *.safetensors file is in it.")


def _is_markup(token: str) -> bool:
    """Whether an added token can be split in two; spaces, which some tokenizers add, are text anyway."""
    return len(token) > 1 and not token.isspace()


def _has_plain_cache(model: Any) -> bool:
    """Whether the model keeps full keys and values per layer, so that a prefix can be sliced and copied."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    accepted = inspect.signature(model.forward).parameters
    if not {"past_key_values", "position_ids", "attention_mask", "logits_to_keep"} <= set(accepted):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _cache_from(layers: Sequence[tuple[Any, Any]]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a reply, from the generation config and the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {token for token in [*ids, tokenizer.eos_token_id] if token is not None}


def _common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest common prefix of all rows."""
    shared: list[int] = []
    for column in zip(*rows, strict=False):
        if any(token != column[0] for token in column):
            break
        shared.append(column[0])
    return shared


def _until(tokens: list[int], stop: set[int]) -> list[int]:
    """The tokens before the first stop token."""
    return next((tokens[:k] for k, token in enumerate(tokens) if token in stop), tokens)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
