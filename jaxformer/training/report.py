"""What a run says of itself: the first lines, and the page at the end."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxformer.config import Config
from jaxformer.data import Data, Example, PairData, Tokenizers
from jaxformer.decoding.predict import Generator, Hypothesis
from jaxformer.errors import JaxformerError
from jaxformer.models.frames import frame_lengths
from jaxformer.nn.parameters import Params, count
from jaxformer.training.published import PRONUNCIATION
from jaxformer.training.run import RunFolder
from jaxformer_kernels import dispatch

SAMPLES = 10
SAMPLE_TOKENS = 200


class DivergedError(JaxformerError):
    """The loss is no longer a number."""


def speaker(console: Console) -> Callable[[str, str], None]:
    """A function that prints a labelled line."""
    return lambda label, text: console.print(
        f"{label + ':':<11}{text}", highlight=False, markup=False
    )


def devices(mesh: Mesh) -> str:
    """The devices of the mesh, of those there are, and how they are arranged."""
    kind = mesh.devices.flat[0]
    there = len(jax.devices())
    used = f"{mesh.size}" if mesh.size == there else f"{mesh.size} of {there}"
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    arranged = f", mesh: {shape}" if shape else ""
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{used} x {kind.device_kind} ({kind.platform}), jax {jax.__version__}{arranged}{processes}"
    )


def model(config: Config, params: Params) -> str:
    """Kind and size of the model."""
    shape = config.model
    encoder = shape.layers if shape.encoder_layers is None else shape.encoder_layers
    layers = {"decoder": f"{shape.layers}", "ctc": f"{encoder}"}
    depth = layers.get(shape.kind, f"{encoder} + {shape.layers}")
    depth += " layer" if depth == "1" else " layers"
    return (
        f"{shape.kind}, {depth}, width {shape.width}, {count(params):,} parameters "
        f"({shape.param_dtype}, computing in {shape.compute_dtype})"
    )


def attention(config: Config) -> str:
    """Which attention implementation the calls got that were traced so far."""
    if config.model.attention is not None:
        return f"{config.model.attention} (asked for)"
    picked = ", ".join(dispatch.picked("attention"))
    return f"{picked} (the platform's choice)" if picked else "no fused kernel in this model"


def alignment(config: Config, data: Data) -> str:
    """How many pairs CTC cannot learn from, for want of frames: labels and repeats outnumber them.

    Equal neighbours need a blank between them, so they take a frame more.
    """
    assert isinstance(data, PairData)
    impossible, items = 0, 0
    for split in data.splits.values():
        lengths = split.sources.lengths[split.item_example]
        frames = frame_lengths(config.model, lengths, images=config.data.kind == "digits")
        targets = split.targets
        repeats = np.append(0, np.cumsum(targets.tokens[1:] == targets.tokens[:-1]))
        # Each target ends in <eos>, which is no label and equals no neighbour.
        within = repeats[targets.offsets[1:] - 1] - repeats[targets.offsets[:-1]]
        impossible += int((targets.lengths - 1 + within > frames).sum())
        items += len(targets)
    if not impossible:
        return f"every one of {items:,} targets fits into its source's frames"
    more = "more columns" if config.data.kind == "digits" else "a larger --model.ctc.upsample"
    return (
        f"{impossible:,} of {items:,} targets have more labels than their source has frames; "
        f"nothing is learned of them, and they cannot be predicted ({more} would help)"
    )


def finite(metrics: Mapping[str, Any], step: int) -> dict[str, float]:
    """Metrics as Python numbers. Raises DivergedError when the loss is not a number."""
    values = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(values["loss"]):
        raise DivergedError(
            f"the loss is {values['loss']} at step {step}: lower --optimizer.learning-rate, "
            "lengthen --optimizer.warmup-steps, or set --optimizer.clip-norm 1"
        )
    return values


def resume(folder: RunFolder) -> str:
    """The command that goes on with a run."""
    return f"python train.py {folder.path} --resume"


def too_large(lacking: int) -> str:
    """Why nothing is decoded of a model that one device cannot hold."""
    return (
        f"the loss alone: to decode, a device has {lacking / 2**30:.2f} GiB too little for all "
        "parameters; `jaxformer evaluate RUN` does it on a machine with more"
    )


def text_samples(
    apply: Callable[..., Any], params: Params, tokenizers: Tokenizers, config: Config
) -> list[str]:
    """A few texts from nothing, by a language model; none by an encoder-decoder."""
    if config.model.kind != "decoder":
        return []
    generator = Generator(apply, tokenizers, config, max_new=SAMPLE_TOKENS)
    return generator(params, [""] * 2, seed=config.seed)


def summary(
    console: Console,
    config: Config,
    folder: RunFolder,
    *,
    step: int,
    split: str,
    scores: dict[str, float],
    decoded: Sequence[tuple[Example, Hypothesis]],
    samples: Sequence[str],
    mesh: Mesh,
    parameters: int,
    seconds: float,
) -> None:
    """Writes RUN/summary.md and RUN/loss.png and prints the page."""
    from jaxformer.training import figures  # matplotlib, which would delay the first step

    figures.loss_curve(folder, folder.loss_curve, f"{config.preset}: loss")
    lines = [
        f"# {config.preset}",
        "",
        f"{parameters:,} parameters, {config.train.steps:,} steps, "
        f"{seconds / 60:.1f} minutes on {devices(mesh)}.",
        "",
        f"## Scores ({split} split, parameters of step {step:,})",
        "",
    ]
    if "wer" in scores:
        lines += _error_table(config, scores)
    else:
        lines += [f"- {name}: {value:.4f}" for name, value in scores.items()]
    lines += ["", f"![loss]({folder.loss_curve.name})", ""]
    if folder.alignment.exists():
        lines += [f"![alignment]({folder.alignment.name})", ""]
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
    lines += ["", "## Next", "", "```", *_next_commands(config, folder, split), "```"]
    page = "\n".join(lines) + "\n"
    folder.summary.write_text(page, encoding="utf-8")
    console.print("\n" + page, highlight=False, markup=False)
    console.print(f"This page: {folder.summary}", highlight=False, markup=False)


def _error_table(config: Config, scores: dict[str, float]) -> list[str]:
    digits = config.data.kind == "digits"
    lines = [
        "| | digit error % | string error % |" if digits else "| | PER % | WER % |",
        "|---|---|---|",
        f"| **this run**, beam {config.decode.beam}, {scores['examples']:,.0f} sources "
        f"| **{100 * scores['per']:.2f}** | **{100 * scores['wer']:.2f}** |",
    ]
    if config.data.kind == "pronunciation" and not config.data.keep_stress:
        lines += [f"| {name} | {per:.2f} | {wer:.2f} |" for name, per, wer in PRONUNCIATION]
        lines += ["", "Published figures are on splits of their own; every listed variant counts."]
    how = "" if config.model.kind == "ctc" else " under teacher forcing"
    return [*lines, "", f"Loss{how}: {scores['loss']:.4f} nats a token."]


def _next_commands(config: Config, folder: RunFolder, split: str) -> list[str]:
    if config.model.kind == "decoder":
        return [
            f'jaxformer generate {folder.path} --prompt "..."',
            f"jaxformer evaluate {folder.path} --split {split} --json",
            f"jaxformer show {folder.path}",
        ]
    if config.data.kind == "digits":
        return [
            f"jaxformer predict {folder.path} --input {folder.line}",
            f"jaxformer evaluate {folder.path} --split {split} --beam 4 --json",
            f"jaxformer show {folder.path} --input {folder.line}",
        ]
    word = "serendipity" if config.data.kind == "pronunciation" else "..."
    return [
        f"echo {word} | jaxformer predict {folder.path} --beam 4 --n-best 3",
        f"jaxformer evaluate {folder.path} --split {split} --beam 4 --json",
        f"jaxformer show {folder.path} --source {word}",
    ]
