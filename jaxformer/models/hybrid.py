"""One encoder, read by CTC and by a decoder with attention."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.frames import CTCHead, FrameEncoder, Source
from jaxformer.models.output import CTCFrames, HybridPredictions, Output
from jaxformer.models.source_decoder import SourceDecoder
from jaxformer.models.transformer import Transformer, make_embedding
from jaxformer.nn import Cache


class Hybrid(SourceDecoder):
    """Predicts a target by attention and by CTC over the same frames (Watanabe et al., 2017).

    CTC's alignment is monotone, attention's is not: the one steadies the other's.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocabulary: int,
        source_vocabulary: int | None,
        image_height: int | None = None,
        rngs: nnx.Rngs,
        axis_name: str | tuple[str, ...] | None = None,
    ):
        self.config = config
        self.embedding = make_embedding(config, vocabulary, rngs)
        self.encoder = FrameEncoder(
            config,
            source_vocabulary=source_vocabulary,
            image_height=image_height,
            rngs=rngs,
            axis_name=axis_name,
        )
        self.head = CTCHead(config, vocabulary, rngs)
        self.decoder = Transformer(config, layers=config.layers, causal=True, cross=True, rngs=rngs)
        self.output = Output(config, vocabulary, rngs)

    def __call__(
        self,
        source: Source,
        inputs: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        training: bool = False,
    ) -> Float[Array, "B T V"]:
        """The decoder's logits of the next target token at every place, float32.

        `key` turns dropout on; `training` makes BatchNorm take the statistics of this batch.
        """
        predictions = self.predictions(
            source,
            inputs,
            source_segment_ids=source_segment_ids,
            segment_ids=segment_ids,
            key=key,
            training=training,
        )
        return predictions.factors.logits()

    def predictions(
        self,
        source: Source,
        inputs: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        training: bool = False,
    ) -> HybridPredictions:
        """The same logits, not multiplied out; the frames for CTC; and how the two are weighed."""
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        x, frame_segment_ids = self.encoder(
            source, source_segment_ids=source_segment_ids, key=encoder_key, training=training
        )
        return HybridPredictions(
            frames=self.head(x, frame_segment_ids),
            factors=self._decode(inputs, x, frame_segment_ids, segment_ids, decoder_key),
            weight=self.config.ctc.weight,
        )

    def encode(
        self,
        source: Source,
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B F D"]:
        """Hidden states of the frames."""
        return self.encoder(source, source_segment_ids=source_segment_ids, key=key)[0]

    def frames(
        self, source: Source, source_segment_ids: Int[Array, "B S"] | None = None
    ) -> tuple[Float[Array, "B F D"], Int[Array, "B F"]]:
        """Hidden states of the frames, and the segment that each is of, 0 for padding."""
        return self.encoder(source, source_segment_ids=source_segment_ids)

    def cross_attention_weights(
        self,
        source: Source,
        inputs: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "L B T N _"]:
        """How much each target place attends to each source token, by layer and head.

        That to a token is the sum of that to its frames. Of an image it is that to each frame.
        """
        weights = super().cross_attention_weights(
            source, inputs, source_segment_ids=source_segment_ids
        )
        return self.encoder.per_source(weights)

    def init_joint(
        self, source: Source, source_segment_ids: Int[Array, "B S"], length: int
    ) -> tuple[Cache, CTCFrames]:
        """`init_cache`, and the frames that CTC reads, from encoding the source once."""
        x, frame_segment_ids = self.frames(source, source_segment_ids)
        return self._new_cache(x, frame_segment_ids, length), self.head(x, frame_segment_ids)

    def _memory(
        self, source: Source, source_segment_ids: Int[Array, "B S"] | None
    ) -> tuple[Float[Array, "B F D"], Int[Array, "B F"]]:
        return self.frames(source, source_segment_ids)
