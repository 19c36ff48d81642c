"""The backward pass of a part of the keys: the parts' gradients add up to the whole's."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer_kernels.attention import part
from tests.kernels.attention.calls import cast, make_call

HALVES = slice(0, 6), slice(6, None)


def test_parts_add_up_to_the_whole(implementation):
    """With sinks in the whole's denominator, as no part knows them."""
    operands, options = make_call(("segments", "softcap", "sinks", "grouped_heads"))
    q, k, v, sinks = cast(operands, jnp.float32).values()
    mask, softcap = options["mask"], options["softcap"]

    @jax.jit
    def both(q, k, v, mask):
        """Gradients of the whole, and from its parts."""

        def attend(q, k, v):
            return implementation(q, k, v, sinks=sinks, mask=mask, softcap=softcap, return_lse=True)

        out, pull, lse = jax.vjp(attend, q, k, v, has_aux=True)
        weight = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        found = [
            part.gradients(
                q,
                k[:, keys],
                v[:, keys],
                out,
                lse,
                weight,
                mask=mask.cut((0, q.shape[1]), (keys.start, k[:, keys].shape[1])),
                softcap=softcap,
                scale=q.shape[3] ** -0.5,
                implementation=implementation.keywords["implementation"],
            )
            for keys in HALVES
        ]
        dqs, dks, dvs = zip(*found, strict=True)
        return pull(weight), (sum(dqs), *(jnp.concatenate(x, axis=1) for x in (dks, dvs)))

    want, got = both(q, k, v, mask)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
