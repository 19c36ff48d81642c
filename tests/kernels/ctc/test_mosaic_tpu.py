"""The TPU kernels where their interpreter and lowering can see them without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxformer_kernels import compiling_for, ctc_loss, interpreting
from jaxformer_kernels.ctc import mosaic_tpu
from jaxformer_kernels.ctc.shapes import SHAPES
from tests.kernels.ctc.calls import make_call, outcome


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_lowers_to_the_kernels_on_its_own_choice(name):
    shape = SHAPES[name]
    call = (
        jax.ShapeDtypeStruct((shape.B, shape.T, shape.V), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.B,), jnp.int32),
        jax.ShapeDtypeStruct((shape.B, shape.N), jnp.int32),
        jax.ShapeDtypeStruct((shape.B,), jnp.int32),
    )
    with compiling_for("tpu"):
        gradient = jax.jit(jax.grad(lambda *x: jnp.sum(ctc_loss(*x))))
        text = gradient.trace(*call).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_fit_into_the_memory_they_are_given(name):
    shape = SHAPES[name]
    rows, frames = mosaic_tpu._block(shape.B, mosaic_tpu._places(shape.N))
    assert rows % 8 == 0 and frames >= 8
    assert 8 * 2 * 4 * rows * frames * mosaic_tpu._places(shape.N) <= mosaic_tpu._BYTES


def test_it_reads_nothing_unwritten_and_has_no_races(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_FRAMES", 4)
    monkeypatch.setattr(mosaic_tpu, "_STATES", 1)
    call = [jnp.asarray(x, jnp.float32 if x.ndim == 3 else int) for x in make_call(1, 11, 10, 5, 3)]
    want = outcome(lambda *x: ctc_loss(*x, implementation="xla"), *call)
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with interpreting(parameters):
        got = jax.jit(lambda *x: outcome(lambda *y: ctc_loss(*y, implementation="mosaic_tpu"), *x))(
            *call
        )
        jax.block_until_ready(got)
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
