"""Probabilities too small for any float: a mantissa and an exponent apart.

A number is a pair of arrays (mantissa, exponent) and stands for mantissa * 2 ** exponent. The
mantissa keeps all its bits; the exponent is a whole number held as a float, so that zero is
(0, -inf) and nothing overflows. Sums and products cost shifts and comparisons, where logarithms
would cost an exponential for every term and a logarithm for every sum.

A mantissa is 0 or at least 1, and grows with what is done to it: `total` starts it anew, below
twice as many as it adds. Both arrays have the same dtype, float32 or float64.
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
    return jnp.exp2(jnp.where(exponent == -jnp.inf, -jnp.inf, log2 - exponent)), exponent


def to_log(number):
    """Its natural logarithm; -inf for zero."""
    mantissa, exponent = number
    shift = _shift(mantissa) + 1
    # Just below 1, where exponent and shift cancel, the mantissa alone has the bits that count.
    log = math.log(2) * (exponent + shift) + jnp.log(mantissa * power_of_two(-shift))
    return jnp.where(mantissa == 0, -jnp.inf, log)


def total(*numbers):
    """Their sum."""
    top = functools.reduce(jnp.maximum, (e + _shift(m) for m, e in numbers))
    floor = jnp.maximum(top, jnp.finfo(top.dtype).min)  # -inf has no difference to -inf
    return sum(m * power_of_two(e - floor) for m, e in numbers), top


def product(a, b):
    """Their product."""
    return a[0] * b[0], a[1] + b[1]


def power_of_two(exponent):
    """2 ** exponent as a float, for exponents not above 127; 0 where that is not normal."""
    whole, bits, bias = _layout(exponent.dtype)
    raw = (jnp.maximum(exponent, -bias) + bias).astype(whole)
    return lax.bitcast_convert_type(raw << bits, exponent.dtype)


def _shift(mantissa):
    """The whole part of the logarithm to base 2, as a float; of 0, something finite."""
    whole, bits, bias = _layout(mantissa.dtype)
    raw = lax.bitcast_convert_type(mantissa, whole)
    return ((raw >> bits) - bias).astype(mantissa.dtype)


def _layout(dtype):
    """(the integer type as wide as this float, bits of its mantissa, bias of its exponent)."""
    about = jnp.finfo(dtype)
    return np.dtype(f"int{about.bits}"), about.nmant, 1 - int(about.minexp)
