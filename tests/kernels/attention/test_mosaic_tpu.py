"""The TPU kernels, on a CPU: the list of blocks, races, and that they lower for the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxformer_kernels import Dropout, Mask, attention, compiling_for, dispatch, interpreting
from jaxformer_kernels.attention import (
    mosaic_tpu_backward,
    mosaic_tpu_tiles,
    schedule,
)
from jaxformer_kernels.attention.mosaic_tpu_tiles import Tiles
from jaxformer_kernels.attention.shapes import SHAPES

B, T, N, K, H = 2, 9, 4, 2, 8
SEGMENTS = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2], [1, 2, 3, 4, 4, 4, 0, 0, 0]])


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 4 queries of 2 heads and 4 keys in 2 chunks, in float32."""
    sizes = {"LANES": 2, "ROWS": 8, "COLUMNS": 8, "CHUNK": 4, "SHARED_ROWS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(mosaic_tpu_tiles, name, size)


def operands(heads=N, dtype=jnp.float32, T=T, H=H):
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "q": jax.random.normal(keys[0], (B, T, heads, H), dtype),
        "k": jax.random.normal(keys[1], (B, T, K, H), dtype),
        "v": jax.random.normal(keys[2], (B, T, K, H), dtype),
        "bias": jax.random.normal(keys[3], (1, heads, T, T), dtype),
        "sinks": jax.random.normal(keys[4], (heads,), dtype),
    }


def gradient(mask, implementation="mosaic_tpu", **options):
    def loss(operands):
        run = functools.partial(attention, implementation=implementation)
        out, lse = run(**operands, **options, mask=mask, return_lse=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) ** 2)

    return jax.jit(jax.grad(loss))


def assert_close(got, want):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_no_race_no_missing_wait_and_nothing_uninitialised(small_tiles):
    """In the interpreter that simulates vector memory, semaphores and late copies."""
    x, options = operands(), {"dropout": Dropout(0.3, jax.random.key(1)), "softcap": 2.0}
    mask = Mask(causal=True, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS)
    parameters = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan"
    )
    with interpreting(parameters):
        try:
            got = gradient(mask, **options)(x)
            jax.block_until_ready(got)
        finally:
            raced = interpret_pallas_call.races and interpret_pallas_call.races.races_found
            pltpu.reset_tpu_interpret_mode_state()
    assert raced is False
    assert_close(got, gradient(mask, "reference", **options)(x))


def test_keys_too_many_for_vector_memory_are_taken_in_parts(small_tiles, monkeypatch):
    x, options = operands(), {"dropout": Dropout(0.3, jax.random.key(1))}
    visible = jnp.asarray(np.random.RandomState(0).rand(B, 1, T, T) < 0.8)
    mask = Mask(
        window=(5, 1),
        q_offset=jnp.array([1, 0]),
        q_segment_ids=SEGMENTS,
        kv_segment_ids=SEGMENTS,
        kv_start=1,
        kv_end=jnp.array([9, 7]),
        array=visible,
    )
    parts = []
    run_part = mosaic_tpu_backward._run_part

    def counted(options, q, k, *rest):
        parts.append(k.shape[1])
        return run_part(options, q, k, *rest)

    monkeypatch.setattr(mosaic_tpu_backward, "_run_part", counted)
    monkeypatch.setattr(mosaic_tpu_backward, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(mosaic_tpu_tiles, "COLUMNS", 4)
    with interpreting():
        got = gradient(mask, **options)(x)
    assert parts == [4, 4, 1]
    assert_close(got, gradient(mask, "reference", **options)(x))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, N, 1, T), (B, 1, T, 1)])
def test_the_gradient_of_a_broadcasting_bias_is_summed_where_it_broadcasts(small_tiles, shape):
    x = operands()
    x["bias"] = jax.random.normal(jax.random.key(1), shape)
    mask = Mask(causal=True)
    with interpreting():
        got = gradient(mask)(x)
    assert got["bias"].shape == shape
    assert_close(got, gradient(mask, "reference")(x))


def visited(mask, T=16, S=16, rows=4, columns=4, chunk=4):
    """Every list of `steps`, as tuples (row, column, code, begin, end, first, last)."""
    steps = mosaic_tpu_tiles.steps(mask, T, S, Tiles(rows, columns, chunk, 1))
    words = np.asarray(steps.words).reshape(steps.lists, steps.count)
    return [
        [tuple(int(x) for part in mosaic_tpu_tiles.unpack(w) for x in part) for w in row]
        for row in words
    ]


def test_a_static_mask_shortens_the_grid():
    (causal,) = visited(Mask(causal=True))
    assert [step[:2] for step in causal] == [(i, j) for i in range(4) for j in range(i + 1)]
    assert [step[2] for step in causal] == [
        schedule.PARTIAL if i == j else schedule.FULL for i, j, *_ in causal
    ]
    (window,) = visited(Mask(window=(2, 0)))
    assert [step[:2] for step in window] == [
        (0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3),
    ]  # fmt: skip
    (nothing,) = visited(Mask(kv_end=0))
    assert nothing == [(i, 0, schedule.EMPTY, 0, 1, 1, 1) for i in range(4)]


def test_chunks_that_a_static_mask_hides_are_not_worked_on():
    (steps,) = visited(Mask(causal=True), rows=4, columns=8, chunk=4)
    assert [step[:5] for step in steps] == [
        (0, 0, schedule.PARTIAL, 0, 1),
        (1, 0, schedule.PARTIAL, 0, 2),
        (2, 0, schedule.FULL, 0, 2),
        (2, 1, schedule.PARTIAL, 0, 1),
        (3, 0, schedule.FULL, 0, 2),
        (3, 1, schedule.PARTIAL, 0, 2),
    ]
    (steps,) = visited(Mask(kv_start=5), T=4, S=20, columns=8, chunk=4)
    assert [step[1:5] for step in steps] == [
        (0, schedule.PARTIAL, 1, 2),
        (1, schedule.FULL, 0, 2),
        (2, schedule.PARTIAL, 0, 1),  # past the end
    ]


def test_every_row_of_blocks_begins_and_ends_once():
    ids = jnp.array([[1] * 6 + [2] * 10, [3] * 16])
    masks = (
        Mask(causal=True),
        Mask(window=(0, 5), q_offset=jnp.array([-20, 7])),
        Mask(causal=True, q_segment_ids=ids, kv_segment_ids=ids),
    )
    for mask in masks:
        for steps in visited(mask):
            assert [step[0] for step in steps if step[5]] == [0, 1, 2, 3]
            assert [step[0] for step in steps if step[6]] == [0, 1, 2, 3]


def test_what_only_run_time_hides_is_left_at_the_end_where_it_fetches_nothing():
    ids = jnp.repeat(jnp.arange(4), 4)[None]
    (steps,) = visited(Mask(causal=True, q_segment_ids=ids, kv_segment_ids=ids))
    assert len(steps) == 10  # what causal leaves
    assert steps[:4] == [(i, i, schedule.PARTIAL, 0, 1, 1, 1) for i in range(4)]
    assert steps[4:] == [(3, 3, schedule.EMPTY, 0, 1, 0, 0)] * 6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_blocks_suit_the_hardware_and_pad_little(shape, dtype):
    mask = Mask(causal=shape.causal, window=shape.window)
    tiles = mosaic_tpu_tiles.choose(shape.T, shape.S, shape.N // shape.K, dtype, mask)
    assert tiles.rows % 128 == tiles.chunk % 128 == tiles.columns % tiles.chunk == 0
    assert (shape.N // shape.K) % tiles.heads == 0
    assert -shape.T % tiles.rows <= max(128, shape.T // 8)
    assert -shape.S % tiles.columns <= max(128, shape.S // 8)
    if shape.window == (127, 0):
        assert tiles.rows == tiles.columns == 256


def lowered(x, mask, **options):
    with compiling_for("tpu"):
        return gradient(mask, **options).trace(x).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("head_dim", [64, 128, 256, 80])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_it_lowers_for_a_tpu_without_one(head_dim, dtype):
    x = operands(dtype=dtype, T=1000, H=head_dim)
    del x["bias"]
    text = lowered(x, Mask(causal=True, window=(300, 0)))
    assert text.count("tpu_custom_call") == 2
    assert "1000x1000" not in text and "1024x1024" not in text


def test_everything_at_once_lowers_for_a_tpu_without_one():
    ids = jnp.zeros((B, 200), jnp.int32)
    mask = Mask(
        causal=True,
        q_offset=jnp.array([0, 1]),
        q_segment_ids=ids,
        kv_segment_ids=ids,
        kv_end=jnp.array([100, 200]),
        array=jnp.ones((B, 1, 200, 200), bool),
    )
    x = operands(T=200, H=64)
    options = {"softcap": 30.0, "dropout": Dropout(0.1, jax.random.key(0))}
    assert lowered(x, mask, **options).count("tpu_custom_call") == 3


def test_on_a_tpu_it_is_the_automatic_choice():
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    with compiling_for("tpu"):
        run = jax.jit(lambda q, k, v: attention(q, k, v))
        text = run.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and "mosaic_tpu" in dispatch.picked("attention")


def test_what_it_cannot_do_is_refused():
    x = operands()
    run = functools.partial(attention, x["q"], x["k"], x["v"], implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match=r"the cpu platform .*interpreting\(\)"):
        run()
    halves = [x[name].astype(jnp.float16) for name in "qkv"]
    with interpreting(), pytest.raises(NotImplementedError, match="float16"):
        attention(*halves, implementation="mosaic_tpu")
    with jax.enable_x64(True), interpreting():
        wide = [jnp.asarray(x[name], jnp.float64) for name in "qkv"]
        with pytest.raises(NotImplementedError, match="float64"):
            attention(*wide, implementation="mosaic_tpu")
    long = jax.ShapeDtypeStruct((1, 2**19, 1, 64), jnp.bfloat16)
    with compiling_for("tpu"), pytest.raises(NotImplementedError, match="so many blocks"):
        jax.eval_shape(functools.partial(attention, implementation="mosaic_tpu"), long, long, long)
