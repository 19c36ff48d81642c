"""LSTM layers: one product for the inputs of all steps, one fused product a step in the scan."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxformer.nn.dropout import dropout
from jaxformer.nn.linear import matmul, project
from jaxformer.nn.parameters import fan_in_normal, parameter


class LSTMState(NamedTuple):
    """What an LSTM carries from step to step, float32."""

    h: Float[Array, "*B D"]
    """The hidden state, which is also the output."""
    c: Float[Array, "*B D"]
    """The cell state."""


class LSTMLayer(nnx.Module):
    """The parameters of one LSTM layer (Hochreiter & Schmidhuber, 1997; Gers et al., 2000).

        i, f, g, o = split(x W + h U + b);  c = σ(f) c + σ(i) tanh(g);  h = σ(o) tanh(c)

    The gates stand in the order of PyTorch (input, forget, candidate, output), so that its weights
    are copied by a transpose; its two biases are one here, their sum. The forget gate's bias starts
    at 1 (Jozefowicz et al., 2015), other biases at 0, each gate's recurrent kernel orthogonal
    (Saxe et al., 2014). Axes: R reading directions, D input or hidden size, F = 4 x hidden size.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        directions: int = 1,
        rngs: nnx.Rngs,
        param_dtype: str = "float32",
        compute_dtype: str = "float32",
    ):
        self.width, self.directions, self.compute_dtype = width, directions, compute_dtype
        new = functools.partial(parameter, rngs=rngs, dtype=param_dtype)
        self.kernel = new(fan_in_normal(inputs), {"R": directions, "D": inputs, "F": 4 * width})
        self.recurrent_kernel = new(
            _orthogonal_gates, {"R": directions, "D": width, "F": 4 * width}
        )
        self.bias = new(_forget_one, {"R": directions, "F": 4 * width})

    def project(
        self, x: Float[Array, "S B D"], direction: int = 0, inputs: slice = slice(None)
    ) -> Float[Array, "S B F"]:
        """x W + b for all steps at once, float32; of W only the rows `inputs`."""
        gates = project(x, self.kernel[...][direction][inputs], self.compute_dtype)
        return gates + self.bias[...][direction].astype(jnp.float32)

    def fused_kernel(self, inputs: slice = slice(None)) -> Float[Array, "_ F"]:
        """W above U, of the forward direction: [x, h] times it is x W + h U in one product."""
        return jnp.concatenate([self.kernel[...][0][inputs], self.recurrent_kernel[...][0]])

    def __call__(
        self, x: Float[Array, "S B D"], real: Bool[Array, "S B"] | None = None
    ) -> tuple[Float[Array, "S B C"], LSTMState]:
        """The states after every step, of all directions side by side, and the last ones [R B D].

        Time stands first. Where `real` is False the state is carried on unchanged and the output is
        0, as from PyTorch's packed sequences.
        """
        outputs, finals = [], []
        for direction in range(self.directions):
            states, final = lstm(
                self.project(x, direction),
                self.recurrent_kernel[...][direction],
                real,
                reverse=direction == 1,
                compute_dtype=self.compute_dtype,
            )
            outputs.append(states)
            finals.append(final)
        final = jax.tree.map(lambda *leaves: jnp.stack(leaves), *finals)
        return jnp.concatenate(outputs, axis=-1), final


class LSTMStack(nnx.Module):
    """LSTM layers on top of each other, read from one end or from both (Graves et al., 2005).

    `width` is the hidden size of a direction: states have C = width, or 2 x width where
    bidirectional, the forward direction first. `dropout` is applied to the states between layers
    (Zaremba et al., 2014), not to the input or to the output.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        layers: int,
        bidirectional: bool,
        rngs: nnx.Rngs,
        dropout: float = 0.0,
        param_dtype: str = "float32",
        compute_dtype: str = "float32",
    ):
        directions = 2 if bidirectional else 1
        self.dropout = dropout
        # Names, not places: a checkpoint's nested dict has strings for keys.
        self.layers = nnx.Dict(
            {
                str(layer): LSTMLayer(
                    inputs if layer == 0 else directions * width,
                    width,
                    directions=directions,
                    rngs=rngs,
                    param_dtype=param_dtype,
                    compute_dtype=compute_dtype,
                )
                for layer in range(layers)
            }
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T C"], LSTMState]:
        """States of every token, and each layer's final (h, c) [layers, directions, B, width].

        Where `segment_ids` is 0 there is padding: its states are 0, and it changes no other. The
        final state of the forward direction is that of the last token, of the backward direction
        that of the first. All are float32. `key` turns dropout on.
        """
        real = None if segment_ids is None else segment_ids.T != 0
        keys = [None] * len(self.layers) if key is None else jax.random.split(key, len(self.layers))
        x = jnp.swapaxes(x, 0, 1)
        finals = []
        for number, (layer, layer_key) in enumerate(zip(self.layers.values(), keys, strict=True)):
            if number:
                x = dropout(x, self.dropout, layer_key, axes="T B D")
            x, final = layer(x, real)
            finals.append(final)
        return jnp.swapaxes(x, 0, 1), jax.tree.map(lambda *leaves: jnp.stack(leaves), *finals)


def lstm_cell(gates: Float[Array, "B F"], c: Float[Array, "B D"]) -> LSTMState:
    """The next state, from the gates before their non-linearities and the cell state."""
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c)


def lstm(
    gates: Float[Array, "S B F"],
    kernel: Float[Array, "D F"],
    real: Bool[Array, "S B"] | None = None,
    initial: LSTMState | None = None,
    *,
    reverse: bool = False,
    compute_dtype: str = "float32",
) -> tuple[Float[Array, "S B D"], LSTMState]:
    """The states of an LSTM whose inputs are projected already, and the last one.

    `initial` is 0 where not given; `reverse` reads from the last step to the first.
    """
    if initial is None:
        zeros = jnp.zeros((gates.shape[1], kernel.shape[0]), jnp.float32)
        initial = LSTMState(zeros, zeros)

    def step(state: LSTMState, item: Any) -> tuple[LSTMState, Array]:
        projected, real = item
        new = lstm_cell(projected + matmul(state.h, kernel, compute_dtype), state.c)
        if real is None:
            return new, new.h
        here = real[:, None]
        kept = LSTMState(jnp.where(here, new.h, state.h), jnp.where(here, new.c, state.c))
        return kept, jnp.where(here, new.h, 0)

    final, states = jax.lax.scan(step, initial, (gates, real), reverse=reverse)
    return states, final


def _orthogonal_gates(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    directions, width, _ = shape
    square = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, (directions, 4))
    gates = jax.vmap(jax.vmap(lambda key: square(key, (width, width), jnp.float32)))(keys)
    return jnp.moveaxis(gates, 1, 2).reshape(shape).astype(dtype)


def _forget_one(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    width = shape[1] // 4
    return jnp.zeros(shape, dtype).at[:, width : 2 * width].set(1)
