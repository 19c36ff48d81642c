"""Pictures of what CTC does with a source: frame by frame, and which label stands where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxformer.config import Config
from jaxformer.data import (
    EOS,
    PAD,
    SOS,
    Data,
    Example,
    PairData,
    Source,
    Tokenizers,
    source_batches,
)
from jaxformer.data.images import INK, write_image
from jaxformer.decoding.ctc_align import Alignment, ctc_align
from jaxformer.decoding.predict import Hypothesis, PredictionError, Translator
from jaxformer.models.output import CTCFrames, HybridPredictions
from jaxformer.nn.parameters import Params
from jaxformer.training.run import LoadedRun, RunFolder

SHOWN = 4
"""Sources of the picture that a run leaves behind."""
UNIT = {True: 0.075, False: 0.3}
"""Inches of the picture that a column of pixels takes, or a frame of a text."""


@dataclass(frozen=True)
class Aligned:
    """A source, its prediction, and how the prediction's labels lie in the frames."""

    source: Source
    predicted: str
    labels: list[int]
    probabilities: np.ndarray
    """float[frames, V]: the softmax of every frame."""
    spans: list[tuple[int, int]]
    """First frame of each label, and the one behind its last."""


def draws_alignments(config: Config) -> bool:
    """Whether a run of this configuration is shown by its alignments."""
    return config.model.kind == "ctc" or config.data.kind == "digits"


def align(
    apply: Callable[..., Any],
    params: Params,
    tokenizers: Tokenizers,
    config: Config,
    sources: Sequence[Source],
) -> list[Aligned]:
    """The best prediction of each source, aligned to its frames (Viterbi).

    Raises PredictionError where the model has no frames for CTC.
    """
    if config.model.kind not in ("ctc", "hybrid"):
        raise PredictionError(
            f"model.kind={config.model.kind!r} has no frames to align: it was not trained by CTC"
        )
    hypotheses = Translator(apply, tokenizers, config)(params, sources)
    found = []
    for source, best in zip(sources, hypotheses, strict=True):
        predicted = best[0].text if best else ""
        [batch] = source_batches([source], tokenizers, config.data, batch_size=1)
        inputs = jnp.full((1, 1), SOS, jnp.int32)
        predictions = apply(
            params,
            jnp.asarray(batch["source"]),
            inputs,
            source_segment_ids=jnp.asarray(batch["source_segment_ids"]),
            method="predictions",
        )
        frames = predictions.frames if isinstance(predictions, HybridPredictions) else predictions
        labels = tokenizers.target.encode(predicted)
        alignment = _forced(frames, labels)
        length = int(frames.lengths[0])
        spans = zip(alignment.starts[0].tolist(), alignment.ends[0].tolist(), strict=True)
        found.append(
            Aligned(
                source,
                predicted,
                labels,
                np.asarray(jax.nn.softmax(frames.logits[0, :length])),
                list(spans)[: len(labels)],
            )
        )
    return found


def draw_alignments(
    found: Sequence[Aligned], titles: Sequence[str], tokenizers: Tokenizers, output: Path
) -> None:
    """Draws each source, below it what every frame says, and the spans of the labels, as a PNG."""
    widest = max(_width(aligned) * UNIT[not isinstance(aligned.source, str)] for aligned in found)
    figure = Figure(figsize=(max(widest, 4) + 1.5, 2.3 * len(found) + 0.3), layout="constrained")
    rows = figure.subplots(2 * len(found), 1, squeeze=False, height_ratios=[1, 1.6] * len(found))
    for number, (aligned, title) in enumerate(zip(found, titles, strict=True)):
        above, below = rows[2 * number, 0], rows[2 * number + 1, 0]
        _draw_source(above, aligned, tokenizers)
        above.set_title(title, fontsize=9, loc="left")
        _draw_frames(below, aligned, tokenizers)
    # One scale for all, else a short line is stretched.
    right = max(_width(aligned) for aligned in found)
    for axes in rows[:, 0]:
        axes.set_xlim(0, right)
    unit = "frame" if isinstance(found[0].source, str) else "column of pixels"
    rows[-1, 0].set_xlabel(f"{unit} (grey: the blank)")
    figure.savefig(output, dpi=150)


def show_source(run: LoadedRun, source: Source, output: Path) -> str:
    """Draws the alignment of one source's prediction, which it returns. Raises PredictionError."""
    found = align(run.apply, run.params, run.tokenizers, run.config, [source])
    name = f"{source} → " if isinstance(source, str) else ""
    draw_alignments(found, [f"{name}{found[0].predicted}"], run.tokenizers, output)
    return found[0].predicted


def show_split(
    apply: Callable[..., Any],
    params: Params,
    tokenizers: Tokenizers,
    config: Config,
    data: Data,
    split: str,
    decoded: Sequence[tuple[Example, Hypothesis]],
    folder: RunFolder,
) -> None:
    """Writes RUN/alignment.png, of a few decoded examples, and RUN/line.png, the first one's image.

    Among the examples is one with a wrong prediction, if there was any.
    """
    wrong = [n for n, (example, best) in enumerate(decoded) if best.text not in example.references]
    places = np.linspace(0, len(decoded), SHOWN, endpoint=False).astype(int).tolist()
    chosen = list(dict.fromkeys([*places[: SHOWN - 1], *(wrong or places)[:1]]))
    assert isinstance(data, PairData)
    encoded = data.splits[split]
    numbers = {id(example): number for number, example in enumerate(encoded.examples)}
    sources = [encoded.source(numbers[id(decoded[place][0])]) for place in chosen]
    found = align(apply, params, tokenizers, config, sources)
    titles = []
    for aligned, place in zip(found, chosen, strict=True):
        example = decoded[place][0]
        right = aligned.predicted in example.references
        verdict = "right" if right else f"wrong: {' / '.join(example.references)}"
        titles.append(f"{example.source} → {aligned.predicted} ({verdict})")
    draw_alignments(found, titles, tokenizers, folder.alignment)
    if not isinstance(sources[0], str):
        write_image(folder.line, sources[0])


def _forced(frames: CTCFrames, labels: list[int]) -> Alignment:
    # At least one place, as no array can be empty; its length says that there is no label.
    padded = jnp.asarray([labels or [PAD]], jnp.int32)
    return ctc_align(frames.logits, frames.lengths, padded, jnp.array([len(labels)], jnp.int32))


def _width(aligned: Aligned) -> int:
    """How wide the axes are: columns of an image, frames of a text."""
    source = aligned.source
    return len(aligned.probabilities) if isinstance(source, str) else len(source)


def _draw_source(axes: Axes, aligned: Aligned, tokenizers: Tokenizers) -> None:
    width = _width(aligned)
    if isinstance(aligned.source, str):
        assert tokenizers.source is not None
        letters = [*tokenizers.source.encode(aligned.source), EOS]
        names = [
            "<eos>" if token == EOS else tokenizers.source.decode([token]) for token in letters
        ]
        step = width / len(names)
        for place, name in enumerate(names):
            axes.text((place + 0.5) * step, 0.5, name, ha="center", va="center", fontsize=12)
            axes.axvline(place * step, color="0.8", linewidth=0.8)
        axes.set(ylim=(0, 1))
    else:
        image = INK - aligned.source.T
        extent = (0, width, len(image), 0)
        axes.imshow(image, cmap="gray", vmin=0, vmax=INK, extent=extent, aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_frames(axes: Axes, aligned: Aligned, tokenizers: Tokenizers) -> None:
    width, frames = _width(aligned), len(aligned.probabilities)
    step = width / frames
    middles = (np.arange(frames) + 0.5) * step
    axes.plot(middles, aligned.probabilities[:, PAD], color="0.6", linewidth=0.8)
    colours = {label: f"C{n % 10}" for n, label in enumerate(dict.fromkeys(aligned.labels))}
    for label, colour in colours.items():
        axes.plot(middles, aligned.probabilities[:, label], color=colour, linewidth=1.2)
    for label, (first, last) in zip(aligned.labels, aligned.spans, strict=True):
        axes.axvspan(first * step, last * step, color=colours[label], alpha=0.25, linewidth=0)
        name = tokenizers.target.decode([label])
        axes.text((first + last) / 2 * step, 1.08, name, ha="center", va="bottom", fontsize=9)
    axes.set(ylim=(0, 1.35), yticks=[0, 0.5, 1], ylabel="probability")
