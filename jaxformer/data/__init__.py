"""Data: real text and pairs, as batches that depend on (seed, step) alone.

```
corpus = load_corpus(config)                       # read and split; corpus.report says what
tokenizers = build_tokenizers(corpus, config)      # trained on the train split alone
data = encode_corpus(corpus, tokenizers, config)   # ids; data.report is the whole account
batches = training_batches(data, config, batch_size=64, seed=0)
batch = next(batches)                              # a dictionary of numpy arrays
```
"""

from jaxformer.data.bucketing import PairBatches, is_label
from jaxformer.data.corpus import (
    Corpus,
    DataError,
    Document,
    Example,
    LineCorpus,
    PairCorpus,
    Report,
    TextCorpus,
)
from jaxformer.data.encoding import Data, PairData, PairSplit, Stream, TextData, encode_corpus
from jaxformer.data.given import (
    Source,
    normal_source,
    pair_batches,
    source_batches,
    text_batches,
)
from jaxformer.data.images import Images, image_height, read_image, write_image
from jaxformer.data.load import load_corpus
from jaxformer.data.packing import TextBatches
from jaxformer.data.pipeline import (
    BatchIterator,
    OnePass,
    evaluation_batches,
    training_batches,
)
from jaxformer.data.plan import Batch
from jaxformer.data.tokenizers import (
    EOS,
    PAD,
    SOS,
    UNK,
    Tokenizer,
    Tokenizers,
    build_tokenizers,
    load_tokenizer,
)

__all__ = [
    "EOS",
    "PAD",
    "SOS",
    "UNK",
    "Batch",
    "BatchIterator",
    "Corpus",
    "Data",
    "DataError",
    "Document",
    "Example",
    "Images",
    "LineCorpus",
    "OnePass",
    "PairBatches",
    "PairCorpus",
    "PairData",
    "PairSplit",
    "Report",
    "Source",
    "Stream",
    "TextBatches",
    "TextCorpus",
    "TextData",
    "Tokenizer",
    "Tokenizers",
    "build_tokenizers",
    "encode_corpus",
    "evaluation_batches",
    "image_height",
    "is_label",
    "load_corpus",
    "load_tokenizer",
    "normal_source",
    "pair_batches",
    "read_image",
    "source_batches",
    "text_batches",
    "training_batches",
    "write_image",
]
