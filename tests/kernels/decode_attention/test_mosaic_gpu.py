"""The Hopper kernel in the interpreter, with race detection, and its lowering to the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxformer_kernels import compiling_for, decode_attention, interpreting
from jaxformer_kernels.decode_attention import mosaic_gpu
from jaxformer_kernels.decode_attention.shapes import SHAPES

run = functools.partial(decode_attention, implementation="mosaic_gpu")

ALL = ("few_queries", "grouped_heads", "window", "softcap", "sinks", "starts")
CALLS = {
    "lengths": ((), {}),
    "everything": (ALL, {}),
    "pages_of_16": (("paged",), {}),
    "pages_of_16_everything": ((*ALL, "paged"), {}),
    "pages_of_64": (("paged", "window"), {"page_size": 64}),
    "pages_of_128": (("paged", "grouped_heads"), {"page_size": 128}),
    "values_of_two_pieces": (("value_head_dim",), {"Hv": 192, "lengths": (130,)}),
    "keys_of_128": (("few_queries", "sinks"), {"H": 128, "lengths": (130,)}),
    "two_warpgroups": (("few_queries", "grouped_heads"), {"groups": 40, "lengths": (77, 200)}),
}


@pytest.fixture
def simulated(monkeypatch):
    """The interpreter that simulates memory, barriers and warpgroups, and finds races.

    On a GPU (JAXFORMER_TEST_PLATFORM=gpu) the kernel runs there.
    """
    if jax.default_backend() == "gpu":
        yield
        return
    # Rings of two stages, so that a handful of tiles goes round them.
    monkeypatch.setattr(mosaic_gpu, "_MOST_STAGES", 2)
    # No public name leads to what it found.
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    parameters = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with interpreting(parameters):
        yield
    races = gpu_callbacks.get_races().races_found
    gpu_callbacks.reset_gpu_interpret_mode_state()
    assert not races


def rounded(call, dtype):
    """The call with q, k and v as `dtype` holds them."""
    exact = {name: np.array(jnp.asarray(call[name], dtype), np.float64) for name in "qkv"}
    return {**call, **exact}


def outcome(calls, features, sizes, dtype):
    """(what the kernel gives, what the reference gives in float64)."""
    call = rounded(calls.make_call(features, sizes), dtype)
    got = calls.compiled(run, calls.cast(call, dtype))
    return [np.asarray(x, np.float32) for x in got], calls.expected(call)


@pytest.mark.mosaic_gpu
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.bfloat16) for name in CALLS), ("everything", jnp.float16)]
)
def test_it_is_the_reference_to_the_rounding_of_its_operands(calls, simulated, name, dtype):
    features, change = CALLS[name]
    base = {"K": 1, "groups": 2, "T": 2, "S": 200, "H": 64, "Hv": 64, "window": 70}
    base |= {"page_size": 16, "lengths": (200, 0, 131)}
    sizes = calls.Sizes(**(base | change))
    (out, lse), (want_out, want_lse) = outcome(calls, features, sizes, dtype)
    # Probabilities, at most 1 in all, and then the output round to a half of this.
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(out, want_out, rtol=epsilon, atol=epsilon)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.mosaic_gpu
def test_it_errs_at_most_twice_as_much_as_plain_bfloat16(calls, simulated):
    sizes = calls.Sizes(K=2, groups=2, T=2, S=200, H=64, Hv=64, lengths=(200, 131))
    call = rounded(calls.make_call(("few_queries", "grouped_heads"), sizes), jnp.bfloat16)
    want = calls.expected(call)
    narrow = calls.cast(call, jnp.bfloat16)
    for got, plain, x in zip(
        calls.compiled(run, narrow), jax.jit(calls.plain)(narrow), want, strict=True
    ):
        error, allowed = (np.abs(np.asarray(y, np.float64) - x).max() for y in (got, plain))
        assert error <= 2 * allowed


@pytest.mark.mosaic_gpu
def test_a_rerun_is_bitwise_equal(calls, simulated):
    sizes = calls.Sizes(K=1, groups=2, S=200, H=64, Hv=64, page_size=16, lengths=(200, 131))
    call = calls.cast(calls.make_call(("paged", "grouped_heads"), sizes), jnp.bfloat16)
    first, second = (calls.compiled(run, call) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def abstract(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def operands(shape):
    """The named shape's call, as shapes."""
    cache = (shape.B, shape.S, shape.K, shape.H)
    call = {"q": abstract((shape.B, shape.T, shape.N, shape.H))}
    if shape.page_size is not None:
        pages = shape.S // shape.page_size
        cache = (shape.B * pages, shape.page_size, shape.K, shape.H)
        call["page_table"] = abstract((shape.B, pages), jnp.int32)
    if shape.sinks:
        call["sinks"] = abstract((shape.N,))
    return call | {
        "k": abstract(cache),
        "v": abstract(cache),
        "lengths": abstract((shape.B,), jnp.int32),
    }


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_lowers_for_hopper(name):
    shape = SHAPES[name]
    call = functools.partial(run, window=shape.window, softcap=shape.softcap)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
    with compiling_for("gpu"), mesh:
        traced = jax.jit(call).trace(**operands(shape))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"H": 80, "Hv": 80}, "head dims of 80 and 80"),
        ({"T": 70}, "140 queries a key-value head"),
        ({"T": 64, "H": 256, "Hv": 256}, "head dims of 256 and 256 with 128 queries"),
        ({"page_size": 24}, "pages of 24 positions"),
        ({"S": 100}, "a cache of 100 positions"),
        ({"S": 56}, "a cache of 56 positions"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_reason(change, message):
    sizes = {"T": 1, "S": 96, "H": 128, "Hv": 128, "dtype": jnp.bfloat16, "page_size": None}
    sizes |= change
    cache = (1, sizes["S"]) if sizes["page_size"] is None else (4, sizes["page_size"])
    call = {
        "q": abstract((1, sizes["T"], 4, sizes["H"]), sizes["dtype"]),
        "k": abstract((*cache, 2, sizes["H"]), sizes["dtype"]),
        "v": abstract((*cache, 2, sizes["Hv"]), sizes["dtype"]),
        "lengths": abstract((1,), jnp.int32),
    }
    if sizes["page_size"] is not None:
        call["page_table"] = abstract((1, 4), jnp.int32)
    with compiling_for("gpu"), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(run, **call)


def test_it_is_refused_off_the_gpu():
    with pytest.raises(NotImplementedError, match="the cpu platform"):
        jax.eval_shape(run, **operands(SHAPES["llama3_8b"]))


@pytest.mark.parametrize("runs", [1, 8, 128, 1000])
@pytest.mark.parametrize("keys", [1, 128, 8192])
def test_splits_fill_the_processors_and_none_is_tiny(runs, keys):
    splits = mosaic_gpu.splits(runs, keys)
    assert splits == 1 or (splits - 1) * mosaic_gpu.TILE * 4 < keys
    assert splits == 1 or (splits - 1) * runs < 2 * 132
