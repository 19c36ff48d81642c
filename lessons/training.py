"""Training for lessons: the library's models on its data, and any small objective in one scan."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
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
    watch: Callable[[int, Params], None] | None = None,
) -> Trained:
    """Trains as train.py does, on `config.data`, without a run folder.

    `data` takes the place of the corpus (encoded with its tokenizers); `change` that of the initial
    parameters. `watch` is called after each step with the steps done and the parameters.
    """
    [trained] = train_seeds(config, [config.seed], data=data, change=change, watch=watch)
    return trained


def train_seeds(
    config: Config,
    seeds: Sequence[int],
    *,
    data: PairData | None = None,
    change: Callable[[Params], Params] | None = None,
    watch: Callable[[int, Params], None] | None = None,
) -> list[Trained]:
    """As `train`, once a seed (of parameters and data order) with one compiled step.

    The models share one `apply`, so a function of it and parameters is compiled once as well.
    """
    corpus, tokenizers = pairs(config.data)
    data = corpus if data is None else data
    sizes = vocabularies(tokenizers, config.data)
    model = models.abstract(config.model, **sizes)
    apply, _ = nn.pure(model)
    optimizer = make_optimizer(config.optimizer, config.train.steps, nn.parameter_axes(model))
    schedule = make_schedule(config.optimizer, config.train.steps)
    step = jax.jit(
        make_train_step(apply, optimizer, schedule, config.train, config.seed), donate_argnums=0
    )
    rows = config.train.batch_size * config.train.accumulation
    found = []
    for seed in seeds:
        _, params = nn.pure(models.build(config.model, **sizes, seed=seed))
        params = params if change is None else change(params)
        state, history = init_state(params, optimizer), []
        started = time.perf_counter()
        with training_batches(data, config.data, batch_size=rows, seed=seed) as batches:
            for number in range(config.train.steps):
                state, metrics = step(state, next(batches))
                history.append(metrics)
                if watch is not None:
                    watch(number + 1, state.params)
            history = jax.device_get(history)
        found.append(
            Trained(
                config=dataclasses.replace(config, seed=seed),
                apply=apply,
                params=state.evaluated,
                tokenizers=tokenizers,
                data=data,
                metrics={name: np.array([float(h[name]) for h in history]) for name in history[0]},
                seconds=time.perf_counter() - started,
            )
        )
    return found
