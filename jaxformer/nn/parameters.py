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

    A module with BatchNorm has running statistics too (`statistics`). They go in beside the
    parameters, `apply(params, *inputs, statistics=statistics)`, or merged with them,
    `apply(with_statistics(params, statistics), *inputs)`, and are then what is normalised with.
    `apply(params, *inputs, statistics=statistics, training=True)` calls the method with
    `training=True` and returns `(outputs, new statistics)`; of a module without statistics it takes
    `{}` and returns `(outputs, {})`. Raises ValueError where the parameters or the statistics are
    not this module's, or statistics are missing.
    """
    graph, param_state, statistic_state = nnx.split(model, nnx.Param, nnx.BatchStat)
    # Shapes alone stay in the closure: it must not keep the initial parameters alive.
    shapes = [_shapes(param_state), _shapes(statistic_state)]
    params, empty_statistics = (nnx.to_pure_dict(state) for state in shapes)
    has_statistics = bool(empty_statistics)

    def apply(
        variables: Params,
        *inputs: Any,
        method: str = "__call__",
        statistics: Params | None = None,
        training: bool = False,
        **named: Any,
    ) -> Any:
        if training and statistics is None:
            raise ValueError(
                "training=True gives new running statistics and needs the old ones: pass "
                "statistics=nn.statistics(model)"
            )
        if statistics is None:
            given, given_statistics = _separate(variables, empty_statistics)
        else:
            given, given_statistics = variables, statistics
        _check(given, params, "parameters")
        if has_statistics and not given_statistics:
            raise ValueError(
                "this model normalises with running statistics: pass "
                "statistics=nn.statistics(model), or nn.with_statistics(params, statistics) in "
                "place of the parameters"
            )
        _check(given_statistics, empty_statistics, "statistics")
        module = nnx.merge(graph, *map(_filled, shapes, (given, given_statistics)))
        if training and has_statistics:
            named["training"] = True
        outputs = getattr(module, method)(*inputs, **named)
        if not training:
            return outputs
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return apply, nnx.to_pure_dict(param_state)


def statistics(model: nnx.Module) -> Params:
    """The running statistics of a module, in a nested dict as `pure` gives the parameters.

    Empty where the module has none; shapes where it was made under `jax.eval_shape`.
    """
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def with_statistics(params: Params, statistics: Params) -> Params:
    """Parameters and running statistics in one nested dict, which `apply` takes for evaluation."""
    merged = dict(params)
    for name, value in statistics.items():
        here = merged.get(name)
        merged[name] = with_statistics(here, value) if isinstance(here, dict) else value
    return merged


def parameter_axes(model: nnx.Module) -> Params:
    """The axis names of every parameter, in the same nested dict as `pure` gives the arrays."""
    state = nnx.state(model, nnx.Param)
    axes = nnx.to_pure_dict(state)
    for path, param in nnx.to_flat_state(state):
        node: Any = axes
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = param.get_metadata()["axes"]
    return axes


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _separate(variables: Params, statistics: Params) -> tuple[Params, Params]:
    """Parameters and running statistics of a merged dict; `statistics` names those to take out."""
    params, taken = dict(variables), {}
    for name, inner in statistics.items():
        if name not in params:
            continue
        if not isinstance(inner, dict):
            taken[name] = params.pop(name)
            continue
        rest, found = _separate(params.pop(name), inner)
        if rest:
            params[name] = rest
        if found:
            taken[name] = found
    return params, taken


def _check(given: Params, wanted: Params, what: str) -> None:
    if jax.tree.structure(given) != jax.tree.structure(wanted):
        names, found = _paths(wanted), _paths(given)
        missing, extra = sorted(names - found), sorted(found - names)
        raise ValueError(
            f"these are not the {what} of this model: missing {missing[:5]}, not known {extra[:5]}"
        )


def _shapes(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def _filled(shapes: Any, values: Params) -> Any:
    state = jax.tree.map(lambda leaf: leaf, shapes)
    nnx.replace_by_pure_dict(state, values)
    return state


def _paths(params: Params) -> set[str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
