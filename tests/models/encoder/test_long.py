"""A clip in chunks gives what it gives as a whole, and takes no more memory for being longer."""

import pytest
import torch

from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
from vot_kernels.models.encoder.long import LongEncoding, _Rows

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    "expert_rank": 8,
}
CONFIGS = {
    "hybrid": {"full_attention_every": 0},
    "one exact layer": {"full_attention_every": 2},
    "window 0": {"full_attention_every": 0, "window": 0},
    "wide window": {"full_attention_every": 0, "window": 3},
    "causal": {"full_attention_every": 2, "causal": "group", "window": 2},
    "grouped heads, relu": {"num_key_value_heads": 1, "feature_map": "relu", "full_attention_every": 0},
    "no residual, no beta": {"dense_residual": False, "learned_beta": False, "full_attention_every": 0},
    "dilated residual": {"residual_dilation": 2, "residual_period": 1},
    "dense": {"aoe_every": 0},
}
FRAMES, GRID = 9, (2, 3)


def encoder_of(options):
    encoder = VotEncoder(VotEncoderConfig(**SMALL | options)).double().eval()
    with torch.no_grad():  # mixed states and far weights that differ from their start
        for name, parameter in encoder.named_parameters():
            if "residual" in name or "beta" in name:
                parameter.add_(torch.randn_like(parameter) / 2)
    return encoder


def pixels(frames=FRAMES):
    return torch.randn(frames * GRID[0] * GRID[1], 48, dtype=torch.float64)


def encode(encoder, folder, values, chunk, parts=(4, 5)):
    encoding = LongEncoding(encoder, folder, GRID, chunk)
    for part in values.split([6 * frames for frames in parts]):
        encoding.add(part)
    return encoding.run(fps=8.0)


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 50])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_chunks_equal_the_whole(options, chunk, tmp_path):
    encoder, values = encoder_of(options), pixels()
    with torch.no_grad():
        whole = encoder(values, torch.tensor([[FRAMES, *GRID]]), torch.tensor([8.0]))
    found = encode(encoder, tmp_path, values, chunk)
    torch.testing.assert_close(found.tokens, whole.last_hidden_state, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        found.pooled, whole.pooler_output[0], rtol=1e-6, atol=1e-6
    )  # scores are float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype, tmp_path):
    encoder, values = encoder_of(CONFIGS["dense"]).to(dtype), pixels().to(dtype)
    with torch.no_grad():
        whole = encoder(values, torch.tensor([[FRAMES, *GRID]]), torch.tensor([8.0]))
    found = encode(encoder, tmp_path, values, 2)
    assert found.tokens.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.tokens, whole.last_hidden_state, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [CONFIGS["hybrid"], CONFIGS["one exact layer"]])
def test_no_more_than_a_chunk_and_its_windows_is_read_at_once(options, tmp_path, monkeypatch):
    most, read = [], _Rows.read

    def counted(rows, begin, end):
        if rows.path.name not in ("states", "states-after"):
            most.append(end - begin)
        return read(rows, begin, end)

    monkeypatch.setattr(_Rows, "read", counted)
    encode(encoder_of(options), tmp_path, pixels(40), 4, parts=(8,) * 5)
    assert (
        max(most) == (4 + 2) * 6
    )  # frames of a chunk and of the window of 1 on either side, tokens of a frame


def test_progress_ends_with_the_total(tmp_path):
    encoder, seen = encoder_of({}), []
    encoding = LongEncoding(encoder, tmp_path, GRID, chunk=4)
    encoding.add(pixels())
    encoding.run(report=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]


def test_what_does_not_fit_is_refused(tmp_path):
    encoder = encoder_of({})
    encoding = LongEncoding(encoder, tmp_path, GRID)
    with pytest.raises(ValueError, match="whole frames of 6 patches, got 7 patches"):
        encoding.add(torch.randn(7, 48, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least one frame, but none was added"):
        encoding.run()
    for options, message in (
        ({"group": "rows:1"}, "group must be \"frame\", got 'rows:1'"),
        ({"attention": "linear"}, "got one of linear attention"),
    ):
        with pytest.raises(ValueError, match=message):
            LongEncoding(encoder_of(options), tmp_path, GRID)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        LongEncoding(encoder, tmp_path, GRID, chunk=0)
