"""Calls of CTC that libraries answer differently: what each makes of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accuracy, kernel_torch
from benchmarks.kernel_calls import Arrays
from benchmarks.kernel_competitors import TORCH, installed, optax_ctc
from jaxformer_kernels import ctc_loss

OURS = "ctc_loss"


def rows() -> list[dict[str, str]]:
    """A row for each call and library: its loss, and whether its gradient is 0 or NaN."""
    found = []
    for name, logits, labels in calls():
        for library, answer in answers(logits, labels).items():
            loss, gradient = (np.asarray(answer[key]) for key in ("loss", "dlogits"))
            kind = "some NaN" if np.isnan(gradient).any() else "not 0" if gradient.any() else "0"
            row = {"call": name, "library": library, "loss": f"{float(loss[0]):.4g}"}
            found.append(row | {"gradient": kind})
    return found


def calls() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(what is special about it, logits [1, T, V], labels [N])."""
    ruled_out = np.zeros((1, 4, 4))
    ruled_out[..., 3] = -np.inf
    classes = np.zeros(63, int)
    classes[1::3] = labels = np.tile([1, 2, 3], 7)
    return [
        ("more labels than frames", np.zeros((1, 2, 4)), np.array([1, 2, 3])),
        ("an unrelated class of logit -inf", ruled_out, np.array([1, 2])),
        ("logits that are sure of the labels", 18 * np.eye(4)[None, classes], labels),
    ]


def answers(logits, labels) -> dict[str, Arrays]:
    """Library -> losses and gradient of one row; of the libraries that are installed."""
    operands = {"logits": logits.astype(np.float32)}
    integers = {
        "logit_lengths": np.array([logits.shape[1]], np.int32),
        "labels": np.array([labels], np.int32),
        "label_lengths": np.array([len(labels)], np.int32),
    }
    functions: dict[str, Callable[[Arrays, Arrays], Arrays]] = {
        OURS: lambda operands, integers: {"loss": ctc_loss(**operands, **integers)},
        "optax": optax_ctc,
    }
    arrays = [jax.tree.map(jnp.asarray, given) for given in (operands, integers)]
    found = {
        library: accuracy.results(function, *arrays, {"loss": jnp.ones(1)})
        for library, function in functions.items()
    }
    if installed(TORCH):
        program = kernel_torch.program_of("ctc_loss", None, operands, integers)
        found[TORCH] = {name: kernel_torch.as_numpy(x) for name, x in program().items()}
    return found
