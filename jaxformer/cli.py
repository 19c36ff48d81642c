"""`jaxformer <verb>`: what is done with a trained run, and what a run would take."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from jaxformer import presets as preset_registry
from jaxformer.config import Config, check_decode
from jaxformer.config import load as load_config
from jaxformer.data import (
    Batch,
    Source,
    encode_corpus,
    load_corpus,
    normal_source,
    pair_batches,
    read_image,
    text_batches,
)
from jaxformer.data.tokenizers import UNK
from jaxformer.decoding.generate import make_score
from jaxformer.decoding.predict import Generator, Translator
from jaxformer.errors import JaxformerError
from jaxformer.runtime import keep_compiled, keep_memory
from jaxformer.training.evaluation import evaluate as evaluate_split
from jaxformer.training.run import LoadedRun, RunFolder, load_run
from jaxformer.training.tracking import read_metrics

RunPath = Annotated[Path, arg(help="Run folder, such as runs/g2p-20260101-120000.")]
INTERACTIVE_PROMPT = "> "


def presets(name: Positional[str | None] = None) -> None:
    """List the presets, or describe one.

    Args:
        name: A preset, to read its whole description.
    """
    if name is not None:
        print((preset_registry.module(name).__doc__ or "").strip())
        return
    for known in preset_registry.names():
        print(f"{known:<24}{preset_registry.description(known)}")


def predict(
    run: Positional[RunPath],
    input: tuple[str, ...] = ("-",),
    beam: int | None = None,
    n_best: int = 1,
    length_penalty: float | None = None,
    max_length: int | None = None,
    min_length: int | None = None,
    step: int | None = None,
) -> None:
    """Predict the target of every line, or of every picture of a line.

    Prints one line a prediction, in the order of the input. With --n-best above 1 a line is
    source, prediction and log-probability (nats), separated by tabs, and sources that have fewer
    hypotheses have fewer lines. A run on images takes PNGs, each cut to one line: of any size and
    colour, dark on light or light on dark.

    Args:
        run: Run folder.
        input: Files with a source a line, - is standard input; for a run on images, PNGs.
        beam: Beam width; 1 is greedy. Default: the run's.
        n_best: Predictions a source, the best first.
        length_penalty: GNMT's alpha. Default: the run's.
        max_length: Longest prediction in tokens. Default: the run's.
        min_length: Shortest prediction in tokens. Default: the run's.
        step: Checkpoint to use. Default: the one with the lowest dev loss.
    """
    loaded = load_run(run, step=step)
    config = _decoding(
        loaded.config,
        beam=beam,
        length_penalty=length_penalty,
        max_length=max_length,
        min_length=min_length,
    )
    if beam is None and n_best > config.decode.beam:
        config = _decoding(config, beam=n_best)
    translator = Translator(loaded.apply, loaded.tokenizers, config, n_best=n_best)
    for names, sources in _sources(loaded, input):
        for name, found in zip(names, translator(loaded.params, sources), strict=True):
            for hypothesis in found:
                if n_best == 1:
                    print(hypothesis.text, flush=True)
                else:
                    print(f"{name}\t{hypothesis.text}\t{hypothesis.log_prob:.4f}", flush=True)


def generate(
    run: Positional[RunPath],
    prompt: str = "",
    max_new: int = 200,
    samples: int = 1,
    seed: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    step: int | None = None,
) -> None:
    """Continue a prompt with a language model.

    Args:
        run: Run folder.
        prompt: Text to continue; empty starts a document.
        max_new: Most new tokens.
        samples: Number of continuations.
        seed: Of the sampling.
        temperature: Softmax temperature; 0 is greedy. Default: the run's.
        top_k: Sample among the k likeliest tokens. Default: the run's.
        top_p: Sample among the smallest set with this probability. Default: the run's.
        min_p: Drop tokens less likely than this share of the likeliest. Default: the run's.
        step: Checkpoint to use. Default: the one with the lowest dev loss.
    """
    loaded = load_run(run, step=step)
    config = _decoding(
        loaded.config, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    generator = Generator(loaded.apply, loaded.tokenizers, config, max_new=max_new)
    for number, text in enumerate(generator(loaded.params, [prompt] * samples, seed=seed)):
        if number:
            print("-" * 80)
        print(text)


def score(run: Positional[RunPath], input: str = "-", step: int | None = None) -> None:
    """Print the log-probability (nats) of given text, a line each.

    Args:
        run: Run folder.
        input: File with a text a line (language models) or source<TAB>target; - is standard input.
        step: Checkpoint to use. Default: the one with the lowest dev loss.
    """
    loaded = load_run(run, step=step)
    score_batch = make_score(loaded.apply)
    for lines in _portions(input):
        batches = _given(lines, loaded)
        found: dict[int, float] = {}
        for batch in batches:
            scores = score_batch(loaded.params, batch)
            found |= {int(i): float(s) for i, s in zip(batch["index"], scores, strict=True)}
        for number in range(len(lines)):
            print(f"{found[number]:.6f}", flush=True)


def evaluate(
    run: Positional[RunPath],
    split: str = "test",
    beam: int | None = None,
    length_penalty: float | None = None,
    max_examples: int | None = None,
    step: int | None = None,
    json_output: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Score a run on a split of its data.

    Pairs: wer (share of sources whose prediction is none of the references; the string error of
    digits), per (edits a reference token; their digit error), loss (nats a token), examples. Text:
    loss, bits_per_byte, perplexity.

    Args:
        run: Run folder.
        split: train, dev or test.
        beam: Beam width; 1 is greedy. Default: the run's.
        length_penalty: GNMT's alpha. Default: the run's.
        max_examples: Decode this many examples only. Default: all.
        step: Checkpoint to use. Default: the one with the lowest dev loss.
        json_output: Print one JSON object.
    """
    loaded = load_run(run, step=step)
    config = _decoding(loaded.config, beam=beam, length_penalty=length_penalty)
    data = encode_corpus(load_corpus(config.data), loaded.tokenizers, config.data)
    if split not in data.filled:
        known = ", ".join(data.filled)
        raise JaxformerError(f"this run's data has no split {split!r}; it has {known}")
    scores, _ = evaluate_split(
        loaded.apply,
        loaded.params,
        loaded.tokenizers,
        data,
        config,
        split=split,
        max_examples=max_examples,
    )
    if json_output:
        print(json.dumps(scores))
        return
    for name, value in scores.items():
        print(f"{name:<16}{value:.6g}")


def show(
    run: Positional[RunPath],
    source: str | None = None,
    input: Path | None = None,
    output: Path | None = None,
    step: int | None = None,
) -> None:
    """Draw the loss curves or, for a source, what its prediction looked at.

    That is where it attended to or, with CTC, at which frames each label stands.

    Args:
        run: Run folder.
        source: A source, to draw the cross-attention of its prediction or (CTC) its alignment.
        input: A PNG, which is the source of a run on images.
        output: PNG to write. Default: loss.png, attention.png or alignment.png in the run folder.
        step: Checkpoint to use. Default: the one with the lowest dev loss.
    """
    from jaxformer.training import figures  # matplotlib, which no other verb needs

    folder = RunFolder(run)
    if source is None and input is None:
        output = output or folder.loss_curve
        if not folder.metrics.exists():
            raise JaxformerError(f"{run} has no {folder.metrics.name}: is it a run folder?")
        figures.loss_curve(folder, output, f"{load_config(folder.config).preset}: loss")
        for kind in ("train", "dev"):
            lines = read_metrics(folder.metrics, kind)
            if lines:
                last = lines[-1]
                print(f"{kind:<6}step {last['step']:,}  loss {last['loss']:.4f}")
    else:
        output = _show_source(load_run(run, step=step), source, input, output)
    print(output)


def plan(preset: Positional[str], topology: str) -> None:
    """Compile a training step for hardware that need not be there: does it fit, how fast at best?

    `jaxformer plan --help` lists what can be asked.

    Args:
        preset: A preset, a config.json or a run folder, as for train.py.
        topology: The machine: v5p:4x4x4, v5p-128, v5e-256, v6e:8x8, h100:8, cpu:8.
    """
    _plan([preset, "--topology", topology])


def _plan(arguments: Sequence[str]) -> None:
    """The verb with the options of the plan and all of the configuration's."""
    from jaxformer.arguments import parse
    from jaxformer.plan import command  # the parts of training, which no other verb needs

    command.run(arguments, lambda rest: parse(rest, "jaxformer plan"))


def _show_source(
    loaded: LoadedRun, source: str | None, input: Path | None, output: Path | None
) -> Path:
    from jaxformer.training import figures, pictures

    images = loaded.config.data.kind == "digits"
    if images != (source is None) or images != (input is not None):
        wanted = "--input PICTURE.png" if images else "--source TEXT"
        raise JaxformerError(f"this run reads {'images' if images else 'text'}: give {wanted}")
    model = loaded.config.model
    if model.kind == "recurrent" and model.recurrent.context == "final":
        raise JaxformerError(
            "this run's decoder attends to nothing (model.recurrent.context='final'), so there is "
            "nothing to draw; g2p-bahdanau and g2p-luong attend"
        )
    if pictures.draws_alignments(loaded.config):
        output = output or loaded.folder.alignment
        given = str(source) if input is None else read_image(input)
        predicted = pictures.show_source(loaded, given, output)
    else:
        output = output or loaded.folder.path / "attention.png"
        predicted = figures.attention_map(loaded, str(source), output)
    print(f"{input or source} -> {predicted}")
    return output


def _sources(
    loaded: LoadedRun, inputs: Sequence[str]
) -> Iterator[tuple[Sequence[str], Sequence[Source]]]:
    """What is to be predicted from, and how each is called: texts by lines, or images by files."""
    if loaded.config.data.kind != "digits":
        for name in inputs:
            for lines in _portions(name):
                _warn_of_unknown(loaded, lines)
                yield lines, lines
        return
    if "-" in inputs:
        raise JaxformerError("this run reads images: name PNGs, --input LINE.png ...")
    yield inputs, [read_image(name) for name in inputs]


def _portions(name: str) -> Iterator[list[str]]:
    """The lines of a file or of standard input, all at once; typed ones one by one."""
    if name == "-" and sys.stdin.isatty():
        while True:
            try:
                line = input(INTERACTIVE_PROMPT)
            except EOFError:
                print()
                return
            if line.strip():
                yield [line]
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise JaxformerError(f"--input {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise JaxformerError(
            f"--input {name} is not UTF-8 (byte {error.start}): convert it first"
        ) from None
    if lines[-1] == "":
        lines.pop()
    if lines:
        yield lines


def _given(lines: Sequence[str], loaded: LoadedRun) -> Sequence[Batch]:
    rows = loaded.config.eval.batch_size
    if loaded.config.model.kind == "decoder":
        longest = loaded.config.model.max_length
        return text_batches(lines, loaded.tokenizers, longest=longest, batch_size=rows)
    return pair_batches(lines, loaded.tokenizers, loaded.config.data, batch_size=rows)


def _decoding(config: Config, **options: Any) -> Config:
    """The configuration with those decoding options that are given."""
    given = {name: value for name, value in options.items() if value is not None}
    decode = dataclasses.replace(config.decode, **given)
    return check_decode(dataclasses.replace(config, decode=decode))


def _warn_of_unknown(loaded: LoadedRun, sources: Sequence[str]) -> None:
    tokenizer = loaded.tokenizers.source
    if tokenizer is None:
        return
    for source in sources:
        if UNK in tokenizer.encode(normal_source(source, loaded.config.data)):
            print(
                f"warning: {source!r} has tokens that training never saw; its prediction is a "
                "guess",
                file=sys.stderr,
            )


VERBS: dict[str, Callable[..., None]] = {
    "presets": presets,
    "predict": predict,
    "generate": generate,
    "score": score,
    "evaluate": evaluate,
    "show": show,
    "plan": plan,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb. Exits with 2 and one line on a known error."""
    keep_compiled()
    keep_memory()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given[:1] == ["plan"]:  # whose options are those of train.py too
            _plan(given[1:])
            return
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="jaxformer",
            description="What is done with a trained run, and what one would take. Training: "
            "python train.py PRESET.",
            args=given,
        )
    except JaxformerError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {error}", style="bold red", markup=False
        )
        sys.exit(2)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
