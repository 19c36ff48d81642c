"""`attention` on the CPU against `jax.nn.dot_product_attention`: time and memory with gradients.

`python -m benchmarks.attention_cpu` times loss and gradients at B2 T4096 N8 H64 causal, the two by
turns, and prints the median of each and of the ratios turn by turn; memory is that of the compiled
programs' temporaries, exact and the same on every machine.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer_kernels import Mask, attention

B, T, N, H = 2, 4096, 8, 64


def compiled(function, T: int = T):
    """Loss and gradients of `function(q, k, v)`, compiled for float32 [B, T, N, H]."""

    def loss(q, k, v):
        return jnp.mean(jnp.square(function(q, k, v)))

    shape = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return gradients.lower(shape, shape, shape).compile()


def ours(q, k, v):
    return attention(q, k, v, mask=Mask(causal=True), implementation="xla")


def theirs(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def temporaries(program) -> int:
    """Bytes that a compiled program needs beside its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def seconds(program, arrays) -> float:
    """Of one run, to the end."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_cpu", description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.RandomState(0)
    arrays = [jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32) for _ in range(3)]
    programs = {"attention, xla": compiled(ours), "jax.nn.dot_product_attention": compiled(theirs)}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(options.turns + 1):
        for name, program in programs.items():
            taken = seconds(program, arrays)
            if turn:  # the first touches fresh memory
                times[name].append(taken)

    print(f"loss and gradients, float32, B{B} T{T} N{N} H{H} causal, {jax.__version__}")
    print("| | median, s | temporaries, MiB |\n| --- | --- | --- |")
    for name, program in programs.items():
        median = statistics.median(times[name])
        print(f"| {name} | {median:.2f} | {temporaries(program) / 2**20:.0f} |")
    mine, other = times.values()
    ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
    share = temporaries(programs["attention, xla"]) / temporaries(
        programs["jax.nn.dot_product_attention"]
    )
    print(f"| ratio | {ratio:.2f} | {share:.3f} |")


if __name__ == "__main__":
    main()
