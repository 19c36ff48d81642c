"""Trains a model: `python train.py PRESET [--group.key value ...]`.

The file reads from top to bottom: Run, Mesh, Data, Model, State and step, Restore, Loop, Scores.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from rich.console import Console

from jaxformer import config as configuration
from jaxformer import models, nn
from jaxformer.arguments import parse
from jaxformer.config import Config, DistributedConfig
from jaxformer.data import (
    Batch,
    Tokenizers,
    build_tokenizers,
    encode_corpus,
    evaluation_batches,
    load_corpus,
    training_batches,
)
from jaxformer.errors import JaxformerError
from jaxformer.runtime import keep_compiled, keep_memory
from jaxformer.sharding import make_mesh
from jaxformer.training import distributed, report
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.compiling import compile_ahead, run_once, trace
from jaxformer.training.evaluation import evaluate, make_loss, mean_loss
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.parallel import Parallel, check_parallel
from jaxformer.training.progress import TrainingProgress
from jaxformer.training.run import RunError, claim, open_run, vocabularies
from jaxformer.training.state import TrainState, init_state
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

    # ---------------------------------------------------------------- Mesh
    mesh = make_mesh(config.mesh)
    check_parallel(config, mesh)
    parallel = Parallel(mesh, config.parallel)
    say("devices", report.devices(mesh))

    # ---------------------------------------------------------------- Data
    corpus = load_corpus(config.data)
    tokenizers = (
        Tokenizers.load(folder.tokenizers)
        if config.resume
        else build_tokenizers(corpus, config.data)
    )
    data = encode_corpus(corpus, tokenizers, config.data)
    for line in data.report.lines():
        say("data", line)
    fingerprint = data.fingerprint()
    distributed.require_same(fingerprint, "training data")
    rows = config.train.batch_size * config.train.accumulation
    # What this process reads of every batch: all of it where it is alone.
    index, count = parallel.share
    part = {"process_index": index, "process_count": count}
    batches = training_batches(data, config.data, batch_size=rows, seed=config.seed, **part)
    say("epoch", f"{batches.batches_per_epoch:,} steps of {rows} rows")
    dev: Sequence[Batch] = []
    if "dev" in data.filled:
        dev = evaluation_batches(
            data, config.data, "dev", batch_size=config.eval.batch_size, **part
        )
        if config.eval.max_batches is not None:
            dev = dev[: config.eval.max_batches]

    # ---------------------------------------------------------------- Model
    sizes = vocabularies(tokenizers, config.data)
    # Shapes alone: the arrays are made when everything else is known to fit.
    model = models.abstract(config.model, **sizes, axis_name=parallel.manual_axes or None)
    axes = nn.parameter_axes(model)
    apply, params = nn.pure(model)
    say("model", report.model(config, params))
    if config.model.kind in ("ctc", "hybrid"):
        say("alignment", report.alignment(config, data))

    # ---------------------------------------------------------------- State and step
    optimizer = make_optimizer(config.optimizer, config.train.steps, axes)
    schedule = make_schedule(config.optimizer, config.train.steps)
    make_state = partial(init_state, optimizer=optimizer, ema=config.train.ema is not None)
    template = parallel.state(
        jax.eval_shape(make_state, params, statistics=nn.statistics(model)), axes
    )

    def first_state() -> TrainState:
        model = models.build(config.model, seed=config.seed, **sizes)
        return make_state(nn.pure(model)[1], statistics=nn.statistics(model))

    step_of_one = make_train_step(
        apply,
        optimizer,
        schedule,
        config.train,
        config.seed,
        axis_names=parallel.manual_axes,
        constrain=parallel.gradient_constraint(params, axes),
    )
    train_step = parallel.compile(step_of_one, config.train.accumulation)
    eval_step = make_loss(apply, parallel)
    shapes = parallel.batch_shapes(batches.source[0])
    traced = trace(train_step, template, shapes, model=config.model)
    say("attention", report.attention(config))
    compiling = compile_ahead(traced)

    stop = StopRequest(several=distributed.several())
    with claim(folder, resume=config.resume), stop:
        # ------------------------------------------------------------ Restore
        checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoint.keep)
        if config.resume and distributed.from_main(lambda: folder.has_checkpoint):
            state, progress = checkpoints.restore(template)
            if progress["data"] != fingerprint:
                raise RunError("the training data is not what this run began with: restore it")
            batches.set_state(progress["batches"])
            spent = progress["seconds"]
            say("resumed", f"from step {int(state.step):,} of {config.train.steps:,}")
        else:
            state, spent = run_once(first_state, like=template), 0.0
            if distributed.is_main():
                tokenizers.save(folder.tokenizers)
        if distributed.is_main():
            # How this was started is nothing that another start goes by.
            kept = dataclasses.replace(config, resume=False, distributed=DistributedConfig())
            configuration.save(kept, folder.config)
        tracker = Tracker(folder.metrics, config, start_step=int(state.step))

        def save(dev_loss: float | None) -> None:
            progress = {
                "batches": batches.get_state(),
                "data": fingerprint,
                "seconds": spent + time.perf_counter() - started,
            }
            checkpoints.save(state, progress, dev_loss)

        # ------------------------------------------------------------ Loop
        start, steps = int(state.step), config.train.steps
        compiling.exception()  # waits: a call meanwhile would compile once more
        if steps == 0:
            save(None)
        with contextlib.ExitStack() as closing:
            closing.callback(tracker.close)
            closing.callback(checkpoints.wait)
            closing.enter_context(batches)
            shown = closing.enter_context(TrainingProgress(console, start=start, steps=steps))
            for step in range(start + 1, steps + 1):
                batch = next(batches)
                state, metrics = train_step(state, parallel.batch(batch))
                # Other processes' rows hold about as many.
                shown.count(count * float(np.sum(batch["weights"])))
                # Asked once: a signal may come at any time, and must not end the loop unsaved.
                stopping = stop.after(step)
                saving = _due(step, config.checkpoint.every) or step == steps or stopping
                logging = step % config.train.log_every == 0 or step == steps
                if saving or logging:
                    values = report.finite(jax.device_get(metrics), step)
                if logging:
                    values["tokens_per_second"] = shown.show(step, values["loss"])
                    tracker.write(step, "train", values)
                dev_loss = None
                if len(dev) and (_due(step, config.eval.every) or step == steps):
                    shown.pause()
                    scores = report.finite(mean_loss(eval_step, state.evaluated, dev), step)
                    tracker.write(step, "dev", scores)
                    shown.say(
                        f"step {step}  dev loss {scores['loss']:.4f}  "
                        f"accuracy {scores['accuracy']:.4f}"
                    )
                    dev_loss = scores["loss"]
                    shown.resume()
                if saving:
                    save(dev_loss)
                if stopping:
                    break
        if stop:
            say("stopped", f"at step {int(state.step):,}; go on with: {report.resume(folder)}")
            return 128 + int(stop.number or 0)
        seconds = spent + time.perf_counter() - started

        # ------------------------------------------------------------ Scores
        evaluated, step = state.evaluated, int(state.step)
        if checkpoints.best not in (None, step):
            step = checkpoints.best
            evaluated = checkpoints.restore_evaluated(
                state.params,
                statistics=state.statistics,
                ema=config.train.ema is not None,
                step=step,
            )
        checkpoints.close()
    split = config.eval.final_split if config.eval.final_split in data.filled else "dev"
    scores, decoded, samples = {}, [], []
    if split in data.filled:
        say("scoring", f"step {step:,} on the {split} split")
    lacking = distributed.from_main(lambda: parallel.lacking(evaluated))
    if lacking:
        say("scoring", report.too_large(lacking))
        if split in data.filled:
            scored = evaluation_batches(
                data, config.data, split, batch_size=config.eval.batch_size, **part
            )
            scores = mean_loss(eval_step, evaluated, scored)
    else:
        evaluated = parallel.on_one_device(evaluated)
    if not distributed.is_main():
        return 0
    if not lacking:
        samples = report.text_samples(apply, evaluated, tokenizers, config)
    if split in data.filled and not lacking:
        scores, decoded = evaluate(
            apply,
            evaluated,
            tokenizers,
            data,
            config,
            split=split,
            max_examples=config.eval.final_examples,
        )
        from jaxformer.training import pictures  # matplotlib, which would delay the first step

        if pictures.draws_alignments(config):
            pictures.show_split(apply, evaluated, tokenizers, config, data, split, decoded, folder)
    report.summary(
        console,
        config,
        folder,
        step=step,
        split=split,
        scores=scores,
        decoded=decoded,
        samples=samples,
        mesh=mesh,
        parameters=nn.count(state.params),
        seconds=seconds,
    )
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main() -> int:
    """Reads the command line and trains; a known error is one line, without a traceback."""
    console = Console(soft_wrap=True)
    keep_compiled()
    keep_memory()
    try:
        config = parse(sys.argv[1:])
        distributed.initialize(config.distributed)
        console.quiet = not distributed.is_main()
        return train(config, console)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped before anything was saved since the last checkpoint")
        return distributed.fail(130)
    except JaxformerError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"{distributed.here()}error: {error}", style="bold red", markup=False
        )
        return distributed.fail(2)


if __name__ == "__main__":
    sys.exit(main())
