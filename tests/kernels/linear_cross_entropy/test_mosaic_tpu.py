"""The TPU kernel where its interpreter and lowering can see it without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxformer_kernels import compiling_for, interpreting, linear_cross_entropy
from jaxformer_kernels.linear_cross_entropy import mosaic_tpu
from jaxformer_kernels.linear_cross_entropy.shapes import SHAPES


def shapes_of(shape, dtype):
    w = (shape.V, shape.D) if shape.transposed else (shape.D, shape.V)
    return (
        jax.ShapeDtypeStruct((shape.tokens, shape.D), dtype),
        jax.ShapeDtypeStruct(w, jnp.float32),
        jax.ShapeDtypeStruct((shape.tokens,), jnp.int32),
    )


def lowered(function, *arguments):
    with compiling_for("tpu"):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_lowers_to_the_kernel_on_its_own_choice(monkeypatch, name, dtype):
    # The straight-line code of the usual block takes its time to be written down.
    monkeypatch.setattr(mosaic_tpu, "ROWS", 64)
    shape = SHAPES[name]

    def call(x, w, labels):
        return linear_cross_entropy(
            x,
            w,
            labels,
            softcap=shape.softcap,
            label_smoothing=shape.label_smoothing,
            z_loss=shape.z_loss,
            transposed=shape.transposed,
        )

    arguments = shapes_of(shape, dtype)
    assert "tpu_custom_call" in lowered(call, *arguments)
    gradient = jax.grad(lambda *operands: call(*operands).objective, argnums=(0, 1))
    assert "tpu_custom_call" not in lowered(gradient, *arguments)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_no_race_and_nothing_uninitialised_is_read(monkeypatch, transposed, parts):
    """Two blocks of tokens and three of the vocabulary, the last of each ragged."""
    monkeypatch.setattr(mosaic_tpu, "ROWS", 32)
    monkeypatch.setattr(mosaic_tpu, "COLUMNS", 128)
    monkeypatch.setattr(mosaic_tpu, "_BYTES", 640_000 if parts == 2 else 10**7)
    assert mosaic_tpu._plan(40, 256, 300, jnp.float32).inner == 256 // parts
    random = np.random.RandomState(0)
    x, w = (jnp.asarray(random.randn(*shape), jnp.float32) for shape in ((40, 256), (256, 300)))
    labels = jnp.asarray(random.randint(0, 300, 40))
    options = {"softcap": 20.0, "label_smoothing": 0.1, "transposed": transposed}
    w = w.T if transposed else w
    parameters = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan"
    )
    try:
        with interpreting(parameters):
            got = linear_cross_entropy(x, w, labels, implementation="mosaic_tpu", **options)
            jax.block_until_ready(got)
        assert not race_found()
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    want = linear_cross_entropy(x, w, labels, implementation="reference", **options)
    for name, value in want._asdict().items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=2e-5, atol=2e-5, err_msg=name)


def race_found():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public name

    return interpret_pallas_call.races.races_found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_of_real_shapes_are_as_large_as_meant(name, dtype):
    """Of so many tokens that reading w does not hold the matrix unit up."""
    shape = SHAPES[name]
    plan = mosaic_tpu._plan(shape.tokens, shape.D, shape.V, dtype)
    assert plan.rows == mosaic_tpu.ROWS or plan.rows >= shape.tokens
    assert plan.columns == mosaic_tpu.COLUMNS or plan.columns >= shape.V
    assert dtype == jnp.float32 or plan.whole
