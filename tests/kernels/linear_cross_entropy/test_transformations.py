"""linear_cross_entropy under JAX's transformations, and what it costs in products and memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer_kernels import compiling_for, linear_cross_entropy
from jaxformer_kernels.linear_cross_entropy import xla

B, T, D, V = 4, 8, 16, 40
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}


def operands():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "x": jax.random.normal(keys[0], (B, T, D)),
        "w": jax.random.normal(keys[1], (D, V)),
        "labels": jax.random.randint(keys[2], (B, T), 0, V),
        "weights": jax.random.uniform(keys[3], (B, T)),
    }


def objective(run, x, w, labels, weights):
    return run(x, w, labels, weights=weights, **OPTIONS).objective


def every_result(run, x, w, labels, weights):
    found = run(x, w, labels, weights=weights, **OPTIONS)
    return found.objective + jnp.sum(jnp.sin(found.loss)) + jnp.sum(found.lse**2)


def gradient(loss, run):
    return jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1, 3)))


def assert_close(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


LOSSES = pytest.mark.parametrize("loss", [objective, every_result])


@LOSSES
def test_vmap_is_a_loop(fast_implementation, loss):
    x = operands()
    x["w"] = jnp.stack([x["w"] * i for i in range(B)])
    grad = gradient(loss, fast_implementation)
    mapped = jax.vmap(grad)(*x.values())
    for i in range(B):
        assert_close([leaf[i] for leaf in mapped], grad(*(leaf[i] for leaf in x.values())))


@LOSSES
def test_remat_and_scan_change_nothing(fast_implementation, loss):
    x = operands()
    want = gradient(loss, fast_implementation)(*x.values())

    def scanned(hidden, w, labels, weights):
        def body(total, row):
            return total + jax.checkpoint(functools.partial(loss, fast_implementation))(
                row[0], w, row[1], row[2]
            ), None

        return jax.lax.scan(body, 0.0, (hidden, labels, weights))[0]

    got = jax.jit(jax.grad(scanned, argnums=(0, 1, 3)))(*x.values())
    assert_close(got, want)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("check_vma", [True, False])
@LOSSES
def test_shard_map_over_tokens_is_the_whole(fast_implementation, loss, check_vma):
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    tokens = P("data", "context")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(tokens, P(), tokens, tokens),
        out_specs=P(),
        check_vma=check_vma,
    )
    def sharded(*operands):
        return jax.lax.psum(loss(fast_implementation, *operands), ("data", "context"))

    x = operands()
    got = jax.jit(jax.grad(sharded, argnums=(0, 1, 3)))(*x.values())
    assert_close(got, gradient(loss, fast_implementation)(*x.values()))


@pytest.fixture
def small_tiles(monkeypatch):
    for name, value in (("LOGITS", 1), ("TOKENS", 8), ("CPU_TOKENS", 8)):
        monkeypatch.setattr(xla, name, value)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_tokens_spread_over_devices_stay_where_they_are(small_tiles, platform):
    """Under jit alone, too, every device works on its own tokens of each tile."""
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    # XLA on CPU takes one axis of tokens only: see `xla._rows`.
    spec = P("data") if platform == "cpu" else P("data", "context")
    x = operands()
    spread = [
        jax.device_put(leaf, NamedSharding(mesh, P() if name == "w" else spec))
        for name, leaf in x.items()
    ]
    run = functools.partial(linear_cross_entropy, implementation="xla")
    with compiling_for(platform):
        compiled = gradient(objective, run).lower(*spread).compile()
    assert "while" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(*spread), gradient(objective, run)(*x.values()))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_tile_is_as_many_times_larger_as_devices_share_it(small_tiles):
    tiles = functools.partial(count_tiles, operands())
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    assert tiles() == B * T / 8
    with jax.set_mesh(mesh):
        assert tiles() is None


def count_tiles(x):
    """Length of the loop over tiles; None where there is none."""
    run = functools.partial(linear_cross_entropy, implementation="xla", weights=x["weights"])
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: run(x["x"], w, x["labels"]).objective))(x["w"])
    found = re.search(r"length=(\d+)", str(jaxpr))
    return int(found[1]) if found else None


def products(function, *arguments):
    """How many matrix products the compiled function has, the body of a loop counted once."""
    text = jax.jit(function).lower(*arguments).as_text()
    return len(re.findall(r"stablehlo\.dot_general", text))


@pytest.mark.parametrize("tiled", [False, True])
def test_the_objective_takes_three_products_and_fewer_where_fewer_do(request, tiled):
    if tiled:
        request.getfixturevalue("small_tiles")
    run = functools.partial(linear_cross_entropy, implementation="xla")
    x, w, labels, _ = operands().values()
    assert products(lambda x, w: run(x, w, labels).objective, x, w) == 1
    both = jax.grad(lambda x, w: run(x, w, labels).objective, argnums=(0, 1))
    assert products(both, x, w) == 3
    # A frozen projection, as in fine-tuning by adapters.
    assert products(jax.grad(lambda x, w: run(x, w, labels).objective), x, w) == 2

    def with_statistics(x, w):
        found = run(x, w, labels)
        return found.objective, (found.loss, found.correct)

    assert products(jax.grad(with_statistics, argnums=(0, 1), has_aux=True), x, w) == 3


def temporary_bytes(tokens, loss):
    run = functools.partial(linear_cross_entropy, implementation="xla")
    arguments = (
        jax.ShapeDtypeStruct((tokens, 32), jnp.float32),
        jax.ShapeDtypeStruct((32, 4096), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), jnp.float32),
    )
    compiled = gradient(loss, run).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@LOSSES
def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch, loss):
    monkeypatch.setattr(xla, "LOGITS", 128 * 4096)
    monkeypatch.setattr(xla, "CPU_TOKENS", 128)
    short, long = temporary_bytes(1024, loss), temporary_bytes(8192, loss)
    # What is left to grow is x, its gradient, and the statistics.
    assert long - short < (8192 - 1024) * 4 * (4 * 32 + 32)
    assert long < 8192 * 4096 * 4 / 8
