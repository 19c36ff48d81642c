"""JAX's own attention by cuDNN, for the calls of which it is certain that it does them right.

It goes through `jax.nn.dot_product_attention(implementation="cudnn")`, whose lse has the dtype of
the operands and whose hidden keys get a large negative number (a query that sees nothing then sees
everything): so no lse, and no mask but causal ones in which every query sees itself. The backward
pass is bitwise reproducible only with `XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true`.
"""

import jax
import jax.numpy as jnp

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.attention.call import Call

_FEATURES = frozenset({"causal", "window", "grouped_heads"})
# JAX lets 256 pass where the process's own device is a Hopper or newer; nothing here has tried it.
_WIDEST_HEAD = 128


def cudnn(q, k, v, bias, sinks, mask, dropout, scale, softcap):
    """Attention by cuDNN; the arguments are those of `reference`, and lse is None."""
    assert bias is None and sinks is None and dropout is None and softcap is None
    left, right = mask.bounds
    # The last key ends a window anyway; cuDNN refuses a longer one than there are keys.
    window = None if left is None or left >= k.shape[1] - 1 else (left, 0)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=right == 0,
        local_window_size=window,
        implementation="cudnn",
    )
    return out, None


def limits(call: Call) -> list[str]:
    """What is wrong with the call's shapes, dtype or device, in words."""
    wrong = []
    if dispatch.platform() != "gpu":
        wrong.append(f"the {dispatch.platform()} platform (it is for NVIDIA GPUs)")
    elif _compat.cudnn_version() is None:
        wrong.append("a machine without cuDNN (install jax[cuda13])")
    if call.dtype not in (jnp.float16, jnp.bfloat16):
        wrong.append(f"{call.dtype} (it does float16 and bfloat16)")
    if call.H > _WIDEST_HEAD or call.H % 8:
        wrong.append(f"head dim {call.H} (a multiple of 8 up to {_WIDEST_HEAD})")
    if call.T % 2 or call.S % 2:  # JAX lets them pass forward, and refuses them when differentiated
        wrong.append(f"an odd length, {call.T} queries and {call.S} keys")
    left, right = call.bounds
    if (left, right) != (None, None):
        if right != 0:
            wrong.append("a window that is not causal")
        if call.T != call.S:
            wrong.append(f"a causal mask on {call.T} queries and {call.S} keys")
    return wrong


IMPLEMENTATION = dispatch.Implementation(run=cudnn, supports=_FEATURES, limits=limits)
