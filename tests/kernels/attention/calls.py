"""Calls of attention, what comes of them, and how wrong that is: what the tests here share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer_kernels import Dropout, Mask
from jaxformer_kernels.attention.dropout import keep

FEATURES = (
    "causal",
    "window",
    "q_offset",
    "q_offset_per_row",
    "segments",
    "kv_range",
    "mask_array",
    "bias",
    "sinks",
    "softcap",
    "dropout",
    "grouped_heads",
)
SMALL = (2, 9, 13, 4, 2, 8, 6)  # B, T, S, N, K, H, Hv


def draw(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape)


def make_call(features, sizes=SMALL):
    """(differentiable operands, options) of a call with these features, operands in float64."""
    B, T, S, N, K, H, Hv = sizes
    keys = K if "grouped_heads" in features else N
    operands = {"q": draw(0, B, T, N, H), "k": draw(1, B, S, keys, H), "v": draw(2, B, S, keys, Hv)}
    if "bias" in features:
        operands["bias"] = draw(3, 1, N, T, S)
    if "sinks" in features:
        operands["sinks"] = draw(4, N)
    rng = np.random.RandomState(5)
    fields = {"causal": "causal" in features}
    if "window" in features:
        fields["window"] = (S // 3, S // 4)
    if "q_offset" in features:
        fields["q_offset"] = T // 3
    if "q_offset_per_row" in features:
        fields["q_offset"] = jnp.array([-T // 4, T // 2][:B])
    if "segments" in features:
        fields["q_segment_ids"] = jnp.asarray(np.sort(rng.randint(0, 3, (B, T))))
        fields["kv_segment_ids"] = jnp.asarray(np.sort(rng.randint(0, 4, (B, S))))
    if "kv_range" in features:
        fields["kv_start"] = jnp.array([S // 4, 0][:B])
        fields["kv_end"] = jnp.array([S, 2 * S // 3][:B])
    if "mask_array" in features:
        fields["array"] = jnp.asarray(rng.rand(B, 1, T, S) < 0.7)
    options = {"mask": Mask(**fields)}
    if "softcap" in features:
        options["softcap"] = 1.5
    if "dropout" in features:
        options["dropout"] = Dropout(0.3, jax.random.key(7))
    return operands, options


def outcome(run, operands, options):
    """Output, log-sum-exp and the gradients of a loss that uses both."""

    def loss(operands, options):
        out, lse = run(**operands, **options, return_lse=True)
        seen = jnp.where(lse == -jnp.inf, 0.0, lse)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        lse_weights = jnp.sin(jnp.arange(lse.size)).reshape(lse.shape)
        return jnp.sum(out * weights) + jnp.sum(seen * lse_weights), (out, lse)

    gradients, (out, lse) = jax.grad(loss, has_aux=True)(operands, options)
    return {"out": out, "lse": lse, **{f"d{name}": g for name, g in gradients.items()}}


def compiled(run, options):
    """`outcome` as a jitted function of the operands; mask and dropout key are arguments too."""
    softcap = options.get("softcap")
    arrays = {name: x for name, x in options.items() if name != "softcap"}

    @jax.jit
    def call(operands, arrays):
        return outcome(run, operands, {**arrays, "softcap": softcap})

    return lambda operands: call(operands, arrays)


def cast(operands, dtype):
    return {name: jnp.asarray(x, dtype) for name, x in operands.items()}


def shape_call(shape):
    operands = {
        "q": draw(0, shape.B, shape.T, shape.N, shape.H),
        "k": draw(1, shape.B, shape.S, shape.K, shape.H),
        "v": draw(2, shape.B, shape.S, shape.K, shape.H),
    }
    if shape.bias:
        operands["bias"] = draw(3, 1, shape.N, shape.T, shape.S)
    if shape.sinks:
        operands["sinks"] = draw(4, shape.N)
    offset = shape.S - shape.T if shape.causal else 0
    mask = Mask(causal=shape.causal, window=shape.window, q_offset=offset)
    options = {"mask": mask} if shape.softcap is None else {"mask": mask, "softcap": shape.softcap}
    return operands, options


def plain(q, k, v, *, mask, bias=None, sinks=None, softcap=None, dropout=None, return_lse=True):
    """Attention as one writes it first, every step in the dtype of the operands."""
    heads = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, heads, axis=2), jnp.repeat(v, heads, axis=2)
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    if softcap is not None:
        x = softcap * jnp.tanh(x / softcap)
    if bias is not None:
        x = x + bias
    visible = mask.as_array(*x.shape)
    sees = jnp.any(visible, axis=-1, keepdims=True)
    x = jnp.where(visible, x, jnp.where(sees, -jnp.inf, 0.0))
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, :, None, None], (*x.shape[:-1], 1))
        x = jnp.concatenate([x, sink], axis=-1)
    p = jnp.where(sees, jax.nn.softmax(x, axis=-1), 0.0)[..., : k.shape[1]]
    if dropout is not None:
        kept = keep(dropout.seed(), dropout.rate, *jnp.ix_(*map(jnp.arange, p.shape)))
        p = jnp.where(kept, p / (1 - dropout.rate), 0.0)
    lse = jnp.where(sees[..., 0], jax.nn.logsumexp(x, axis=-1), -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", p, v), lse


def errors(got, want):
    """The largest error of every result, where it should be finite."""
    return {
        name: np.abs(np.asarray(got[name], np.float32)[finite] - x[finite]).max(initial=0.0)
        for name, x in want.items()
        for finite in [np.isfinite(x)]
    }
