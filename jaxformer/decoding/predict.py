"""To text from text or images: sources or prompts in, predictions out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxformer.config import Config
from jaxformer.data import Source, Tokenizers, source_batches
from jaxformer.data.tokenizers import PAD, SOS
from jaxformer.decoding.beam import Beams
from jaxformer.decoding.generate import (
    Apply,
    make_generate,
    make_joint_translate,
    make_transcribe,
    make_translate,
)
from jaxformer.decoding.sampling import Sampled
from jaxformer.errors import JaxformerError
from jaxformer.nn.parameters import Params


class PredictionError(JaxformerError):
    """A request that the model cannot serve; the message says what it can."""


@dataclass(frozen=True)
class Hypothesis:
    """One prediction: its text, its log-probability in nats, and the score it was ranked by."""

    text: str
    log_prob: float
    score: float


class Translator:
    """Predicts targets of sources, with the search that the configuration describes."""

    def __init__(self, apply: Apply, tokenizers: Tokenizers, config: Config, *, n_best: int = 1):
        if config.model.kind == "decoder":
            raise PredictionError("a language model has no sources: use `jaxformer generate`")
        if n_best < 1:
            raise PredictionError(f"--n-best {n_best} must be at least 1")
        if n_best > config.decode.beam:
            raise PredictionError(
                f"--n-best {n_best} needs a beam of at least {n_best}: add --beam {n_best}"
            )
        self.tokenizers = tokenizers
        self.config = config
        self.translate = _search(apply, config, n_best)

    def __call__(self, params: Params, sources: Sequence[Source]) -> list[list[Hypothesis]]:
        """The best hypotheses of each source, the best first, in the order of the sources."""
        batches = source_batches(
            sources, self.tokenizers, self.config.data, batch_size=self.config.eval.batch_size
        )
        found: list[list[Hypothesis]] = [[] for _ in sources]
        for batch in batches:
            beams = jax.device_get(
                self.translate(params, batch["source"], batch["source_segment_ids"])
            )
            for row, index in enumerate(batch["index"]):
                if index >= 0:
                    found[index] = [
                        Hypothesis(
                            self.tokenizers.target.decode(tokens[:length].tolist()),
                            float(log_prob),
                            float(score),
                        )
                        for tokens, length, log_prob, score in zip(
                            beams.tokens[row],
                            beams.lengths[row],
                            beams.log_probs[row],
                            beams.scores[row],
                            strict=True,
                        )
                        if np.isfinite(score)
                    ]
        return found


def _search(apply: Apply, config: Config, n_best: int) -> Callable[..., Beams]:
    """The search that fits the kind of model, with the options of the configuration."""
    decode = config.decode
    max_length = decode.max_length or config.data.max_target_length
    if config.model.kind == "ctc":
        if decode.min_length:
            raise PredictionError(
                f"decode.min_length={decode.min_length}: CTC knows no shortest output; leave it 0"
            )
        return make_transcribe(apply, max_length=max_length, beam=decode.beam, n_best=n_best)
    options: dict[str, Any] = dict(
        max_length=max_length,
        min_length=decode.min_length,
        beam=decode.beam,
        n_best=n_best,
        length_penalty=decode.length_penalty,
    )
    if config.model.kind == "hybrid":
        weight = config.model.ctc.weight if decode.ctc_weight is None else decode.ctc_weight
        return make_joint_translate(apply, ctc_weight=weight, **options)
    return make_translate(apply, **options)


class Generator:
    """Continues prompts with a language model.

    When the model's window is full, the text goes on from its last half window: what stood before
    is forgotten.
    """

    def __init__(self, apply: Apply, tokenizers: Tokenizers, config: Config, *, max_new: int):
        if config.model.kind != "decoder":
            raise PredictionError("a model of this kind has sources: use `jaxformer predict`")
        if max_new < 1:
            raise PredictionError(f"--max-new {max_new} must be at least 1")
        self.apply = apply
        self.tokenizers = tokenizers
        self.config = config
        self.max_new = max_new
        self.compiled: dict[int, Callable[..., Sampled]] = {}

    def __call__(self, params: Params, prompts: Sequence[str], *, seed: int = 0) -> list[str]:
        """Each prompt with its continuation. An empty prompt starts a document."""
        window = self.config.model.max_length
        texts = [[SOS, *self.tokenizers.target.encode(prompt)] for prompt in prompts]
        limits = [len(ids) + self.max_new for ids in texts]
        running = set(range(len(texts)))
        key = jax.random.key(seed)
        kept = min(max(len(ids) for ids in texts), window - 1)
        part = 0
        while running:
            new = min(self.max_new, window - kept)
            rows = [ids[-kept:] for ids in texts]
            start = np.array([kept - len(row) for row in rows], np.int32)
            padded = np.array([[PAD] * (kept - len(row)) + row for row in rows], np.int32)
            sampled = jax.device_get(
                self._generate(new)(params, padded, start, jax.random.fold_in(key, part))
            )
            for i in sorted(running):
                found = sampled.tokens[i, : sampled.lengths[i]].tolist()
                texts[i] = (texts[i] + found)[: limits[i]]
                if sampled.finished[i] or len(texts[i]) == limits[i]:
                    running.remove(i)
            kept, part = window // 2, part + 1
        return [self.tokenizers.target.decode(ids) for ids in texts]

    def _generate(self, new: int) -> Callable[..., Sampled]:
        if new not in self.compiled:
            decode = self.config.decode
            self.compiled[new] = make_generate(
                self.apply,
                max_length=new,
                temperature=decode.temperature,
                top_k=decode.top_k,
                top_p=decode.top_p,
                min_p=decode.min_p,
            )
        return self.compiled[new]
