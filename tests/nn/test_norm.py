"""Normalisation is held to its formula in float64, BatchNorm and GroupNorm to PyTorch."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.nn import BatchNorm, GroupNorm, LayerNorm, RMSNorm, pure, statistics


def layer_norm(x, params, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon) * params["scale"]
    return y + params.get("bias", 0)


def rms_norm(x, params, epsilon):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * params["scale"]


CASES = {
    "layernorm": (lambda **options: LayerNorm({"D": 16}, **options), layer_norm),
    "layernorm without bias": (
        lambda **options: LayerNorm({"D": 16}, bias=False, **options),
        layer_norm,
    ),
    "rmsnorm": (lambda **options: RMSNorm({"D": 16}, **options), rms_norm),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_norm_equals_its_formula(name, epsilon):
    make, formula = CASES[name]
    apply, params = pure(make(epsilon=epsilon, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    params = {key: random.normal(size=16).astype(np.float32) for key in params}
    x = (3 + 2 * random.normal(size=(2, 5, 16))).astype(np.float32)
    wide = {key: value.astype(np.float64) for key, value in params.items()}
    found = jax.jit(apply)(params, x)
    np.testing.assert_allclose(found, formula(x.astype(np.float64), wide, epsilon), atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_norm_starts_as_plain_normalisation(name):
    make, formula = CASES[name]
    apply, params = pure(make(rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(apply)(params, x), formula(x, {"scale": 1.0}, 1e-5), atol=1e-5
    )


def test_statistics_of_narrow_inputs_are_taken_in_float32():
    # In bfloat16 the mean of 256 + noise would swallow the noise.
    apply, params = pure(LayerNorm({"D": 16}, rngs=nnx.Rngs(0)))
    x = jnp.asarray(256 + 2 * np.arange(16), jnp.bfloat16)
    y = apply(params, x)
    assert y.dtype == jnp.bfloat16
    exact = layer_norm(np.asarray(x, np.float64), {"scale": 1.0}, 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8)


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_zeros_stays_finite_with_its_gradient(name):
    apply, params = pure(CASES[name][0](rngs=nnx.Rngs(0)))
    y, pull = jax.vjp(apply, params, jnp.zeros((2, 16)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, pull(jnp.ones((2, 16))))))


GOLDEN = Path(__file__).parent.parent / "fixtures" / "torch_norms.npz"
AXES = {"D": 8}
EXPECTED = ("y", "gradient.x", "gradient.scale", "gradient.bias", "mean", "variance")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {name: jnp.asarray(value) for name, value in arrays.items()}


def batch_norm(**options):
    """apply, params, statistics of a BatchNorm over eight channels."""
    model = BatchNorm(AXES, rngs=nnx.Rngs(0), **options)
    return *pure(model), statistics(model)


def train(apply, params, running, x, cotangent, mask):
    """Output, new statistics, and the gradients of x and of the parameters."""

    def run(params, x):
        return apply(params, x, mask=mask, statistics=running, training=True)

    y, pull, new = jax.vjp(run, params, x, has_aux=True)
    return y, new, *pull(cotangent)


@pytest.mark.parametrize("kind", ["whole", "masked"])
def test_batch_norm_is_pytorchs_on_the_rows_without_padding(golden, kind):
    apply, params, running = batch_norm()
    params = {name: golden[f"batch.{name}"] for name in params}
    step = jax.jit(partial(train, apply))
    for batch in range(3):
        x, cotangent, real = (golden[name][batch] for name in ("x", "cotangent", "real"))
        mask = real > 0 if kind == "masked" else jnp.ones(x.shape[:-1], bool)
        y, running, gradient, dx = step(params, running, x, cotangent, mask)
        expected = {name: golden[f"{kind}.{batch}.batch.{name}"] for name in EXPECTED}
        found = {"y": y, "gradient.x": dx, **running}
        found |= {f"gradient.{name}": value for name, value in gradient.items()}
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-5, err_msg=name)
    x, cotangent, real = (golden[name][0] for name in ("x", "cotangent", "real"))
    mask = real > 0 if kind == "masked" else None
    evaluate = lambda params, x: apply(params, x, mask=mask, statistics=running)  # noqa: E731
    y, pull = jax.vjp(evaluate, params, x)
    gradient, dx = pull(cotangent)
    found = {"y": y, "gradient.x": dx, "gradient.scale": gradient["scale"]}
    for name, value in found.items():
        np.testing.assert_allclose(
            value, golden[f"{kind}.evaluation.{name}"], atol=1e-5, rtol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("kind", ["whole", "masked"])
def test_group_norm_is_pytorchs_on_the_places_without_padding(golden, kind):
    apply, params = pure(GroupNorm(2, AXES, rngs=nnx.Rngs(0)))
    params = {name: golden[f"group.{name}"] for name in params}
    for batch in range(3):
        x, cotangent, real = (golden[name][batch] for name in ("x", "cotangent", "real"))
        mask = real > 0 if kind == "masked" else None
        y, pull = jax.vjp(lambda params, x, mask=mask: apply(params, x, mask=mask), params, x)
        gradient, dx = pull(cotangent)
        found = {"y": y, "gradient.x": dx, "gradient.scale": gradient["scale"]}
        found["gradient.bias"] = gradient["bias"]
        for name, value in found.items():
            expected = golden[f"{kind}.{batch}.group.{name}"]
            np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5, err_msg=name)


def test_group_norm_refuses_unequal_groups():
    with pytest.raises(ValueError, match="8 channels do not fall into 3 equal groups"):
        GroupNorm(3, AXES, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_what_stands_at_padding_changes_nothing(golden, value):
    apply, params, running = batch_norm()
    x, cotangent, real = (golden[name][0] for name in ("x", "cotangent", "real"))
    mask = real > 0
    clean = train(apply, params, running, x, cotangent, mask)
    dirty = train(apply, params, running, jnp.where(mask[..., None], x, value), cotangent, mask)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not np.any(clean[0][~mask]) and not np.any(clean[3][~mask])


@pytest.mark.parametrize("real", [0, 1])
def test_a_batch_without_two_real_places_has_no_nan_and_keeps_the_variance(golden, real):
    apply, params, running = batch_norm()
    params["bias"] = golden["batch.bias"]
    x, cotangent = golden["x"][0], golden["cotangent"][0]
    mask = jnp.arange(x[..., 0].size).reshape(x.shape[:-1]) < real
    y, new, gradient, dx = train(apply, params, running, x, cotangent, mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, new, gradient, dx)))
    np.testing.assert_array_equal(y[mask], np.tile(params["bias"], (real, 1)))
    np.testing.assert_array_equal(new["variance"], running["variance"])
    expected = 0.1 * x[0, 0] if real else running["mean"]
    np.testing.assert_allclose(new["mean"], expected, rtol=1e-6)


def test_running_statistics_converge_to_those_of_the_data():
    apply, params, running = batch_norm(momentum=0.02)
    random = np.random.default_rng(0)
    deviation, mean = np.arange(1.0, 9), np.arange(-4.0, 4)
    step = jax.jit(lambda running, x: apply(params, x, statistics=running, training=True)[1])
    draw = lambda rows: jnp.asarray(  # noqa: E731
        mean + deviation * random.normal(size=(rows, 8)), jnp.float32
    )
    for _ in range(500):
        running = step(running, draw(64))
    # Four deviations of an average over batches with weights 0.02 * 0.98 ** age.
    np.testing.assert_allclose((running["mean"] - mean) / deviation, 0, atol=0.05)
    np.testing.assert_allclose(running["variance"], deviation**2, rtol=0.08)
    y = np.asarray(apply(params, draw(20_000), statistics=running))
    np.testing.assert_allclose(y.mean(0), 0, atol=0.08)
    np.testing.assert_allclose(y.std(0), 1, atol=0.06)


def test_a_variance_that_is_small_beside_the_mean_is_kept():
    apply, params, running = batch_norm()
    x = (1000 + 0.01 * np.random.default_rng(0).normal(size=(64, 8))).astype(np.float32)
    y, new = apply(params, jnp.asarray(x), statistics=running, training=True)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(new["variance"], 0.9 + 0.1 * exact.var(0, ddof=1), rtol=1e-6)
    centred = exact - exact.mean(0)
    expected = centred / np.sqrt(exact.var(0) + 1e-5)
    # The mean itself has float32's roundings of 1000: a shift of all rows, not of their spread.
    np.testing.assert_allclose(y - np.mean(y, 0), expected, atol=1e-4)


def test_momentum_is_the_weight_of_the_new():
    for momentum in (0.0, 0.25, 1.0):
        apply, params, running = batch_norm(momentum=momentum)
        x = np.random.default_rng(0).normal(3, 2, size=(16, 8)).astype(np.float32)
        _, new = apply(params, jnp.asarray(x), statistics=running, training=True)
        np.testing.assert_allclose(new["mean"], momentum * x.mean(0), atol=1e-6)
        variance = 1 - momentum + momentum * x.var(0, ddof=1)
        np.testing.assert_allclose(new["variance"], variance, rtol=1e-5)


def one_device(golden, apply, params, running):
    x, cotangent = golden["x"].reshape(-1, 6, 8)[:8], golden["cotangent"].reshape(-1, 6, 8)[:8]
    mask = golden["real"].reshape(-1, 6)[:8] > 0
    return (x, cotangent, mask), train(apply, params, running, x, cotangent, mask)


def assert_equal_to_one_device(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), found, expected)


def test_statistics_are_shared_by_a_sharded_batch_under_jit(golden):
    apply, params, running = batch_norm()
    batch, expected = one_device(golden, apply, params, running)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    found = jax.jit(partial(train, apply))(params, running, *spread)
    assert_equal_to_one_device(found, expected)


@pytest.mark.parametrize("axis_name", ["data", ("data", "fsdp")])
def test_statistics_are_shared_under_shard_map(golden, axis_name):
    expected_apply, params, running = batch_norm()
    batch, expected = one_device(golden, expected_apply, params, running)
    apply, _, _ = batch_norm(axis_name=axis_name)
    shape = (8,) if axis_name == "data" else (4, 2)
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, ("data", "fsdp")[: len(shape)], axis_types=auto)
    rows, same = jax.P(axis_name), jax.P()
    found = jax.jit(
        jax.shard_map(
            partial(train, apply),
            mesh=mesh,
            in_specs=(same, same, rows, rows, rows),
            out_specs=(rows, same, same, rows),
        )
    )(params, running, *batch)
    assert_equal_to_one_device(found, expected)


def test_statistics_are_shared_under_pmap(golden):
    expected_apply, params, running = batch_norm()
    batch, expected = one_device(golden, expected_apply, params, running)
    apply, _, _ = batch_norm(axis_name="data")

    def step(params, running, x, cotangent, mask):
        y, new, gradient, dx = train(apply, params, running, x, cotangent, mask)
        return y, new, jax.lax.psum(gradient, "data"), dx

    split = [value[:, None] for value in batch]
    y, new, gradient, dx = jax.pmap(step, axis_name="data", in_axes=(None, None, 0, 0, 0))(
        params, running, *split
    )
    first = jax.tree.map(lambda leaf: leaf[0], (new, gradient))
    assert_equal_to_one_device((y[:, 0], *first, dx[:, 0]), expected)


def test_narrow_inputs_are_normalised_in_float32_and_stay_narrow():
    apply, params, running = batch_norm()
    x = jnp.asarray(256 + 2 * np.arange(64).reshape(8, 8), jnp.bfloat16)
    y, new = apply(params, x, statistics=running, training=True)
    assert y.dtype == jnp.bfloat16 and new["mean"].dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(new["mean"], 0.1 * exact.mean(0), rtol=1e-6)


def by_formula(norm, x, scale, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True) if norm is LayerNorm else x
    y = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon) * scale
    return y if bias is None else y + bias


@pytest.mark.parametrize(
    ("norm", "options"), [(LayerNorm, {}), (LayerNorm, dict(bias=False)), (RMSNorm, {})]
)
def test_gradients_are_those_of_the_formula_in_float64(norm, options):
    random = np.random.default_rng(3)
    layer = norm({"D": 24}, rngs=nnx.Rngs(0), epsilon=1e-2, **options)
    x, cotangent = (3 + 2 * random.normal(size=(2, 5, 24)) for _ in range(2))
    scale, bias = random.normal(size=24), random.normal(size=24)
    apply, params = pure(layer)
    params = {"scale": jnp.float32(scale)} | (
        {"bias": jnp.float32(bias)} if "bias" in params else {}
    )
    _, pull = jax.vjp(apply, params, jnp.float32(x))
    of_params, dx = jax.jit(pull)(jnp.float32(cotangent))
    with jax.enable_x64(True):
        _, pull = jax.vjp(
            lambda x, scale, bias: by_formula(norm, x, scale, bias, 1e-2),
            jnp.asarray(x),
            jnp.asarray(scale),
            jnp.asarray(bias) if "bias" in params else None,
        )
        wanted = pull(jnp.asarray(cotangent))
    np.testing.assert_allclose(dx, wanted[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(of_params["scale"], wanted[1], rtol=1e-5, atol=2e-5)
    if "bias" in params:
        np.testing.assert_allclose(of_params["bias"], wanted[2], rtol=1e-5, atol=2e-5)
