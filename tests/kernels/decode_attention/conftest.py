"""Calls to draw, and every implementation under one fixture.

Kernels in their interpreters are slow: each implementation names the sizes it is tested at.
"""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer_kernels
from jaxformer_kernels import decode_attention
from jaxformer_kernels.decode_attention import mosaic_tpu, xla

FEATURES = (
    "few_queries",
    "window",
    "grouped_heads",
    "softcap",
    "sinks",
    "starts",
    "paged",
    "value_head_dim",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a call; `page_size * max_pages` is what a row has room for when it is paged."""

    K: int = 2
    groups: int = 3
    T: int = 3
    S: int = 13
    H: int = 8
    Hv: int = 6
    window: int = 4
    page_size: int = 4
    lengths: tuple[int, ...] = (13, 0, 7, 2, 1)


def draw(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape)


def paginate(k, v, lengths, first, page_size, seed=9):
    """Pools and a table that hold rows k, v [B, S, ...] in scattered pages, garbage elsewhere.

    Only pages that hold a position first[b] <= s < lengths[b] exist; the table says -1 or nonsense
    for the others.
    """
    rng = np.random.RandomState(seed)
    B, S = k.shape[:2]
    max_pages = -(-S // page_size)
    padding = ((0, 0), (0, max_pages * page_size - S), (0, 0), (0, 0))
    rows = [np.pad(x, padding).reshape(B, max_pages, page_size, *x.shape[2:]) for x in (k, v)]
    free = list(rng.permutation(B * max_pages + 2))
    pools = [3 * rng.standard_normal((len(free), *x.shape[2:])).astype(x.dtype) for x in rows]
    table = rng.choice([-1, 10**6, -(10**6)], (B, max_pages)).astype(np.int32)
    for b in range(B):
        for page in range(max_pages):
            if page * page_size < lengths[b] and (page + 1) * page_size > first[b]:
                table[b, page] = free.pop()
                for pool, x in zip(pools, rows, strict=True):
                    pool[table[b, page]] = x[b, page]
    return *pools, table


def make_call(features, sizes=Sizes()):
    """Arguments of a call with these features, in float64 numpy."""
    lengths = np.array(sizes.lengths, np.int32)
    B, K, S = len(lengths), sizes.K, sizes.S
    T = sizes.T if "few_queries" in features else 1
    N = K * sizes.groups if "grouped_heads" in features else K
    Hv = sizes.Hv if "value_head_dim" in features else sizes.H
    call = {
        "q": draw(0, B, T, N, sizes.H),
        "k": draw(1, B, S, K, sizes.H),
        "v": draw(2, B, S, K, Hv),
        "lengths": lengths,
    }
    first = np.zeros(B, int)
    if "window" in features:
        call["window"] = (sizes.window, 0)
        first = np.maximum(first, lengths - T - sizes.window)
    if "starts" in features:
        call["starts"] = (np.arange(B) * 3 % 5 * S // 13).astype(np.int32)
        first = np.maximum(first, call["starts"])
    if "softcap" in features:
        call["softcap"] = 1.5
    if "sinks" in features:
        call["sinks"] = draw(4, N)
    if "paged" in features:
        call["k"], call["v"], call["page_table"] = paginate(
            call["k"], call["v"], lengths, first, sizes.page_size
        )
    return call


def cast(call, dtype):
    """The call with its floating arrays in `dtype`."""
    return {
        name: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else x.dtype)
        if isinstance(x, np.ndarray)
        else x
        for name, x in call.items()
    }


def compiled(run, call):
    """(out, lse) of a jitted run; what is no array is closed over."""
    arrays = {name: x for name, x in call.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in call.items() if name not in arrays}
    return jax.jit(lambda arrays: run(**arrays, **static, return_lse=True))(arrays)


def expected(call, dtype=jnp.float64):
    """The reference's (out, lse), as numpy, of the call computed in `dtype`."""
    with jax.enable_x64(dtype == jnp.float64):
        run = functools.partial(decode_attention, implementation="reference")
        return tuple(np.asarray(x) for x in compiled(run, cast(call, dtype)))


@functools.cache
def wanted(features, sizes):
    """The call with these features, and its reference; once for all implementations."""
    call = make_call(features, sizes)
    return call, expected(call)


def plain(call):
    """(out, lse) as one writes it first, every step in the dtype of the operands.

    Not paged; every query must see a key.
    """
    q, k, v = call["q"], call["k"], call["v"]
    T, N = q.shape[1:3]
    S, K = k.shape[1:3]
    k, v = jnp.repeat(k, N // K, axis=2), jnp.repeat(v, N // K, axis=2)
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    if "softcap" in call:
        x = call["softcap"] * jnp.tanh(x / call["softcap"])
    place = call["lengths"][:, None, None, None] - T + jnp.arange(T)[:, None]
    seen = jnp.arange(S) <= place
    if "window" in call:
        seen &= jnp.arange(S) >= place - call["window"][0]
    x = jnp.where(seen, x, -jnp.inf)
    if "sinks" in call:
        sink = jnp.broadcast_to(call["sinks"][None, :, None, None], (*x.shape[:-1], 1))
        x = jnp.concatenate([x, sink], axis=-1)
    p = jax.nn.softmax(x, axis=-1)[..., :S]
    return jnp.einsum("bnts,bsnh->btnh", p, v), jax.nn.logsumexp(x, axis=-1)


@pytest.fixture(scope="session")
def calls():
    """The functions above, for the tests beside this file."""
    return types.SimpleNamespace(
        FEATURES=FEATURES,
        Sizes=Sizes,
        cast=cast,
        compiled=compiled,
        expected=expected,
        make_call=make_call,
        paginate=paginate,
        plain=plain,
        wanted=wanted,
    )


@dataclasses.dataclass(frozen=True)
class Regime:
    """An implementation, what to set so that tiny calls have several blocks, and its sizes."""

    name: str
    settings: dict = dataclasses.field(default_factory=dict)
    interpreted: bool = False
    sizes: Sizes = Sizes()
    heads_first: bool = False


REGIMES = {
    "reference": Regime("reference"),
    "xla": Regime("xla", {(xla, "_BLOCK"): 5}),
    "heads_first": Regime("xla", heads_first=True),
    "heads_first_blocks": Regime(
        "xla", {(xla, "_BLOCK"): 5, (xla, "_WHOLE"): 12}, heads_first=True
    ),
    # Of wide heads 16 positions a block, of narrow ones 128: three blocks, the last of them ragged.
    "mosaic_tpu": Regime(
        "mosaic_tpu",
        {(mosaic_tpu, "_LOGITS"): 1},
        interpreted=True,
        sizes=Sizes(S=40, H=128, Hv=256, window=9, page_size=8, lengths=(40, 0, 23, 2, 33)),
    ),
    "mosaic_tpu_narrow": Regime(
        "mosaic_tpu",
        {(mosaic_tpu, "_LOGITS"): 1},
        interpreted=True,
        sizes=Sizes(S=300, window=140, page_size=128, lengths=(300, 0, 180, 2)),
    ),
}


@pytest.fixture(params=[name for name in REGIMES if name != "reference"])
def regime(request, monkeypatch):
    """A regime in force; `regime.run` is decode_attention bound to it."""
    chosen = REGIMES[request.param]
    for (module, attribute), value in chosen.settings.items():
        monkeypatch.setattr(module, attribute, value)

    def run(**call):
        if chosen.heads_first and "page_table" not in call:
            turned = {name: jnp.swapaxes(call[name], 1, 2) for name in ("k", "v")}
            call |= turned | {"heads_first": True}
        interpreter = jaxformer_kernels.interpreting() if chosen.interpreted else None
        with interpreter or contextlib.nullcontext():
            return decode_attention(**call, implementation=chosen.name)

    return types.SimpleNamespace(run=run, sizes=chosen.sizes)
