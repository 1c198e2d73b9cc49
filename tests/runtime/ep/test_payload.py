"""Bytes that tokens travel as."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from ep_ranks import assert_rounded  # noqa: E402

from eplb.errors import InvalidInput  # noqa: E402
from eplb.runtime.ep.payload import Payload  # noqa: E402


@pytest.mark.parametrize("hidden", [1, 96, 128, 1000, 7168])
def test_fp8_is_off_by_its_rounding_only(hidden):
    torch.manual_seed(0)
    payload = Payload("fp8", hidden)
    x = torch.randn(40, hidden) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0.0
    sent = payload.encode(x)
    assert sent.shape == (40, payload.num_bytes)
    assert_rounded(payload, sent, x)
    assert not payload.decode(sent)[3].any()
    # As columns of wider rows, which is how they arrive.
    wide = torch.zeros(40, payload.num_bytes + 32, dtype=torch.uint8)
    wide[:, : payload.num_bytes] = sent
    assert torch.equal(payload.decode(wide[:, : payload.num_bytes]), payload.decode(sent))


def test_a_wide_token_is_off_by_less_than_five_percent():
    torch.manual_seed(0)
    payload = Payload("fp8", 7168)
    x = torch.randn(100, 7168)
    error = (payload.decode(payload.encode(x)).float() - x).norm(dim=1) / x.norm(dim=1)
    assert 0.02 < float(error.max()) < 0.03


@pytest.mark.parametrize(("kind", "size"), [("fp32", 40), ("bf16", 20), ("fp8", 12 + 4)])
def test_sizes_and_no_tokens(kind, size):
    payload = Payload(kind, 10)
    assert payload.num_bytes == size
    assert payload.encode(torch.zeros(0, 10)).shape == (0, size)
    assert payload.decode(torch.zeros(0, size, dtype=torch.uint8)).shape == (0, 10)
    x = torch.arange(20.0).view(2, 10)
    if kind != "fp8":
        assert torch.equal(payload.decode(payload.encode(x)).float(), x)


def test_an_unknown_payload_is_named():
    with pytest.raises(InvalidInput, match="did you mean 'fp8'"):
        Payload("fp9", 8)
