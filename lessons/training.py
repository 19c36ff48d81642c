"""Training for lessons: the library's models on its data, and any small objective in one scan."""

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxformer import models, nn
from jaxformer.config import Config, DataConfig
from jaxformer.data import (
    PairData,
    Tokenizers,
    build_tokenizers,
    encode_corpus,
    load_corpus,
    training_batches,
)
from jaxformer.data.pronunciation import dictionary_path
from jaxformer.nn.parameters import Params
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.run import vocabularies
from jaxformer.training.state import init_state
from jaxformer.training.step import make_train_step


def minimise(
    objective: Callable[[Any, Any], Any],
    params: Any,
    optimizer: optax.GradientTransformation,
    draw: Callable[[jax.Array], Any],
    *,
    steps: int,
    seed: int,
) -> tuple[Any, np.ndarray]:
    """Minimises `objective(params, draw(key))`, a new key each step, as one compiled scan.

    Returns the last parameters and the objective before each step, float32[steps].
    """

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(objective)(params, draw(key))
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def run(params: Any, keys: jax.Array) -> Any:
        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, values

    params, values = run(params, jax.random.split(jax.random.key(seed), steps))
    return params, np.asarray(values)


@dataclass(frozen=True)
class Trained:
    """A model of the library after training."""

    config: Config
    apply: Callable[..., Any]
    params: Params
    tokenizers: Tokenizers
    data: PairData
    metrics: dict[str, np.ndarray]
    """What the training step reports (loss in nats a token, gradient_norm, ...), every step."""
    seconds: float
    """Of training, compilation included."""


def words(*, letters: int, small: bool) -> DataConfig:
    """CMUdict's words of at most so many letters (and phonemes), in batches of one shape.

    A small one reads every hundredth line alone, from a temporary file.
    """
    return DataConfig(
        files=(_hundredth_lines(),) if small else (),
        max_source_length=letters + 1,
        max_target_length=letters + 1,
        buckets=1,
        on_bad="skip",
    )


@functools.lru_cache(maxsize=1)
def _hundredth_lines() -> str:
    lines = dictionary_path().read_text(encoding="utf-8").splitlines()
    path = Path(tempfile.mkdtemp(prefix="lessons-")) / "cmudict.dict"
    path.write_text("\n".join(lines[::100]) + "\n", encoding="utf-8")
    return str(path)


@functools.lru_cache(maxsize=8)
def pairs(config: DataConfig) -> tuple[PairData, Tokenizers]:
    """A corpus of pairs and its tokenizers, read once a process."""
    corpus = load_corpus(config)
    tokenizers = build_tokenizers(corpus, config)
    data = encode_corpus(corpus, tokenizers, config)
    assert isinstance(data, PairData)
    return data, tokenizers


def train(
    config: Config,
    *,
    data: PairData | None = None,
    change: Callable[[Params], Params] | None = None,
) -> Trained:
    """Trains as train.py does, on `config.data`, without a run folder.

    `data` takes the place of the corpus (encoded with its tokenizers); `change` that of the initial
    parameters.
    """
    corpus, tokenizers = pairs(config.data)
    data = corpus if data is None else data
    model = models.build(config.model, **vocabularies(tokenizers, config.data), seed=config.seed)
    apply, params = nn.pure(model)
    params = params if change is None else change(params)
    optimizer = make_optimizer(config.optimizer, config.train.steps, nn.parameter_axes(model))
    schedule = make_schedule(config.optimizer, config.train.steps)
    step = jax.jit(
        make_train_step(apply, optimizer, schedule, config.train, config.seed), donate_argnums=0
    )
    state, history = init_state(params, optimizer), []
    rows = config.train.batch_size * config.train.accumulation
    started = time.perf_counter()
    with training_batches(data, config.data, batch_size=rows, seed=config.seed) as batches:
        for _ in range(config.train.steps):
            state, metrics = step(state, next(batches))
            history.append(metrics)
        history = jax.device_get(history)
    return Trained(
        config=config,
        apply=apply,
        params=state.evaluated,
        tokenizers=tokenizers,
        data=data,
        metrics={name: np.array([float(entry[name]) for entry in history]) for name in history[0]},
        seconds=time.perf_counter() - started,
    )
