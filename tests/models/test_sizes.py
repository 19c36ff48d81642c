"""Models of published sizes have the published numbers of parameters, and cost nothing to plan."""

import jax
import pytest

from jaxformer import presets
from jaxformer.models import abstract
from jaxformer.nn import count, pure

EMBEDDINGS = 37_000 * 512
ATTENTION, FEEDFORWARD, NORM = 4 * (512 * 512 + 512), 2 * 512 * 2048 + 2048 + 512, 2 * 512
VASWANI = EMBEDDINGS + 6 * (3 * ATTENTION + 2 * FEEDFORWARD + 5 * NORM)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "parameters"),
    [
        ("gpt2-small", 50_257, 124_439_808),
        ("llama2-7b", 32_000, 6_738_415_616),
        ("llama2-13b", 32_000, 13_015_864_320),
        ("llama2-70b", 32_000, 68_976_648_192),
        ("vaswani-base", 37_000, VASWANI),
        ("t5-small", 32_128, 60_506_624),
    ],
)
def test_preset_has_the_published_number_of_parameters(preset, vocabulary, parameters):
    model = abstract(presets.get(preset).model, vocabulary=vocabulary)
    assert count(pure(model)[1]) == parameters


def test_abstract_model_allocates_nothing():
    live = len(jax.live_arrays())
    params = pure(abstract(presets.get("llama2-7b").model, vocabulary=32_000))[1]
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {jax.ShapeDtypeStruct}
    assert len(jax.live_arrays()) == live
