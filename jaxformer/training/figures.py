"""Pictures of a run: its loss curves, and where a prediction attended to."""

from collections.abc import Iterable
from pathlib import Path
from typing import SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from jaxformer.data import source_batches
from jaxformer.data.tokenizers import EOS, SOS, Tokenizer
from jaxformer.decoding.predict import PredictionError, Translator
from jaxformer.training.run import LoadedRun, RunFolder
from jaxformer.training.tracking import read_metrics


def loss_curve(folder: RunFolder, output: Path, title: str) -> None:
    """Draws train and dev loss (nats a token) against the step as a PNG."""
    train, dev = read_metrics(folder.metrics, "train"), read_metrics(folder.metrics, "dev")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        steps = np.array([line["step"] for line in train])
        losses = np.array([line["loss"] for line in train])
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color="tab:blue", label="train (smoothed)")
    if dev:
        axes.plot(
            [line["step"] for line in dev],
            [line["loss"] for line in dev],
            "o-",
            color="tab:orange",
            label="dev",
        )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    # The first steps stand so high that on a linear axis the rest would be flat.
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(ticker.FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.grid(alpha=0.3, which="both")
    if train or dev:
        axes.legend()
    figure.savefig(output, dpi=150)


def attention_map(run: LoadedRun, source: str, output: Path) -> str:
    """Draws the cross-attention of a source's best prediction, a panel a layer, as a PNG.

    Heads are averaged. Returns the prediction. Raises PredictionError for a model without source.
    """
    translator = Translator(run.apply, run.tokenizers, run.config)
    [hypotheses] = translator(run.params, [source])
    if not hypotheses:
        raise PredictionError(f"nothing was predicted for {source!r}")
    predicted = hypotheses[0].text
    [batch] = source_batches([source], run.tokenizers, run.config.data, batch_size=1)
    length = int(batch["source_segment_ids"].sum())
    target = run.tokenizers.target.encode(predicted)
    weights = run.apply(
        run.params,
        jnp.asarray(batch["source"]),
        jnp.array([[SOS, *target]], jnp.int32),
        source_segment_ids=jnp.asarray(batch["source_segment_ids"]),
        method="cross_attention_weights",
    )
    panels = np.asarray(jax.device_get(weights))[:, 0, :, :, :length].mean(axis=2)
    assert run.tokenizers.source is not None
    columns = _labels(run.tokenizers.source, batch["source"][0, :length])
    rows = _labels(run.tokenizers.target, [*target, EOS])
    figure = Figure(
        figsize=(1.5 + len(panels) * (1 + 0.28 * len(columns)), 1.5 + 0.28 * len(rows)),
        layout="constrained",
    )
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for layer, (panel, axis) in enumerate(zip(panels, axes[0], strict=True)):
        image = axis.imshow(panel, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(title=f"layer {layer + 1}", xlabel="source")
    axes[0][0].set_ylabel("predicted")
    figure.colorbar(image, ax=list(axes[0]), label="attention weight, mean over heads")
    figure.savefig(output, dpi=150)
    return predicted


def _labels(tokenizer: Tokenizer, ids: Iterable[SupportsInt]) -> list[str]:
    return ["<eos>" if token == EOS else tokenizer.decode([int(token)]) for token in ids]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a thirtieth of the curve, shorter at its ends."""
    reach = max(len(values) // 60, 1)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
