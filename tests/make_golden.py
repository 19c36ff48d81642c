"""Writes tests/fixtures/torch_transformer_*.npz: what PyTorch makes of a small encoder-decoder.

Needs torch (2.13.0 was used) and numpy, and nothing of this project. The parameters are torch's
own, renamed and reshaped to the names here; logits, the loss (label smoothing 0.1) and its
gradients are computed by torch in float64.

    pip install torch==2.13.0 && python tests/make_golden.py
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

FIXTURES = Path(__file__).parent / "fixtures"
WIDTH, HEADS, HIDDEN, LAYERS, VOCABULARY = 8, 2, 12, 2, 11
SMOOTHING, IGNORED = 0.1, -100


def attention(module: nn.MultiheadAttention, read) -> dict[str, np.ndarray]:
    """in_proj [3 D, D] and out_proj [D, D] as kernels [D, N, H] and [N, H, D]."""
    head = WIDTH // HEADS
    named = {}
    kernels = np.split(read(module.in_proj_weight), 3)
    biases = np.split(read(module.in_proj_bias), 3)
    for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
        named[f"{name}.kernel"] = kernel.T.reshape(WIDTH, HEADS, head)
        named[f"{name}.bias"] = bias.reshape(HEADS, head)
    named["out.kernel"] = read(module.out_proj.weight).T.reshape(HEADS, head, WIDTH)
    named["out.bias"] = read(module.out_proj.bias)
    return named


def block(layer: nn.Module, read) -> dict[str, np.ndarray]:
    """A layer's parameters by the names of this project."""
    cross = hasattr(layer, "multihead_attn")
    parts = {"attention": attention(layer.self_attn, read)}
    norms = {
        "attention_norm": layer.norm1,
        "feedforward_norm": layer.norm3 if cross else layer.norm2,
    }
    if cross:
        parts["cross_attention"] = attention(layer.multihead_attn, read)
        norms["cross_attention_norm"] = layer.norm2
    parts["feedforward"] = {
        "up.kernel": read(layer.linear1.weight).T,
        "up.bias": read(layer.linear1.bias),
        "down.kernel": read(layer.linear2.weight).T,
        "down.bias": read(layer.linear2.bias),
    }
    for name, norm in norms.items():
        parts[name] = {"scale": read(norm.weight), "bias": read(norm.bias)}
    return {
        f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()
    }


def named_parameters(model: nn.Transformer, embeddings, read) -> dict[str, np.ndarray]:
    """All parameters, those of the layers stacked."""
    named = {}
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        blocks = [block(layer, read) for layer in stack.layers]
        for name in blocks[0]:
            named[f"{side}.blocks.{name}"] = np.stack([values[name] for values in blocks])
        if stack.norm is not None:
            named[f"{side}.norm.scale"] = read(stack.norm.weight)
            named[f"{side}.norm.bias"] = read(stack.norm.bias)
    for name, embedding in zip(("source_embedding", "embedding"), embeddings, strict=True):
        named[f"{name}.table"] = read(embedding.weight)
    return named


def make(placement: str) -> dict[str, np.ndarray]:
    """One golden file's arrays."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    options = dict(
        d_model=WIDTH,
        nhead=HEADS,
        dim_feedforward=HIDDEN,
        dropout=0.0,
        activation="relu" if placement == "post" else "gelu",
        batch_first=True,
        norm_first=placement == "pre",
    )

    def norm() -> nn.LayerNorm | None:
        return nn.LayerNorm(WIDTH) if placement == "pre" else None

    model = nn.Transformer(
        **options,
        custom_encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**options), LAYERS, norm(), enable_nested_tensor=False
        ),
        custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), LAYERS, norm()),
    )
    embeddings = [nn.Embedding(VOCABULARY, WIDTH) for _ in range(2)]
    # Away from the starting values, where biases are 0 and layers are copies of one another.
    for parameter in [*model.parameters(), *(e.weight for e in embeddings)]:
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.4)

    random = np.random.default_rng(0)
    source = random.integers(4, VOCABULARY, (3, 7))
    inputs, targets = random.integers(4, VOCABULARY, (2, 3, 6))
    lengths, target_lengths = np.array([7, 4, 6]), np.array([6, 6, 3])
    source_real = np.arange(7) < lengths[:, None]
    target_real = np.arange(6) < target_lengths[:, None]
    padding = torch.tensor(~source_real)
    hidden = model(
        embeddings[0](torch.tensor(source)),
        embeddings[1](torch.tensor(inputs)),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    logits = hidden @ embeddings[1].weight.T
    loss = nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY),
        torch.tensor(np.where(target_real, targets, IGNORED)).reshape(-1),
        label_smoothing=SMOOTHING,
        reduction="sum",
        ignore_index=IGNORED,
    )
    loss.backward()
    arrays = {
        "source": source,
        "source_segment_ids": source_real,
        "inputs": inputs,
        "targets": targets,
        "weights": target_real,
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
    }
    readers = {
        "param": lambda parameter: parameter.detach().numpy(),
        "gradient": lambda parameter: parameter.grad.numpy(),
    }
    for kind, read in readers.items():
        values = named_parameters(model, embeddings, read)
        arrays |= {f"{kind}.{name}": value for name, value in values.items()}
    return {
        name: value.astype(np.float32 if value.dtype == np.float64 else np.int32)
        for name, value in arrays.items()
    }


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for placement in ("pre", "post"):
        path = FIXTURES / f"torch_transformer_{placement}.npz"
        np.savez_compressed(path, **make(placement))
        print(path.name, path.stat().st_size, "bytes")
