"""The specification against the same formulas in NumPy, a token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import linear_cross_entropy


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 1.5}, {"label_smoothing": 0.2}, {"z_loss": 0.1}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_reference_is_the_formula(options, transposed):
    random = np.random.RandomState(0)
    x, w = random.randn(2, 3, 4), random.randn(4, 7)
    labels, weights = random.randint(0, 7, (2, 3)), random.rand(2, 3)
    with jax.enable_x64(True):
        got = linear_cross_entropy(
            jnp.asarray(x),
            jnp.asarray(w.T if transposed else w),
            jnp.asarray(labels),
            weights=jnp.asarray(weights),
            transposed=transposed,
            implementation="reference",
            **options,
        )
    smooth, objective = options.get("label_smoothing", 0.0), 0.0
    for place in np.ndindex(2, 3):
        logits = x[place] @ w
        if "softcap" in options:
            logits = options["softcap"] * np.tanh(logits / options["softcap"])
        lse = np.log(np.exp(logits).sum())
        log_p = logits - lse
        loss = -log_p[labels[place]]
        np.testing.assert_allclose(got.lse[place], lse, rtol=1e-12)
        np.testing.assert_allclose(got.loss[place], loss, rtol=1e-12)
        assert got.correct[place] == (logits.argmax() == labels[place])
        token = (1 - smooth) * loss - smooth * log_p.mean() + options.get("z_loss", 0.0) * lse**2
        objective += weights[place] * token
    np.testing.assert_allclose(got.objective, objective, rtol=1e-12)
