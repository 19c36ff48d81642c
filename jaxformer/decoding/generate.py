"""The searches applied to this library's models: one compiled function a model and setting."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.data import is_label
from jaxformer.data.tokenizers import EOS, PAD, SOS, UNK
from jaxformer.decoding.beam import Beams, beam_search
from jaxformer.decoding.ctc import (
    LanguageModel,
    ctc_beam_search,
    ctc_greedy,
    frame_log_probs,
)
from jaxformer.decoding.ctc_prefix import CTCPrefixScorer, joint_search
from jaxformer.decoding.sampling import Sampled, Step, greedy, sample
from jaxformer.decoding.scoring import sequence_log_probs
from jaxformer.models import model_inputs
from jaxformer.models.output import CTCFrames, LogitFactors
from jaxformer.nn import Cache
from jaxformer.nn.parameters import Params
from jaxformer_kernels import ctc_loss

Apply = Callable[..., Any]
FORBIDDEN = (PAD, SOS, UNK)
NO_LABELS = (SOS, EOS, UNK)


def make_translate(
    apply: Apply,
    *,
    max_length: int,
    beam: int = 1,
    n_best: int = 1,
    min_length: int = 0,
    length_penalty: float = 0.6,
) -> Callable[..., Beams]:
    """A compiled `translate(params, source, source_segment_ids) -> Beams` of an encoder-decoder.

    Beam search, or greedy search where `beam` is 1 and one hypothesis is wanted. `max_length`
    counts <eos>; the other options are those of `decoding.beam_search`.
    """

    @jax.jit
    def translate(params: Params, source: Array, source_segment_ids: Array) -> Beams:
        cache = apply(params, source, source_segment_ids, max_length, method="init_cache")
        step, cache = make_step(apply, params, cache)
        first = jnp.full((source.shape[0], 1), SOS, jnp.int32)
        logits, cache = step(first, cache)
        if beam == 1 and n_best == 1:
            found = greedy(
                step,
                cache,
                logits,
                max_length=max_length,
                min_length=min_length,
                eos_id=EOS,
                pad_id=PAD,
                forbidden=FORBIDDEN,
            )
            penalty = ((5 + found.lengths + found.finished) / 6) ** length_penalty
            return Beams(
                tokens=found.tokens[:, None],
                lengths=found.lengths[:, None],
                scores=(found.log_probs / penalty)[:, None],
                log_probs=found.log_probs[:, None],
                finished=found.finished[:, None],
            )
        return beam_search(
            step,
            cache,
            logits,
            beam=beam,
            n_best=n_best,
            min_length=min_length,
            length_penalty=length_penalty,
            max_length=max_length,
            eos_id=EOS,
            pad_id=PAD,
            forbidden=FORBIDDEN,
        )

    return translate


def make_transcribe(
    apply: Apply,
    *,
    max_length: int,
    beam: int = 1,
    n_best: int = 1,
    language_model: LanguageModel | None = None,
    language_model_weight: float = 1.0,
    length_bonus: float = 0.0,
) -> Callable[..., Beams]:
    """A compiled `transcribe(params, source, source_segment_ids) -> Beams` of an encoder with CTC.

    Prefix beam search, or the likeliest path where `beam` is 1, one hypothesis is wanted, and there
    is nothing to add to its score; what that has beyond `max_length` is cut off, and the hypothesis
    is then not finished. The options are those of
    `decoding.ctc_beam_search`. No <eos> is counted or returned.
    """
    plain = beam == 1 and n_best == 1 and language_model is None and length_bonus == 0

    @jax.jit
    def transcribe(params: Params, source: Array, source_segment_ids: Array) -> Beams:
        frames = apply(params, source, source_segment_ids=source_segment_ids, method="predictions")
        if plain:
            return _best_path(frames, max_length)
        return ctc_beam_search(
            frames.logits,
            frames.lengths,
            beam=beam,
            n_best=n_best,
            max_length=max_length,
            blank=PAD,
            forbidden=NO_LABELS,
            language_model=language_model,
            language_model_weight=language_model_weight,
            length_bonus=length_bonus,
            eos_id=EOS,
        )

    return transcribe


def make_joint_translate(
    apply: Apply,
    *,
    ctc_weight: float,
    max_length: int,
    beam: int = 1,
    n_best: int = 1,
    min_length: int = 0,
    length_penalty: float = 0.6,
) -> Callable[..., Beams]:
    """A compiled `translate(params, source, source_segment_ids) -> Beams` of a hybrid model.

    Beam search by `ctc_weight` times CTC's log-probability plus the rest times the decoder's
    (`decoding.joint_search`): that sum is what `log_probs` has. The other options are those of
    `make_translate`.
    """

    @jax.jit
    def translate(params: Params, source: Array, source_segment_ids: Array) -> Beams:
        cache, frames = apply(params, source, source_segment_ids, max_length, method="init_joint")
        step, cache = make_step(apply, params, cache)
        first = jnp.full((source.shape[0], 1), SOS, jnp.int32)
        logits, cache = step(first, cache)
        log_probs = frame_log_probs(frames.logits, frames.lengths, blank=PAD, forbidden=NO_LABELS)
        scorer = CTCPrefixScorer(log_probs, blank=PAD, eos_id=EOS)
        joint_step, joint_cache, gains = joint_search(step, cache, logits, scorer, ctc_weight)
        return beam_search(
            joint_step,
            joint_cache,
            gains,
            normalize=False,
            beam=beam,
            n_best=n_best,
            min_length=min_length,
            length_penalty=length_penalty,
            max_length=max_length,
            eos_id=EOS,
            pad_id=PAD,
            forbidden=FORBIDDEN,
        )

    return translate


def make_generate(
    apply: Apply,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Callable[..., Sampled]:
    """A compiled `generate(params, prompts, start, key) -> Sampled` of a decoder.

    `prompts` are padded on the left: row b's tokens begin at column `start[b]`. `max_length` counts
    the new tokens; the other options are those of `decoding.sample`.
    """

    @jax.jit
    def generate(params: Params, prompts: Array, start: Array, key: PRNGKeyArray) -> Sampled:
        length = prompts.shape[1] + max_length
        cache = apply(params, length, start, method="init_cache")
        logits, cache = apply(params, prompts, cache, last=True, method="extend")
        step, cache = make_step(apply, params, cache)
        return sample(
            step,
            cache,
            logits[:, -1],
            key=key,
            max_length=max_length,
            eos_id=EOS,
            pad_id=PAD,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            forbidden=FORBIDDEN,
        )

    return generate


def make_score(apply: Apply) -> Callable[..., Float[Array, " B"]]:
    """A compiled `score(params, batch)`: log-probability of each row's targets, in nats.

    The targets are given, not searched for (teacher forcing). All kinds of model: CTC's is of the
    labels without <eos>, by all their paths, -inf where they have none; a hybrid's is the weighted
    sum of CTC's and the decoder's that it was trained for.
    """

    @jax.jit
    def score(params: Params, batch: dict[str, Array]) -> Array:
        predictions = apply(params, **model_inputs(batch), method="predictions")
        return _log_probs(predictions, batch["targets"], batch["weights"])

    return score


def _log_probs(predictions: Any, targets: Array, weights: Array) -> Float[Array, " B"]:
    if isinstance(predictions, LogitFactors):
        return sequence_log_probs(predictions.logits(), targets, weights)
    if isinstance(predictions, CTCFrames):
        label_lengths = is_label(targets, weights).sum(1)
        return -ctc_loss(predictions.logits, predictions.lengths, targets, label_lengths, blank=PAD)
    by_ctc = _log_probs(predictions.frames, targets, weights)
    by_decoder = _log_probs(predictions.factors, targets, weights)
    return predictions.weight * by_ctc + (1 - predictions.weight) * by_decoder


def _best_path(frames: CTCFrames, max_length: int) -> Beams:
    found = ctc_greedy(frames.logits, frames.lengths, blank=PAD, forbidden=NO_LABELS)
    missing = max(max_length - found.tokens.shape[1], 0)
    tokens = jnp.pad(found.tokens, ((0, 0), (0, missing)), constant_values=PAD)[:, :max_length]
    lengths = jnp.minimum(found.lengths, max_length)
    # Of the labels, as everywhere: the path is one of many that give them.
    log_probs = -ctc_loss(frames.logits, frames.lengths, tokens, lengths, blank=PAD)
    return Beams(
        tokens=tokens[:, None],
        lengths=lengths[:, None],
        scores=log_probs[:, None],
        log_probs=log_probs[:, None],
        finished=(found.lengths <= max_length)[:, None],
    )


def make_step(apply: Apply, params: Params, cache: Any) -> tuple[Step, Any]:
    """The step that a search takes, and the cache to give it in place of this one.

    Call it where the search is traced, once for all of its steps.
    """
    options = {}
    # Out of a stack, a CPU copies each layer's weights and cache at every step, which takes longer
    # than the step's arithmetic. Unrolled once, before the loop, they are read where they lie. On
    # accelerators the stack stays: there the copy of the weights would cost memory that large
    # models do not leave.
    if isinstance(cache, Cache) and jax.default_backend() == "cpu":
        options["blocks"] = apply(params, method="unrolled")
        cache = cache.unrolled()

    def step(tokens: Int[Array, "B 1"], cache: Any) -> tuple[Float[Array, "B V"], Any]:
        logits, cache = apply(params, tokens, cache, method="extend", **options)
        return logits[:, -1], cache

    return step, cache
