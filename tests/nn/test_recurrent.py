"""LSTMs are held to torch.nn.LSTM with copied weights (tests/make_golden_recurrent.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.nn import pure
from jaxformer.nn.recurrent import LSTMLayer, LSTMStack

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
LENGTHS = np.array([6, 2, 4])
CASES = ["1-forward", "1-both", "2-forward", "2-both"]


def of_case(flat, case, kind=None):
    """A case's arrays by name; those named `kind.a.b` as a nested dict."""
    arrays = {
        name.split("/")[1]: value for name, value in flat.items() if name.startswith(f"{case}/")
    }
    if kind is None:
        return arrays
    tree = {}
    for name, value in arrays.items():
        first, *path = name.split(".")
        if first == kind:
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = value
    return tree


def make(case, **options):
    layers, directions = case.split("-")
    stack = LSTMStack(
        3,
        4,
        layers=int(layers),
        bidirectional=directions == "both",
        rngs=nnx.Rngs(params=0),
        **options,
    )
    return pure(stack)


@pytest.fixture(scope="module")
def flat():
    return dict(np.load(FIXTURES / "torch_lstm.npz"))


@pytest.fixture(params=CASES, scope="module")
def found(request, flat):
    """(torch's arrays, states and final states here, gradients here)."""
    golden, params = of_case(flat, request.param), of_case(flat, request.param, "param")
    apply, _ = make(request.param)
    segment_ids = jnp.asarray(np.arange(6) < LENGTHS[:, None], jnp.int32)

    @jax.jit
    def run(params, x):
        def results(params, x):
            states, (h, c) = apply(params, x, segment_ids=segment_ids)
            # torch: [layers x directions, B, D]
            return states, h.reshape(-1, *h.shape[2:]), c.reshape(-1, *c.shape[2:])

        values, pull = jax.vjp(results, params, x)
        return values, pull(
            tuple(jnp.asarray(golden[f"{name}_cotangent"]) for name in ("states", "h", "c"))
        )

    params = jax.tree.map(jnp.asarray, params)
    values, gradients = run(params, jnp.asarray(golden["x"]))
    return golden, of_case(flat, request.param, "gradient"), values, gradients


def test_states_and_final_states_equal_those_of_torch(found):
    golden, _, values, _ = found
    for name, value in zip(("states", "h", "c"), values, strict=True):
        np.testing.assert_allclose(value, golden[name], atol=1e-5, err_msg=name)


def test_gradients_equal_those_of_torch(found):
    golden, wanted, _, (params, x) = found
    np.testing.assert_allclose(x, golden["gradient_x"], atol=1e-5)
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for (path, leaf), torch in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(wanted), strict=True
    ):
        scale = max(np.abs(torch).max(), 1.0)
        np.testing.assert_allclose(leaf, torch, atol=1e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize("case", ["2-forward", "2-both"])
def test_padding_may_stand_anywhere_and_changes_nothing(case):
    apply, params = make(case)
    x = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32)
    states, final = apply(params, jnp.asarray(x))
    spread = np.full((1, 7, 3), 9.0, np.float32)
    places = [1, 2, 4, 6]
    spread[:, places] = x
    segment_ids = np.isin(np.arange(7), places)[None].astype(np.int32)
    padded, padded_final = apply(params, jnp.asarray(spread), segment_ids=jnp.asarray(segment_ids))
    np.testing.assert_allclose(padded[:, places], states, atol=1e-6)
    assert not np.any(np.delete(np.asarray(padded), places, axis=1))
    for a, b in zip(padded_final, final, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_source_of_padding_alone_leaves_the_state_at_zero():
    apply, params = make("2-both")
    states, final = apply(params, jnp.ones((2, 5, 3)), segment_ids=jnp.zeros((2, 5), jnp.int32))
    assert not np.any(states)
    assert not any(np.any(leaf) for leaf in final)


def test_forget_gates_start_open_and_each_gate_orthogonal():
    layer = LSTMLayer(3, 4, directions=2, rngs=nnx.Rngs(params=0))
    expected = np.repeat([0.0, 1.0, 0.0, 0.0], 4)
    np.testing.assert_array_equal(layer.bias[...], np.stack([expected, expected]))
    kernels = np.asarray(layer.recurrent_kernel[...]).reshape(2, 4, 4, 4)  # R, D, gate, D
    for direction in kernels:
        for gate in range(4):
            square = direction[:, gate]
            np.testing.assert_allclose(square @ square.T, np.eye(4), atol=1e-6)
    assert not np.allclose(kernels[0, :, 0], kernels[0, :, 1])
    assert not np.allclose(kernels[0], kernels[1])


def test_dropout_acts_between_layers_and_only_with_a_key():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
    key = jax.random.key(0)
    for case, acts in (("1-both", False), ("2-both", True)):
        apply, params = make(case, dropout=0.5)
        states, _ = apply(params, x)
        dropped, _ = apply(params, x, key=key)
        assert np.allclose(states, dropped) != acts
        plain, _ = make(case)
        np.testing.assert_array_equal(plain(params, x)[0], states)


def test_bfloat16_products_leave_states_in_float32():
    apply, params = make("2-both", compute_dtype="bfloat16")
    exact, _ = make("2-both")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
    states, final = apply(params, x)
    assert {states.dtype, final.h.dtype, final.c.dtype} == {jnp.dtype("float32")}
    np.testing.assert_allclose(states, exact(params, x)[0], atol=0.02)
    assert np.any(states != exact(params, x)[0])
