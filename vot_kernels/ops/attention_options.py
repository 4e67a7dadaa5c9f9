"""The options of attention: feature maps, causal modes and windows.

The references and the backends both import this file, so that the references share no code with what they check.
"""

from vot_kernels.packing import MAX_TOKENS, brief

FEATURE_MAPS = ("softmax", "elu", "relu")
CAUSAL_MODES = (None, "group", "token")
TOKEN_CAUSAL_MODES = (None, "token")  # of ops without groups
Causal = bool | str | None

Window = int | tuple[int, int] | None


def window_sides(window: Window, causal: str | None) -> tuple[int | None, int | None]:
    """Return how many groups are near on the left and on the right; None means all of them.

    An int counts for both sides, or for the left side alone when attention is causal.

    Raises:
        ValueError: `window` is not an int >= 0, a pair of them or None, or a causal window looks right.
    """
    if window is None:
        return None, (None if causal is None else 0)
    if isinstance(window, bool):
        sides: list[object] = []
    elif isinstance(window, int):
        sides = [window, window if causal is None else 0]
    else:
        sides = list(window) if isinstance(window, (tuple, list)) else []
    left, right = sides if len(sides) == 2 else (None, None)
    if not _is_count(left) or not _is_count(right):
        raise ValueError(
            f"window must be an int >= 0, a pair (left, right) of them, or None for all groups, got {brief(window)}."
        )
    if causal is not None and right != 0:
        raise ValueError(f"A causal window looks left only: give an int or (left, 0), got {brief(window)}.")
    return min(int(left), MAX_TOKENS), min(int(right), MAX_TOKENS)  # type: ignore[call-overload]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
