"""How far each implementation in bfloat16 is from float32, beside the plain bfloat16 computation.

`python -m benchmarks.accuracy` writes results/accuracy.json, of which `benchmarks.aot.table` makes
the last columns of its tables. Calls of real models, scaled down, because kernels run in their
interpreter; the Mosaic GPU one needs jax >= 0.11.2 and NPROC=16 (`make kernel-table` sees to both).
The error of a result is its largest absolute difference from what the reference computes in float32
from the same bfloat16 operands.
"""

import argparse
import datetime
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import records
from jaxformer_kernels import Mask, attention, interpreting
from jaxformer_kernels.attention import api as attention_api
from jaxformer_kernels.attention.shapes import SHAPES as ATTENTION
from jaxformer_kernels.decode_attention import api as decode_api
from jaxformer_kernels.decode_attention.shapes import SHAPES as DECODE
from jaxformer_kernels.linear_cross_entropy import api as projection_api
from jaxformer_kernels.linear_cross_entropy.shapes import SHAPES as PROJECTION

RESULTS = Path(__file__).resolve().parent / "results" / "accuracy.json"
LENGTH, HEADS, HEAD_DIM = 200, 2, 64
TOKENS, WIDTH, VOCABULARY = 96, 128, 515

# (name of the implementation or None for the plain computation, operands) -> results by name.
Run = Callable[[str | None, dict], dict]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("--only", default="", help="measurements with this in their name")
    parser.add_argument("--output", type=Path, help=f"else {RESULTS.name}, for a whole run")
    options = parser.parse_args()
    if int(os.environ.get("NPROC", "0")) < 8:
        parser.error("set NPROC=16: with few threads the Mosaic GPU interpreter hangs")
    measured = []
    for op, shapes, implementations, run, operands in calls():
        for implementation in implementations:
            name = f"{op} {shapes[0]} {implementation}"
            if implementation == "reference" or options.only not in name:
                continue
            try:
                results = errors(run, implementation, operands)
            except NotImplementedError as refusal:
                print(f"{name}: {str(refusal)[:60]} ...", flush=True)
                continue
            measured.append(
                {"op": op, "shapes": shapes, "implementation": implementation, "results": results}
            )
            found = ", ".join(f"{key} {e:.1e} ({p:.1e})" for key, (e, p) in results.items())
            print(f"{name}: {found}", flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "jax": version("jax"),
        "lengths": {"positions": LENGTH, "head_dim": HEAD_DIM, "tokens": TOKENS},
        "errors": measured,
    }
    output = options.output or (None if options.only else RESULTS)
    if output:
        records.write(output, record, rows="errors")


def errors(run: Run, implementation: str, operands: dict) -> dict[str, tuple[float, float]]:
    """Result -> (error of the implementation, error of the plain computation)."""
    wide = {name: x.astype(jnp.float32) if _floating(x) else x for name, x in operands.items()}
    with interpreting():
        got = jax.jit(run, static_argnums=0)(implementation, operands)
    want = jax.jit(run, static_argnums=0)("reference", wide)
    plain = jax.jit(run, static_argnums=0)(None, operands)
    return {
        name: (_error(x, want[name]), _error(plain[name], want[name])) for name, x in got.items()
    }


def _floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _error(x, want):
    largest = np.abs(np.asarray(x, np.float32) - np.asarray(want, np.float32)).max()
    return float(f"{largest:.3g}")


def normal(seed, *shape):
    """Standard normal numbers that bfloat16 holds."""
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.bfloat16)


def calls() -> Iterator[tuple[str, list[str], list[str], Run, dict]]:
    """(op, names of the shapes it stands for, implementations, the call, its operands)."""
    for shape, names in distinct(ATTENTION, length=LENGTH, heads=HEADS, head_dim=HEAD_DIM).items():
        yield "attention", names, list(attention_api.IMPLEMENTATIONS), *_attention(shape)
    for shape, names in distinct(DECODE, length=LENGTH, groups=HEADS, head_dim=HEAD_DIM).items():
        if shape.page_size is None:
            yield "decode_attention", names, list(decode_api.IMPLEMENTATIONS), *_decode(shape)
    for shape, names in distinct(PROJECTION, tokens=TOKENS, D=WIDTH, V=VOCABULARY).items():
        implementations = list(projection_api.IMPLEMENTATIONS)
        yield "linear_cross_entropy", names, implementations, *_projection(shape)


def distinct(shapes, **sizes) -> dict:
    """The shapes in small, and the names of those that are then the same."""
    found = {}
    for name, shape in shapes.items():
        found.setdefault(shape.scaled(**sizes), []).append(name)
    return found


def with_gradients(function: Callable[[dict], dict], operands: dict) -> dict:
    """Results, and the gradients of all operands for cotangents drawn at random."""
    results, pull = jax.vjp(function, operands)
    cotangents = {
        name: normal(9 + i, *x.shape).astype(x.dtype)
        for i, (name, x) in enumerate(sorted(results.items()))
    }
    (gradients,) = pull(cotangents)
    return results | {f"d{name}": x for name, x in gradients.items()}


def _attention(shape):
    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H
    operands = {"q": normal(0, B, T, N, H), "k": normal(1, B, S, K, H), "v": normal(2, B, S, K, H)}
    if shape.bias:
        operands["bias"] = normal(3, 1, N, T, S)
    if shape.sinks:
        operands["sinks"] = normal(4, N)
    mask = Mask(causal=shape.causal, window=shape.window, q_offset=S - T if shape.causal else 0)
    options = {"mask": mask, "softcap": shape.softcap}

    def run(implementation, operands):
        def call(operands):
            if implementation is None:
                out, lse = plain_attention(**operands, **options)
            else:
                out, lse = attention(
                    **operands, **options, return_lse=True, implementation=implementation
                )
            return {"out": out, "lse": lse}

        return with_gradients(call, operands)

    return run, operands


def plain_attention(q, k, v, *, mask, bias=None, sinks=None, softcap=None):
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
    return jnp.einsum("bnts,bsnh->btnh", p, v), jax.nn.logsumexp(x, axis=-1)


def _decode(shape):
    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H
    operands = {"q": normal(0, B, T, N, H), "k": normal(1, B, S, K, H), "v": normal(2, B, S, K, H)}
    if shape.sinks:
        operands["sinks"] = normal(4, N)
    operands["lengths"] = jnp.linspace(S // 3, S, B).astype(jnp.int32)

    def run(implementation, operands):
        if implementation is not None:
            out, lse = decode_api.decode_attention(
                **operands,
                window=shape.window,
                softcap=shape.softcap,
                return_lse=True,
                implementation=implementation,
            )
            return {"out": out, "lse": lse}
        lengths = operands["lengths"]
        mask = Mask(causal=True, window=shape.window, q_offset=lengths - T, kv_end=lengths)
        rest = {name: x for name, x in operands.items() if name != "lengths"}
        out, lse = plain_attention(**rest, mask=mask, softcap=shape.softcap)
        return {"out": out, "lse": lse}

    return run, operands


def _projection(shape):
    operands = {
        "x": normal(0, shape.tokens, shape.D),
        "w": normal(1, *((shape.V, shape.D) if shape.transposed else (shape.D, shape.V)))
        * shape.D**-0.5,
    }
    labels = jnp.asarray(np.random.RandomState(2).randint(0, shape.V, shape.tokens))
    smoothing, z_loss, softcap = shape.label_smoothing, shape.z_loss, shape.softcap

    def plain(x, w):
        logits = x @ (w.T if shape.transposed else w)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        seen = (1 - smoothing) * picked + smoothing * jnp.mean(logits, axis=-1)
        return {"loss": lse - seen + z_loss * lse**2, "lse": lse}

    def run(implementation, operands):
        def call(operands):
            if implementation is None:
                return plain(**operands)
            found = projection_api.linear_cross_entropy(
                **operands,
                labels=labels,
                softcap=softcap,
                label_smoothing=smoothing,
                z_loss=z_loss,
                transposed=shape.transposed,
                implementation=implementation,
            )
            return {"loss": found.loss, "lse": found.lse}

        # The TPU kernel serves calls that nobody differentiates.
        differentiable = implementation != "mosaic_tpu"
        return with_gradients(call, operands) if differentiable else call(operands)

    return run, operands


if __name__ == "__main__":
    main()
