"""A small encoder-decoder equals torch.nn.Transformer with the same weights.

The numbers come from tests/make_golden.py, in float64.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import ModelConfig
from jaxformer.models import abstract
from jaxformer.nn import pure
from jaxformer.training.step import batch_loss

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def nested(flat, kind):
    """The arrays named `kind.a.b.c` as a nested dict."""
    tree = {}
    for name, value in flat.items():
        first, *path = name.split(".")
        if first == kind:
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = value
    return tree


@pytest.fixture(params=["pre", "post"], scope="module")
def golden(request):
    """(the file's arrays, logits, loss and gradients here)."""
    flat = dict(np.load(FIXTURES / f"torch_transformer_{request.param}.npz"))
    config = ModelConfig(
        layers=2,
        width=8,
        heads=2,
        feedforward=12,
        position="none",
        norm_placement=request.param,
        activation="relu" if request.param == "post" else "gelu_exact",
    )
    apply, _ = pure(abstract(config, vocabulary=11))
    batch = {
        name: jnp.asarray(flat[name])
        for name in ("source", "inputs", "source_segment_ids", "targets")
    }
    batch["weights"] = jnp.asarray(flat["weights"], jnp.float32)

    @jax.jit
    def run(params):
        def loss(params):
            return batch_loss(apply, params, batch, label_smoothing=0.1)[0]

        inputs = {name: batch[name] for name in ("source", "inputs", "source_segment_ids")}
        return apply(params, **inputs), *jax.value_and_grad(loss)(params)

    return flat, run(jax.tree.map(jnp.asarray, nested(flat, "param")))


def test_logits_equal_those_of_torch(golden):
    flat, (logits, _, _) = golden
    np.testing.assert_allclose(logits, flat["logits"], atol=1e-5, rtol=1e-5)


def test_smoothed_loss_equals_that_of_torch(golden):
    flat, (_, loss, _) = golden
    np.testing.assert_allclose(loss, flat["loss"], rtol=1e-6)


def test_gradients_of_every_parameter_equal_those_of_torch(golden):
    flat, (_, _, gradients) = golden
    wanted = nested(flat, "gradient")
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    for (path, found), torch in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
    ):
        scale = max(np.abs(torch).max(), 0.1)
        np.testing.assert_allclose(found, torch, atol=1e-5 * scale, err_msg=str(path))
