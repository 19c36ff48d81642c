"""Trains a model: `python train.py PRESET [--group.key value ...]`.

The file reads from top to bottom: Run, Data, Model, State and step, Restore, Loop, Scores.
"""

import sys
import time

import jax
import numpy as np
from rich.console import Console

from jaxformer import config as configuration
from jaxformer import models, nn
from jaxformer.arguments import parse
from jaxformer.config import Config
from jaxformer.data import (
    build_tokenizers,
    encode_corpus,
    evaluation_batches,
    load_corpus,
    training_batches,
)
from jaxformer.errors import JaxformerError
from jaxformer.training import report
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.evaluation import evaluate, make_loss, mean_loss
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.progress import TrainingProgress
from jaxformer.training.run import open_run, vocabularies
from jaxformer.training.state import init_state
from jaxformer.training.step import make_train_step
from jaxformer.training.stopping import StopRequest
from jaxformer.training.tracking import Tracker, require_installed


def train(config: Config, console: Console) -> int:
    """Runs one experiment. Returns the exit status: 128 + signal if it was told to stop."""
    started = time.perf_counter()

    # ---------------------------------------------------------------- Run
    config, folder = open_run(config)
    require_installed(config)
    say = report.speaker(console)
    say("run", str(folder.path))
    say("devices", report.devices())

    # ---------------------------------------------------------------- Data
    corpus = load_corpus(config.data)
    tokenizers = build_tokenizers(corpus, config.data)
    data = encode_corpus(corpus, tokenizers, config.data)
    for line in data.report.lines():
        say("data", line)
    rows = config.train.batch_size * config.train.accumulation
    batches = training_batches(data, config.data, batch_size=rows, seed=config.seed)
    say("epoch", f"{batches.batches_per_epoch:,} steps of {rows} rows")
    dev = (
        evaluation_batches(data, config.data, "dev", batch_size=config.eval.batch_size)
        if "dev" in data.filled
        else []
    )
    dev_sample = dev[: config.eval.max_batches] if config.eval.max_batches else dev

    # ---------------------------------------------------------------- Model
    model = models.build(config.model, **vocabularies(tokenizers), seed=config.seed)
    apply, params = nn.pure(model)
    say("model", report.model(config, params))
    say("attention", report.attention(config, apply, params, batches.source[0]))

    # ---------------------------------------------------------------- State and step
    optimizer = make_optimizer(config.optimizer, config.train.steps, nn.parameter_axes(model))
    schedule = make_schedule(config.optimizer, config.train.steps)
    state = init_state(params, optimizer, ema=config.train.ema is not None)
    train_step = jax.jit(
        make_train_step(apply, optimizer, schedule, config.train, config.seed), donate_argnums=0
    )
    eval_step = make_loss(apply)

    # ---------------------------------------------------------------- Restore
    folder.path.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoint.keep)
    if config.resume and checkpoints.latest is not None:
        state, data_state = checkpoints.restore(state)
        batches.set_state(data_state)
        say("resumed", f"from step {int(state.step):,}")
    start = int(state.step)
    tokenizers.save(folder.tokenizers)
    configuration.save(config, folder.config)
    tracker = Tracker(folder.metrics, config, start_step=start)

    # ---------------------------------------------------------------- Loop
    steps = config.train.steps
    dev_loss = None
    stop = StopRequest()
    with stop, batches, TrainingProgress(console, start=start, steps=steps) as progress:
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            state, metrics = train_step(state, batch)
            progress.count(float(np.sum(batch["weights"])))
            if step % config.train.log_every == 0 or step == steps:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                report.require_finite(values, step)
                values["tokens_per_second"] = progress.show(step, values["loss"])
                tracker.write(step, "train", values)
            dev_loss = None
            if len(dev) and (_due(step, config.eval.every) or step == steps):
                progress.pause()
                sample = dev if step == steps else dev_sample
                scores = mean_loss(eval_step, state.evaluated, sample)
                tracker.write(step, "dev", scores)
                progress.say(
                    f"step {step}  dev loss {scores['loss']:.4f}  accuracy {scores['accuracy']:.4f}"
                )
                dev_loss = scores["loss"]
                progress.resume()
            # Asked once: a signal may come at any time, and must not end the loop unsaved.
            stopping = bool(stop)
            if _due(step, config.checkpoint.every) or step == steps or stopping:
                checkpoints.save(state, batches.get_state(), dev_loss)
            if stopping:
                break
    seconds = time.perf_counter() - started
    checkpoints.close()
    tracker.close()
    if stop:
        say("stopped", f"at step {int(state.step):,}; go on with: {report.resume(folder)}")
        return 128 + int(stop.number or 0)

    # ---------------------------------------------------------------- Scores
    split = config.eval.final_split if config.eval.final_split in data.filled else "dev"
    if split in data.filled:
        scores, decoded = evaluate(
            apply,
            state.evaluated,
            tokenizers,
            data,
            config,
            split=split,
            max_examples=config.eval.final_examples,
        )
    else:
        scores, decoded = {}, []
    report.summary(
        console,
        config,
        folder,
        split=split,
        scores=scores,
        decoded=decoded,
        samples=report.text_samples(apply, state.evaluated, tokenizers, config),
        parameters=nn.count(state.params),
        seconds=seconds,
    )
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main() -> int:
    """Reads the command line and trains; a known error is one line, without a traceback."""
    console = Console(soft_wrap=True)
    try:
        return train(parse(sys.argv[1:]), console)
    except JaxformerError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {error}", style="bold red", markup=False
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
