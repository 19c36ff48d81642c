"""From text to text: sources or prompts in, predictions out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxformer.config import Config
from jaxformer.data import Tokenizers, source_batches
from jaxformer.data.tokenizers import PAD, SOS
from jaxformer.decoding.generate import Apply, make_generate, make_translate
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
        if config.model.kind != "encoder_decoder":
            raise PredictionError("a language model has no sources: use `jaxformer generate`")
        if n_best > config.decode.beam:
            raise PredictionError(
                f"--n-best {n_best} needs a beam of at least {n_best}: add --beam {n_best}"
            )
        self.tokenizers = tokenizers
        self.config = config
        self.translate = make_translate(
            apply,
            max_length=config.decode.max_length or config.data.max_target_length,
            beam=config.decode.beam,
            n_best=n_best,
            length_penalty=config.decode.length_penalty,
        )

    def __call__(self, params: Params, sources: Sequence[str]) -> list[list[Hypothesis]]:
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


class Generator:
    """Continues prompts with a language model.

    A text longer than the model takes goes on from its last half: what stood before is forgotten.
    """

    def __init__(self, apply: Apply, tokenizers: Tokenizers, config: Config, *, max_new: int):
        if config.model.kind != "decoder":
            raise PredictionError("an encoder-decoder has sources: use `jaxformer predict`")
        if max_new < 1:
            raise PredictionError(f"--max-new {max_new} must be at least 1")
        self.apply = apply
        self.tokenizers = tokenizers
        self.config = config
        self.max_new = max_new

    def __call__(self, params: Params, prompts: Sequence[str], *, seed: int = 0) -> list[str]:
        """One continuation a prompt, without the prompt. An empty prompt starts a document."""
        limit = self.config.model.max_length
        texts = [[SOS, *self.tokenizers.target.encode(prompt)] for prompt in prompts]
        lengths = [len(ids) for ids in texts]
        running = list(range(len(texts)))
        key = jax.random.key(seed)
        if max(lengths) + self.max_new <= limit:
            kept, new = max(lengths), self.max_new
        else:
            kept = limit // 2
            new = limit - kept
        parts = math.ceil(self.max_new / new)
        decode = self.config.decode
        generate = make_generate(
            self.apply,
            max_length=new,
            temperature=decode.temperature,
            top_k=decode.top_k,
            top_p=decode.top_p,
            min_p=decode.min_p,
        )
        for part in range(parts):
            rows = [ids[-kept:] for ids in texts]
            start = np.array([kept - len(row) for row in rows], np.int32)
            padded = np.array([[PAD] * (kept - len(row)) + row for row in rows], np.int32)
            sampled = jax.device_get(generate(params, padded, start, jax.random.fold_in(key, part)))
            for i in list(running):
                texts[i] = texts[i] + sampled.tokens[i, : sampled.lengths[i]].tolist()
                if sampled.finished[i]:
                    running.remove(i)
            if not running:
                break
        return [
            self.tokenizers.target.decode(ids[length : length + self.max_new])
            for ids, length in zip(texts, lengths, strict=True)
        ]
