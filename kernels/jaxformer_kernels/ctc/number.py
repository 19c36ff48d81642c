"""Probabilities too small for any float: a mantissa and an exponent apart.

A number is a pair of arrays (mantissa, exponent) and stands for mantissa * 2 ** exponent. The
mantissa is in [1, 2) and keeps all its bits; the exponent is a whole number held as a float, so
that zero is (0, -inf) and nothing overflows. Sums and products cost shifts and comparisons, where
logarithms would cost an exponential for every term and a logarithm for every sum.

Both arrays have the same dtype, float32 or float64.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax


def from_log(log):
    """The number whose natural logarithm is `log`, which is not above 0 and may be -inf."""
    log2 = log * math.log2(math.e)
    exponent = jnp.floor(log2)
    mantissa = jnp.exp2(jnp.where(exponent == -jnp.inf, -jnp.inf, log2 - exponent))
    # Past 2^24 log2 has no bits after the point, and neither may exp2 round up to 2.
    return jnp.minimum(mantissa, np.nextafter(log.dtype.type(2), log.dtype.type(0))), exponent


def to_log(number):
    """Its natural logarithm; -inf for zero."""
    mantissa, exponent = number
    # Halved, so that just below 1, where the exponent is -1, the two do not cancel.
    log = math.log(2) * (exponent + 1) + jnp.log(mantissa / 2)
    return jnp.where(mantissa == 0, -jnp.inf, log)


def add(*numbers):
    """Their sum, its mantissa below twice as many as they are: for `times` or `normal`."""
    top = functools.reduce(jnp.maximum, (exponent for _, exponent in numbers))
    floor = jnp.maximum(top, jnp.finfo(top.dtype).min)  # -inf has no difference to -inf
    total = sum(mantissa * power_of_two(exponent - floor) for mantissa, exponent in numbers)
    return total, top


def times(a, b):
    """Their product."""
    return normal((a[0] * b[0], a[1] + b[1]))


def normal(number):
    """The same number, its mantissa in [1, 2)."""
    mantissa, exponent = number
    whole, bits, bias = _layout(mantissa.dtype)
    raw = lax.bitcast_convert_type(mantissa, whole)
    shift = (raw >> bits) - bias
    raw = (raw & whole.type((1 << bits) - 1)) | whole.type(bias << bits)
    zero = mantissa == 0
    return (
        jnp.where(zero, 0.0, lax.bitcast_convert_type(raw, mantissa.dtype)),
        jnp.where(zero, -jnp.inf, exponent + shift.astype(exponent.dtype)),
    )


def power_of_two(exponent):
    """2 ** exponent as a float, for exponents not above 0; 0 where it is none that is normal."""
    whole, bits, bias = _layout(exponent.dtype)
    raw = (jnp.maximum(exponent, -bias) + bias).astype(whole)
    return lax.bitcast_convert_type(raw << bits, exponent.dtype)


def _layout(dtype):
    """(the integer type as wide as this float, bits of its mantissa, bias of its exponent)."""
    about = jnp.finfo(dtype)
    return np.dtype(f"int{about.bits}"), about.nmant, 1 - int(about.minexp)
