"""An encoder whose frames are read by connectionist temporal classification."""

from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.frames import CTCHead, FrameEncoder, Source
from jaxformer.models.output import CTCFrames


class EncoderCTC(nnx.Module):
    """Scores every label, and the blank, at every frame of the source (Graves et al., 2006).

    The labels are predicted independently of each other, given the source: there is no decoder, so
    the target side of a batch is an argument only because every model is given a batch's inputs,
    and is not read.
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
        self.encoder = FrameEncoder(
            config,
            source_vocabulary=source_vocabulary,
            image_height=image_height,
            rngs=rngs,
            axis_name=axis_name,
        )
        self.head = CTCHead(config, vocabulary, rngs)

    def __call__(
        self,
        source: Source,
        inputs: Int[Array, "B T"] | None = None,
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        training: bool = False,
    ) -> Float[Array, "B F V"]:
        """Logits of labels and blank (id 0) at every frame, float32.

        `key` turns dropout on; `training` makes BatchNorm take the statistics of this batch.
        """
        predictions = self.predictions(
            source, source_segment_ids=source_segment_ids, key=key, training=training
        )
        return predictions.logits

    def predictions(
        self,
        source: Source,
        inputs: Int[Array, "B T"] | None = None,
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        training: bool = False,
    ) -> CTCFrames:
        """The same logits, and how many frames of each row are real."""
        x, frame_segment_ids = self.encoder(
            source, source_segment_ids=source_segment_ids, key=key, training=training
        )
        return self.head(x, frame_segment_ids)

    def frames(
        self, source: Source, source_segment_ids: Int[Array, "B S"] | None = None
    ) -> tuple[Float[Array, "B F D"], Int[Array, "B F"]]:
        """Hidden states of the frames, and the segment that each is of, 0 for padding."""
        return self.encoder(source, source_segment_ids=source_segment_ids)
