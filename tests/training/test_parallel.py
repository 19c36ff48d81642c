"""The three ways to run the one step, and where they lay its arrays."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxformer import models, nn
from jaxformer.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from jaxformer.sharding import make_mesh, parameter_specs
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.parallel import Parallel, check_parallel, state_specs
from jaxformer.training.state import init_state
from jaxformer.training.step import batch_loss, make_train_step
from jaxformer_kernels.context_attention import zigzag

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

MODEL = ModelConfig(
    kind="decoder", layers=2, width=16, heads=4, max_length=16, scan=True, dropout=0.1
)
VOCABULARY = 24
ROWS, LENGTH = 16, 16


def make_run(*, mesh=None, mode="jit", context="ring", model=MODEL, optimizer=None, **train):
    """(parallel, its compiled step, the first state) of a tiny language model."""
    mesh = make_mesh(mesh or MeshConfig(data=1))
    parallel = Parallel(mesh, ParallelConfig(mode=mode, context=context))
    optimizer = optimizer or OptimizerConfig(name="sgd", learning_rate=0.5, schedule="constant")
    config = TrainConfig(batch_size=ROWS, **train)
    abstract = models.abstract(model, vocabulary=VOCABULARY)
    axes, (apply, params) = nn.parameter_axes(abstract), nn.pure(abstract)
    transformation = make_optimizer(optimizer, 100, axes)
    step = parallel.compile(
        make_train_step(
            apply,
            transformation,
            make_schedule(optimizer, 100),
            config,
            seed=3,
            axis_names=parallel.manual_axes,
            constrain=parallel.gradient_constraint(params, axes),
        ),
        config.accumulation,
    )
    make = functools.partial(init_state, optimizer=transformation, ema=config.ema is not None)
    state = make(nn.pure(models.build(model, vocabulary=VOCABULARY, seed=1))[1])
    places = parallel.state(jax.eval_shape(lambda: state), axes)
    state = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, places)
    return parallel, step, state


def make_batch(seed=0, rows=ROWS):
    """Rows of two packed pieces, the last ones padded."""
    random = np.random.default_rng(seed)
    place = np.arange(LENGTH)
    ends = random.integers(4, LENGTH + 1, (rows, 1))
    cut = random.integers(1, 4, (rows, 1))
    weights = (place < ends).astype(np.float32)
    tokens = random.integers(4, VOCABULARY, (2, rows, LENGTH)).astype(np.int32)
    return {
        "inputs": tokens[0],
        "targets": tokens[1],
        "weights": weights,
        "segment_ids": ((1 + (place >= cut)) * weights).astype(np.int32),
        "positions": np.where(place < cut, place, place - cut).astype(np.int32),
    }


def after(steps, **options):
    """The state on the host after some steps, and the loss of each."""
    parallel, step, state = make_run(**options)
    rows = ROWS * options.get("accumulation", 1)
    losses = []
    for number in range(steps):
        state, metrics = step(state, parallel.batch(make_batch(number, rows)))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def on_one_device():
    return after(20)


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_twenty_steps_on_eight_devices_are_those_of_one(on_one_device, mode):
    state, losses = after(20, mesh=MeshConfig(data=8), mode=mode)
    np.testing.assert_allclose(losses, on_one_device[1], rtol=1e-6)
    chex.assert_trees_all_close(state.params, on_one_device[0].params, rtol=2e-6, atol=2e-6)


def test_shard_map_and_pmap_are_bitwise_the_same():
    """Both run the step on a device's own rows and add up in the same order."""
    one, other = (after(3, mesh=MeshConfig(data=8), mode=mode) for mode in ("shard_map", "pmap"))
    chex.assert_trees_all_equal(one[0], other[0])
    assert one[1] == other[1]


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_micro_batches_are_the_same_on_any_mesh(mode):
    """Also the rows in each: the dropout of a row depends on the micro-batch that it is in."""
    alone, _ = after(2, accumulation=2)
    state, _ = after(2, mesh=MeshConfig(data=4), mode=mode, accumulation=2)
    chex.assert_trees_all_close(state.params, alone.params, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("mode", "context"), [("jit", "ring"), ("jit", "all_to_all"), ("shard_map", "ring")]
)
def test_rows_divided_over_context_train_as_whole_ones(mode, context):
    """Without dropout, which draws by the place of a token in the row as it is laid out."""
    model = dataclasses.replace(MODEL, dropout=0.0, window=6)
    alone, _ = after(2, model=model)
    mesh = MeshConfig(data=2, context=2)
    state, _ = after(2, mesh=mesh, mode=mode, context=context, model=model)
    chex.assert_trees_all_close(state.params, alone.params, rtol=2e-6, atol=2e-6)


def test_sharded_optimiser_and_average_compute_as_whole_ones():
    options = dict(optimizer=OptimizerConfig(name="adamw", epsilon=1e-3, warmup_steps=0), ema=0.9)
    alone, _ = after(5, **options)
    state, _ = after(5, mesh=MeshConfig(data=2, fsdp=2, tensor=2), **options)
    chex.assert_trees_all_close(state, alone, rtol=1e-5, atol=2e-6)


def test_a_body_written_for_pmap_is_wrong_by_the_number_of_devices_in_a_default_shard_map():
    """The trap that `shard_map` mode steps round; should jax close it, that can be simpler.

    The check casts the shared parameters to every device, and the cast's transpose is a sum: a
    `pmean` of the gradients then leaves them as many times too large as there are devices.
    """

    def gradient(w, x):
        return jax.grad(lambda w: jnp.tanh(x @ w).mean())(w)

    def as_for_pmap(w, x):
        return jax.lax.pmean(gradient(w, x), "data")

    random = np.random.default_rng(0)
    w, x = random.normal(size=(4, 3)).astype(np.float32), random.normal(size=(16, 4))
    mapped = functools.partial(
        jax.shard_map,
        as_for_pmap,
        mesh=make_mesh(MeshConfig(data=8)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    right = gradient(w, x.astype(np.float32))
    np.testing.assert_allclose(jax.jit(mapped())(w, x), 8 * right, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(mapped(check_vma=False))(w, x), right, rtol=1e-5)


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_a_step_moves_by_the_gradient_of_the_whole_batch_once(mode):
    model = dataclasses.replace(MODEL, dropout=0.0)
    plain = OptimizerConfig(
        name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, b1=0.0, clip_norm=None
    )
    parallel, step, state = make_run(
        mesh=MeshConfig(data=8), mode=mode, model=model, optimizer=plain
    )
    apply, _ = nn.pure(models.abstract(model, vocabulary=VOCABULARY))
    batch, before = make_batch(), jax.device_get(state.params)

    def mean_loss(params):
        rows = {name: jnp.asarray(x) for name, x in batch.items()}
        return batch_loss(apply, params, rows)[0] / rows["weights"].sum()

    gradient = jax.jit(jax.grad(mean_loss))(before)
    after, _ = step(state, parallel.batch(batch))
    moved = jax.tree.map(np.subtract, before, jax.device_get(after.params))
    chex.assert_trees_all_close(moved, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_the_optimisers_state_lies_where_its_parameters_do(name):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract = models.abstract(MODEL, vocabulary=VOCABULARY)
    axes, (_, params) = nn.parameter_axes(abstract), nn.pure(abstract)
    optimizer = make_optimizer(OptimizerConfig(name=name), 10, axes)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer, ema=True), params)
    specs = parameter_specs(axes, params, mesh)
    split = state_specs(state, specs)
    assert split.params == specs
    assert split.ema == specs
    assert split.step == P()
    kernel = "['feedforward']['up']['kernel']"
    leaves = jax.tree.leaves(split.optimizer_state, is_leaf=lambda node: isinstance(node, P))
    found = [
        (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(state.optimizer_state), leaves, strict=True
        )
        if jax.tree_util.keystr(path).endswith(kernel)
    ]
    whole_size = [spec for shape, spec in found if shape == (2, 16, 64)]
    assert whole_size == [P(None, "fsdp", "tensor")] * {"adamw": 2, "sgd": 1}.get(name, 1)
    assert all(spec == P() for shape, spec in found if shape != (2, 16, 64))


def test_one_device_leaves_batch_and_state_as_they_are():
    parallel, _, state = make_run()
    batch = make_batch()
    assert parallel.batch(batch) is batch
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(state))


def test_rows_of_a_process_are_placed_where_they_belong_in_the_global_batch():
    parallel, _, _ = make_run(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    batch = make_batch()
    placed = parallel.batch(batch)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding.spec == P(("data", "fsdp"), None)
    shapes = parallel.batch_shapes(batch)
    assert {name: (x.shape, x.dtype, x.sharding) for name, x in shapes.items()} == {
        name: (x.shape, x.dtype, x.sharding) for name, x in placed.items()
    }


def test_long_rows_are_put_in_zigzag_order_over_the_context_axis():
    parallel, _, _ = make_run(mesh=MeshConfig(data=2, context=4))
    batch = make_batch() | {"index": np.arange(ROWS)}
    placed = parallel.batch(batch)
    order = zigzag(4, LENGTH)
    np.testing.assert_array_equal(placed["inputs"], batch["inputs"][:, order])
    np.testing.assert_array_equal(placed["index"], batch["index"])
    assert placed["targets"].sharding.spec == P(("data", "fsdp"), "context")


TEXT = Config(
    data=DataConfig(kind="text", length=16),
    model=MODEL,
    train=TrainConfig(batch_size=8),
    eval=EvalConfig(batch_size=8),
)
PAIRS = dataclasses.replace(
    TEXT, data=DataConfig(kind="pairs"), model=dataclasses.replace(MODEL, kind="encoder_decoder")
)


@pytest.mark.parametrize(
    ("config", "mesh", "parallel", "message"),
    [
        (TEXT, dict(data=3), {}, "train.batch_size=8 does not divide over 3 devices"),
        (TEXT, dict(data=2, fsdp=2), dict(mode="pmap"), "mesh.fsdp=2: use --parallel.mode jit"),
        (TEXT, dict(tensor=2), dict(mode="shard_map"), "mesh.tensor=2: use --parallel.mode jit"),
        (TEXT, dict(context=2), dict(mode="pmap"), "mesh.context=2: use --parallel.mode jit"),
        (TEXT, dict(tensor=8), {}, "model.heads=4 does not divide over mesh.tensor=8"),
        (PAIRS, dict(context=2), {}, "data.kind='pairs': use mesh.data"),
        (
            dataclasses.replace(TEXT, model=dataclasses.replace(MODEL, position="alibi")),
            dict(context=2),
            {},
            "use model.position='rotary'",
        ),
        (
            dataclasses.replace(TEXT, data=dataclasses.replace(TEXT.data, length=12)),
            dict(context=4),
            {},
            "data.length=12 must be a multiple of twice mesh.context=4",
        ),
        (
            TEXT,
            dict(context=4, tensor=2),
            dict(context="all_to_all"),
            "use --parallel.context ring",
        ),
    ],
)
def test_what_a_mesh_cannot_do_is_one_line_that_names_the_fix(config, mesh, parallel, message):
    config = dataclasses.replace(config, parallel=ParallelConfig(**parallel))
    with pytest.raises(ConfigError) as refused:
        check_parallel(config, make_mesh(MeshConfig(**({"data": 1} | mesh))))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
