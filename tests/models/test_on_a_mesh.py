"""A step on a mesh: the gradients of one device, by the collectives that it takes and no others."""

import collections
import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from jaxformer import sharding
from jaxformer.config import MeshConfig, ModelConfig, TrainConfig
from jaxformer.losses import cross_entropy
from jaxformer.models import build
from jaxformer.models.output import LogitFactors
from jaxformer.nn import parameter_axes, pure
from jaxformer.training.state import init_state
from jaxformer.training.step import make_train_step
from jaxformer_kernels import zigzag
from jaxformer_kernels.linear_cross_entropy import xla

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

VOCABULARY, ROWS, TOKENS = 24, 8, 16
TARGETS = ("inputs", "targets", "weights", "segment_ids", "positions")
MODELS = {
    "decoder": {"kind": "decoder", "kv_heads": 2, "dropout": 0.2},
    "decoder, untied": {
        "kind": "decoder",
        "kv_heads": 1,
        "dropout": 0.2,
        "tied_embeddings": False,
        "activation": "swiglu",
        "scan": False,
        "remat": "full",
    },
    # Where sequences are in zig-zag order, dropout draws for another token than on one device.
    "decoder, undropped": {"kind": "decoder", "kv_heads": 2},
    "decoder, window": {"kind": "decoder", "window": 5, "remat": "dots"},
    "encoder-decoder": {"position": "relative", "norm_placement": "post", "dropout": 0.2},
    "encoder-decoder, rotary": {"window": 5, "shared_embeddings": True},
    "lstm": {"kind": "recurrent", "dropout": 0.2},
    "ctc": {"kind": "ctc", "dropout": 0.2},
}
RULES = {"label_smoothing": 0.1, "z_loss": 1e-3}

# The gradient itself comes out, in place of the optimiser's state.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, *_: (gradient, gradient)
)


@functools.cache
def training(name, accumulation=1, vocabulary=VOCABULARY):
    """The step of one of MODELS, its first state, the axes of its parameters, and a batch."""
    config = ModelConfig(**{"layers": 2, "width": 32, "heads": 4, "max_length": 64} | MODELS[name])
    model = build(config, vocabulary=vocabulary)
    apply, params = pure(model)
    train = TrainConfig(accumulation=accumulation, **RULES)
    step = make_train_step(apply, KEEP, optax.constant_schedule(0.0), train, 0)
    return SimpleNamespace(
        step=step,
        state=init_state(params, KEEP),
        axes=parameter_axes(model),
        batch=batch(ROWS * accumulation, "source" if config.kind != "decoder" else "positions"),
    )


def batch(rows, extra):
    """Two packed segments a row; some tokens weigh nothing."""
    random = np.random.default_rng(0)
    tokens = random.integers(4, VOCABULARY, (3, rows, TOKENS)).astype(np.int32)
    places = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (rows, TOKENS))
    segments = 1 + (places > 8).astype(np.int32)
    arrays = {
        "inputs": tokens[0],
        "targets": tokens[1],
        "weights": (random.random((rows, TOKENS)) < 0.8).astype(np.float32),
        "segment_ids": segments,
    }
    if extra == "source":
        arrays["weights"][:] = 1
        return arrays | {"source": tokens[2], "source_segment_ids": segments}
    return arrays | {"positions": places - 9 * (segments - 1)}


@functools.cache
def on_one_device(name, **options):
    """(gradients, metrics)"""
    run = training(name, **options)
    state, metrics = jax.jit(run.step)(run.state, run.batch)
    return state.optimizer_state, metrics


@functools.cache
def on_mesh(name, axes, method="ring", **options):
    """(gradients, metrics, the compiled program)"""
    run = training(name, **options)
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | dict(axes)), jax.devices())
    specs = sharding.parameter_specs(run.axes, run.state.params, mesh)
    placed = jax.device_put(run.state.params, sharding.named(specs, mesh))
    state = dataclasses.replace(run.state, params=placed, optimizer_state=placed)
    rows = run.batch
    if (context := dict(axes).get("context", 1)) > 1:
        order = zigzag(context, TOKENS)
        rows = {name: x[:, order] if name in TARGETS else x for name, x in rows.items()}
    rows = {
        name: jax.device_put(x, NamedSharding(mesh, sharding.spec("B T", x.shape, mesh)))
        for name, x in rows.items()
    }
    with jax.set_mesh(mesh), sharding.context_by(method):
        program = jax.jit(run.step).lower(state, rows).compile()
        after, metrics = program(state, rows)
    return after.optimizer_state, metrics, program.as_text()


def mesh_of(**axes):
    return tuple(axes.items())


CUBE = mesh_of(data=2, fsdp=2, tensor=2)


def agree(found, wanted, relative=2e-6):
    """Metrics and gradients, to a share of each tensor's largest.

    Or of 1e-2 of the model's: the gradients of key biases are 0 but for what is rounded away.
    """
    for name in ("objective", "loss", "accuracy", "tokens", "gradient_norm"):
        assert float(found[1][name]) == pytest.approx(float(wanted[1][name]), rel=relative), name
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted[0]))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(wanted[0]), strict=True
    ):
        scale = max(float(jnp.abs(b).max()), 1e-2 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * scale, err_msg=str(path))


@pytest.mark.parametrize(
    "axes", [mesh_of(data=8), mesh_of(fsdp=8), CUBE], ids=["data", "fsdp", "all three"]
)
def test_gradients_of_a_decoder_with_dropout_are_those_of_one_device(axes):
    agree(on_mesh("decoder", axes), on_one_device("decoder"))


@pytest.mark.parametrize("name", ["encoder-decoder", "lstm", "ctc"])
def test_gradients_of_other_models_are_those_of_one_device(name):
    axes = CUBE if name == "encoder-decoder" else mesh_of(data=2, fsdp=2)
    agree(on_mesh(name, axes), on_one_device(name))


def test_gradients_are_the_same_unrolled_rematerialised_and_accumulated():
    # One key-value head and 25 tokens, which tensor does not divide.
    options = {"accumulation": 2, "vocabulary": 25}
    axes = mesh_of(fsdp=2, tensor=4)
    agree(on_mesh("decoder, untied", axes, **options), on_one_device("decoder, untied", **options))


@pytest.mark.parametrize(
    ("name", "method", "axes"),
    [
        ("decoder, undropped", "ring", mesh_of(context=4)),
        ("decoder, window", "all_to_all", mesh_of(fsdp=2, context=2, tensor=2)),
        ("encoder-decoder, rotary", "all_to_all", mesh_of(data=2, context=4)),
    ],
)
def test_gradients_over_sequences_in_parts_are_those_of_one_device(name, method, axes):
    agree(on_mesh(name, axes, method), on_one_device(name))


def collectives(text):
    """(kind, elements of the result) of every array that a collective moves, in program order."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            for sizes in re.findall(r"[a-z]\w*\[([\d,]*)\]", match[1]):
                yield match[2], math.prod(int(size) for size in sizes.split(",") if size)


def test_golden_collectives_of_a_step_on_two_by_two_by_two():
    """By size, of arrays of 100 elements or more: others are norms, biases and sums of scalars."""
    width, hidden, tokens = 32, 128, ROWS // 4 * TOKENS
    heads, key_heads, vocabulary = 32 // 2, 16 // 2, VOCABULARY // 2  # of one of two on tensor
    query, key, up = width * heads, width * key_heads, width * hidden // 2
    kernels = [query, key, key, query, up, up]  # query, key, value, out, up, down of one layer
    table = width * vocabulary
    expected = collections.Counter(
        # Forward and backward; of the tied table once, for lookup and loss.
        [("all-gather", size) for size in (*kernels, *kernels, table)]
        + [("reduce-scatter", size // 2) for size in (*kernels, table, table)]
        # Gradients over data, when they are scattered already.
        + [("all-reduce", size // 2) for size in (*kernels, table, table)]
        # Over tensor: lookup; attention and feed-forward, forward and backward; the loss' x.
        + [("all-reduce", tokens * width)] * (1 + 2 + 2 + 1)
        # What two parts of the vocabulary found: five numbers a token.
        + [("all-reduce", 2 * 5 * tokens)]
    )
    found = collections.Counter(it for it in collectives(on_mesh("decoder", CUBE)[2]) if it[1] > 99)
    assert found == expected
    # One layer's kernel, and a part of that: not the stack of them, nor what tensor divides.
    assert max(size for kind, size in found if kind == "all-gather") == width * hidden // 2


def test_the_gradient_of_the_output_matrix_is_reduced_once_however_many_tiles(monkeypatch):
    monkeypatch.setattr(xla, "CPU_TOKENS", 8)
    monkeypatch.setattr(xla, "LOGITS", 8)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    x, w = jnp.ones((ROWS, TOKENS, 32)), jnp.ones((VOCABULARY, 32))
    factors = LogitFactors(x, w, transposed=True, softcap=None, compute_dtype="float32")
    targets, weights = jnp.zeros((ROWS, TOKENS), jnp.int32), jnp.ones((ROWS, TOKENS))

    def loss(w):
        return cross_entropy(dataclasses.replace(factors, w=w), targets, weights)[0]

    place = NamedSharding(mesh, sharding.parameter_spec(("V", "D"), w.shape, mesh))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(jax.device_put(w, place)).compile().as_text()
    assert "while/body" in text  # there are tiles
    reduced = [line for line in text.splitlines() if re.search(r" reduce-scatter(-start)?\(", line)]
    assert len(reduced) == 1 and "while/body" not in reduced[0]
