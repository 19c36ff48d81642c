"""Linear maps over named axes, computed as one two-dimensional product."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from jaxformer import sharding
from jaxformer.nn.parameters import fan_in_normal, parameter
from jaxformer.nn.precision import activation_dtype
from jaxformer_kernels import _compat, dispatch

# A step of decoding has a row a hypothesis: putting kernels side by side would take it longer than
# the products, which take little longer than to read the kernels.
_FEW_ROWS = 128


class Spread(NamedTuple):
    """How the devices that multiply together, inside `jax.shard_map`, have rows and kernel."""

    gathered: int | None
    """The axis of the kernel that fsdp divides, and the product needs whole."""
    summed: tuple[str, ...]
    """The axes of the mesh that divide the rows, but not the kernel."""


def matmul(
    x: Float[Array, "rows inner"],
    w: Float[Array, "_ _"],
    dtype: str,
    transposed: bool = False,
    spread: Spread | None = None,
) -> Float[Array, "rows columns"]:
    """x @ w, or x @ w.T where `transposed`; operands in `dtype`, sums in float32, in both passes.

    The result has the dtype of x. Without a rule of its own the backward pass would multiply a
    float32 cotangent by a narrow operand, which no matrix unit does; and what fsdp divides would
    not travel in `dtype`, and its gradient in w's own.
    """
    if spread is None:
        x, w = _compat.vary_alike(x, w)
    return _matmul(x, w, dtype, transposed, spread)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(x, w, dtype, transposed, spread):
    whole = _gathered(w, dtype, spread)
    return _product(x, whole, dtype, contract=(1, 1 if transposed else 0)).astype(x.dtype)


def _matmul_forward(x, w, dtype, transposed, spread):
    # What the product read is what the backward pass reads: half the bytes of float32.
    narrow = _narrowed(x, dtype)
    whole = _gathered(w, dtype, spread)
    y = _product(narrow, whole, dtype, contract=(1, 1 if transposed else 0)).astype(x.dtype)
    # Not w as it was gathered: of all layers at once that would be the model on every device.
    return y, (narrow, w, jnp.zeros((0,), x.dtype))


def _matmul_backward(dtype, transposed, spread, saved, cotangent):
    x, w, like = saved
    cotangent = _narrowed(cotangent, dtype)
    whole = _gathered(w, dtype, spread)
    dx = _product(cotangent, whole, dtype, contract=(1, 0 if transposed else 1))
    left, right = (cotangent, x) if transposed else (x, cotangent)
    dw = _scattered(_over_rows(left, right, dtype), spread)
    return dx.astype(like.dtype), dw.astype(w.dtype)


def _gathered(w: Array, dtype: str, spread: Spread | None) -> Array:
    if spread is None or spread.gathered is None:
        return w
    return jax.lax.all_gather(w.astype(dtype), "fsdp", axis=spread.gathered, tiled=True)


def _scattered(dw: Array, spread: Spread | None) -> Array:
    """The sum of all devices' gradients of w, and of that the part that is this device's."""
    if spread is None:
        return dw
    if spread.gathered is not None:
        dw = jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=spread.gathered, tiled=True)
    return jax.lax.psum(dw, spread.summed) if spread.summed else dw


def _narrowed(x: Array, dtype: str) -> Array:
    """x in the dtype of operands; on a CPU as an array of its own, for several products to read."""
    if x.dtype == dtype or dispatch.platform() != "cpu":
        return x.astype(dtype)
    return jax.lax.optimization_barrier(x.astype(dtype))


def _over_rows(left: Array, right: Array, dtype: str) -> Array:
    """left.T @ right.

    A CPU multiplies faster with the narrower of the two on the left, the transpose of the result
    included (0.8 of the time at 2048 rows of 1536 and 384); and bfloat16 only where it need not
    sum over rows on both sides.
    """
    if dispatch.platform() != "cpu":
        return _product(left, right, dtype, contract=(0, 0))
    if left.shape[1] > right.shape[1]:
        # Apart, lest XLA turn the operands again and not the result.
        return jax.lax.optimization_barrier(_over_rows(right, left, dtype)).T
    if dtype == "float32":
        return _product(left, right, dtype, contract=(0, 0))
    return _product(_turned(left), right, dtype, contract=(1, 0))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def project(
    x: Float[Array, "*B inner"], w: Float[Array, "inner columns"], dtype: str
) -> Float[Array, "*B columns"]:
    """x @ w over the last axis as one two-dimensional product: `matmul` of x in float32."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return matmul(rows, w, dtype).reshape(*x.shape[:-1], -1)


def _product(a: Array, b: Array, dtype: str, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
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
        return together((self,), x)[0]

    def rows(self, x: Float[Array, "..."]) -> tuple[Float[Array, "rows inner"], tuple[int, ...]]:
        """x with its batch axes as one, in the dtype of activations, and the sizes of those."""
        batch = x.shape[: x.ndim - len(self.inputs)]
        # One 2-D product: on CPU a batched product of the same sizes runs far slower.
        rows = x.reshape(-1, math.prod(x.shape[len(batch) :]))
        return rows.astype(activation_dtype(self.compute_dtype)), batch

    def matrix(self) -> Float[Array, "inner columns"]:
        """The kernel, with its input axes as one and its output axes as one."""
        return self.kernel[...].reshape(math.prod(self.inputs), -1)

    def finish(self, y: Float[Array, "... columns"], batch: tuple[int, ...]) -> Float[Array, "..."]:
        """A product of `rows` and `matrix`, with the bias and its axes."""
        if self.bias is not None:
            y = y + self.bias[...].reshape(-1).astype(y.dtype)
        return y.reshape(*batch, *self.outputs)


def together(layers: Sequence[Linear], x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """What each of the layers makes of the same x.

    On a CPU as one product with their kernels side by side: three small ones keep its cores less
    busy than one large one. Elsewhere one by one: side by side, kernels that are spread over
    devices by heads would have to be gathered.
    """
    if sharding.active() is not None:
        return _on_mesh(layers, x)
    rows, batch = layers[0].rows(x)
    if dispatch.platform() != "cpu" or len(layers) == 1 or rows.shape[0] <= _FEW_ROWS:
        products = [matmul(rows, layer.matrix(), layer.compute_dtype) for layer in layers]
    else:
        kernels = [layer.matrix() for layer in layers]
        product = matmul(rows, jnp.concatenate(kernels, axis=1), layers[0].compute_dtype)
        ends = np.cumsum([w.shape[1] for w in kernels])[:-1].tolist()
        products = jnp.split(product, ends, axis=1)
    return [layer.finish(y, batch) for layer, y in zip(layers, products, strict=True)]


def _on_mesh(layers: Sequence[Linear], x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """`together` on the active mesh, by hand: every device multiplies what it has of the rows.

    Kernels are gathered over fsdp, one layer at a time and in the dtype of operands, and their
    gradients scattered; over tensor they stay split (Shoeybi et al. 2019, arXiv:1909.08053), and of
    all layers' gradients of x there is one sum.
    """
    mesh = sharding.active()
    assert mesh is not None
    tensor, inputs = mesh.shape["tensor"], len(layers[0].inputs)
    batch = x.shape[: x.ndim - inputs]
    letters = ["B", "T", *["_"] * len(batch)][: len(batch)]
    rows = tuple(sharding.spec(" ".join(letters), batch, mesh))
    splits = [_split(layer, rows, mesh) for layer in layers]
    of_x = PartitionSpec(*rows, *_tensor_alone(splits[0][:inputs]))
    of_y = [PartitionSpec(*rows, *_tensor_alone(split[inputs:])) for split in splits]
    by_columns = any("tensor" in split[inputs:] for split in splits)

    def run(x: Array, kernels: list[Array]) -> list[Array]:
        flat = varied = layers[0].rows(x)[0]
        if by_columns:
            # Once for all layers: the transpose is the sum over tensor of their gradients.
            varied = jax.lax.pcast(flat, "tensor", to="varying")
        products = []
        for layer, split, w in zip(layers, splits, kernels, strict=True):
            spread = Spread(
                gathered=None if "fsdp" not in split else int("fsdp" in split[inputs:]),
                summed=tuple(axis for axis in sharding.axes_in(rows) if axis not in split),
            )
            factor = varied if "tensor" in split[inputs:] else flat
            matrix = w.reshape(math.prod(w.shape[:inputs]), -1)
            y = matmul(factor, matrix, layer.compute_dtype, False, spread)
            if "tensor" in split[:inputs]:
                y = jax.lax.psum(y, "tensor")
            parts = (tensor if axis == "tensor" else 1 for axis in split[inputs:])
            outputs = (n // part for n, part in zip(layer.outputs, parts, strict=True))
            products.append(y.reshape(*x.shape[: len(batch)], *outputs))
        return products

    in_specs = (of_x, [PartitionSpec(*split) for split in splits])
    kernels = [layer.kernel[...] for layer in layers]
    products = sharding.on_each_device(run, mesh, in_specs, of_y)(x, kernels)
    return [
        y if layer.bias is None else y + layer.bias[...].astype(y.dtype)
        for layer, y in zip(layers, products, strict=True)
    ]


def _split(layer: Linear, rows: Sequence[Any], mesh: AbstractMesh) -> tuple[str | None, ...]:
    """The mesh axis that divides each axis of the kernel; fsdp only where it divides rows too."""
    inputs, outputs = layer.axes
    sizes = layer.inputs + layer.outputs
    split = tuple(sharding.parameter_spec(inputs + outputs, sizes, mesh))
    # What becomes one axis of a matrix is gathered by the first.
    gathered = "fsdp" in sharding.axes_in(rows) and "fsdp" in (split[0], split[len(inputs)])
    return split if gathered else _tensor_alone(split)


def _tensor_alone(split: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(axis if axis == "tensor" else None for axis in split)
