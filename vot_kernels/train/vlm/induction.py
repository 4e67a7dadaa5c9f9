"""How a small language model begins that shall read what stands in its prompt.

To read is to find again what was just said, and to copy what followed it. A transformer does so with two layers
(induction heads; Olsson et al. 2022): heads that look back by a fixed number of tokens, and heads that compare what
these found. From random weights a small model takes longer to find this circuit than to learn all else, so here it
begins with it, and training only has to use it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EMBEDDING = 0.3
"""Standard deviation of the embeddings."""
_ALIKE = 0.95
"""Cosine of embeddings of tokens that differ in marks around a word alone, such as "o1=" and " o1"."""
_LOOK_BACK = 0.6
"""What a head that looks back adds to the embedding of a token, which has `_EMBEDDING`."""
_COPY = 0.3
"""What the other heads add, and how much smaller the MLPs' outputs are than at random."""
_SHARP = 6.0
"""Logits of each of the fastest rotations, by which heads look back."""
_TURNING = 6
"""Rotations that heads look back by."""
_FAST = 5
"""Rotations that are too fast to compare words that stand far apart."""
_MATCH = 2.0
"""Scale of queries and keys that compare words."""
_LONGEST = 3
"""Most tokens that a head looks for at once."""


@torch.no_grad()
def begin_with_induction(llama: Any, tokenizer: Any) -> None:
    """Write the first weights of a Llama that has biases in its attention, and at least two layers.

    In the first layer, head h looks back by h + 1 tokens, and writes what stands there into a place of its own. In the
    second, the heads look for the last one, two and three tokens, and copy what followed them; but the first looks for
    the token two places before, and copies what preceded it, which finds the number of a name. In later layers, queries
    equal keys, so that a word looks for itself (after Trockman & Kolter 2023). All values are copied as they are.

    Args:
        llama: without its head, which is tied to the embeddings.
        tokenizer: of the model; its tokens of one word begin alike.
    """
    _embed(llama.get_input_embeddings().weight, tokenizer.decode)
    width, heads = llama.config.hidden_size, llama.config.num_attention_heads
    size = width // heads
    llama.norm.weight.fill_(1 / (_EMBEDDING * math.sqrt(width)))  # logits then begin with a variance of 1
    word, places = _orthogonal(width)[:size], _orthogonal(width).view(heads, size, width)
    own = word * math.sqrt(_LOOK_BACK / _EMBEDDING)
    for number, layer in enumerate(llama.layers):
        attention = layer.self_attn
        query, key, value = (
            getattr(attention, f"{name}_proj").weight.view(heads, size, width) for name in "qkv"
        )
        output = attention.o_proj.weight.view(width, heads, size).permute(1, 2, 0)
        layer.mlp.down_proj.weight.mul_(_COPY)
        if number == 0:
            query.mul_(0.1)
            key.mul_(0.1)
            _look_back(attention, llama.rotary_emb.inv_freq, heads)
            value.copy_(word.expand_as(value))
            output.copy_(_LOOK_BACK * places)
            continue
        value.copy_(_orthogonal(width).view(heads, size, width))
        output.copy_(_COPY * value)
        if number == 1:
            _find_again(query, key, [own, *places])
            value[0], output[0] = places[0], _COPY * word
        else:
            key.copy_(query)


def _embed(weight: Tensor, decode: Callable[[list[int]], str]) -> None:
    """Draw embeddings, of which those of one word resemble the first of them."""
    weight.normal_(0, _EMBEDDING)
    first: dict[str, int] = {}
    for token in range(len(weight)):
        word = decode([token]).strip(" =@:,")
        same = first.setdefault(word, token) if word else token
        if same != token:
            weight[token] = _ALIKE * weight[same] + math.sqrt(1 - _ALIKE**2) * weight[token]


def _look_back(attention: Any, rates: Tensor, heads: int) -> None:
    """Let head h attend to the token h + 1 places before: a constant key, and a query turned by as many places."""
    query, key = (projection.bias.view(heads, 2, -1) for projection in (attention.q_proj, attention.k_proj))
    length = math.sqrt(_SHARP * math.sqrt(2 * query.shape[-1]))
    angle = torch.arange(1, heads + 1)[:, None] * rates[:_TURNING]
    query[:, 0, :_TURNING], query[:, 1, :_TURNING] = length * angle.cos(), -length * angle.sin()
    key[:, 0, :_TURNING] = length


def _find_again(query: Tensor, key: Tensor, back: list[Tensor]) -> None:
    """Let head 0 look for the token two places before, and head h for what followed the last h tokens.

    `back[n]` reads the token n places before.
    """
    query.zero_()
    key.zero_()
    size = query.shape[1]
    for head in range(len(query)):
        pairs = [(n, n + 1) for n in range(min(head, _LONGEST))] or [(2, 0)]
        for here, there in pairs:
            turn = _MATCH * _orthogonal(size).view(2, size // 2, size)
            turn[:, :_FAST] = 0
            query[head] += turn.flatten(0, 1) @ back[here]
            key[head] += turn.flatten(0, 1) @ back[there]


def _orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]
