"""Which arrays of a batch a model is given, and which belong to the loss or to the caller."""

from typing import Any

LABELS = ("targets", "weights", "index")


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a batch that are a model's inputs, by the names of its arguments."""
    return {name: value for name, value in batch.items() if name not in LABELS}
