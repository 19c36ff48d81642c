"""FLOPs of a training step: counted by the formula, and by XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxformer import models, nn
from jaxformer.config import ModelConfig
from jaxformer.decoding import token_log_probs
from jaxformer.training.flops import training_flops

DECODER = ModelConfig(
    kind="decoder",
    layers=2,
    width=128,
    heads=4,
    kv_heads=2,
    feedforward=384,
    activation="swiglu",
    norm="rmsnorm",
    position="learned",
    bias=False,
    tied_embeddings=False,
    scan=False,
    max_length=64,
    attention="reference",
)
PAIRS = ModelConfig(
    kind="encoder_decoder",
    layers=1,
    encoder_layers=2,
    width=128,
    heads=4,
    position="learned",
    scan=False,
    max_length=64,
    attention="reference",
)


def counted_by_xla(config, *, vocabulary, batch, length, source_length=None):
    """FLOPs of loss and gradient with plain attention and plain logits."""
    apply, params = nn.pure(models.abstract(config, vocabulary=vocabulary))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    source = (
        [] if source_length is None else [jax.ShapeDtypeStruct((batch, source_length), jnp.int32)]
    )

    def loss(params, targets, *inputs):
        return -token_log_probs(apply(params, *inputs), targets).mean()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, tokens, *source, tokens)
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (DECODER, {"vocabulary": 512, "batch": 2, "length": 64}),
        (PAIRS, {"vocabulary": 256, "batch": 2, "length": 48, "source_length": 32}),
    ],
)
def test_the_formula_agrees_with_xla(config, sizes):
    ours = training_flops(config, **sizes)
    # Plain attention multiplies what the causal mask then hides: it does the work of all pairs.
    length = sizes["length"]
    hidden = 12 * config.width * sizes["batch"] * config.layers * length * (length - 1) / 2
    found = counted_by_xla(config, **sizes)
    # XLA also counts what is no product: norms, activations, softmax.
    assert 1.0 <= found / (ours.total + hidden) <= 1.03


def test_a_decoder_costs_six_flops_a_parameter_and_token_and_its_attention():
    sizes = {"vocabulary": 512, "batch": 3, "length": 64}
    _, params = nn.pure(models.abstract(DECODER, vocabulary=512))
    blocks = params["decoder"]["blocks"]
    in_blocks = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(blocks)
        if path[-1].key == "kernel"
    )
    found = training_flops(DECODER, **sizes)
    assert found.layers == 6 * in_blocks * 3 * 64
    assert found.output == 6 * 512 * 128 * 3 * 64
    whole = 12 * DECODER.layers * 64 * DECODER.width * 3 * 64
    assert found.attention == pytest.approx(whole / 2, rel=1 / 64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_a_window_counts_what_it_shows(causal, window):
    config = dataclasses.replace(DECODER if causal else PAIRS, window=window)
    places = range(12)
    reach = 12 if window is None else window
    shown = sum(abs(q - k) < reach and (not causal or k <= q) for q in places for k in places)
    lengths = {"length": 12} if causal else {"length": 1, "source_length": 12}
    found = training_flops(config, vocabulary=9, batch=1, **lengths)
    others = 0 if causal else config.layers * (1 + 12)
    layers = config.layers if causal else config.encoder_layers
    assert found.attention == 12 * config.width * (layers * shown + others)


def test_what_is_not_counted_is_refused():
    with pytest.raises(NotImplementedError, match="ctc"):
        training_flops(ModelConfig(kind="ctc"), vocabulary=9, batch=1, length=4, source_length=4)
    with pytest.raises(ValueError, match="source_length"):
        training_flops(PAIRS, vocabulary=9, batch=1, length=4)
