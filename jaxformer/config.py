"""The experiment: frozen dataclasses, one nested in the other, and how they are read and printed.

A preset is a function that returns a `Config`; the command line overrides single fields
(`--train.steps 500`); the resolved whole is saved as JSON in the run folder and can be given back.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxformer.errors import JaxformerError

ConfigType = typing.TypeVar("ConfigType")
TokenizerName = Literal["byte", "character", "word", "bpe"]


class ConfigError(JaxformerError):
    """A configuration that cannot work; the message names the field and the fix."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it is split, tokenised, and cut into batches."""

    kind: Literal["pronunciation", "text", "pairs"] = "pronunciation"
    """pronunciation: CMUdict. text: documents. pairs: TSV files, source<TAB>target."""
    files: tuple[str, ...] = ()
    """Files or globs to train on (text: empty means the running Python's standard library)."""
    dev_files: tuple[str, ...] = ()
    """Files for the dev split; empty: split `files` as `split` says."""
    test_files: tuple[str, ...] = ()
    """Files for the test split; empty: split `files` as `split` says."""
    split: Literal["hash", "tail"] = "hash"
    """hash: whole documents or sources by a stable hash. tail: the last characters of each text."""
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
    """pairs: longest source in tokens (S), <eos> included."""
    max_target_length: int = 64
    """pairs: longest target in tokens (T), <eos> included."""
    buckets: int = 4
    """pairs: number of length buckets, so of batch shapes that are compiled."""
    on_bad: Literal["error", "skip"] = "error"
    """Unusable lines or files: stop with an error, or leave them out, counted and reported."""
    workers: int = 0
    """Processes that prepare batches; 0 uses threads of this process."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Axis letters as in the glossary of `jaxformer.nn`."""

    kind: Literal["decoder", "encoder_decoder"] = "encoder_decoder"
    """decoder: a language model. encoder_decoder: source to target."""
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
    """What the backward pass recomputes: full keeps only each layer's input."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which parameters are stored."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix operands; sums are kept in float32."""
    attention: str | None = None
    """Attention implementation (jaxformer_kernels); None: the fastest that can do the call."""


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
    """GNMT's alpha: scores are divided by ((5 + length) / 6) ** alpha."""
    max_length: int | None = None
    """pairs: longest output in tokens, <eos> included; None: the longest the data allows."""
    min_length: int = 0
    """pairs: shortest output in tokens, <eos> not counted."""
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
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def check(config: Config) -> Config:
    """Refuses what cannot work, before anything is read or written.

    Returns the same config. Raises ConfigError naming the field and the fix.
    """
    model, data, train = config.model, config.data, config.train
    wanted = "decoder" if data.kind == "text" else "encoder_decoder"
    _require(
        model.kind == wanted,
        f"data.kind={data.kind!r} trains model.kind={wanted!r}, not {model.kind!r}",
    )
    for name in ("layers", "width", "heads", "max_length"):
        _require(getattr(model, name) > 0, f"model.{name} must be positive")
    for name in ("kv_heads", "head_dim", "feedforward", "encoder_layers"):
        value = getattr(model, name)
        _require(value is None or value > 0, f"model.{name}={value} must be positive, or None")
    kv_heads = model.kv_heads or model.heads
    _require(
        model.heads % kv_heads == 0,
        f"model.heads={model.heads} must be a multiple of model.kv_heads={kv_heads}",
    )
    _require(
        model.head_dim is not None or model.width % model.heads == 0,
        f"model.width={model.width} must be a multiple of model.heads={model.heads}, "
        "or give model.head_dim",
    )
    head_dim = model.head_dim or model.width // model.heads
    _require(
        model.position != "rotary" or head_dim % 2 == 0,
        f"rotary positions need an even head size, not {head_dim}: change model.head_dim",
    )
    _require(
        model.window is None or model.window > 0,
        f"model.window={model.window} must be positive, or None for no window",
    )
    _require(
        not model.shared_embeddings or data.shared_vocabulary,
        "model.shared_embeddings needs data.shared_vocabulary=True",
    )
    longest = (
        data.length if data.kind == "text" else max(data.max_source_length, data.max_target_length)
    )
    longest_name = "data.length" if data.kind == "text" else "data.max_source/target_length"
    _require(
        longest <= model.max_length,
        f"{longest_name}={longest} is more than model.max_length={model.max_length}: "
        "shorten the data or raise model.max_length",
    )
    for name in ("dropout", "attention_dropout"):
        rate = getattr(model, name)
        _require(0 <= rate < 1, f"model.{name}={rate} must be at least 0 and below 1")
    for name in ("batch_size", "accumulation", "log_every"):
        _require(getattr(train, name) > 0, f"train.{name} must be positive")
    _require(train.steps >= 0, "train.steps must not be negative")
    _require(
        0 <= train.label_smoothing < 1,
        f"train.label_smoothing={train.label_smoothing} must be at least 0 and below 1",
    )
    _require(
        train.ema is None or 0 < train.ema < 1,
        f"train.ema={train.ema} must lie between 0 and 1, or be None",
    )
    _require(
        data.dev_fraction >= 0
        and data.test_fraction >= 0
        and data.dev_fraction + data.test_fraction < 1,
        "data.dev_fraction and data.test_fraction must be non-negative and leave something to "
        "train on",
    )
    _require(
        data.kind != "pairs" or bool(data.files),
        "data.kind='pairs' needs data.files, for example --data.files pairs.tsv",
    )
    _require(data.buckets > 0, "data.buckets must be positive")
    _require(data.split == "hash" or data.kind == "text", "data.split='tail' is for text only")
    check_decode(config)
    _require(config.optimizer.learning_rate > 0, "optimizer.learning_rate must be positive")
    _require(config.optimizer.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")
    _require(
        config.optimizer.clip_norm is None or config.optimizer.clip_norm > 0,
        "optimizer.clip_norm must be positive, or None for no clipping",
    )
    _require(config.eval.batch_size > 0, "eval.batch_size must be positive")
    _require(config.checkpoint.keep > 0, "checkpoint.keep must be positive")
    return config


def check_decode(config: Config) -> Config:
    """Refuses decoding options that cannot work. Raises ConfigError; returns the same config."""
    decode = config.decode
    _require(decode.beam > 0, "decode.beam must be positive")
    _require(
        math.isfinite(decode.length_penalty),
        f"decode.length_penalty={decode.length_penalty} must be a finite number",
    )
    _require(
        decode.max_length is None or 0 < decode.max_length <= config.model.max_length,
        f"decode.max_length={decode.max_length} must lie between 1 and "
        f"model.max_length={config.model.max_length}",
    )
    _require(decode.min_length >= 0, f"decode.min_length={decode.min_length} must not be negative")
    _require(
        math.isfinite(decode.temperature) and decode.temperature >= 0,
        f"decode.temperature={decode.temperature} must not be negative; 0 is greedy",
    )
    _require(
        decode.top_k is None or decode.top_k > 0,
        f"decode.top_k={decode.top_k} must be positive, or None for no limit",
    )
    for name in ("top_p", "min_p"):
        share = getattr(decode, name)
        _require(
            share is None or (0 <= share <= 1 and not (name == "top_p" and share == 0)),
            f"decode.{name}={share} must be a share of 1",
        )
    return config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values (what `config.json` holds)."""
    return dataclasses.asdict(config)


def from_dict(cls: type[ConfigType], values: Any) -> ConfigType:
    """The inverse of `to_dict`. Raises ConfigError on an unknown field, naming the nearest."""
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{values!r} is no {cls.__name__}: options by name are needed")
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"unknown option {name!r} of {cls.__name__}{_nearest(name, hints)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            arguments[name] = from_dict(hint, value)
        elif isinstance(value, list):
            arguments[name] = tuple(value)
        else:
            arguments[name] = value
        _check_type(f"{cls.__name__}.{name}", arguments[name], hint)
    return cls(**arguments)


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _check_type(name: str, value: Any, hint: Any) -> None:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        fits = value in options
    elif origin in (typing.Union, types.UnionType):
        fits = any(option is not float and isinstance(value, option) for option in options) or (
            float in options and isinstance(value, int | float)
        )
    elif origin is tuple:
        fits = isinstance(value, tuple)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, hint)
    if not fits:
        raise ConfigError(f"{name}={value!r} does not fit {hint}")


def save(config: Config, path: Path) -> None:
    """Writes the configuration as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(path: Path) -> Config:
    """Reads what `save` wrote. Raises ConfigError on a missing file, bad JSON or unknown field."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is this a run folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return from_dict(Config, values)
