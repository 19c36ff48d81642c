"""Memory of attention on the CPU, as the benchmark has it."""

import pytest

from benchmarks import attention_cpu


@pytest.mark.slow
def test_a_training_step_takes_at_most_a_quarter_of_the_memory_that_jax_takes():
    mine = attention_cpu.temporaries(attention_cpu.compiled(attention_cpu.ours))
    theirs = attention_cpu.temporaries(attention_cpu.compiled(attention_cpu.theirs))
    assert mine <= theirs / 4


def test_memory_is_linear_in_the_length():
    once, twice = (
        attention_cpu.temporaries(attention_cpu.compiled(attention_cpu.ours, T))
        for T in (2048, 4096)
    )
    assert twice <= 2.1 * once
