"""Attention on a mesh: every device attends with its own rows, heads and tokens.

The kernels know one device. On a mesh they run inside `jax.shard_map`, on the part of every operand
that a device has, so that nothing gathers them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from jaxformer import sharding
from jaxformer_kernels import Dropout, Mask, attention, context_attention

_AXES = {
    "q": "B T N H",
    "k": "B S K H",
    "v": "B S K H",
    "bias": "B N T S",
    "q_segment_ids": "B T",
    "kv_segment_ids": "B S",
    "array": "B N T S",
    "q_offset": "B",
    "kv_start": "B",
    "kv_end": "B",
}
"""The axes of every operand; one that has fewer lacks the first of them."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K _"],
    *,
    mask: Mask,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    dropout: Dropout | None = None,
    **options: Any,
) -> Float[Array, "B T N _"]:
    """`jaxformer_kernels.attention`, on whatever mesh is active.

    Rows are divided over the data and fsdp axes where those divide them, heads over tensor, and
    tokens over context, by `jaxformer_kernels.context_attention` and the method of
    `sharding.context_by`. Tokens that are read causally are then in the order of
    `jaxformer_kernels.zigzag`, all others in their own. Every device draws dropout for itself: the
    draw depends on the mesh. Raises ValueError where tensor does not divide the heads, context does
    not divide the tokens, or context meets a bias or dropout.
    """
    by_hand = sharding.manual_axes()
    mesh = sharding.active()
    if mesh is None:
        dropout = _own(dropout, by_hand)
        return _on_device("context" in by_hand, q, k, v, mask, bias, dropout, options)
    free = sharding.free_axes(mesh)
    if "tensor" in free:
        k, v = _heads_for(mesh.shape["tensor"], q, k, v)
    in_parts = "context" in (*free, *by_hand)
    if "context" in free and _decodes(mask):
        # A step has few tokens: they, and the cache, are whole on every device.
        in_parts = False
    elif "context" in free:
        _check_lengths(mesh.shape["context"], q.shape[1], k.shape[1])
    arrays, rebuild = _arrays({"q": q, "k": k, "v": v, "mask": mask, "bias": bias})
    splits = {name: _split(name, x, mesh, in_parts) for name, x in arrays.items()}
    drawn_apart = (*by_hand, *sharding.axes_in(splits["q"]))

    def run(arrays: dict[str, Array], dropout: Dropout | None) -> Array:
        given = rebuild(arrays)
        return _on_device(
            in_parts,
            given["q"],
            given["k"],
            given["v"],
            given["mask"],
            given["bias"],
            _own(dropout, drawn_apart),
            options,
        )

    in_specs = (splits, PartitionSpec())
    return sharding.on_each_device(run, mesh, in_specs, splits["q"])(arrays, dropout)


def _on_device(
    in_parts: bool,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    bias: Array | None,
    dropout: Dropout | None,
    options: dict[str, Any],
) -> Array:
    """Attention of what this device has; `in_parts`: of the tokens it has a part."""
    if not in_parts:
        return attention(q, k, v, mask=mask, bias=bias, dropout=dropout, **options)
    if bias is not None:
        raise ValueError(
            "mesh.context divides the tokens, and a bias is of every pair of them: set "
            "model.position to 'rotary' in place of 'alibi' or 'relative', or mesh.context to 1"
        )
    if dropout is not None:
        raise ValueError(
            "mesh.context divides the tokens, and dropout of attention weights is not divided "
            "so: set model.attention_dropout to 0, or mesh.context to 1"
        )
    return context_attention(
        q,
        k,
        v,
        axis_name="context",
        mask=mask,
        method=sharding.context_method(),
        order="zigzag" if mask.causal else "contiguous",
        **options,
    )


def _own(dropout: Dropout | None, axes: Sequence[str]) -> Dropout | None:
    """Dropout with a key of this device's own among those along these axes of the mesh."""
    if dropout is None or not axes:
        return dropout
    index = sharding.device_index([axis for axis in sharding.AXES if axis in axes])
    return Dropout(dropout.rate, jax.random.fold_in(dropout.key, index))


def _heads_for(devices: int, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values with as many heads as there are devices, where they had fewer."""
    N, K = q.shape[2], k.shape[2]
    if N % devices or (K % devices and devices % K):
        raise ValueError(
            f"mesh.tensor={devices} does not divide {N} query heads and {K} key-value heads: set "
            "mesh.tensor to a divisor of both (or to a multiple of the key-value heads that "
            "divides the query heads), or model.heads and model.kv_heads to multiples of it"
        )
    if K % devices == 0:
        return k, v
    return jnp.repeat(k, devices // K, axis=2), jnp.repeat(v, devices // K, axis=2)


def _decodes(mask: Mask) -> bool:
    """Whether this is attention to a cache."""
    return not {"kv_range", "q_offset", "traced_q_offset"}.isdisjoint(mask.features)


def _check_lengths(context: int, T: int, S: int) -> None:
    if T % context or S % context:
        raise ValueError(
            f"mesh.context={context} does not divide {T} queries and {S} keys: pad the sequences "
            "to a multiple of it, or set mesh.context to a divisor of their lengths"
        )


def _arrays(operands: Any) -> tuple[dict[str, Array], Callable[[dict[str, Array]], Any]]:
    """The arrays among the operands by name, and what puts others in their places again."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(operands)
    names = [jax.tree_util.keystr(path[-1:], simple=True) for path, _ in leaves]
    # Plain numbers stay what they are: as arrays they would be unknown to the kernel's schedule.
    arrays = {
        name: leaf for name, (_, leaf) in zip(names, leaves, strict=True) if hasattr(leaf, "ndim")
    }

    def rebuild(given: dict[str, Array]) -> Any:
        return structure.unflatten(
            [given.get(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
        )

    return arrays, rebuild


def _split(name: str, x: Array, mesh: AbstractMesh, in_parts: bool) -> PartitionSpec:
    letters = _AXES[name].split()[-x.ndim :] if x.ndim else []
    entries = sharding.spec(" ".join(letters), x.shape, mesh)
    kept = (letter not in "TS" or in_parts for letter in letters)
    return PartitionSpec(
        *(entry if keep else None for entry, keep in zip(entries, kept, strict=True))
    )
