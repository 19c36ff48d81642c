"""What a run says of itself: the first lines, and the page at the end."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxformer_kernels
import matplotlib
import numpy as np
from rich.console import Console

from jaxformer.config import Config
from jaxformer.data import Data, Example, PairData, Tokenizers
from jaxformer.decoding.predict import Generator, Hypothesis
from jaxformer.nn.parameters import Params, count
from jaxformer.training.published import PRONUNCIATION
from jaxformer.training.run import RunFolder
from jaxformer.training.tracking import read_metrics

SAMPLES = 10
SAMPLE_TOKENS = 200


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def speaker(console: Console) -> Callable[[str, str], None]:
    """A function that prints a labelled line."""
    return lambda label, text: console.print(
        f"{label + ':':<11}{text}", highlight=False, markup=False
    )


def devices() -> str:
    """How many devices of which kind this process has."""
    found = jax.devices()
    return f"{len(found)} x {found[0].device_kind} ({found[0].platform}), jax {jax.__version__}"


def model(config: Config, params: Params) -> str:
    """Kind and size of the model."""
    shape = config.model
    depth = f"{shape.layers} layers"
    if shape.kind == "encoder_decoder":
        encoder = shape.layers if shape.encoder_layers is None else shape.encoder_layers
        depth = f"{encoder} + {shape.layers} layers"
    return (
        f"{shape.kind}, {depth}, width {shape.width}, {count(params):,} parameters "
        f"({shape.param_dtype}, computing in {shape.compute_dtype})"
    )


def attention(config: Config, data: Data) -> str:
    """Which attention implementation this run's calls get."""
    if config.model.attention is not None:
        return f"{config.model.attention} (chosen)"
    return "chosen by platform"


def require_finite(values: dict[str, float], step: int) -> None:
    """Raises DivergedError when the loss is not a number."""
    if not math.isfinite(values["loss"]):
        raise DivergedError(
            f"the loss is {values['loss']} at step {step}: lower --optimizer.learning-rate, "
            "lengthen --optimizer.warmup-steps, or set --optimizer.clip-norm 1"
        )


def resume(folder: RunFolder) -> str:
    """The command that goes on with a run."""
    return f"python train.py {folder.path} --resume"


def text_samples(
    apply: Callable[..., Any], params: Params, tokenizers: Tokenizers, config: Config
) -> list[str]:
    """A few texts from nothing, by a language model; none by an encoder-decoder."""
    if config.model.kind != "decoder":
        return []
    new = min(SAMPLE_TOKENS, config.model.max_length - 1)
    generator = Generator(apply, tokenizers, config, max_new=new)
    return generator(params, [""] * 2, seed=config.seed)


def loss_curve(folder: RunFolder, title: str) -> None:
    """Draws train and dev loss against the step into the run folder."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, dev = read_metrics(folder.metrics, "train"), read_metrics(folder.metrics, "dev")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if train:
        steps = np.array([line["step"] for line in train])
        losses = np.array([line["loss"] for line in train])
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color="tab:blue", label="train (smoothed)")
        # The first steps stand so high that the rest would be flat.
        top = np.quantile(losses, 0.98) * 1.1
        axes.set_ylim(bottom=min(0.95 * losses.min(), _lowest(dev)), top=top)
    if dev:
        axes.plot(
            [line["step"] for line in dev],
            [line["loss"] for line in dev],
            "o-",
            color="tab:orange",
            label="dev",
        )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder.loss_curve, dpi=150)
    pyplot.close(figure)


def summary(
    console: Console,
    config: Config,
    folder: RunFolder,
    *,
    split: str,
    scores: dict[str, float],
    decoded: Sequence[tuple[Example, Hypothesis]],
    samples: Sequence[str],
    parameters: int,
    seconds: float,
) -> None:
    """Writes RUN/summary.md and RUN/loss.png and prints the page."""
    loss_curve(folder, f"{config.preset}: loss")
    lines = [
        f"# {config.preset}",
        "",
        f"{parameters:,} parameters, {config.train.steps:,} steps, "
        f"{seconds / 60:.1f} minutes on {devices()}.",
        "",
        f"## Scores ({split} split)",
        "",
    ]
    if "wer" in scores:
        lines += _error_table(config, scores)
    else:
        lines += [f"- {name}: {value:.4f}" for name, value in scores.items()]
    lines += ["", f"![loss]({folder.loss_curve.name})", ""]
    if decoded or samples:
        lines += ["## Samples", ""]
    if decoded:
        lines += ["| source | predicted | right |", "|---|---|---|"]
        for example, hypothesis in decoded[:: max(len(decoded) // SAMPLES, 1)][:SAMPLES]:
            right = hypothesis.text in example.references
            verdict = "yes" if right else " / ".join(example.references)
            lines.append(f"| {example.source} | {hypothesis.text} | {verdict} |")
    for sample in samples:
        lines += ["```", sample, "```", ""]
    lines += ["", "## Next", "", "```", *_next_commands(config, folder), "```"]
    page = "\n".join(lines) + "\n"
    folder.summary.write_text(page, encoding="utf-8")
    console.print("\n" + page, highlight=False, markup=False)
    console.print(f"This page: {folder.summary}", highlight=False, markup=False)


def _error_table(config: Config, scores: dict[str, float]) -> list[str]:
    lines = [
        "| | PER % | WER % |",
        "|---|---|---|",
        f"| **this run**, beam {config.decode.beam}, {scores['examples']:,.0f} sources "
        f"| **{100 * scores['per']:.2f}** | **{100 * scores['wer']:.2f}** |",
    ]
    if config.data.kind == "pronunciation" and not config.data.keep_stress:
        lines += [f"| {name} | {per:.2f} | {wer:.2f} |" for name, per, wer in PRONUNCIATION]
        lines += ["", "Published figures are on splits of their own; every listed variant counts."]
    return [*lines, "", f"Loss under teacher forcing: {scores['loss']:.4f} nats a token."]


def _next_commands(config: Config, folder: RunFolder) -> list[str]:
    if config.model.kind == "decoder":
        return [
            f'jaxformer generate {folder.path} --prompt "..."',
            f"jaxformer evaluate {folder.path} --split test --json",
            f"jaxformer show {folder.path}",
        ]
    word = "serendipity" if config.data.kind == "pronunciation" else "..."
    return [
        f"echo {word} | jaxformer predict {folder.path} --beam 4 --n-best 3",
        f"jaxformer evaluate {folder.path} --split test --beam 4 --json",
        f"jaxformer show {folder.path} --source {word}",
    ]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a thirtieth of the curve, shorter at its ends."""
    reach = max(len(values) // 60, 1)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _lowest(lines: Sequence[dict[str, Any]]) -> float:
    return min((0.95 * line["loss"] for line in lines), default=math.inf)
