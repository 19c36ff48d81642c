"""Parameters with named axes, and the split of a module into function and parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import ModelConfig
from jaxformer.models import abstract, build
from jaxformer.nn import count, parameter_axes, pure

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
