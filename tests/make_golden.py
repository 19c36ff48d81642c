"""Writes tests/fixtures/torch_*.npz: what PyTorch makes of small models and modules, in float64.

Needs torch (2.13.0 was used) and numpy, and nothing of this project. The parameters are torch's
own, renamed and reshaped to the names here. torch_transformer_*: logits, loss (label smoothing 0.1)
and gradients of an encoder-decoder. torch_norms: outputs, gradients and running statistics of
BatchNorm and GroupNorm, whose padded examples torch is given without their padding.

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


def make_norms() -> dict[str, np.ndarray]:
    """Three batches [B, T, D] through BatchNorm one after the other, then GroupNorm."""
    random = np.random.default_rng(1)
    batches, rows, places, channels = 3, 4, 6, 8
    x = 5 + random.normal(size=(batches, rows, places, channels)) * np.arange(1, channels + 1)
    x, cotangent = x.astype(np.float32), random.normal(size=x.shape).astype(np.float32)
    real = np.arange(places) < random.integers(1, places + 1, (batches, rows, 1))
    arrays = {"x": x, "cotangent": cotangent, "real": real.astype(np.float32)}
    norms = {
        "batch": nn.BatchNorm1d(channels, dtype=torch.float64),
        "group": nn.GroupNorm(2, channels, dtype=torch.float64),
    }
    for name, norm in norms.items():
        with torch.no_grad():
            norm.weight.copy_(torch.tensor(random.normal(size=channels)))
            norm.bias.copy_(torch.tensor(random.normal(size=channels)))
        arrays |= {f"{name}.scale": norm.weight, f"{name}.bias": norm.bias}

    def run(name: str, masked: bool, batch: int) -> dict[str, torch.Tensor]:
        """Output and gradients of one batch, zeros at its padding."""
        norm = norms[name]
        norm.zero_grad()
        inputs = torch.tensor(x[batch], dtype=torch.float64, requires_grad=True)
        weights = torch.tensor(cotangent[batch], dtype=torch.float64)
        kept = torch.tensor(real[batch] if masked else np.ones_like(real[batch]))
        outputs = torch.zeros_like(inputs)
        if name == "batch":
            outputs[kept] = norm(inputs[kept])
        else:
            for row in range(rows):
                alone = norm(inputs[row][kept[row]].T[None])[0].T
                outputs[row, kept[row]] = alone
        (outputs * weights).sum().backward()
        return {
            "y": outputs,
            "gradient.x": inputs.grad,
            "gradient.scale": norm.weight.grad,
            "gradient.bias": norm.bias.grad,
        }

    for masked in (False, True):
        norms["batch"].reset_running_stats()
        kind = "masked" if masked else "whole"
        for batch in range(batches):
            found = {f"batch.{name}": value for name, value in run("batch", masked, batch).items()}
            found["batch.mean"] = norms["batch"].running_mean
            found["batch.variance"] = norms["batch"].running_var
            found |= {f"group.{name}": value for name, value in run("group", masked, batch).items()}
            arrays |= {f"{kind}.{batch}.{name}": value.clone() for name, value in found.items()}
        norms["batch"].eval()
        arrays |= {
            f"{kind}.evaluation.{name}": value for name, value in run("batch", masked, 0).items()
        }
        norms["batch"].train()
    return {
        name: np.asarray(torch.as_tensor(value).detach(), np.float32)
        for name, value in arrays.items()
    }


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    np.savez_compressed(FIXTURES / "torch_norms.npz", **make_norms())
    for placement in ("pre", "post"):
        path = FIXTURES / f"torch_transformer_{placement}.npz"
        np.savez_compressed(path, **make(placement))
        print(path.name, path.stat().st_size, "bytes")
