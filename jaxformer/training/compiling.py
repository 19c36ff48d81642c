"""Compiling while something else goes on, so that the first step comes soon."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from jaxformer.config import ConfigError, ModelConfig


def trace(step: Any, *arguments: Any, model: ModelConfig) -> Any:
    """A jitted step of a model, traced for arguments or their shapes.

    Raises ConfigError if the attention asked for is not known or cannot do the model's calls.
    """
    try:
        return step.trace(*arguments)
    except (ValueError, NotImplementedError) as error:
        if model.attention is None:
            raise
        raise ConfigError(f"--model.attention: {error}") from error


def compile_ahead(traced: Any) -> Future[Any]:
    """Compiles what `trace` gave in a thread of its own.

    A later call of the same jitted function takes up the result: wait for it, as a call meanwhile
    would compile once more. If compiling fails, that call fails too.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
    compiling = thread.submit(traced.lower().compile)
    thread.shutdown(wait=False)
    return compiling


def run_once(make: Callable[[], Any], like: Any) -> Any:
    """What `make()` returns, as one compiled program, each array placed as in `like`.

    Op by op the first state of a small model takes seconds, one compilation after the other. On a
    CPU LLVM optimises little: of random draws it makes nothing faster, and takes four times longer.
    """
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    # Flat, as a state is checked to hold arrays, not shardings.
    leaves, structure = jax.tree.flatten(like)

    def first_state() -> list[Any]:
        return jax.tree.leaves(make())

    program = jax.jit(
        first_state,
        out_shardings=[leaf.sharding for leaf in leaves],
        compiler_options=options,
    )
    return jax.tree.unflatten(structure, program())
