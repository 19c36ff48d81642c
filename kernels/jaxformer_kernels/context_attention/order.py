"""The order in which the tokens of a sequence are dealt out to the devices of a ring."""

import jax.numpy as jnp
import numpy as np

ORDERS = ("zigzag", "contiguous")


def zigzag(C: int, T: int) -> np.ndarray:
    """The order of a sequence in which each of C devices has as much causal attention to do.

    The sequence is cut into 2C chunks; device i holds chunks i and 2C-1-i, one that sees little
    of it and one that sees much. `x[:, zigzag(C, T)]` is in this order,
    `y[:, np.argsort(zigzag(C, T))]` is `y` back in the sequence's own.

    Args:
        C: devices in the ring.
        T: tokens of the whole sequence, a multiple of 2C.

    Returns:
        int [T]: element i of the reordered sequence is token zigzag(C, T)[i].

    Raises:
        ValueError: T is not a multiple of 2C.
    """
    if C < 1 or T < 1 or T % (2 * C):
        raise ValueError(
            f"zigzag: {T} tokens do not make 2 * {C} chunks of one size; pad the sequence to "
            f"{-(-max(T, 1) // (2 * max(C, 1))) * 2 * max(C, 1)} tokens."
        )
    first = np.arange(C)
    chunks = np.stack([first, 2 * C - 1 - first], axis=1)
    return (chunks.reshape(-1, 1) * (T // (2 * C)) + np.arange(T // (2 * C))).reshape(-1)


def chunks_of(order: str, C: int, device: int) -> tuple[int, ...]:
    """Numbers of the sequence's chunks that a device holds, in the order in which it does."""
    return (device, 2 * C - 1 - device) if order == "zigzag" else (device,)


def straightened(x, C: int):
    """`x` [B, T, ...] in zig-zag order, put into the sequence's own: `np.argsort(zigzag)`."""
    # Slices and a reversal of chunks, which transpose to the like; a gather would to a scatter.
    x = x.reshape(x.shape[0], C, 2, -1, *x.shape[2:])
    whole = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
    return whole.reshape(x.shape[0], -1, *x.shape[4:])


def zigzagged(x, C: int):
    """The inverse of `straightened`."""
    x = x.reshape(x.shape[0], 2 * C, -1, *x.shape[2:])
    dealt = jnp.stack([x[:, :C], x[:, : C - 1 : -1]], axis=2)
    return dealt.reshape(x.shape[0], -1, *x.shape[3:])
