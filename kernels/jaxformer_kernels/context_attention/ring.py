"""Ring attention: queries stay, keys and values travel (Liu et al. 2023, arXiv:2310.01889).

Each device attends to the keys it holds while the next ones are on their way; partial results are
merged by their log-sum-exp. The backward pass walks the ring again: the gradients of keys and
values travel one step behind them, and come home after the last. Nothing that came from another
device is kept, so memory is that of the local shards.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.attention import part as part_lib
from jaxformer_kernels.attention.api import attention
from jaxformer_kernels.attention.blocks import wide
from jaxformer_kernels.attention.mask import Mask
from jaxformer_kernels.context_attention import plan


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when a call is traced.

    Attributes:
        axis_name: the mesh axis that is the ring.
        order: "zigzag" or "contiguous".
        softcap, scale, implementation: as in `attention`.
        platform, interpreter: `dispatch`'s when the call was made; the rules of its derivative may
            be traced after that context has ended.
    """

    axis_name: str
    order: str
    softcap: float | None
    scale: float
    implementation: str | None
    platform: str
    interpreter: Any

    @property
    def attention(self) -> dict:
        """What every part's attention is told."""
        return {
            "softcap": self.softcap,
            "scale": self.scale,
            "implementation": self.implementation,
        }

    @contextlib.contextmanager
    def as_called(self):
        """Choose and run implementations as where the call was made."""
        with dispatch.compiling_for(self.platform), dispatch.interpreting(self.interpreter):
            yield


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(options: Options, q, k, v, sinks, mask):
    """Attention of the local queries to the keys of the whole ring: [B, T/C, N, Hv], q's dtype."""
    return _forward(options, q, k, v, sinks, mask)[0]


def _forward(options, q, k, v, sinks, mask):
    B, T, N = q.shape[:3]

    def work(parts, state, travelling):
        k, v, kv_ids = travelling
        for part in parts:
            found = attention(
                _cut(q, part.t),
                _cut(k, part.s),
                _cut(v, part.s),
                mask=_mask(mask, kv_ids, part),
                return_lse=True,
                **options.attention,
            )
            here = _cut(state[0], part.t), _cut(state[1], part.t, axis=2)
            out, lse = _merge(*here, *found)
            state = _put(state[0], out, part.t), _put(state[1], lse, part.t, axis=2)
        return state

    def visit(step, choice, state, travelling):
        return _choose(step, choice, work, state, travelling)

    nothing = (
        jnp.zeros((B, T, N, v.shape[3]), wide(q.dtype)),
        jnp.full((B, N, T), -jnp.inf, wide(q.dtype)),
    )
    nothing = _compat.vary(nothing, _compat.varying_axes(q))
    with options.as_called():
        walk = _stretches(options, mask, q, k)
        out, lse = _walk(options, walk, visit, nothing, (k, v, mask.kv_segment_ids))
    if sinks is not None:
        # One more part, the value of which is 0: rows that saw nothing still have output 0.
        sink = jnp.broadcast_to(sinks.astype(lse.dtype)[:, None], lse.shape)
        out, lse = _merge(out, lse, jnp.zeros_like(out), sink)
    out = out.astype(q.dtype)
    return out, (q, k, v, sinks, mask, out, lse)


def _backward(options, residuals, out_gradient):
    q, k, v, sinks, mask, out, lse = residuals

    def work(parts, dq, travelling):
        k, v, kv_ids = travelling
        dk, dv = _zeros(k, v)
        for part in parts:
            dq_part, dk_part, dv_part = part_lib.gradients(
                _cut(q, part.t),
                _cut(k, part.s),
                _cut(v, part.s),
                _cut(out, part.t),
                _cut(lse, part.t, axis=2),
                _cut(out_gradient, part.t),
                mask=_mask(mask, kv_ids, part),
                **options.attention,
            )
            dq = _put(dq, _cut(dq, part.t) + dq_part, part.t)
            dk = _put(dk, _cut(dk, part.s) + dk_part, part.s)
            dv = _put(dv, _cut(dv, part.s) + dv_part, part.s)
        return dq, (dk, dv)

    def visit(step, choice, state, travelling):
        dq, behind = state
        # What the devices before have found follows the keys while these do their own part.
        behind = _send(behind, options.axis_name, step.came)
        dq, found = _choose(step, choice, work, dq, travelling)
        return dq, jax.tree.map(jnp.add, behind, found)

    with options.as_called():
        walk = _stretches(options, mask, q, k)
        (dq,) = _zeros(q)
        state = dq, _zeros(k, v)
        dq, away = _walk(options, walk, visit, state, (k, v, mask.kv_segment_ids))
    gone = sum(step.came * len(choices) for step, choices in walk)
    dk, dv = _send(away, options.axis_name, -gone)
    gradients = (x.astype(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v)))
    return (*gradients, _sink_gradient(sinks, out, lse, out_gradient), None)


attend.defvjp(_forward, _backward)


def _sink_gradient(sinks, out, lse, out_gradient):
    """[N]: a sink is a key whose value is 0."""
    if sinks is None:
        return None
    probability = jnp.exp(sinks.astype(lse.dtype)[:, None] - lse)
    delta = jnp.sum(out.astype(lse.dtype) * out_gradient.astype(lse.dtype), axis=-1)
    return -jnp.einsum("bnt,btn->n", probability, delta, precision="highest").astype(sinks.dtype)


def _stretches(options, mask, q, k):
    C = lax.axis_size(options.axis_name)
    return plan.stretches(mask.causal, mask.window, options.order, C, q.shape[1], k.shape[1])


def _walk(options, stretches, visit, state, travelling):
    """Go round the ring.

    Args:
        options: axis_name is used.
        stretches: the plan.
        visit: (step, choice, state, travelling) -> state, at each step.
        state: what stays.
        travelling: what goes on to the next device after each step.

    Returns:
        The state after the last step.
    """
    device = lax.axis_index(options.axis_name)
    for step, choices in stretches:

        def one(carry, choice, step=step):
            state, travelling = carry
            # Sent before the visit, which has no need of what comes.
            coming = _send(travelling, options.axis_name, step.goes)
            return (visit(step, choice, state, travelling), coming), None

        mine = jnp.asarray(choices)[:, device]
        if len(choices) == 1:
            (state, travelling), _ = one((state, travelling), mine[0])
        else:
            (state, travelling), _ = lax.scan(one, (state, travelling), mine)
    return state


def _choose(step, choice, work, *operands):
    """`work(parts, *operands)` with the parts that are this device's in this step."""
    branches = [functools.partial(work, parts) for parts in step.alternatives]
    if len(branches) == 1:
        return branches[0](*operands)
    return lax.switch(choice, branches, *operands)


def _send(tree, axis_name, places):
    """Every device's `tree` to the device so many places on."""
    C = lax.axis_size(axis_name)
    if places % C == 0:
        return tree
    pairs = [(device, (device + places) % C) for device in range(C)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, pairs), tree)


def _mask(mask, kv_ids, part):
    """The mask of one part: position where it counts, and segments."""
    position = {}
    if part.offset is not None:
        position = {"causal": mask.causal, "window": mask.window, "q_offset": part.offset}
    whole = Mask(**position, q_segment_ids=mask.q_segment_ids, kv_segment_ids=kv_ids)
    return whole.cut(part.t, part.s)


def _merge(out, lse, part_out, part_lse):
    """Attention to the keys of both partial results: outputs [B, T, N, Hv], lse [B, N, T]."""
    top = jnp.maximum(lse, part_lse)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight, part_weight = jnp.exp(lse - top), jnp.exp(part_lse - top)
    total = weight + part_weight
    share, part_share = (
        jnp.swapaxes(x / jnp.where(total == 0, 1.0, total), 1, 2)[..., None]
        for x in (weight, part_weight)
    )
    return out * share + part_out * part_share, top + jnp.log(total)


def _zeros(*arrays):
    """Of every array's shape, in the dtype to accumulate in."""
    return tuple(
        _compat.vary(jnp.zeros(x.shape, wide(x.dtype)), _compat.varying_axes(x)) for x in arrays
    )


def _cut(x, span, axis=1):
    start, size = span
    return x if size == x.shape[axis] else lax.slice_in_dim(x, start, start + size, axis=axis)


def _put(x, block, span, axis=1):
    """`x` with `block` in the place that `_cut` took it from."""
    start, size = span
    if size == x.shape[axis]:
        return block
    return lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, axis=axis)
