"""Parameters with named axes, and the split of a module into a function and its parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]
"""Nested dict of arrays, keyed by attribute name."""


def parameter(
    initializer: Callable[..., jax.Array],
    axes: dict[str, int],
    *,
    rngs: nnx.Rngs,
    dtype: str = "float32",
) -> nnx.Param:
    """A parameter whose axes have names, such as `{"D": 256, "F": 1024}`.

    The names travel as metadata; sharding rules map them to mesh axes.
    """
    value = initializer(rngs.params(), tuple(axes.values()), jnp.dtype(dtype))
    return nnx.Param(value, axes=tuple(axes))


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Callable[..., jax.Array]:
    """Normal initialisation cut at two deviations, of variance scale**2 / fan_in."""
    # A normal cut at +-2 has deviation 0.8796: divide it out, so that the variance is as stated.
    deviation = scale / math.sqrt(fan_in) / 0.87962566103423978
    return jax.nn.initializers.truncated_normal(deviation)


def pure(model: nnx.Module) -> tuple[Callable[..., Any], Params]:
    """Splits a module into a pure function and its parameters.

    Returns `(apply, params)`: `apply(params, *inputs, method="__call__", **named_inputs)` calls the
    module's method with these parameters. `params` is a nested dict of arrays, or of shapes where
    the module was made under `jax.eval_shape`.
    """
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    names = jax.tree.structure(params)
    # Shapes alone stay in the closure: it must not keep the initial parameters alive.
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def apply(params: Params, *inputs: Any, method: str = "__call__", **named: Any) -> Any:
        if jax.tree.structure(params) != names:
            raise ValueError(f"these are not the parameters of this model: {_difference(params)}")
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        return getattr(nnx.merge(graph, filled), method)(*inputs, **named)

    def _difference(params: Params) -> str:
        wanted, given = _paths(nnx.to_pure_dict(state)), _paths(params)
        missing, extra = sorted(wanted - given), sorted(given - wanted)
        return f"missing {missing[:5]}, not known {extra[:5]}"

    return apply, params


def parameter_axes(model: nnx.Module) -> Params:
    """The axis names of every parameter, in the same nested dict as `pure` gives the arrays."""
    axes = nnx.to_pure_dict(nnx.state(model))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        node: Any = axes
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = param.get_metadata()["axes"]
    return axes


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _paths(params: Params) -> set[str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
