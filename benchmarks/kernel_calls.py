"""A call of each op: its operands, our implementations of it, and what they are compared with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import kernel_shapes
from jaxformer_kernels import Mask, attention, ctc_loss
from jaxformer_kernels.attention import api as attention_api
from jaxformer_kernels.attention.dropout import keep
from jaxformer_kernels.ctc import api as ctc_api
from jaxformer_kernels.decode_attention import api as decode_api
from jaxformer_kernels.linear_cross_entropy import api as projection_api

Arrays = dict[str, Any]
# (operands, whole numbers) -> results, all by name.
Function = Callable[[Arrays, Arrays], Arrays]

APIS: dict[str, Any] = {
    "attention": attention_api,
    "linear_cross_entropy": projection_api,
    "decode_attention": decode_api,
    "ctc_loss": ctc_api,
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: its name.
        shape: its sizes and options.
        operands: what gradients are of, in the dtype of the call.
        integers: labels, lengths, page tables.
        ours: name of an implementation -> the call by it.
        plain: the call as one writes it first, every step in the dtype of the operands.
        exact: the call as it is defined, to be given operands of a wider dtype.
        part: operands, results, gradients or cotangents -> those that depend on one another alone,
            where the whole would not fit a plain computation.
    """

    op: str
    shape: Any
    operands: Arrays
    integers: Arrays
    ours: Callable[[str | None], Function]
    plain: Function
    exact: Function
    part: Callable[[Arrays], Arrays] = lambda arrays: arrays


def make(op: str, shape, dtype: str, *, details: bool = False) -> Call:
    """A call with operands drawn at random.

    Args:
        op, shape: as in `kernel_shapes.SHAPES`.
        dtype: of the operands.
        details: also have the results that only some callers ask for: log-sum-exps, and the loss of
            each token in place of the mean.
    """
    operands, integers = kernel_shapes.operands(op, shape)
    return Call(
        op,
        shape,
        {name: jnp.asarray(x, dtype) for name, x in operands.items()},
        {name: jnp.asarray(x) for name, x in integers.items()},
        *functions(op, shape, details),
    )


def functions(op: str, shape, details: bool = False) -> tuple:
    """(ours, plain, exact) of a `Call`, and its `part` where it has one."""
    return _BUILDERS[op](shape, details)


def with_gradients(function: Function, operands, integers, cotangents) -> Arrays:
    """Results, and the gradients of all operands from the cotangents of the results."""
    results, pull = jax.vjp(lambda operands: function(operands, integers), operands)
    (gradients,) = pull(cotangents)
    return results | {f"d{name}": x for name, x in gradients.items()}


def cotangents(function: Function, operands, integers) -> Arrays:
    """Random cotangents of the results, in their dtypes."""
    results = jax.eval_shape(function, operands, integers)
    return {
        name: jnp.asarray(kernel_shapes.cotangent(i, results[name].shape), results[name].dtype)
        for i, name in enumerate(sorted(results))
    }


def _attention(shape, details):
    mask = Mask(
        causal=shape.causal,
        window=shape.window,
        q_offset=shape.S - shape.T if shape.causal else 0,
    )
    options = {"mask": mask, "softcap": shape.softcap}

    def results(out, lse):
        return {"out": out, "lse": lse} if details else {"out": out}

    def ours(implementation):
        def call(operands, integers):
            if details:
                return results(
                    *attention(
                        **operands, **options, return_lse=True, implementation=implementation
                    )
                )
            return results(attention(**operands, **options, implementation=implementation), None)

        return call

    def plain(operands, integers):
        return results(*plain_attention(**operands, **options))

    return ours, plain, ours("reference"), _one_group(shape)


def _one_group(shape):
    """Takes a key-value head with its query heads, of one row if no gradient sums over rows."""
    G = shape.N // shape.K
    rows = shape.B if shape.bias or shape.sinks else 1
    parts = {
        "q": (slice(rows), slice(None), slice(G)),
        "k": (slice(rows), slice(None), slice(1)),
        "bias": (slice(None), slice(G)),
        "sinks": (slice(G),),
    }
    parts |= {"out": parts["q"], "v": parts["k"], "lse": (slice(rows), slice(G))}

    def part(arrays):
        return {name: x[parts[name if name in parts else name[1:]]] for name, x in arrays.items()}

    return part


def plain_attention(q, k, v, *, mask, bias=None, sinks=None, softcap=None, dropout=None):
    """Attention as one writes it first, every step in the dtype of the operands."""
    heads = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, heads, axis=2), jnp.repeat(v, heads, axis=2)
    x = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    if softcap is not None:
        x = softcap * jnp.tanh(x / softcap)
    if bias is not None:
        x = x + bias
    x = jnp.where(mask.as_array(*x.shape), x, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, :, None, None], (*x.shape[:-1], 1))
        x = jnp.concatenate([x, sink], axis=-1)
    p = jax.nn.softmax(x, axis=-1)[..., : k.shape[1]]
    if dropout is not None:
        kept = keep(dropout.seed(), dropout.rate, *jnp.ix_(*map(jnp.arange, p.shape)))
        p = jnp.where(kept, p / (1 - dropout.rate), 0)
    return jnp.einsum("bnts,bsnh->btnh", p, v), jax.nn.logsumexp(x, axis=-1)


def _decode(shape, details):
    def results(out, lse):
        return {"out": out, "lse": lse} if details else {"out": out}

    def ours(implementation):
        def call(operands, integers):
            found = decode_api.decode_attention(
                **operands,
                **integers,
                window=shape.window,
                softcap=shape.softcap,
                return_lse=details,
                implementation=implementation,
            )
            return results(*found) if details else results(found, None)

        return call

    def plain(operands, integers):
        lengths = integers["lengths"]
        mask = Mask(causal=True, window=shape.window, q_offset=lengths - shape.T, kv_end=lengths)
        if "page_table" in integers:
            table = integers["page_table"]
            caches = {
                name: operands[name][table].reshape(len(table), -1, *operands[name].shape[2:])
                for name in ("k", "v")
            }
            operands = operands | caches
        return results(*plain_attention(**operands, mask=mask, softcap=shape.softcap))

    return ours, plain, ours("reference")


def _projection(shape, details):
    smoothing, z_loss, softcap = shape.label_smoothing, shape.z_loss, shape.softcap

    def results(loss, lse):
        return {"loss": loss, "lse": lse} if details else {"loss": loss}

    def ours(implementation):
        def call(operands, integers):
            tokens = operands["x"].shape[0]
            weights = None if details else jnp.full(tokens, 1 / tokens, jnp.float32)
            found = projection_api.linear_cross_entropy(
                **operands,
                **integers,
                softcap=softcap,
                label_smoothing=smoothing,
                z_loss=z_loss,
                weights=weights,
                transposed=shape.transposed,
                implementation=implementation,
            )
            return results(found.loss if details else found.objective, found.lse)

        return call

    def plain(operands, integers):
        x, w, labels = operands["x"], operands["w"], integers["labels"]
        logits = x @ (w.T if shape.transposed else w)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        seen = (1 - smoothing) * picked + smoothing * jnp.mean(logits, axis=-1)
        loss = lse - seen + z_loss * lse**2
        return results(loss if details else loss.mean(), lse)

    return ours, plain, ours("reference")


def _ctc(shape, details):
    def ours(implementation):
        def call(operands, integers):
            return {"loss": ctc_loss(**operands, **integers, implementation=implementation)}

        return call

    def plain(operands, integers):
        return {"loss": plain_ctc(operands["logits"], integers["labels"])}

    # The reference writes out every path, which only tiny calls allow.
    return ours, plain, plain


def plain_ctc(logits, labels):
    """CTC as one writes it first: one recursion in logarithms over blanks and labels, interleaved.

    Every row is used whole, and label 0 is the blank.
    """
    B, N = labels.shape
    nothing = jnp.asarray(-1e30, logits.dtype)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    states = jnp.zeros((B, 2 * N + 1), labels.dtype).at[:, 1::2].set(labels)
    scores = jnp.take_along_axis(log_p, states[:, None], axis=-1)
    before = jnp.pad(states, ((0, 0), (2, 0)))[:, :-2]
    may_skip = (states != 0) & (states != before)
    may_skip = may_skip & (jnp.arange(2 * N + 1) >= 2)

    def step(alpha, score):
        one, two = (
            jnp.pad(alpha, ((0, 0), (n, 0)), constant_values=nothing)[:, :-n] for n in (1, 2)
        )
        two = jnp.where(may_skip, two, nothing)
        return jnp.logaddexp(jnp.logaddexp(alpha, one), two) + score, None

    first = jnp.where(jnp.arange(2 * N + 1) < 2, scores[:, 0], nothing)
    alpha, _ = jax.lax.scan(step, first, jnp.moveaxis(scores[:, 1:], 1, 0))
    return -jnp.logaddexp(alpha[:, -1], alpha[:, -2])


_BUILDERS = {
    "attention": _attention,
    "linear_cross_entropy": _projection,
    "decode_attention": _decode,
    "ctc_loss": _ctc,
}
