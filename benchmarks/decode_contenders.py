"""The contenders of `benchmarks.decode`: one GPT-2-shaped model, three ways of decoding with it.

Every contender draws the same weights with numpy. A cell is (batch, beam). `turn` returns what one
took: `first_s` up to the first new token, which is reading the prompt, and `all_s` for all of them.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = 4
"""Ids below are <pad>, <sos>, <eos>, <unk>: their rows of the embedding are zero, so that they are
never the likeliest and no contender has to forbid them."""

Weights = dict[str, np.ndarray]
Cell = tuple[int, int]
Generate = Callable[[int], dict[str, np.ndarray]]
Turn = Callable[[int, int], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model, and of what it reads and writes."""

    layers: int = 6
    heads: int = 6
    width: int = 384
    vocabulary: int = 65
    prompt: int = 32
    new: int = 224

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the continuation."""
        return self.prompt + self.new


def weights(shape: Shape) -> Weights:
    """GPT-2's arrays by their names; layers are stacked along the first axis."""
    random = np.random.default_rng(0)
    layers, width = shape.layers, shape.width

    def normal(*sizes: int, deviation: float) -> np.ndarray:
        return random.normal(0, deviation, sizes).astype(np.float32)

    def matrix(inner: int, outer: int) -> np.ndarray:
        return normal(layers, inner, outer, deviation=inner**-0.5)

    drawn = {
        "wte": normal(shape.vocabulary, width, deviation=0.1),
        "wpe": normal(shape.length, width, deviation=0.1),
        "attn.c_attn.weight": matrix(width, 3 * width),
        "attn.c_attn.bias": normal(layers, 3 * width, deviation=0.1),
        "attn.c_proj.weight": matrix(width, width),
        "attn.c_proj.bias": normal(layers, width, deviation=0.1),
        "mlp.c_fc.weight": matrix(width, 4 * width),
        "mlp.c_fc.bias": normal(layers, 4 * width, deviation=0.1),
        "mlp.c_proj.weight": matrix(4 * width, width),
        "mlp.c_proj.bias": normal(layers, width, deviation=0.1),
    }
    for name, sizes in (("ln_1", (layers, width)), ("ln_2", (layers, width)), ("ln_f", (width,))):
        drawn[f"{name}.weight"] = 1 + normal(*sizes, deviation=0.1)
        drawn[f"{name}.bias"] = normal(*sizes, deviation=0.1)
    drawn["wte"][:SPECIAL] = 0.0
    return drawn


def prompts(shape: Shape, batch: int) -> np.ndarray:
    """int32[batch, prompt]; a smaller batch is the first rows of a larger one."""
    random = np.random.default_rng(1)
    return random.integers(SPECIAL, shape.vocabulary, (batch, shape.prompt)).astype(np.int32)


def parameters(shape: Shape, drawn: Weights) -> dict[str, Any]:
    """The same weights as the parameters of this library's decoder."""
    layers, heads, width = shape.layers, shape.heads, shape.width
    split = (layers, width, heads, width // heads)
    kernels = np.split(drawn["attn.c_attn.weight"], 3, axis=-1)
    biases = np.split(drawn["attn.c_attn.bias"], 3, axis=-1)
    attention: dict[str, Any] = {
        name: {"kernel": kernel.reshape(split), "bias": bias.reshape(layers, heads, -1)}
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    out = drawn["attn.c_proj.weight"].reshape(layers, heads, width // heads, width)
    attention["out"] = {"kernel": out, "bias": drawn["attn.c_proj.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": drawn[f"{name}.weight"], "bias": drawn[f"{name}.bias"]}

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": drawn[f"{name}.weight"], "bias": drawn[f"{name}.bias"]}

    return {
        "embedding": {"table": drawn["wte"]},
        "decoder": {
            "positions": {"table": drawn["wpe"]},
            "norm": norm("ln_f"),
            "blocks": {
                "attention": attention,
                "attention_norm": norm("ln_1"),
                "feedforward": {"up": linear("mlp.c_fc"), "down": linear("mlp.c_proj")},
                "feedforward_norm": norm("ln_2"),
            },
        },
    }


def jaxformer(
    *,
    shape: dict[str, int],
    cells: Sequence[Cell],
    folder: str,
    name: str = "jaxformer",
    model: dict[str, Any] | None = None,
) -> tuple[Turn, dict[str, Any]]:
    """This library. `model` changes fields of the model's configuration; it is then drawn anew."""
    import jax

    import jaxformer as library
    from jaxformer.config import ModelConfig
    from jaxformer.runtime import keep_memory

    keep_memory()
    sizes = Shape(**shape)
    config = ModelConfig(
        kind="decoder",
        layers=sizes.layers,
        heads=sizes.heads,
        width=sizes.width,
        position="learned",
        max_length=sizes.length,
    )
    config = dataclasses.replace(config, **(model or {}))
    apply, params = library.pure(library.models.build(config, vocabulary=sizes.vocabulary))
    if model:
        table = params["embedding"]["table"]
        params["embedding"]["table"] = table.at[:SPECIAL].set(0.0)
    else:
        params = parameters(sizes, weights(sizes))
    params = jax.device_put(params)

    def searches(beam: int) -> dict[int, Callable[..., Any]]:
        if beam == 1:
            make = library.decoding.make_generate
            return {new: make(apply, max_length=new, temperature=0.0) for new in (1, sizes.new)}
        return {new: _jaxformer_beam(apply, beam, new) for new in (1, sizes.new)}

    made = {beam: searches(beam) for _, beam in cells}
    logits_of = jax.jit(lambda params, tokens: apply(params, tokens)[:, sizes.prompt - 1 :])

    def generate(cell: Cell) -> Generate:
        batch, beam = cell
        inputs = (prompts(sizes, batch), np.zeros(batch, np.int32), jax.random.key(0))

        def run(new: int) -> dict[str, np.ndarray]:
            found = jax.device_get(made[beam][new](params, *inputs))
            tokens = found.tokens if beam == 1 else found.tokens[:, 0]
            log_probs = found.log_probs if beam == 1 else found.log_probs[:, 0]
            return {"tokens": np.concatenate([inputs[0], tokens], 1), "log_probs": log_probs}

        return run

    def cache_bytes(cell: Cell) -> int:
        batch, beam = cell
        start = np.zeros(batch * beam, np.int32)
        cache = jax.eval_shape(lambda: apply(params, sizes.length, start, method="init_cache"))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (cache.keys, cache.values))

    return _contender(
        name,
        sizes,
        {cell: generate(cell) for cell in map(tuple, cells)},
        logits=lambda tokens: np.asarray(logits_of(params, tokens)),
        cache_bytes=cache_bytes,
        folder=folder,
    )


def _jaxformer_beam(apply: Any, beam: int, new: int) -> Callable[..., Any]:
    """Beam search over a language model; log-probabilities are not divided by a length."""
    import jax

    from jaxformer.data.tokenizers import EOS, PAD
    from jaxformer.decoding import beam_search, make_step

    @jax.jit
    def search(params: Any, prompts: Any, start: Any, _: Any) -> Any:
        cache = apply(params, prompts.shape[1] + new, start, method="init_cache")
        logits, cache = apply(params, prompts, cache, last=True, method="extend")

        step, cache = make_step(apply, params, cache)
        return beam_search(
            step,
            cache,
            logits[:, -1],
            beam=beam,
            max_length=new,
            min_length=new,
            length_penalty=0.0,
            eos_id=EOS,
            pad_id=PAD,
        )

    return search


def transformers(
    *, shape: dict[str, int], cells: Sequence[Cell], folder: str
) -> tuple[Turn, dict[str, Any]]:
    """`generate` of Hugging Face's GPT-2 with its cache."""
    import torch
    import transformers as library

    library.logging.set_verbosity_error()
    sizes = Shape(**shape)
    config = library.GPT2Config(
        vocab_size=sizes.vocabulary,
        n_positions=sizes.length,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = library.GPT2LMHeadModel(config).eval()
    state = {name: torch.from_numpy(array) for name, array in _by_layer(weights(sizes)).items()}
    model.transformer.load_state_dict(state)
    model.tie_weights()

    def generate(cell: Cell) -> Generate:
        batch, beam = cell
        inputs = torch.from_numpy(prompts(sizes, batch)).long()
        mask = torch.ones_like(inputs)

        def run(new: int) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                found = model.generate(
                    inputs,
                    attention_mask=mask,
                    max_new_tokens=new,
                    do_sample=False,
                    num_beams=beam,
                    length_penalty=0.0,
                    use_cache=True,
                    return_dict_in_generate=True,
                    output_scores=beam > 1,  # without them no scores of sequences
                )
            answer = {"tokens": found.sequences.numpy()}
            if beam > 1:
                answer["log_probs"] = found.sequences_scores.numpy()
            return answer

        return run

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found = model(torch.from_numpy(tokens).long()).logits
        return found[:, sizes.prompt - 1 :].numpy()

    def cache_bytes(cell: Cell) -> int:
        # Every token but the last is fed, and its keys and values of every layer are kept.
        return 2 * 4 * cell[0] * cell[1] * sizes.layers * (sizes.length - 1) * sizes.width

    return _contender(
        "transformers",
        sizes,
        {cell: generate(cell) for cell in map(tuple, cells)},
        logits=logits,
        cache_bytes=cache_bytes,
        folder=folder,
    )


def recomputation(
    *, shape: dict[str, int], cells: Sequence[Cell], folder: str
) -> tuple[Turn, dict[str, Any]]:
    """PyTorch without a cache, as nanoGPT decodes: the whole context anew for every token."""
    import torch

    sizes = Shape(**shape)
    arrays = {name: torch.from_numpy(array) for name, array in weights(sizes).items()}

    def generate(cell: Cell) -> Generate:
        inputs = torch.from_numpy(prompts(sizes, cell[0])).long()

        def run(new: int) -> dict[str, np.ndarray]:
            tokens = inputs
            with torch.inference_mode():
                for _ in range(new):
                    logits = _torch_logits(sizes, arrays, tokens, last=True)
                    tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
            return {"tokens": tokens.numpy()}

        return run

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found = _torch_logits(sizes, arrays, torch.from_numpy(tokens).long(), last=False)
        return found[:, sizes.prompt - 1 :].numpy()

    return _contender(
        "recomputation",
        sizes,
        {cell: generate(cell) for cell in map(tuple, cells)},
        logits=logits,
        cache_bytes=lambda _: 0,
        folder=folder,
    )


def _torch_logits(shape: Shape, w: dict[str, Any], tokens: Any, *, last: bool) -> Any:
    """GPT-2 in plain PyTorch; with `last`, only the logits after the last token."""
    from torch.nn import functional

    batch, length = tokens.shape
    x = w["wte"][tokens] + w["wpe"][:length]

    def norm(x: Any, name: str, layer: int | tuple[()]) -> Any:
        scale, bias = w[f"{name}.weight"][layer], w[f"{name}.bias"][layer]
        return functional.layer_norm(x, (shape.width,), scale, bias)

    def linear(x: Any, name: str, layer: int) -> Any:
        return x @ w[f"{name}.weight"][layer] + w[f"{name}.bias"][layer]

    for layer in range(shape.layers):
        joint = linear(norm(x, "ln_1", layer), "attn.c_attn", layer)
        heads = joint.view(batch, length, 3, shape.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + linear(mixed.transpose(1, 2).reshape(x.shape), "attn.c_proj", layer)
        hidden = linear(norm(x, "ln_2", layer), "mlp.c_fc", layer)
        x = x + linear(functional.gelu(hidden, approximate="tanh"), "mlp.c_proj", layer)
    return norm(x[:, -1:] if last else x, "ln_f", ()) @ w["wte"].T


def _by_layer(drawn: Weights) -> Weights:
    """The names of Hugging Face's state dict, a layer's arrays by themselves."""
    state = {}
    for name, array in drawn.items():
        if name.startswith("ln_f"):
            state[name] = array
        elif name.startswith("w"):
            state[f"{name}.weight"] = array
        else:
            state |= {f"h.{layer}.{name}": part for layer, part in enumerate(array)}
    return state


def _contender(
    name: str,
    shape: Shape,
    cells: dict[Any, Generate],
    *,
    logits: Callable[[np.ndarray], np.ndarray],
    cache_bytes: Callable[[Cell], int],
    folder: str,
) -> tuple[Turn, dict[str, Any]]:
    """Runs every cell once, writes what came out to `folder`, and makes `turn`."""
    for cell, generate in cells.items():
        generate(1)
        answer = generate(shape.new)
        found = logits(answer["tokens"])
        np.savez(answer_file(folder, name, cell), logits=found, **answer)

    def turn(batch: int, beam: int) -> dict[str, Any]:
        times = []
        for new in (1, shape.new):
            start = time.perf_counter()
            cells[batch, beam](new)
            times.append(time.perf_counter() - start)
        return {"first_s": times[0], "all_s": times[1]}

    return turn, {"cache_bytes": [cache_bytes(cell) for cell in cells]}


def answer_file(folder: str | Path, name: str, cell: Cell) -> Path:
    """Where a contender leaves the tokens, log-probabilities and logits of a cell."""
    batch, beam = cell
    return Path(folder) / f"{name}_batch{batch}_beam{beam}.npz"
