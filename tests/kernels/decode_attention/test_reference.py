"""The reference of decode_attention against `attention`, and against loops over numbers."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import Mask, attention, decode_attention

reference = functools.partial(decode_attention, implementation="reference", return_lse=True)


def by_loops(q, k, v, lengths, starts=None, window=None, softcap=None, sinks=None):
    """(out, lse) of decoding, one query and one head at a time."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full((B, N, T), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        place = lengths[b] - T + t
        keys = range(max(0, place + 1))
        if starts is not None:
            keys = [s for s in keys if s >= starts[b]]
        if window is not None:
            keys = [s for s in keys if s >= place - window[0]]
        if not keys:
            continue
        x = np.array([q[b, t, n] @ k[b, s, n // group] for s in keys]) / np.sqrt(H)
        if softcap is not None:
            x = softcap * np.tanh(x / softcap)
        total = np.exp(x).sum() + (0 if sinks is None else np.exp(sinks[n]))
        lse[b, n, t] = np.log(total)
        out[b, t, n] = np.exp(x) @ np.array([v[b, s, n // group] for s in keys]) / total
    return out, lse


@pytest.mark.parametrize(
    "features",
    [
        (),
        ("few_queries",),
        ("few_queries", "window", "grouped_heads", "softcap", "sinks", "starts"),
    ],
    ids="+".join,
)
def test_it_is_what_loops_compute(calls, features):
    call = calls.make_call(features)
    want = by_loops(**call)
    for got, wanted in zip(calls.expected(call), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_it_is_attention_under_a_mask(calls):
    call = calls.cast(
        calls.make_call(("few_queries", "window", "grouped_heads", "sinks")), jnp.float32
    )
    lengths, window = call.pop("lengths"), call.pop("window")
    mask = Mask(causal=True, q_offset=lengths - 3, kv_end=lengths, window=window)
    want = attention(**call, mask=mask, return_lse=True, implementation="reference")
    got = reference(**call, lengths=lengths, window=window)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("features", [(), ("window",), ("few_queries", "window", "starts")])
def test_pages_are_the_rows_they_hold(calls, features):
    rows = calls.expected(calls.make_call(features))
    paged = calls.expected(calls.make_call((*features, "paged")))
    for x, y in zip(rows, paged, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-14, atol=1e-14)


def test_what_follows_one_token_at_a_time_is_what_follows_at_once(calls):
    """T queries together are T queries one after the other."""
    call = calls.make_call(("few_queries",), calls.Sizes(lengths=(13, 7, 3)))
    together, _ = calls.expected(call)
    for t in range(3):
        alone = {**call, "q": call["q"][:, t : t + 1], "lengths": call["lengths"] - 2 + t}
        np.testing.assert_allclose(calls.expected(alone)[0][:, 0], together[:, t], atol=1e-12)
