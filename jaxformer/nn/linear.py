"""Linear maps over named axes, computed as one two-dimensional product."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxformer import sharding
from jaxformer.nn.parameters import fan_in_normal, parameter
from jaxformer.nn.precision import activation_dtype
from jaxformer_kernels import dispatch

# A step of decoding has a row a hypothesis: putting kernels side by side would take it longer than
# the products, which take little longer than to read the kernels.
_FEW_ROWS = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(
    x: Float[Array, "*rows inner"],
    w: Float[Array, "_ _"],
    dtype: str,
    transposed: bool = False,
    split: PartitionSpec | None = None,
) -> Float[Array, "*rows columns"]:
    """x @ w, or x @ w.T where `transposed`; operands in `dtype`, sums in float32, in both passes.

    The result has the dtype of x. Without a rule of its own the backward pass would multiply a
    float32 cotangent by a narrow operand, which no matrix unit does. `split` says how w is divided
    over the active mesh: each product gathers it over fsdp, and its gradient is divided likewise.
    """
    whole = _gathered(w, dtype, split)
    return _product(x, whole, dtype, contract=(x.ndim - 1, 1 if transposed else 0)).astype(x.dtype)


def _matmul_forward(x, w, dtype, transposed, split):
    # What the product read is what the backward pass reads: half the bytes of float32.
    narrow = _narrowed(x, dtype)
    whole = _gathered(w, dtype, split)
    y = _product(narrow, whole, dtype, contract=(x.ndim - 1, 1 if transposed else 0))
    # Not w as it was gathered: of all layers at once that would be all parameters on every device.
    return y.astype(x.dtype), (narrow, w, jnp.zeros((0,), x.dtype))


def _matmul_backward(dtype, transposed, split, saved, cotangent):
    x, w, like = saved
    cotangent = _narrowed(cotangent, dtype)
    whole = _gathered(w, dtype, split)
    dx = _product(cotangent, whole, dtype, contract=(x.ndim - 1, 0 if transposed else 1))
    left, right = (cotangent, x) if transposed else (x, cotangent)
    dw = _over_rows(left, right, dtype).astype(w.dtype)
    return dx.astype(like.dtype), dw if split is None else _placed(dw, split)


def _gathered(w: Array, dtype: str, split: PartitionSpec | None) -> Array:
    """w in the dtype of operands, whole but for what tensor divides."""
    if split is None:
        return w
    kept = PartitionSpec(*(None if axis == "fsdp" else axis for axis in split))
    # Narrow before it travels.
    return _placed(_placed(w.astype(dtype), split), kept)


_placed = jax.lax.with_sharding_constraint


def _narrowed(x: Array, dtype: str) -> Array:
    """x in the dtype of operands; on a CPU as an array of its own, for several products to read."""
    if x.dtype == dtype or dispatch.platform() != "cpu":
        return x.astype(dtype)
    return jax.lax.optimization_barrier(x.astype(dtype))


def _over_rows(left: Array, right: Array, dtype: str) -> Array:
    """left.T @ right, of all rows.

    A CPU multiplies faster with the narrower of the two on the left, the transpose of the result
    included (0.8 of the time at 2048 rows of 1536 and 384); and bfloat16 only where it need not
    sum over rows on both sides.
    """
    if dispatch.platform() != "cpu" or left.ndim > 2:
        rows = tuple(range(left.ndim - 1))
        return _product(left, right, dtype, contract=(rows, rows))
    if left.shape[1] > right.shape[1]:
        # Apart, lest XLA turn the operands again and not the result.
        return jax.lax.optimization_barrier(_over_rows(right, left, dtype)).T
    if dtype == "float32":
        return _product(left, right, dtype, contract=(0, 0))
    return _product(_turned(left), right, dtype, contract=(1, 0))


matmul.defvjp(_matmul_forward, _matmul_backward)


def project(
    x: Float[Array, "*B inner"], w: Float[Array, "inner columns"], dtype: str
) -> Float[Array, "*B columns"]:
    """x @ w over the last axis as one two-dimensional product: `matmul` of x in float32."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return matmul(rows, w, dtype).reshape(*x.shape[:-1], -1)


def _product(a: Array, b: Array, dtype: str, contract: tuple[Any, Any]) -> Array:
    of_a, of_b = (axes if isinstance(axes, tuple) else (axes,) for axes in contract)
    dimensions = ((of_a, of_b), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _turned(x: Array) -> Array:
    """x.T as an array of its own.

    XLA takes a plain transpose into the product, and a narrow product that contracts rows misses
    the CPU's matrix unit: 2.5 to 3 times slower. It does not see through a transpose in blocks.
    """
    rows, inner = x.shape
    block = math.gcd(rows, 64)
    blocks = x.reshape(rows // block, block, inner)
    return jnp.transpose(blocks, (2, 0, 1)).reshape(inner, rows)


class Linear(nnx.Module):
    """y = x W + b, from trailing axes `inputs` to trailing axes `outputs`.

    `Linear({"D": 256}, {"N": 4, "H": 64}, ...)` maps [..., 256] to [..., 4, 64]; its kernel is
    [D, N, H] and its bias [N, H]. Raises ValueError where an input and an output share a name.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        scale: float = 1.0,
        param_dtype: str = "float32",
        compute_dtype: str = "float32",
    ):
        if shared := inputs.keys() & outputs.keys():
            raise ValueError(f"axes {sorted(shared)} are inputs and outputs: name them apart")
        self.axes = (tuple(inputs), tuple(outputs))
        self.inputs = tuple(inputs.values())
        self.outputs = tuple(outputs.values())
        self.compute_dtype = compute_dtype
        initializer = fan_in_normal(math.prod(self.inputs), scale)
        self.kernel = parameter(initializer, inputs | outputs, rngs=rngs, dtype=param_dtype)
        self.bias = (
            parameter(jax.nn.initializers.zeros, outputs, rngs=rngs, dtype=param_dtype)
            if bias
            else None
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        rows, batch = self.rows(x)
        y = matmul(rows, self.matrix(), self.compute_dtype, False, self.split())
        return self.finish(y, batch)

    def rows(self, x: Float[Array, "..."]) -> tuple[Float[Array, "*rows inner"], tuple[int, ...]]:
        """x with its batch axes as one, in the dtype of activations, and the sizes of those.

        Where a mesh divides tokens, the batch axes stay: as one it could not divide them.
        """
        batch = x.shape[: x.ndim - len(self.inputs)]
        # One 2-D product: on CPU a batched product of the same sizes runs far slower.
        apart = batch if sharding.divides("context") else (-1,)
        rows = x.reshape(*apart, math.prod(self.inputs))
        return rows.astype(activation_dtype(self.compute_dtype)), batch

    def matrix(self) -> Float[Array, "inner columns"]:
        """The kernel, with its input axes as one and its output axes as one."""
        return self.kernel[...].reshape(math.prod(self.inputs), -1)

    def split(self) -> PartitionSpec | None:
        """How the active mesh, if there is one, divides `matrix`."""
        mesh = sharding.active()
        if mesh is None:
            return None
        inputs, outputs = self.axes
        spec = sharding.parameter_spec(inputs + outputs, self.inputs + self.outputs, mesh)
        # Axes that become one are divided by the first of them: heads, not what is in a head.
        return PartitionSpec(spec[0], spec[len(inputs)])

    def finish(
        self, y: Float[Array, "*rows columns"], batch: tuple[int, ...]
    ) -> Float[Array, "..."]:
        """A product of `rows` and `matrix`, with the bias and its axes."""
        if self.bias is not None:
            y = y + self.bias[...].reshape(-1).astype(y.dtype)
        letters = ("B", "T", *["_"] * len(batch))[: len(batch)] + self.axes[1]
        return sharding.constrain(y.reshape(*batch, *self.outputs), " ".join(letters))


def together(layers: Sequence[Linear], x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """What each of the layers makes of the same x.

    On a CPU as one product with their kernels side by side: three small ones keep its cores less
    busy than one large one. Elsewhere, and on a mesh, one by one: side by side, kernels that are
    spread over devices by heads would have to be gathered.
    """
    rows, batch = layers[0].rows(x)
    side_by_side = dispatch.platform() == "cpu" and sharding.active() is None
    if not side_by_side or len(layers) == 1 or rows.shape[0] <= _FEW_ROWS:
        return [layer(x) for layer in layers]
    kernels = [layer.matrix() for layer in layers]
    product = matmul(rows, jnp.concatenate(kernels, axis=1), layers[0].compute_dtype)
    parts = jnp.split(product, np.cumsum([w.shape[1] for w in kernels])[:-1].tolist(), axis=1)
    return [layer.finish(y, batch) for layer, y in zip(layers, parts, strict=True)]
