"""The recurrent encoder-decoder is held to PyTorch (tests/make_golden_recurrent.py)."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import ModelConfig, RecurrentConfig
from jaxformer.data.tokenizers import PAD, SOS
from jaxformer.decoding import make_translate, sequence_log_probs
from jaxformer.losses import cross_entropy
from jaxformer.models import RecurrentSeq2Seq, abstract, build
from jaxformer.models.sampled_inputs import SampledInputs, choose_token
from jaxformer.nn import pure

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
VOCABULARY = 7
CASES = [
    "final-plain",
    "uniform-fed",
    "additive-fed",
    "dot-fed",
    "general-fed",
    "additive-plain",
    "general-plain",
]


@functools.cache
def golden(case):
    """Torch's arrays of a case, and among them its parameters and gradients as nested dicts."""
    found = {"param": {}, "gradient": {}}
    with np.load(FIXTURES / "torch_recurrent.npz") as flat:
        for name in flat.files:
            own, key = name.split("/")
            if own != case:
                continue
            first, *path = key.split(".")
            if not path:
                found[key] = jnp.asarray(flat[name])
                continue
            node = found[first]
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = jnp.asarray(flat[name])
    return found


@functools.cache
def make(case, **options):
    """A model with torch's parameters, jitted: teacher forcing, and what its loss takes."""
    context, feeding = case.split("-")
    config = ModelConfig(
        kind="recurrent",
        layers=2,
        width=4,
        heads=1,
        max_length=8,
        recurrent=RecurrentConfig(context=context, input_feeding=feeding == "fed"),
        **options,
    )
    apply, _ = pure(abstract(config, vocabulary=VOCABULARY))
    return SimpleNamespace(
        apply=apply,
        call=jax.jit(apply),
        extend=jax.jit(functools.partial(apply, method="extend")),
        params=golden(case)["param"],
        **{
            name: golden(case)[name]
            for name in ("source", "source_segment_ids", "inputs", "targets")
        },
    )


def teacher_forced(model):
    return model.call(
        model.params, model.source, model.inputs, source_segment_ids=model.source_segment_ids
    )


def loss_and_gradient(model, **options):
    """Of given targets, jitted; `options` go to `predictions`, `rate` traced."""

    def loss(params, rate):
        sampled = {} if rate is None else {"sampling_rate": rate}
        factors = model.apply(
            params,
            model.source,
            model.inputs,
            source_segment_ids=model.source_segment_ids,
            method="predictions",
            **sampled,
            **options,
        )
        return cross_entropy(factors, model.targets, jnp.ones(model.targets.shape))[0]

    return jax.jit(jax.value_and_grad(loss))


def assert_trees_close(found, wanted, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        scale = max(np.abs(b).max(), 1.0)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=str(path))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_torch(case):
    np.testing.assert_allclose(teacher_forced(make(case)), golden(case)["logits"], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_torch(case):
    model = make(case)
    _, gradients = loss_and_gradient(model)(model.params, None)
    assert_trees_close(gradients, golden(case)["gradient"], 1e-5)


@pytest.mark.parametrize("case", ["uniform-fed", "additive-fed", "dot-fed", "general-plain"])
def test_attention_weights_equal_those_of_torch(case):
    model = make(case)
    weights = model.apply(
        model.params,
        model.source,
        model.inputs,
        source_segment_ids=model.source_segment_ids,
        method="cross_attention_weights",
    )
    assert weights.shape == (1, 3, 5, 1, 6)
    np.testing.assert_allclose(weights[0, :, :, 0], golden(case)["attention"], atol=1e-6)


def test_a_decoder_that_sees_nothing_has_no_attention_weights():
    model = make("final-plain")
    with pytest.raises(ValueError, match="context additive, dot or general"):
        model.apply(model.params, model.source, model.inputs, method="cross_attention_weights")


@pytest.mark.parametrize("case", ["final-plain", "additive-fed", "general-fed", "general-plain"])
def test_decoding_step_by_step_equals_teacher_forcing(case):
    model = make(case)
    cache = model.apply(
        model.params, model.source, model.source_segment_ids, 5, method="init_cache"
    )
    # The rows are reordered on the way, as beam search does.
    order, parts = jnp.arange(3), []
    for t in range(5):
        order, cache = order[::-1], cache.take(jnp.array([2, 1, 0]))
        logits, cache = model.extend(model.params, model.inputs[order, t : t + 1], cache)
        parts.append(logits[order])
    np.testing.assert_allclose(jnp.concatenate(parts, 1), teacher_forced(model), atol=1e-5)


def test_several_tokens_are_read_at_once_and_the_last_alone_given():
    model = make("general-fed")
    cache = model.apply(
        model.params, model.source, model.source_segment_ids, 5, method="init_cache"
    )
    _, cache = model.apply(model.params, model.inputs[:, :2], cache, method="extend")
    logits, _ = model.apply(model.params, model.inputs[:, 2:], cache, last=True, method="extend")
    np.testing.assert_allclose(logits, teacher_forced(model)[:, -1:], atol=1e-5)


def test_beam_search_scores_what_teacher_forcing_says():
    model = make("additive-fed")
    translate = make_translate(model.apply, max_length=4, beam=3, n_best=2)
    found = translate(model.params, model.source, model.source_segment_ids)
    tokens = found.tokens[:, 1]
    inputs = jnp.concatenate([jnp.full((3, 1), SOS), tokens[:, :-1]], axis=1)
    logits = model.call(
        model.params, model.source, inputs, source_segment_ids=model.source_segment_ids
    )
    weights = jnp.arange(4) < (found.lengths + found.finished)[:, 1:2]
    scores = sequence_log_probs(logits, tokens, weights.astype(jnp.float32))
    np.testing.assert_allclose(found.log_probs[:, 1], scores, atol=1e-5)


@pytest.mark.parametrize("case", ["final-plain", "uniform-fed", "additive-plain", "general-fed"])
def test_padding_of_a_source_and_the_order_of_rows_change_nothing(case):
    model = make(case)
    order = jnp.array([1, 2, 0])
    source = jnp.pad(model.source, [(0, 0), (0, 2)], constant_values=5)[order]
    segment_ids = jnp.pad(model.source_segment_ids, [(0, 0), (0, 2)])[order]
    logits = model.call(model.params, source, model.inputs[order], source_segment_ids=segment_ids)
    np.testing.assert_allclose(logits, teacher_forced(model)[order], atol=1e-5)


def test_a_row_without_a_source_stays_finite():
    model = make("general-fed")
    logits = model.call(
        model.params,
        model.source,
        model.inputs,
        source_segment_ids=jnp.zeros_like(model.source_segment_ids),
    )
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize("case", ["final-plain", "general-fed"])
def test_no_sampled_inputs_is_teacher_forcing_under_the_same_dropout(case):
    model = make(case, dropout=0.3, embedding_scale=True)
    run = loss_and_gradient(model, key=jax.random.key(1))
    loss, gradients = run(model.params, None)
    sampled_loss, sampled_gradients = run(model.params, jnp.float32(0))
    np.testing.assert_allclose(sampled_loss, loss, rtol=1e-6)
    assert_trees_close(sampled_gradients, gradients, 1e-5)


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_sampled_inputs_equal_feeding_the_drawn_tokens_by_hand(scope):
    model, key, rate = make("additive-fed"), jax.random.key(4), 0.6
    factors = model.apply(
        model.params,
        model.source,
        model.inputs,
        source_segment_ids=model.source_segment_ids,
        key=key,
        sampling_rate=rate,
        sampling_scope=scope,
        method="predictions",
    )
    drawn = SampledInputs.draw(jax.random.split(key, 4)[3], model.inputs, rate, scope)
    cache = model.apply(
        model.params, model.source, model.source_segment_ids, 5, method="init_cache"
    )
    token, parts = model.inputs[:, 0], []
    for t in range(5):
        token = jnp.where(drawn.use[t], token, model.inputs[:, t])
        logits, cache = model.extend(model.params, token[:, None], cache)
        token = choose_token(logits[:, 0], drawn.chance[t])
        parts.append(logits)
    np.testing.assert_allclose(factors.logits(), jnp.concatenate(parts, 1), atol=1e-5)
    assert np.any(np.abs(factors.logits() - teacher_forced(model)) > 1e-3)


def test_free_running_reads_the_first_token_only():
    model = make("general-fed")
    run = jax.jit(
        lambda inputs: model.apply(
            model.params,
            model.source,
            inputs,
            key=jax.random.key(0),
            sampling_rate=1.0,
            method="predictions",
        ).logits()
    )
    np.testing.assert_array_equal(run(model.inputs), run(model.inputs.at[:, 1:].set(4)))


def test_coins_fall_at_the_given_rate_for_each_token_or_each_sequence():
    inputs = jnp.zeros((2000, 6), jnp.int32)
    tokens = SampledInputs.draw(jax.random.key(0), inputs, 0.3, "token").use
    assert not np.any(tokens[0])
    assert abs(np.mean(tokens[1:]) - 0.3) < 0.02
    assert not np.all(tokens[1:] == tokens[1])
    sequences = SampledInputs.draw(jax.random.key(0), inputs, 0.3, "sequence").use
    assert not np.any(sequences[0])
    np.testing.assert_array_equal(sequences[1:], np.broadcast_to(sequences[1], (5, 2000)))
    assert abs(np.mean(sequences[1]) - 0.3) < 0.05


def test_drawn_tokens_follow_the_softmax_and_are_never_padding_or_start():
    logits = np.array([9.0, 9.0, 0.5, -1.0, 1.2, 0.0], np.float32)
    draws = 40_000
    chance = jax.random.uniform(jax.random.key(0), (draws,))
    tokens = np.asarray(choose_token(jnp.broadcast_to(logits, (draws, 6)), chance))
    shares = np.exp(logits) * (np.arange(6) > max(PAD, SOS))
    np.testing.assert_allclose(
        np.bincount(tokens, minlength=6) / draws, shares / shares.sum(), atol=0.01
    )
    ends = choose_token(jnp.broadcast_to(logits, (2, 6)), jnp.array([0.0, 1 - 2**-24]))
    assert ends.tolist() == [2, 5]


def test_sampling_without_a_key_is_refused():
    model = make("general-fed")
    with pytest.raises(ValueError, match="give a key"):
        model.apply(
            model.params, model.source, model.inputs, sampling_rate=0.5, method="predictions"
        )


def test_what_cannot_be_built_or_read_is_refused():
    with pytest.raises(ValueError, match=r"even model\.width"):
        abstract(ModelConfig(kind="recurrent", width=5), vocabulary=VOCABULARY)
    model = make("general-fed")
    with pytest.raises(ValueError, match="max_length=8"):
        model.apply(model.params, model.source, jnp.zeros((3, 9), jnp.int32))
    with pytest.raises(ValueError, match="max_length=8"):
        model.apply(model.params, model.source, model.source_segment_ids, 9, method="init_cache")


@pytest.mark.parametrize(("encoder_layers", "bidirectional"), [(1, True), (3, False)])
def test_other_depths_and_an_encoder_of_one_direction(encoder_layers, bidirectional):
    config = ModelConfig(
        kind="recurrent",
        layers=2,
        encoder_layers=encoder_layers,
        width=4,
        heads=1,
        tied_embeddings=False,
        recurrent=RecurrentConfig(bidirectional=bidirectional),
    )
    model = build(config, vocabulary=VOCABULARY)
    assert isinstance(model, RecurrentSeq2Seq)
    apply, params = pure(model)
    assert params["encoder"]["layers"]["0"]["bias"].shape[0] == 1 + bidirectional
    logits = apply(params, jnp.full((2, 3), 4), jnp.full((2, 5), 4))
    assert logits.shape == (2, 5, VOCABULARY)
