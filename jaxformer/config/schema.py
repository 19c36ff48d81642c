"""The experiment as frozen dataclasses, one nested in the other."""

from dataclasses import dataclass, field
from typing import Literal

TokenizerName = Literal["byte", "character", "word", "bpe"]


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it is split, tokenised, and cut into batches."""

    kind: Literal["pronunciation", "text", "pairs", "digits"] = "pronunciation"
    """pronunciation: CMUdict. text: documents. pairs: TSV files, source<TAB>target. digits: lines
    of handwritten digits (scikit-learn's), images to strings."""
    files: tuple[str, ...] = ()
    """Files or globs to train on (text: empty means the running Python's standard library)."""
    dev_files: tuple[str, ...] = ()
    """Files for the dev split; empty: split `files` as `split` says."""
    test_files: tuple[str, ...] = ()
    """Files for the test split; empty: split `files` as `split` says."""
    split: Literal["hash", "tail"] = "hash"
    """hash: whole documents or sources by a stable hash (digits: images, drawn by class).
    tail: the last characters of each text (digits: the last images, which others wrote)."""
    dev_fraction: float = 0.05
    """Share of the data held out as dev when no dev files are given."""
    test_fraction: float = 0.05
    """Share of the data held out as test when no test files are given."""
    keep_stress: bool = False
    """pronunciation: keep the stress digits of the vowels (AH0) instead of removing them (AH)."""
    tokenizer: TokenizerName = "byte"
    """Tokenizer of text, and of the source side of pairs (pronunciation: always characters)."""
    target_tokenizer: TokenizerName = "word"
    """Tokenizer of the target side of pairs (pronunciation: always words, the phonemes)."""
    shared_vocabulary: bool = False
    """pairs: one tokenizer, trained on both sides, serves source and target."""
    vocabulary_size: int = 8192
    """Largest vocabulary of a bpe tokenizer, the four special tokens included."""
    length: int = 256
    """text: tokens a packed row (T)."""
    max_source_length: int = 64
    """pairs: longest source in tokens (S), <eos> included; digits: widest line in pixels."""
    max_target_length: int = 64
    """pairs: longest target in tokens (T), <eos> included."""
    buckets: int = 4
    """pairs: number of length buckets, so of batch shapes that are compiled."""
    on_bad: Literal["error", "skip"] = "error"
    """Unusable lines or files: stop with an error, or leave them out, counted and reported."""
    lines: int = 20_000
    """digits: lines that are strung, of all splits together, each split its share."""
    digits_per_line: tuple[int, int] = (3, 10)
    """digits: fewest and most digits of a line."""
    seed: int = 0
    """digits: decides which images are held out and how all lines are strung."""
    workers: int = 0
    """Processes that prepare batches; 0 uses threads of this process."""


@dataclass(frozen=True)
class RecurrentConfig:
    """What only a model with an LSTM has; its hidden size is model.width."""

    context: Literal["final", "uniform", "additive", "dot", "general"] = "general"
    """What the decoder sees of the source: the final state alone; the mean of all states, equal at
    every step; or attention with the scores of Bahdanau (additive) or Luong (dot, general)."""
    input_feeding: bool = True
    """Each step is also given the attentional state of the step before; not for context=final."""
    bidirectional: bool = True
    """The encoder reads the source from both ends, each with half the width."""


@dataclass(frozen=True)
class CTCConfig:
    """What only the kinds ctc and hybrid have."""

    encoder: Literal["transformer", "lstm"] = "transformer"
    """What reads the frames."""
    upsample: int = 2
    """Frames that each source token becomes: CTC needs no fewer frames than labels."""
    channels: tuple[int, ...] = (32, 64)
    """Images: output channels of each 3x3 convolution, all followed by BatchNorm and ReLU; each
    halves the height, and the last the width too."""
    weight: float = 0.3
    """hybrid: lambda, the share of the CTC loss in the objective (Watanabe et al., 2017)."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Axis letters as in the glossary of `jaxformer.nn`."""

    kind: Literal["decoder", "encoder_decoder", "recurrent", "ctc", "hybrid"] = "encoder_decoder"
    """decoder: a language model. encoder_decoder, recurrent (LSTM): source to target. ctc: an
    encoder read by CTC. hybrid: an encoder read by CTC and by a decoder."""
    layers: int = 4
    """Decoder layers (L)."""
    encoder_layers: int | None = None
    """Encoder layers; None: as many as the decoder has."""
    width: int = 256
    """Model width (D)."""
    heads: int = 4
    """Query heads (N)."""
    kv_heads: int | None = None
    """Key-value heads (K); None: as many as query heads; 1: multi-query; between: grouped."""
    head_dim: int | None = None
    """Size of a head (H); None: width / heads."""
    feedforward: int | None = None
    """Feed-forward width (F); None: 4 x width."""
    activation: Literal["relu", "gelu", "gelu_exact", "swiglu", "geglu"] = "gelu"
    """Feed-forward non-linearity; gelu is the tanh form; the -glu forms are gated."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation of the width."""
    norm_placement: Literal["pre", "post"] = "pre"
    """pre: normalise each sub-layer's input. post: normalise after the residual sum."""
    norm_epsilon: float = 1e-5
    """Added to the variance under the root."""
    bias: bool = True
    """Biases in linear layers and norms."""
    position: Literal["none", "learned", "sinusoidal", "rotary", "alibi", "relative"] = "rotary"
    """How a token's place enters the model."""
    rotary_base: float = 10_000.0
    """rotary: base of the geometric sequence of wavelengths."""
    relative_buckets: int = 32
    """relative (T5): number of distance buckets."""
    relative_max_distance: int = 128
    """relative (T5): distances from here on share the last bucket."""
    max_length: int = 256
    """Longest sequence the model takes, on either side."""
    tied_embeddings: bool = True
    """The output projection is the (target) embedding, transposed."""
    shared_embeddings: bool = False
    """encoder_decoder: source and target share one embedding (needs one vocabulary)."""
    embedding_scale: bool = False
    """Multiply embeddings by sqrt(width)."""
    output_scale: float = 1.0
    """Factor on the final hidden states before the output projection (T5: width ** -0.5)."""
    attention_scale: float | None = None
    """Factor on the attention scores; None: head_dim ** -0.5 (T5: 1)."""
    attention_softcap: float | None = None
    """Attention scores become softcap * tanh(scores / softcap)."""
    output_softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys over the head dimension."""
    window: int | None = None
    """Sliding window: a token attends to itself and the window - 1 tokens before it."""
    dropout: float = 0.0
    """Dropout rate of embeddings and of each sub-layer's output."""
    attention_dropout: float = 0.0
    """Dropout rate of the attention weights."""
    scan: bool = True
    """Scan over the layers (compile time flat in depth); False unrolls. Same parameters."""
    remat: Literal["none", "full", "dots", "dots_no_batch"] = "none"
    """What the backward pass recomputes: full keeps only each layer's input. A CPU then scans."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which parameters are stored."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix operands; sums are kept in float32."""
    attention: str | None = None
    """Attention implementation (jaxformer_kernels); None: the fastest that can do the call."""
    recurrent: RecurrentConfig = field(default_factory=RecurrentConfig)
    ctc: CTCConfig = field(default_factory=CTCConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """The optimiser."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after warm-up; inverse_sqrt is Noam's, wsd is warm-up, stable, decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """wsd: the share of all steps, at the end, that decays."""
    final_fraction: float = 0.1
    """cosine, linear, wsd: last learning rate as a share of the peak."""
    b1: float = 0.9
    """Decay of the first moment (adamw, lion), momentum (sgd, muon); adafactor has none."""
    b2: float = 0.98
    """Decay of the second moment (adamw, and what muon leaves to it), of lion's momentum."""
    epsilon: float = 1e-9
    """adamw: added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradients; None: no clipping."""


@dataclass(frozen=True)
class SamplingConfig:
    """Scheduled sampling (Bengio et al., 2015): the decoder is fed its own samples."""

    schedule: Literal["none", "constant", "linear", "exponential", "inverse_sigmoid"] = "none"
    """How the share of sampled inputs grows: none is teacher forcing."""
    scope: Literal["token", "sequence"] = "token"
    """What the coin is tossed for: each input token, or each sequence as a whole."""
    rate: float = 0.25
    """Share of sampled inputs: always (constant), or approached at the end."""
    warmup_steps: int = 0
    """Steps of teacher forcing before it begins."""
    decay: float = 5.0
    """exponential, inverse_sigmoid: how sharply teacher forcing decays over the run."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 64
    """Rows a micro-batch (B)."""
    accumulation: int = 1
    """Micro-batches a step; their gradients are weighted by token count."""
    label_smoothing: float = 0.0
    """Share of the target probability spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps the logits' normaliser near 1."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, which is then what is evaluated."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class EvalConfig:
    """Scores during and after training."""

    every: int = 500
    """Steps between evaluations of the dev loss (0: only at the end)."""
    batch_size: int = 128
    """Rows a batch when scoring and decoding."""
    max_batches: int | None = None
    """Batches of the dev split that are scored during training; None: all of it."""
    final_split: Literal["dev", "test"] = "test"
    """The split of the scores in the summary."""
    final_examples: int | None = None
    """Examples of it that are decoded for error rates; None: all."""


@dataclass(frozen=True)
class DecodeConfig:
    """How predictions are searched for."""

    beam: int = 1
    """Beam width; 1 is greedy."""
    length_penalty: float = 0.6
    """GNMT's alpha: scores are divided by ((5 + length) / 6) ** alpha; ctc alone has none."""
    max_length: int | None = None
    """pairs: longest output in tokens, <eos> included; None: the longest the data allows."""
    min_length: int = 0
    """pairs: shortest output in tokens, <eos> not counted."""
    ctc_weight: float | None = None
    """hybrid: share of the CTC prefix score in the search; None: model.ctc.weight."""
    temperature: float = 1.0
    """text: softmax temperature of sampling; 0 is greedy."""
    top_k: int | None = None
    """text: sample among the k likeliest tokens."""
    top_p: float | None = None
    """text: sample among the smallest set of tokens with this probability (nucleus)."""
    min_p: float | None = None
    """text: drop tokens less likely than this share of the likeliest."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved under RUN/checkpoints."""

    every: int = 500
    """Steps between checkpoints (0: only the last)."""
    keep: int = 2
    """Newest checkpoints that stay; the best by dev loss always does."""


@dataclass(frozen=True)
class MeshConfig:
    """The sizes of the mesh's axes; one may be -1: as many devices as are left."""

    data: int = -1
    """Copies of the model, each with its share of the batch's rows."""
    fsdp: int = 1
    """Shares of the batch too, and of every matrix, which is put together where it is needed
    (ZeRO-3: Rajbhandari et al., 2020)."""
    expert: int = 1
    """Reserved for mixtures of experts: 1."""
    context: int = 1
    """Shares of every sequence; attention passes keys and values round (ring attention)."""
    tensor: int = 1
    """Shares of heads, feed-forward width and vocabulary (Shoeybi et al., 2019)."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the step runs on the mesh."""

    mode: Literal["jit", "shard_map", "pmap"] = "jit"
    """jit: the compiler divides the work, any mesh. shard_map: by hand, data and context axes.
    pmap: the old way, data axis alone. All compute the same."""
    context: Literal["ring", "all_to_all"] = "ring"
    """mesh.context: keys and values travel round a ring (Liu et al., 2023), or heads are exchanged
    for places (Ulysses: Jacobs et al., 2023), which needs no fewer heads than devices."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run; found in the environment under Slurm, Open MPI, Kubernetes and
    on TPU pods.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0; given together with num_processes and process_id."""
    num_processes: int | None = None
    """How many processes take part."""
    process_id: int | None = None
    """The number of this one, from 0."""
    detect: bool = True
    """Look into the environment; False: this process is alone unless coordinator is given."""
    timeout_seconds: int = 300
    """How long processes wait for each other at the start."""
    heartbeat_seconds: int = 100
    """A process that was not heard of for so long counts as dead; all others then end too."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events into the run folder (extra: tensorboard)."""
    wandb: str | None = None
    """Weights & Biases project name (extra: wandb)."""


@dataclass(frozen=True)
class Config:
    """One experiment, whole."""

    preset: str = "custom"
    """Name of the preset this started from."""
    run: str | None = None
    """Run folder; None: runs/<preset>-<date>."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder."""
    seed: int = 0
    """Of initialisation, data order, dropout and sampling."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
