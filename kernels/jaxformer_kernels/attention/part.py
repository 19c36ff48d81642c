"""The backward pass of attention to a part of the keys, as in ring attention.

Forward, partial results merge by their log-sum-exp. Backward, that merge needs no derivative of its
own: given a whole row's output and log-sum-exp, a part's probabilities exp(logit - lse) are those
of the whole, and so are the gradients that come of them, which add up over the parts.
"""

import jax
import jax.numpy as jnp

from jaxformer_kernels import dispatch
from jaxformer_kernels.attention.api import IMPLEMENTATIONS, ORDER
from jaxformer_kernels.attention.call import describe


def gradients(q, k, v, out, lse, out_gradient, *, mask, softcap, scale, implementation):
    """What a part of the keys adds to the gradients of attention to all of them.

    Args:
        q, k, v, mask, softcap, implementation: those of this part's `attention`; scale a float.
        out, out_gradient: [B, T, N, Hv], output of attention to all keys and its cotangent.
        lse: [B, N, T], its log-sum-exp; -inf where a query sees no key at all.

    Returns:
        dq, dk, dv in the dtype and shape of q, k and v.
    """
    call = describe(q, k, v, None, mask, None, softcap, None, True)
    chosen = dispatch.choose(
        "attention", IMPLEMENTATIONS, ORDER, implementation, call.features, call
    )
    arguments = (q, k, v, mask, out, lse, out_gradient, scale, softcap)
    if chosen.gradients is not None:
        return chosen.gradients(*arguments)
    return _derivative_of(chosen.run, *arguments)


def _derivative_of(run, q, k, v, mask, out, lse, out_gradient, scale, softcap):
    """The same from an implementation's own derivative, which runs its forward pass once more."""

    def part(q, k, v):
        return run(q, k, v, None, None, mask, None, scale, softcap)

    (part_out, part_lse), pull = jax.vjp(part, q, k, v)
    # The part's share in the whole's softmax; its cotangents are those of the merge.
    share = jnp.where(part_lse == -jnp.inf, 0.0, jnp.exp(part_lse - lse))
    wide = out_gradient.astype(lse.dtype)
    difference = part_out.astype(lse.dtype) - out.astype(lse.dtype)
    lse_gradient = share * jnp.swapaxes(jnp.sum(difference * wide, axis=-1), 1, 2)
    shared = jnp.swapaxes(share, 1, 2)[..., None] * wide
    return pull((shared.astype(part_out.dtype), lse_gradient))
