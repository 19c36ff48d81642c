"""Scores of a model on a split: losses under teacher forcing, error rates of what is decoded."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxformer.config import Config
from jaxformer.data import Batch, Data, Example, PairData, TextData, evaluation_batches
from jaxformer.data.tokenizers import Tokenizers
from jaxformer.decoding.predict import Hypothesis, Translator
from jaxformer.metrics import bits_per_byte, perplexity, sequence_error_rate, token_error_rate
from jaxformer.nn.parameters import Params
from jaxformer.training.parallel import Parallel
from jaxformer.training.step import make_eval_step, means

EvalStep = Callable[[Params, Batch], dict[str, Any]]


def make_loss(apply: Callable[..., Any], parallel: Parallel | None = None) -> EvalStep:
    """The compiled evaluation step; on the mesh of `parallel`, which places its batches."""
    step = make_eval_step(apply)
    if parallel is None:
        return jax.jit(step)
    compiled = jax.jit(parallel.on_mesh(step))
    return lambda params, batch: compiled(params, parallel.batch(batch))


def mean_loss(eval_step: EvalStep, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """`loss` (nats a token), `accuracy` and `tokens` over batches, weighted by token.

    A hybrid's `loss` is that of both readings; its `ctc_loss` stands beside it.
    """
    sums: dict[str, float] = {"loss": 0.0, "correct": 0.0, "tokens": 0.0}
    for batch in batches:
        scored = {name: value for name, value in batch.items() if name != "index"}
        # Summed in float64: a split has too many tokens for float32 to count.
        for name, value in jax.device_get(eval_step(params, scored)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return means(sums)


def evaluate(
    apply: Callable[..., Any],
    params: Params,
    tokenizers: Tokenizers,
    data: Data,
    config: Config,
    *,
    split: str,
    max_examples: int | None = None,
) -> tuple[dict[str, float], list[tuple[Example, Hypothesis]]]:
    """The scores of a split, and for pairs every decoded example beside its prediction.

    Pairs: `wer` and `per` (shares, not percent) of the decoded examples, `loss`, `examples`.
    Text: `loss`, `bits_per_byte`, `perplexity`. Losses are over the whole split, in nats a token.
    """
    batches = evaluation_batches(data, config.data, split, batch_size=config.eval.batch_size)
    scores = mean_loss(make_loss(apply), params, batches)
    loss, tokens = scores["loss"], scores["tokens"]
    if isinstance(data, TextData):
        return {
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss * tokens, data.splits[split].bytes),
            "perplexity": perplexity(loss * tokens, tokens),
        }, []
    assert isinstance(data, PairData)
    places = sample(len(data.splits[split].examples), max_examples)
    examples = [data.splits[split].examples[place] for place in places]
    translator = Translator(apply, tokenizers, config)
    found = translator(params, [data.splits[split].source(place) for place in places])
    nothing = Hypothesis("", -math.inf, -math.inf)
    best = [hypotheses[0] if hypotheses else nothing for hypotheses in found]
    predictions = [hypothesis.text.split() for hypothesis in best]
    references = [[text.split() for text in example.references] for example in examples]
    return {
        "wer": sequence_error_rate(predictions, references),
        "per": token_error_rate(predictions, references),
        "loss": loss,
        "examples": len(examples),
    }, list(zip(examples, best, strict=True))


def sample(count: int, most: int | None) -> Sequence[int]:
    """All of `count` places, or `most` at even distances (a sample that is always the same)."""
    if most is None or most >= count:
        return range(count)
    return np.linspace(0, count, most, endpoint=False).astype(int).tolist()
