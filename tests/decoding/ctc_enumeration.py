"""CTC by its definition: every path of a tiny case, in float64."""

import itertools

import numpy as np


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def labels_of(path, blank=0):
    """The labels a path stands for."""
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def paths_by_labels(log_probs, length, tokens, blank=0):
    """{labels: [(path, log-probability), ...]} of all paths over the tokens and the blank."""
    found = {}
    for path in itertools.product((blank, *tokens), repeat=length):
        total = float(sum(log_probs[frame, token] for frame, token in enumerate(path)))
        if total > -np.inf:
            found.setdefault(labels_of(path, blank), []).append((path, total))
    return found


def log_sum(values):
    return np.logaddexp.reduce(np.asarray(values, np.float64)) if len(values) else -np.inf


def label_log_probs(log_probs, length, tokens, blank=0):
    """{labels: log P(labels)}."""
    found = paths_by_labels(log_probs, length, tokens, blank)
    return {labels: log_sum([total for _, total in paths]) for labels, paths in found.items()}
