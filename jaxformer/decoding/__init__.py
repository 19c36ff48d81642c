"""From next-token logits to sequences: sampling, beam search, and scores of given targets.

The searches (`greedy`, `sample`, `beam_search`) know no model; `make_translate`, `make_generate`
and `make_score` apply them to this library's, `Translator` and `Generator` go from text to text. A
search is given

- `step(tokens: Int[B 1], cache) -> (logits: Float[B V], cache)`, a pure traceable function that
  feeds one token a row and returns the logits of the next;
- `cache`, any pytree; beam search also calls its method `take(indices: Int[rows]) -> cache`, which
  gathers rows (the cache knows where its batch axis is);
- `logits: Float[B V]`, what the model said after the prompt (or <sos>), which the caller has fed.

    search = jax.jit(lambda cache, logits: greedy(step, cache, logits, max_length=50, ...))

CTC models give all frames at once, so their searches (`ctc_greedy`, `ctc_beam_search`) take logits
and no step; `make_transcribe` applies them, and `ctc_align` says at which frames given labels
stand. A hybrid model's decoder is searched together with CTC's probabilities of prefixes by
`joint_search`, which `make_joint_translate` applies.

One meaning everywhere: `max_length` and `row_lengths` count <eos>; `lengths` and `min_length` count
the tokens before it; log-probabilities are the model's own, <eos> included.
"""

from jaxformer.decoding.beam import Beams, beam_search
from jaxformer.decoding.ctc import (
    BestPath,
    LanguageModel,
    ctc_beam_search,
    ctc_greedy,
    frame_log_probs,
)
from jaxformer.decoding.ctc_align import Alignment, ctc_align
from jaxformer.decoding.ctc_prefix import CTCPrefixes, CTCPrefixScorer, joint_search
from jaxformer.decoding.generate import (
    make_generate,
    make_joint_translate,
    make_score,
    make_step,
    make_transcribe,
    make_translate,
)
from jaxformer.decoding.ngram import NGram
from jaxformer.decoding.predict import Generator, Hypothesis, Translator
from jaxformer.decoding.sampling import (
    Sampled,
    SearchCache,
    Step,
    filter_logits,
    greedy,
    sample,
)
from jaxformer.decoding.scoring import sequence_log_probs, token_log_probs

__all__ = [
    "Alignment",
    "Beams",
    "BestPath",
    "CTCPrefixScorer",
    "CTCPrefixes",
    "Generator",
    "Hypothesis",
    "LanguageModel",
    "NGram",
    "Sampled",
    "SearchCache",
    "Step",
    "Translator",
    "beam_search",
    "ctc_align",
    "ctc_beam_search",
    "ctc_greedy",
    "filter_logits",
    "frame_log_probs",
    "greedy",
    "joint_search",
    "make_generate",
    "make_joint_translate",
    "make_score",
    "make_step",
    "make_transcribe",
    "make_translate",
    "sample",
    "sequence_log_probs",
    "token_log_probs",
]
