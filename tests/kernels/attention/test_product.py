"""Every combination of features on every implementation: a right answer or NotImplementedError.

Ten features and three kinds of offset make 3072 calls. On `xla` each of them is computed, with all
gradients: those with an even number of features in one regime, those with an odd number in the
other, so that each regime meets every combination of all features but one. Compiling a call for
each would take hours; they run one operation at a time, whose compiled code they share, and the
reference, which sees of a mask no more than an array, is compiled once for each set of the other
features.

Kernels in an interpreter take seconds a call. All 3072 are held to be refused where a feature is
missing; what is taken is computed for few of them, in which every three features occur in all their
on/off states (test_implementations.py).
"""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import Dropout, Mask, _compat, attention, compiling_for, interpreting
from jaxformer_kernels.attention import api, dropout, xla, xla_long, xla_short

B, T, S, N, K, H, HV = 2, 5, 7, 4, 2, 4, 3

MASKING = ("causal", "window", "segments", "kv_range", "mask_array")
OFFSETS = (None, "q_offset", "traced_q_offset")
OTHERS = ("bias", "sinks", "softcap", "dropout", "grouped_heads")


def subsets(names):
    return [some for size in range(len(names) + 1) for some in itertools.combinations(names, size)]


# Both in blocks so small that there are several, the last of them ragged.
SHORT = {
    (xla_short, "_MIN_ROWS"): 2,
    (xla_short, "_MANY_ROWS"): 2,
    (xla_short, "_WORTHWHILE"): 2.0,
}
BLOCKED = {
    (xla, "_SHORT_LOGITS"): 0,
    (xla, "_FEW_ROWS"): 0,
    (xla_long, "ROWS"): 3,
    (xla_long, "COLUMNS"): 4,
}


def draw(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def masks():
    """features -> mask, for every combination of the features of a mask."""
    rng = np.random.RandomState(5)
    given = {
        "causal": {"causal": True},
        "window": {"window": (2, 1)},
        "segments": {
            "q_segment_ids": jnp.asarray(np.sort(rng.randint(0, 3, (B, T)))),
            "kv_segment_ids": jnp.asarray(np.sort(rng.randint(0, 3, (B, S)))),
        },
        "kv_range": {"kv_start": jnp.array([0, 2]), "kv_end": jnp.array([4, 7])},
        "mask_array": {"array": jnp.asarray(rng.rand(B, 1, T, S) < 0.7)},
        "q_offset": {"q_offset": 2},
        "traced_q_offset": {"q_offset": jnp.array([3, -1])},
    }
    found = {}
    for names in subsets(MASKING):
        for offset in OFFSETS:
            every = (*names, offset) if offset else names
            fields = {key: x for name in every for key, x in given[name].items()}
            found[every] = Mask(**fields)
    return found


def operands(others):
    """The differentiable arrays of a call."""
    heads = K if "grouped_heads" in others else N
    arrays = {"q": draw(0, B, T, N, H), "k": draw(1, B, S, heads, H), "v": draw(2, B, S, heads, HV)}
    if "bias" in others:
        arrays["bias"] = draw(3, 1, N, T, S)
    if "sinks" in others:
        arrays["sinks"] = draw(4, N)
    return arrays


def options(others):
    """The rest of a call but its mask."""
    return {
        "softcap": 1.5 if "softcap" in others else None,
        "dropout": Dropout(0.3, jnp.array([1, 2], jnp.uint32)) if "dropout" in others else None,
    }


WEIGHTS = np.cos(np.arange(B * T * N * HV, dtype=np.float32)).reshape(B, T, N, HV)
LSE_WEIGHTS = np.sin(np.arange(B * N * T, dtype=np.float32)).reshape(B, N, T)


def outcome(implementation, arrays, mask, others):
    """Output, log-sum-exp and the gradients of both together."""

    def run(arrays):
        return attention(
            **arrays, **options(others), mask=mask, return_lse=True, implementation=implementation
        )

    (out, lse), pull = jax.vjp(run, arrays)
    # A row that sees nothing has no gradient, whatever comes back to its lse.
    (gradients,) = pull((jnp.asarray(WEIGHTS), jnp.asarray(LSE_WEIGHTS)))
    return {"out": out, "lse": lse, **{f"d{name}": x for name, x in gradients.items()}}


def expected(others):
    """mask -> what the reference says, in one compiled function."""
    arrays = operands(others)
    run = jax.jit(lambda visible: outcome("reference", arrays, Mask(array=visible), others))
    return lambda mask: run(mask.as_array(B, N, T, S))


MIX = jax.jit(dropout._mix)


def compiled_mix(x):
    """Dropout's hash of integers, compiled: one operation at a time it is 0.4 of such a call."""
    with jax.disable_jit(False):
        return MIX(x)


@pytest.mark.slow
@pytest.mark.parametrize("others", subsets(OTHERS), ids="+".join)
def test_every_combination_is_right_on_xla(others):
    assert len(masks()) * len(subsets(OTHERS)) == 3072
    arrays, reference = operands(others), expected(others)
    for names, mask in masks().items():
        want = reference(mask)
        regime = BLOCKED if (len(names) + len(others)) % 2 else SHORT
        with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
            for (module, name), value in regime.items():
                patch.setattr(module, name, value)
            patch.setattr(dropout, "_mix", compiled_mix)
            got = outcome("xla", arrays, mask, others)
        for name, x in want.items():
            message = f"{name} of {'+'.join((*names, *others))}"
            np.testing.assert_allclose(got[name], x, rtol=2e-5, atol=2e-5, err_msg=message)


def at_home(name):
    """Where the implementation would run if it could: on its device, or in an interpreter."""
    if name.startswith("mosaic"):
        return interpreting()
    return compiling_for("gpu") if name == "cudnn" else contextlib.nullcontext()


def used(names):
    """The features that a call with these has: an offset matters where something counts from it."""
    counted = {"causal", "window"} & set(names)
    return set(names) if counted else set(names) - {"q_offset", "traced_q_offset"}


@pytest.mark.parametrize("name", api.IMPLEMENTATIONS)
def test_every_combination_with_a_feature_that_is_missing_is_refused(monkeypatch, name):
    """No feature is lost between the call and the choice, alone or beside any others."""
    ran = []
    implementation = dataclasses.replace(
        api.IMPLEMENTATIONS[name], run=lambda q, k, v, *_: (ran.append(1), (q[..., :HV], None))[1]
    )
    monkeypatch.setitem(api.IMPLEMENTATIONS, name, implementation)
    monkeypatch.setattr(_compat, "cudnn_version", lambda: 91000)
    taken = 0
    for others in subsets(OTHERS):
        arrays = {key: jnp.asarray(x, jnp.bfloat16) for key, x in operands(others).items()}
        for names, mask in masks().items():
            features = used((*names, *others, "value_head_dim"))
            missing = sorted(features - implementation.supports)
            ran.clear()
            try:
                with at_home(name):
                    attention(**arrays, **options(others), mask=mask, implementation=name)
                said = ""
            except NotImplementedError as refusal:
                said = str(refusal)
            assert bool(ran) != bool(said)
            taken += bool(ran)
            assert all(feature in said for feature in missing), f"one of {missing} was dropped"
    if name in ("reference", "xla"):
        assert taken == 3072
