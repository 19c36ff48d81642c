"""The key-value cache: its layers stacked or one by one, its rows repeated for beams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jaxformer
from jaxformer.config import ModelConfig
from jaxformer.decoding import make_generate, make_translate
from jaxformer.nn import Cache

LAYERS, ROWS, SLOTS, SOURCE = 2, 3, 5, 4
TINY = ModelConfig(layers=LAYERS, width=16, heads=4, kv_heads=2, max_length=16)


def filled(rows=ROWS):
    """A cache in which every number is different."""
    shapes = ((LAYERS, rows, SLOTS, 2, 4), (LAYERS, rows, SOURCE, 2, 4))
    keys, cross = (jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) for shape in shapes)
    start = jnp.arange(rows, dtype=jnp.int32)
    segments = jnp.arange(rows * SOURCE, dtype=jnp.int32).reshape(rows, SOURCE)
    return Cache(keys, -keys, jnp.int32(2), start, cross, -cross, segments)


def stacked(cache):
    """The same cache with its layers stacked, slots before heads."""
    parts = ("keys", "values", "cross_keys", "cross_values")
    sources = cache.source_segment_ids.shape[0]

    def turned(part):
        rows = sources if "cross" in part else cache.start.shape[0]
        layers = jnp.stack(getattr(cache, part))
        return jnp.swapaxes(layers.reshape(LAYERS, rows, -1, *layers.shape[2:]), 2, 3)

    return dataclasses.replace(cache, **{part: turned(part) for part in parts})


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for found, wanted in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(found, wanted)


class TestUnrolled:
    def test_reads_and_writes_what_the_stack_does(self):
        cache = filled()
        unrolled = cache.unrolled()
        assert unrolled.length == cache.length == SLOTS
        assert unrolled.keys[0].shape == (ROWS * 2, SLOTS, 4)
        turned = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), unrolled.read_heads_first(1))
        assert_same(turned, cache.read(1))
        new = -jnp.ones((ROWS, 2, 2, 4))
        assert_same(stacked(unrolled.write(1, new, 2 * new)), cache.write(1, new, 2 * new))
        assert_same(unrolled.read(1), cache.read(1))
        assert_same(unrolled.read_source(0), cache.read_source(0))
        rows = jnp.array([2, 0])
        assert_same(stacked(unrolled.take(rows)), cache.take(rows))
        assert unrolled.unrolled() is unrolled

    @pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
    def test_steps_are_those_of_the_stack(self, kind):
        config = dataclasses.replace(TINY, kind=kind)
        apply, params = jaxformer.pure(jaxformer.models.build(config, vocabulary=11))
        if kind == "decoder":
            cache = apply(params, 8, jnp.array([0, 2]), method="init_cache")
        else:
            source = jnp.array([[5, 6, 7], [5, 6, 0]])
            cache = apply(params, source, (source > 0).astype(int), 8, method="init_cache")
        tokens = jnp.array([[4, 5, 6], [7, 8, 9]])
        blocks = apply(params, method="unrolled")
        unrolled = cache.unrolled()
        for part in (tokens, tokens[:, :1]):
            logits, cache = apply(params, part, cache, method="extend")
            found, unrolled = apply(params, part, unrolled, blocks=blocks, method="extend")
            np.testing.assert_allclose(found, logits, atol=1e-5)


class TestBeams:
    def test_repeated_rows_share_their_source(self):
        cache = filled().repeat(2)
        assert cache.keys.shape[1] == 2 * ROWS
        assert cache.cross_keys.shape[1] == cache.source_segment_ids.shape[0] == ROWS
        np.testing.assert_array_equal(cache.start, [0, 0, 1, 1, 2, 2])
        swapped = cache.reorder(jnp.array([1, 0, 3, 2, 4, 4]))
        assert_same(swapped.read_source(0), cache.read_source(0))
        np.testing.assert_array_equal(swapped.start, cache.start)

    def test_taken_rows_have_a_source_each(self):
        rows = jnp.array([5, 0, 2])
        found = filled().repeat(2).take(rows)
        assert_same(found, filled().take(rows // 2))

    def test_sharing_a_source_changes_no_logits(self):
        config = dataclasses.replace(TINY, kind="encoder_decoder")
        apply, params = jaxformer.pure(jaxformer.models.build(config, vocabulary=11))
        source = jnp.array([[5, 6, 7], [5, 6, 0]])
        cache = apply(params, source, (source > 0).astype(int), 8, method="init_cache")
        tokens = jnp.array([[4], [5], [6], [7]])
        shared, _ = apply(params, tokens, cache.repeat(2), method="extend")
        rows = jnp.array([0, 0, 1, 1])
        alone, _ = apply(params, tokens, cache.take(rows), method="extend")
        np.testing.assert_allclose(shared, alone, atol=1e-5)


class TestSharedSlots:
    """Rows of an unrolled cache that `repeat` made of one share its slots."""

    BEAMS = 3

    def alike(self):
        """The same cache twice: each repeated row with slots of its own, and with shared ones."""
        return filled().repeat(self.BEAMS), filled().unrolled().repeat(self.BEAMS)

    def turns(self):
        """Reorderings of beams within their rows, some of which die out and some of which part."""
        random = np.random.default_rng(0)
        first = np.arange(0, ROWS * self.BEAMS, self.BEAMS)[:, None]
        for _ in range(2):
            chosen = random.integers(0, self.BEAMS, (ROWS, self.BEAMS))
            yield jnp.asarray((first + chosen).reshape(-1))

    def test_hold_what_slots_of_their_own_would(self):
        own, shared = self.alike()
        for number, rows in enumerate(self.turns()):
            new = 1000.0 * (number + 1) + jnp.arange(ROWS * self.BEAMS * 8.0)
            new = new.reshape(ROWS * self.BEAMS, 1, 2, 4)
            own, shared = own.reorder(rows), shared.reorder(rows)
            for layer in range(LAYERS):
                own = own.write(layer, new, 2 * new)
                shared = shared.write(layer, new, 2 * new)
            own, shared = own.advance(1), shared.advance(1)
            for layer in range(LAYERS):
                assert_same(shared.read(layer), own.read(layer))
            np.testing.assert_array_equal(shared.start, own.start)
        assert shared.length == own.length
        rows = jnp.array([7, 0, 4, 4])
        assert_same(stacked(shared.take(rows)), own.take(rows))

    def test_repeated_again_are_rows_with_slots_of_their_own_repeated(self):
        own, shared = self.alike()
        rows = next(self.turns())
        own, shared = own.reorder(rows).repeat(2), shared.reorder(rows).repeat(2)
        assert_same(shared.read(1), own.read(1))
        np.testing.assert_array_equal(shared.start, own.start)

    def test_more_beams_than_pay_have_slots_of_their_own(self):
        assert filled().unrolled().repeat(16).writer is not None
        many = filled().unrolled().repeat(17)
        assert many.writer is None
        assert_same(many.read(0), filled().repeat(17).read(0))

    def test_reordering_moves_neither_keys_nor_values(self):
        _, shared = self.alike()
        reordered = shared.reorder(next(self.turns()))
        for part in ("keys", "values"):
            for before, after in zip(getattr(shared, part), getattr(reordered, part), strict=True):
                assert after is before

    @pytest.mark.parametrize(
        "model",
        [
            {"kind": "decoder"},
            {"kind": "decoder", "window": 3},
            {"kind": "decoder", "position": "rotary", "attention_softcap": 5.0},
            {"kind": "decoder", "position": "alibi"},
            {"kind": "encoder_decoder"},
        ],
        ids=str,
    )
    def test_steps_are_those_of_slots_of_their_own(self, model):
        config = dataclasses.replace(TINY, **model)
        apply, params = jaxformer.pure(jaxformer.models.build(config, vocabulary=11))
        tokens = jnp.array([[4, 5, 6], [7, 8, 9]])
        if config.kind == "decoder":
            cache = apply(params, 9, jnp.array([0, 2]), method="init_cache")
        else:
            source = jnp.array([[5, 6, 7], [5, 6, 0]])
            cache = apply(params, source, (source > 0).astype(int), 9, method="init_cache")
        _, own = apply(params, tokens, cache, method="extend")
        blocks = apply(params, method="unrolled")
        _, shared = apply(params, tokens, cache.unrolled(), blocks=blocks, method="extend")
        own, shared = own.repeat(2), shared.repeat(2)
        assert shared.writer is not None
        for fed, rows in (([4, 5, 6, 7], [1, 0, 2, 2]), ([8, 9, 4, 4], [0, 0, 3, 2])) * 2:
            fed, rows = jnp.array(fed)[:, None], jnp.array(rows)
            logits, own = apply(params, fed, own.reorder(rows), method="extend")
            shared = shared.reorder(rows)
            found, shared = apply(params, fed, shared, blocks=blocks, method="extend")
            np.testing.assert_allclose(found, logits, atol=1e-5)
        several = jnp.array([[4, 5], [6, 7], [8, 9], [4, 6]])
        logits, _ = apply(params, several, own, method="extend")
        found, _ = apply(params, several, shared, blocks=blocks, method="extend")
        np.testing.assert_allclose(found, logits, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [{"kind": "decoder"}, {"kind": "decoder", "position": "alibi"}, {"kind": "encoder_decoder"}],
    ids=str,
)
def test_a_step_of_beams_gathers_no_keys(model):
    config = dataclasses.replace(TINY, max_length=64, **model)
    apply, params = jaxformer.pure(jaxformer.models.build(config, vocabulary=11))
    if config.kind == "decoder":
        cache = apply(params, 64, jnp.zeros(2, jnp.int32), method="init_cache")
    else:
        source = jnp.array([[5, 6, 7], [5, 6, 0]])
        cache = apply(params, source, (source > 0).astype(int), 64, method="init_cache")
    blocks = apply(params, method="unrolled")
    cache = cache.unrolled().repeat(2)

    def step(tokens, rows, cache):
        cache = cache.reorder(rows)
        return apply(params, tokens, cache, blocks=blocks, method="extend")

    jaxpr = jax.make_jaxpr(step)(jnp.ones((4, 1), jnp.int32), jnp.arange(4), cache)
    # The embedding of a token, and who wrote what.
    assert largest_cut(jaxpr.jaxpr) <= 4 * 64


def loops(jaxpr):
    """Every `while` in a program, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from loops(inner)


def largest_cut(jaxpr):
    """Elements of the largest array that is cut out of another, or gathered from it."""
    largest = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("slice", "split", "dynamic_slice", "gather"):
            sizes = [out.aval.size for out in equation.outvars]
            # A slice may be the whole array, of which no copy is made; a gather always copies.
            whole = equation.invars[0].aval.size
            cut = equation.primitive.name == "gather"
            largest = max(largest, *(size if cut or size < whole else 0 for size in sizes))
        for inner in jaxprs_in_params(equation.params):
            largest = max(largest, largest_cut(inner))
    return largest


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a CPU alone are layers unrolled")
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_no_step_copies_weights_or_cache_out_of_a_stack(kind):
    config = dataclasses.replace(TINY, kind=kind)
    apply, params = jaxformer.pure(jaxformer.models.build(config, vocabulary=11))
    tokens = jnp.full((2, 4), 5)
    if kind == "decoder":
        program = make_generate(apply, max_length=8, temperature=0.0)
        inputs = (tokens, jnp.zeros(2, jnp.int32), jax.random.key(0))
    else:
        program, inputs = make_translate(apply, max_length=8), (tokens, jnp.ones_like(tokens))
    jaxpr = jax.make_jaxpr(program)(params, *inputs)
    search = list(loops(jaxpr.jaxpr))[-1]
    # The embedding of a token is the largest thing to be looked up.
    assert largest_cut(search.params["body_jaxpr"].jaxpr) <= 2 * config.width
