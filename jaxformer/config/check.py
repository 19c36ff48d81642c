"""What a configuration must keep to, checked before anything is read or written."""

import math

from jaxformer.config.files import ConfigError
from jaxformer.config.schema import Config

MODELS_OF = {
    "text": ("decoder",),
    "pairs": ("encoder_decoder", "recurrent", "ctc", "hybrid"),
    "pronunciation": ("encoder_decoder", "recurrent", "ctc", "hybrid"),
    "digits": ("ctc", "hybrid"),
}
"""The kinds of model that can learn each kind of data."""


def check(config: Config) -> Config:
    """Refuses what cannot work, before anything is read or written.

    Returns the same config. Raises ConfigError naming the field and the fix.
    """
    model, data, train = config.model, config.data, config.train
    fitting = MODELS_OF[data.kind]
    _require(
        model.kind in fitting,
        f"data.kind={data.kind!r} trains model.kind={' or '.join(map(repr, fitting))}, "
        f"not {model.kind!r}",
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
    _check_ctc(config)
    _check_sampling(config)
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
    _require(
        data.split == "hash" or data.kind in ("text", "digits"),
        "data.split='tail' is for text only (and digits)",
    )
    _check_digits(config)
    check_decode(config)
    _check_distributed(config)
    _require(config.optimizer.learning_rate > 0, "optimizer.learning_rate must be positive")
    _require(config.optimizer.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")
    _require(
        config.optimizer.clip_norm is None or config.optimizer.clip_norm > 0,
        "optimizer.clip_norm must be positive, or None for no clipping",
    )
    _require(config.eval.batch_size > 0, "eval.batch_size must be positive")
    _require(config.checkpoint.keep > 0, "checkpoint.keep must be positive")
    return config


def _check_ctc(config: Config) -> None:
    model, data, train, ctc = config.model, config.data, config.train, config.model.ctc
    _require(ctc.upsample > 0, f"model.ctc.upsample={ctc.upsample} must be positive")
    _require(
        bool(ctc.channels) and min(ctc.channels) > 0,
        f"model.ctc.channels={ctc.channels} must be positive numbers, at least one",
    )
    _require(0 <= ctc.weight <= 1, f"model.ctc.weight={ctc.weight} must be a share of 1")
    if model.kind == "ctc":
        for name in ("label_smoothing", "z_loss"):
            _require(
                getattr(train, name) == 0,
                f"train.{name} is of a softmax over the next token, and CTC has none: set it to 0",
            )
    if model.kind in ("ctc", "hybrid") and ctc.encoder == "transformer" and data.kind != "digits":
        frames = data.max_source_length * ctc.upsample
        _require(
            frames <= model.max_length,
            f"data.max_source_length={data.max_source_length} times model.ctc.upsample="
            f"{ctc.upsample} is {frames} frames, more than model.max_length={model.max_length}",
        )


def _check_distributed(config: Config) -> None:
    given = config.distributed
    names = ("coordinator", "num_processes", "process_id")
    missing = [name for name in names if getattr(given, name) is None]
    _require(
        len(missing) in (0, len(names)),
        "distributed.coordinator, num_processes and process_id are given together; missing: "
        + ", ".join(missing),
    )
    if given.coordinator is not None:
        host, _, port = given.coordinator.rpartition(":")
        _require(
            bool(host) and port.isdigit(),
            f"distributed.coordinator={given.coordinator!r} must be HOST:PORT of process 0, such "
            "as 10.0.0.1:12345",
        )
        count, number = given.num_processes or 0, given.process_id or 0
        _require(count > 0, f"distributed.num_processes={count} must be positive")
        _require(
            0 <= number < count,
            f"distributed.process_id={number} must be one of 0 to {count - 1}, as "
            f"distributed.num_processes={count}",
        )
    for name in ("timeout_seconds", "heartbeat_seconds"):
        _require(getattr(given, name) > 0, f"distributed.{name} must be positive")


def _check_digits(config: Config) -> None:
    data = config.data
    fewest, most = data.digits_per_line
    _require(data.lines > 0, f"data.lines must be positive, not {data.lines}")
    _require(
        0 < fewest <= most,
        f"data.digits_per_line={data.digits_per_line} must be two positive numbers, the larger "
        "last",
    )
    _require(data.seed >= 0, f"data.seed={data.seed} must not be negative")
    for name in ("files", "dev_files", "test_files"):
        _require(
            data.kind != "digits" or not getattr(data, name),
            f"data.{name} is not for data.kind='digits', whose images are scikit-learn's: leave "
            "it out",
        )


def _check_sampling(config: Config) -> None:
    sampling = config.train.sampling
    _require(
        sampling.schedule == "none" or config.model.kind == "recurrent",
        f"train.sampling.schedule={sampling.schedule!r} needs model.kind='recurrent', whose "
        f"decoder takes one step at a time; {config.model.kind!r} is trained by teacher forcing",
    )
    _require(0 <= sampling.rate <= 1, f"train.sampling.rate={sampling.rate} must be a share of 1")
    _require(sampling.decay > 0, f"train.sampling.decay={sampling.decay} must be positive")
    _require(
        sampling.warmup_steps >= 0,
        f"train.sampling.warmup_steps={sampling.warmup_steps} must not be negative",
    )


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
    _require(
        decode.ctc_weight is None or config.model.kind == "hybrid",
        f"decode.ctc_weight={decode.ctc_weight} is for model.kind='hybrid' alone; leave it out",
    )
    _require(
        decode.ctc_weight is None or 0 <= decode.ctc_weight <= 1,
        f"decode.ctc_weight={decode.ctc_weight} must be a share of 1",
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
