"""What the TPU kernel does beyond its numbers: its memory, its lowering, and what it refuses."""

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxformer_kernels import compiling_for, decode_attention, interpreting
from jaxformer_kernels.decode_attention import mosaic_tpu
from jaxformer_kernels.decode_attention.shapes import SHAPES

run = functools.partial(decode_attention, implementation="mosaic_tpu")


@pytest.fixture
def simulated(monkeypatch):
    """The interpreter that finds races, missing waits and reads of what was never written."""
    # Its callbacks starve on few cores.
    monkeypatch.setitem(os.environ, "NPROC", "16")
    params = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan"
    )
    with interpreting(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("features", [("grouped_heads", "window"), ("paged", "few_queries")])
def test_no_race_and_nothing_read_unwritten(calls, simulated, monkeypatch, features):
    monkeypatch.setattr(mosaic_tpu, "_LOGITS", 1)
    sizes = calls.Sizes(S=40, H=128, Hv=128, window=9, page_size=8, lengths=(23, 0, 40))
    call, want = calls.wanted(features, sizes)
    out, lse = calls.compiled(run, calls.cast(call, jnp.float32))
    np.testing.assert_allclose(out, want[0], rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(lse, want[1], rtol=3e-5, atol=3e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def blocks_fetched(plan, scalars, runs, steps):
    """Blocks of the cache that the pipeline copies in: those named anew, step after step."""
    named = [
        tuple(int(x) for x in mosaic_tpu._cache_index(plan, run, step, *scalars))
        for run in range(runs)
        for step in range(steps)
    ]
    return [now for before, now in zip([None, *named], named, strict=False) if now != before]


def test_only_blocks_that_some_query_sees_are_fetched():
    plan = mosaic_tpu._Plan(1, 1, 1, 80, 16, None, 1, False, ("first", "end", "lengths", "starts"))
    first, end = np.array([0, 3, 0, 2]), np.array([2, 5, 0, 3])
    fetched = blocks_fetched(plan, (first, end, None, None), runs=4, steps=3)
    # The third row has nothing to read, and names a block all the same.
    assert fetched == [(0, 0, 0), (0, 1, 0), (1, 3, 0), (1, 4, 0), (2, 0, 0), (3, 2, 0)]


def test_it_maps_over_queries_that_share_a_cache():
    """The scalars stay as they are, and the grid grows by an axis."""
    q = jnp.cos(jnp.arange(2 * 2 * 4 * 64.0)).reshape(2, 2, 1, 4, 64)
    k = jnp.sin(jnp.arange(2 * 70 * 2 * 64.0)).reshape(2, 70, 2, 64)
    each = jax.jit(lambda q: run(q, k, k, jnp.array([70, 20])))
    with interpreting():
        got = jax.jit(jax.vmap(each))(q)
        for out, queries in zip(got, q, strict=True):
            np.testing.assert_allclose(out, each(queries), rtol=1e-5, atol=1e-6)


def abstract(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lower(shape):
    """Text of the named shape's call, lowered for a TPU v5e."""
    cache, options = (shape.B, shape.S, shape.K, shape.H), {}
    if shape.page_size is not None:
        pages = shape.S // shape.page_size
        cache = (shape.B * pages, shape.page_size, shape.K, shape.H)
        options["page_table"] = abstract((shape.B, pages), jnp.int32)
    if shape.sinks:
        options["sinks"] = abstract((shape.N,))
    call = functools.partial(run, window=shape.window, softcap=shape.softcap)
    q = abstract((shape.B, shape.T, shape.N, shape.H))
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
    with compiling_for("tpu"), mesh:
        lengths = abstract((shape.B,), jnp.int32)
        traced = jax.jit(call).trace(q, abstract(cache), abstract(cache), lengths, **options)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_lowers_for_tpu(name):
    assert "tpu_custom_call" in lower(SHAPES[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "the cpu platform .*interpreting"),
        ({"dtype": jnp.float16}, "float16"),
        ({"T": 200}, "200 queries of 4 heads"),
        ({"Hv": 64}, "head dims of 128 and 64"),
        ({"H": 64, "Hv": 64, "page_size": 16}, "pages of 16 positions with a head dim of 64"),
        ({"page_size": 4}, "not a multiple of 16"),
        ({"page_size": 16, "S": 1 << 21}, "page table of more than"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_reason(change, message):
    sizes = {"T": 1, "S": 32, "H": 128, "Hv": 128, "dtype": jnp.float32, "page_size": None}
    sizes |= change
    paged = sizes["page_size"] is not None
    cache = (sizes["S"] // sizes["page_size"], sizes["page_size"]) if paged else (1, sizes["S"])
    call = {
        "q": abstract((1, sizes["T"], 4, sizes["H"]), sizes["dtype"]),
        "k": abstract((*cache, 2, sizes["H"]), sizes["dtype"]),
        "v": abstract((*cache, 2, sizes["Hv"]), sizes["dtype"]),
        "lengths": abstract((1,), jnp.int32),
    }
    if paged:
        call["page_table"] = abstract((1, cache[0]), jnp.int32)
    interpreter = interpreting() if change else contextlib.nullcontext()
    with interpreter, pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(run, **call)
