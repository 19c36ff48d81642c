"""Layers stacked along a leading axis L, scanned or unrolled from the same parameters."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxformer_kernels import dispatch

Carry = TypeVar("Carry")

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose every parameter has a leading axis L, initialised layer by layer."""
    keys = jax.random.split(rngs.params(), layers)
    stacked = jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)
    for _, param in nnx.to_flat_state(nnx.state(stacked)):
        param.set_metadata(axes=("L", *param.get_metadata()["axes"]))
    return stacked


def run_layers(
    layer: Callable[[Any, Carry, Any], Carry],
    stacked: nnx.Module,
    carry: Carry,
    per_layer: Any,
    *,
    scan: bool,
    remat: str = "none",
) -> Carry:
    """Applies `layer(module, carry, item)` for each layer in turn.

    `per_layer` is a pytree whose leaves have a leading axis L; `item` is its slice. Scanning keeps
    compile time flat in depth; unrolling is faster for small models. `remat` names what the
    backward pass may keep: see REMAT_POLICIES. With it, a CPU always scans.
    """
    # Outside a loop, XLA on a CPU sees through the barriers of `jax.checkpoint`: it finds what is
    # computed again to be what it had, and keeps that after all.
    scan = scan or (remat != "none" and dispatch.platform() == "cpu")
    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    if scan:
        carry, _ = jax.lax.scan(
            lambda carry, xs: (layer(xs[0], carry, xs[1]), None), carry, (stacked, per_layer)
        )
        return carry
    for module, item in unstack_layers((stacked, per_layer)):
        carry = layer(module, carry, item)
    return carry


def unstack_layers(tree: Any) -> list[Any]:
    """One tree a layer, of a tree whose leaves (modules too) have a leading axis L."""
    # Split, not index: the gradient of a split is one concatenation, that of an index is a
    # full-size array of zeros a layer.
    leaves, structure = jax.tree.flatten(tree)
    layers = leaves[0].shape[0]
    pieces = [
        [jnp.squeeze(piece, 0) for piece in jax.lax.split(leaf, [1] * layers, axis=0)]
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else list(leaf)
        for leaf in leaves
    ]
    return [structure.unflatten(parts) for parts in zip(*pieces, strict=True)]
