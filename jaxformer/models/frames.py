"""From a source, tokens or an image, to the frames that CTC reads."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.output import CTCFrames
from jaxformer.models.transformer import Transformer, make_embedding
from jaxformer.nn import BatchNorm, Convolution, dropout
from jaxformer.nn.linear import Linear, matmul
from jaxformer.nn.parameters import fan_in_normal, parameter
from jaxformer.nn.recurrent import LSTMStack

Source = Int[Array, "B S"] | Float[Array, "B S height"]
"""Tokens, or images in 0..1 of S columns of pixels."""


def frame_lengths(config: ModelConfig, lengths: np.ndarray, *, images: bool) -> np.ndarray:
    """How many frames sources of these lengths become."""
    return (lengths + 1) // 2 if images else lengths * config.ctc.upsample


class TokenFrames(nnx.Module):
    """Embeds tokens, each as often as it has frames; a learned vector tells the copies apart."""

    def __init__(self, config: ModelConfig, vocabulary: int, rngs: nnx.Rngs):
        self.copies = config.ctc.upsample
        self.embedding = make_embedding(config, vocabulary, rngs)
        self.copy = make_embedding(config, self.copies, rngs)

    def __call__(
        self, source: Int[Array, "B S"], real: Bool[Array, "B S"], *, training: bool
    ) -> Float[Array, "B F D"]:
        del real, training
        embedded = self.embedding(source)[:, :, None]
        frames = embedded + self.copy(jnp.arange(self.copies, dtype=jnp.int32))
        return frames.reshape(source.shape[0], -1, frames.shape[-1])

    def per_frame(self, of_columns: Int[Array, "B S"]) -> Int[Array, "B F"]:
        """What each frame has from its token."""
        return jnp.repeat(of_columns, self.copies, axis=1)

    def per_source(self, weights: Float[Array, "*B F"]) -> Float[Array, "*B S"]:
        """Attention to tokens, from that to their frames."""
        return weights.reshape(*weights.shape[:-1], -1, self.copies).sum(-1)


class ImageFrames(nnx.Module):
    """Convolutions, each with BatchNorm and ReLU, and a projection of the columns they leave.

    Each halves the height; the last also the width, so that there is a frame for every two columns.
    """

    def __init__(
        self,
        config: ModelConfig,
        height: int,
        rngs: nnx.Rngs,
        axis_name: str | tuple[str, ...] | None,
    ):
        self.height = height
        layers, inputs = {}, 1
        for number, outputs in enumerate(config.ctc.channels):
            last = number == len(config.ctc.channels) - 1
            layers[str(number)] = nnx.Dict(
                {
                    # BatchNorm subtracts the mean, and with it any bias.
                    "convolution": Convolution(
                        inputs,
                        outputs,
                        strides=(2 if last else 1, 2),
                        bias=False,
                        rngs=rngs,
                        param_dtype=config.param_dtype,
                        compute_dtype=config.compute_dtype,
                    ),
                    "norm": BatchNorm(
                        {"O": outputs},
                        rngs=rngs,
                        axis_name=axis_name,
                        param_dtype=config.param_dtype,
                    ),
                }
            )
            inputs, height = outputs, math.ceil(height / 2)
        # Names, not places: a checkpoint's nested dict has strings for keys.
        self.layers = nnx.Dict(layers)
        self.projection = Linear(
            {"P": height * inputs},
            {"D": config.width},
            bias=config.bias,
            rngs=rngs,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
        )

    def __call__(
        self, source: Float[Array, "B S height"], real: Bool[Array, "B S"], *, training: bool
    ) -> Float[Array, "B F D"]:
        if source.shape[-1] != self.height:
            raise ValueError(
                f"this model reads images {self.height} pixels high, not {source.shape[-1]}: "
                f"resize them, or build it with image_height={source.shape[-1]}"
            )
        x = source[..., None]
        for layer in self.layers.values():
            x = layer["convolution"](x, mask=real)
            real = real[:, :: layer["convolution"].strides[0]]
            x = jax.nn.relu(layer["norm"](x, mask=real[:, :, None], training=training))
        return self.projection(x.reshape(*x.shape[:2], -1))

    def per_frame(self, of_columns: Int[Array, "B S"]) -> Int[Array, "B F"]:
        """What each frame has from the column it lies around."""
        for layer in self.layers.values():
            of_columns = of_columns[:, :: layer["convolution"].strides[0]]
        return of_columns

    def per_source(self, weights: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        """Attention to frames: a frame of an image is of several columns, which share it."""
        return weights


class FrameEncoder(nnx.Module):
    """Reads tokens or images as frames, with a Transformer or an LSTM.

    A token becomes `config.ctc.upsample` frames: CTC needs at least as many frames as labels, and
    spellings are often shorter than what they spell. An image has a frame every two columns. A
    bidirectional LSTM has half the width for each direction. Raises ValueError where the width is
    odd.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        source_vocabulary: int | None,
        image_height: int | None,
        rngs: nnx.Rngs,
        axis_name: str | tuple[str, ...] | None = None,
    ):
        if image_height is not None:
            # There is no embedding to scale.
            config = dataclasses.replace(config, embedding_scale=False)
            self.front = ImageFrames(config, image_height, rngs, axis_name)
        else:
            assert source_vocabulary is not None
            self.front = TokenFrames(config, source_vocabulary, rngs)
        self.config = config
        layers = config.layers if config.encoder_layers is None else config.encoder_layers
        if config.ctc.encoder == "transformer":
            self.encoder = Transformer(config, layers=layers, causal=False, cross=False, rngs=rngs)
            return
        directions = 2 if config.recurrent.bidirectional else 1
        if config.width % directions:
            raise ValueError(
                f"a bidirectional encoder needs an even model.width, not {config.width}: change "
                "it, or set model.recurrent.bidirectional=False"
            )
        self.encoder = LSTMStack(
            config.width,
            config.width // directions,
            layers=layers,
            bidirectional=config.recurrent.bidirectional,
            rngs=rngs,
            dropout=config.dropout,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
        )

    def __call__(
        self,
        source: Source,
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        key: PRNGKeyArray | None = None,
        training: bool = False,
    ) -> tuple[Float[Array, "B F D"], Int[Array, "B F"]]:
        """Hidden states of the frames, and the segment that each frame is of, 0 for padding.

        `key` turns dropout on; `training` makes BatchNorm take the statistics of this batch.
        """
        if source_segment_ids is None:
            source_segment_ids = jnp.ones(source.shape[:2], jnp.int32)
        frames = self.front(source, source_segment_ids != 0, training=training)
        segment_ids = self.front.per_frame(source_segment_ids)
        if isinstance(self.encoder, Transformer):
            return self.encoder(frames, segment_ids=segment_ids, key=key), segment_ids
        return self._read_recurrently(frames, segment_ids, key), segment_ids

    def per_source(self, weights: Float[Array, "*B F"]) -> Float[Array, "*B _"]:
        """Attention to the frames as attention to the source's tokens; of images, as it is."""
        return self.front.per_source(weights)

    def _read_recurrently(
        self, frames: Array, segment_ids: Int[Array, "B F"], key: PRNGKeyArray | None
    ) -> Float[Array, "B F D"]:
        config = self.config
        first, inner, last = (None,) * 3 if key is None else jax.random.split(key, 3)
        if config.embedding_scale:
            frames = frames * math.sqrt(config.width)
        frames = dropout(frames, config.dropout, first)
        states, _ = self.encoder(frames, segment_ids=segment_ids, key=inner)
        return dropout(states, config.dropout, last)


class CTCHead(nnx.Module):
    """Scores of every label and of the blank, frame by frame."""

    def __init__(self, config: ModelConfig, vocabulary: int, rngs: nnx.Rngs):
        self.compute_dtype = config.compute_dtype
        self.kernel = parameter(
            fan_in_normal(config.width),
            {"D": config.width, "V": vocabulary},
            rngs=rngs,
            dtype=config.param_dtype,
        )
        zeros = jax.nn.initializers.zeros
        self.bias = parameter(zeros, {"V": vocabulary}, rngs=rngs, dtype=config.param_dtype)

    def __call__(self, x: Float[Array, "B F D"], segment_ids: Int[Array, "B F"]) -> CTCFrames:
        """The frames that CTC reads, logits in float32; those of segment 0 stand last."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        logits = matmul(rows, self.kernel[...], self.compute_dtype)
        logits = logits + self.bias[...].astype(jnp.float32)
        lengths = jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        return CTCFrames(logits.reshape(*x.shape[:-1], -1), lengths)
