"""Parameters with named axes, and the split of a module into function and parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import ModelConfig
from jaxformer.models import abstract, build
from jaxformer.nn import (
    BatchNorm,
    LayerNorm,
    count,
    parameter_axes,
    pure,
    statistics,
    with_statistics,
)

CONFIG = ModelConfig(
    kind="encoder_decoder",
    layers=2,
    width=8,
    heads=2,
    position="learned",
    max_length=6,
    norm="rmsnorm",
)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, vocabulary=7, source_vocabulary=9)


def test_pure_gives_back_the_model(model):
    apply, params = pure(model)
    source, inputs = jnp.array([[4, 5]]), jnp.array([[1, 4, 5]])
    np.testing.assert_array_equal(apply(params, source, inputs), model(source, inputs))
    chex.assert_trees_all_equal(pure(model)[1], params)


def test_apply_uses_the_parameters_it_is_given_and_leaves_the_module_alone(model):
    apply, params = pure(model)
    before = jax.tree.map(np.array, params)
    source, inputs = jnp.array([[4, 5]]), jnp.array([[1, 4, 5]])
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert not apply(zeros, source, inputs).any()
    assert apply(params, source, inputs).any()
    chex.assert_trees_all_equal(pure(model)[1], before)


def test_params_are_a_nested_dict_of_arrays_by_attribute_name(model):
    _, params = pure(model)
    assert set(params) == {"embedding", "source_embedding", "encoder", "decoder"}
    assert params["decoder"]["blocks"]["cross_attention"]["key"]["kernel"].shape == (2, 8, 2, 4)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_foreign_parameters_are_refused_by_name(model):
    apply, params = pure(model)
    foreign = {**params, "head": params["embedding"]}
    del foreign["source_embedding"]
    with pytest.raises(ValueError, match=r"missing \['source_embedding.table'\]") as caught:
        apply(foreign, jnp.array([[4]]), jnp.array([[4]]))
    assert "not known ['head.table']" in str(caught.value)


def test_parameter_axes_name_every_axis_and_blocks_start_with_layers(model):
    _, params = pure(model)
    axes = parameter_axes(model)
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    flat = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert [path for path, _ in flat] == [path for path, _ in leaves]
    sizes = {"D": {8}, "N": {2}, "K": {2}, "H": {4}, "F": {32}, "V": {7, 9}, "T": {6}, "L": {2}}
    for (path, names), (_, leaf) in zip(flat, leaves, strict=True):
        assert len(names) == leaf.ndim, path
        assert (names[0] == "L") == ("blocks" in jax.tree_util.keystr(path)), path
        for name, size in zip(names, leaf.shape, strict=True):
            assert size in sizes[name], (path, names, leaf.shape)


def test_axes_of_an_abstract_model_are_those_of_the_real_one(model):
    shapes = abstract(CONFIG, vocabulary=7, source_vocabulary=9)
    assert parameter_axes(shapes) == parameter_axes(model)


def test_count_counts_arrays_and_shapes_alike(model):
    params = pure(model)[1]
    shapes = pure(abstract(CONFIG, vocabulary=7, source_vocabulary=9))[1]
    assert count(params) == count(shapes) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_seed_decides_the_parameters():
    draw = lambda seed: pure(build(CONFIG, vocabulary=7, seed=seed))[1]["embedding"]["table"]  # noqa: E731
    np.testing.assert_array_equal(draw(1), draw(1))
    assert np.abs(draw(1) - draw(2)).max() > 1e-3


class Normalised(nnx.Module):
    """Two BatchNorms, one of them nested, and a norm without statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = BatchNorm({"D": 3}, rngs=rngs)
        self.inner = Inner(rngs)
        self.last = LayerNorm({"D": 3}, rngs=rngs)

    def __call__(self, x, *, training=False):
        return self.last(self.inner(self.first(x, training=training), training=training))


class Inner(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = BatchNorm({"D": 3}, rngs=rngs, bias=False)

    def __call__(self, x, *, training=False):
        return self.norm(x * x, training=training)


@pytest.fixture(scope="module")
def normalised():
    return Normalised(nnx.Rngs(0))


X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (5, 3)), jnp.float32)


def test_parameters_hold_no_statistics_and_statistics_no_parameters(normalised):
    _, params = pure(normalised)
    running = statistics(normalised)
    names = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert names(running) == {
        "first.mean",
        "first.variance",
        "inner.norm.mean",
        "inner.norm.variance",
    }
    assert not names(params) & names(running)
    assert count(params) == 6 + 3 + 6
    chex.assert_trees_all_equal_structs(parameter_axes(normalised), axes_like(params))
    assert parameter_axes(normalised)["inner"]["norm"]["scale"] == ("D",)


def axes_like(params):
    return jax.tree.map(lambda leaf: ("D",) * leaf.ndim, params)


def test_a_module_without_batch_norm_has_no_statistics(model):
    assert statistics(model) == {}
    apply, params = pure(model)
    batch = jnp.array([[4, 5]]), jnp.array([[1, 4, 5]])
    expected = apply(params, *batch)
    np.testing.assert_array_equal(apply(params, *batch, statistics={}), expected)
    outputs, new = apply(params, *batch, statistics={}, training=True)
    np.testing.assert_array_equal(outputs, expected)
    assert new == {} and with_statistics(params, {}) == params


def test_training_gives_new_statistics_and_changes_nothing_else(normalised):
    apply, params = pure(normalised)
    running = statistics(normalised)
    before = jax.tree.map(np.array, running)
    step = jax.jit(lambda running: apply(params, X, statistics=running, training=True))
    y, new = step(running)
    np.testing.assert_allclose(new["first"]["mean"], 0.1 * X.mean(0), rtol=1e-5)
    assert np.abs(new["inner"]["norm"]["mean"] - before["inner"]["norm"]["mean"]).max() > 0.01
    chex.assert_trees_all_equal(running, before)
    chex.assert_trees_all_equal(statistics(normalised), before)
    chex.assert_trees_all_equal(step(running), (y, new))
    chex.assert_trees_all_equal_shapes_and_dtypes(running, new)


def test_evaluation_reads_the_statistics_apart_or_merged(normalised):
    apply, params = pure(normalised)
    _, new = apply(params, X, statistics=statistics(normalised), training=True)
    evaluated = apply(params, X, statistics=new)
    np.testing.assert_array_equal(apply(with_statistics(params, new), X), evaluated)
    assert np.abs(evaluated - apply(params, X, statistics=statistics(normalised))).max() > 1e-3


def test_missing_statistics_are_asked_for(normalised):
    apply, params = pure(normalised)
    with pytest.raises(ValueError, match=r"pass statistics=nn.statistics\(model\), or nn.with_st"):
        apply(params, X)
    with pytest.raises(ValueError, match=r"needs the old ones: pass statistics=nn.statistics"):
        apply(params, X, training=True)
    running = statistics(normalised)
    with pytest.raises(ValueError, match=r"not the statistics .* missing \['inner.norm.mean'"):
        apply(params, X, statistics={"first": running["first"]})
    with pytest.raises(ValueError, match=r"not the parameters .* not known \['first.mean'"):
        apply(with_statistics(params, running), X, statistics=running)


def test_gradients_are_of_the_parameters_alone(normalised):
    apply, params = pure(normalised)
    running = statistics(normalised)

    def loss(params):
        y, new = apply(params, X, statistics=running, training=True)
        return jnp.square(y).sum(), new

    gradient, new = jax.grad(loss, has_aux=True)(params)
    chex.assert_trees_all_equal_shapes(gradient, params)
    chex.assert_trees_all_equal_shapes(new, running)


def test_an_abstract_model_takes_parameters_and_statistics(normalised):
    shapes = nnx.eval_shape(lambda: Normalised(nnx.Rngs(0)))
    apply, abstract_params = pure(shapes)
    params, running = pure(normalised)[1], statistics(normalised)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract_params, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(statistics(shapes), running)
    np.testing.assert_array_equal(
        apply(params, X, statistics=running), pure(normalised)[0](params, X, statistics=running)
    )
    assert parameter_axes(shapes) == parameter_axes(normalised)
