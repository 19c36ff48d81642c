"""A scan over time whose matrices get their gradients after it, each as one product."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxformer.nn.linear import matmul

Multiply = Callable[[str, Array], Array]
"""multiply(name, x): x times the matrix of that name."""
Step = Callable[[Multiply, Any, Any, Any], tuple[Any, Any]]
"""step(multiply, constants, carry, x) -> (carry, y)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_products(
    step: Step, dtype: str, matrices: dict[str, Array], constants: Any, carry: Any, xs: Any
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step(multiply, constants, carry, x) -> (carry, y)` over xs.

    `multiply(name, x)` is x @ matrices[name], operands in `dtype`: [B, inner] by [inner, outer], or
    by a matrix for each row, [B, inner, outer]; where x is int[B], it is the rows x of the matrix.
    A step uses each name at most once, and closes over no traced arrays but what stands in
    `constants`.

    The gradient of a plain scan adds to each matrix's cotangent at every step, a product that is
    short in what it contracts and a pass over the whole matrix. Here the backward scan leaves those
    out; operands and cotangents of all steps are multiplied once when it has ended.
    """

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        return step(lambda name, value: _product(value, matrices[name], dtype), constants, carry, x)

    return jax.lax.scan(body, carry, xs)


def _forward(step: Step, dtype: str, matrices: dict, constants: Any, carry: Any, xs: Any) -> Any:
    shifts = _shifts(step, dtype, matrices, constants, carry, xs)

    def run(constants: Any, carry: Any, xs: Any, shifts: dict) -> tuple[Any, dict]:
        def body(carry: Any, item: Any) -> tuple[Any, Any]:
            x, shift = item
            used: dict[str, Array] = {}

            def multiply(name: str, value: Array) -> Array:
                used[name] = value
                return _tap(_product(value, matrices[name], dtype), shift[name])

            carry, y = step(multiply, constants, carry, x)
            return carry, (y, used)

        carry, (ys, used) = jax.lax.scan(body, carry, (xs, shifts))
        return (carry, ys), used

    result, pull, used = jax.vjp(run, constants, carry, xs, shifts, has_aux=True)
    return result, (pull, used, matrices)


def _backward(step: Step, dtype: str, saved: Any, cotangent: Any) -> Any:
    del step
    pull, used, matrices = saved
    constants, carry, xs, shifts = pull(cotangent)
    gradients = {
        name: _matrix_gradient(used[name], shifts[name], matrix, dtype)
        if name in used
        else jnp.zeros_like(matrix)
        for name, matrix in matrices.items()
    }
    return gradients, constants, carry, xs


scan_products.defvjp(_forward, _backward)


@jax.custom_vjp
def _tap(y: Array, shift: Array) -> Array:
    """y + shift for a shift of 0, which is not read: it is there for its cotangent."""
    del shift
    return y


_tap.defvjp(lambda y, shift: (y, None), lambda _, cotangent: (cotangent, cotangent))


def _shifts(step: Step, dtype: str, matrices: dict, constants: Any, carry: Any, xs: Any) -> dict:
    """Zeros in the shape of every product, of all steps."""
    shapes: dict[str, Any] = {}

    def record(carry: Any, x: Any) -> Any:
        def multiply(name: str, value: Array) -> Array:
            product = _product(value, matrices[name], dtype)
            shapes[name] = jax.ShapeDtypeStruct(product.shape, product.dtype)
            return product

        return step(multiply, constants, carry, x)

    jax.eval_shape(record, carry, jax.tree.map(lambda leaf: leaf[0], xs))
    steps = jax.tree.leaves(xs)[0].shape[0]
    return {name: jnp.zeros((steps, *shape.shape), shape.dtype) for name, shape in shapes.items()}


def _product(x: Array, matrix: Array, dtype: str) -> Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
        return matrix[x].astype(jnp.float32)
    if matrix.ndim == 2:
        return matmul(x, matrix, dtype)
    dimensions = (((1,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(
        x.astype(dtype), matrix.astype(dtype), dimensions, preferred_element_type=jnp.float32
    )


def _matrix_gradient(x: Array, cotangent: Array, matrix: Array, dtype: str) -> Array:
    """The sum over steps of what each step's product would add: x^T cotangent."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        rows = cotangent.reshape(-1, cotangent.shape[-1])
        zeros = jnp.zeros(matrix.shape, jnp.float32)
        return zeros.at[x.reshape(-1)].add(rows).astype(matrix.dtype)
    if matrix.ndim == 2:
        rows = x.reshape(-1, x.shape[-1])
        _, pull = jax.vjp(lambda matrix: matmul(rows, matrix, dtype), matrix)
        return pull(cotangent.reshape(-1, cotangent.shape[-1]))[0]
    dimensions = (((0,), (0,)), ((1,), (1,)))
    gradient = jax.lax.dot_general(
        x.astype(dtype),
        cotangent.astype(dtype),
        dimensions,
        preferred_element_type=jnp.float32,
    )
    return gradient.astype(matrix.dtype)
