"""The benchmarked models written plainly in PyTorch, as a contender that trains them.

What a user of PyTorch would write: modules with fused query-key-value projections, attention by
`scaled_dot_product_attention`, `cross_entropy`, `clip_grad_norm_` and AdamW.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import train_shapes, train_weights
from benchmarks.train_shapes import Shape
from jaxformer.config import ModelConfig


class Rotary(nn.Module):
    """Rotates the pairs (i, i + H/2) of each head by position / base**(2i/H)."""

    def __init__(self, head_dim: int, max_length: int, base: float):
        super().__init__()
        frequencies = base ** (-torch.arange(head_dim // 2) / (head_dim // 2))
        angles = torch.outer(torch.arange(max_length), frequencies).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x * self.cosine[:length] + turned * self.sine[:length]).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention within a sequence, with key-value heads that groups of query heads may share."""

    def __init__(self, config: ModelConfig, *, causal: bool):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.width // config.heads
        self.causal = causal
        columns = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.width, columns, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.rotary = (
            Rotary(self.head_dim, config.max_length, config.rotary_base)
            if config.position == "rotary"
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        heads = [self.heads, self.kv_heads, self.kv_heads]
        qkv = self.qkv(x).view(rows, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = qkv.split(heads, dim=1)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=self.causal,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class CrossAttention(nn.Module):
    """Attention to the encoded source."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width, bias=config.bias)
        self.kv = nn.Linear(config.width, 2 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        rows, length, width = x.shape
        query = self.query(x).view(rows, length, self.heads, -1).transpose(1, 2)
        key, value = (
            part.view(rows, source.shape[1], self.heads, -1).transpose(1, 2)
            for part in self.kv(source).chunk(2, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    """GELU, exact or by tanh, or SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.feedforward or 4 * config.width
        self.gate = (
            nn.Linear(config.width, hidden, bias=config.bias)
            if config.activation == "swiglu"
            else None
        )
        self.up = nn.Linear(config.width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.width, bias=config.bias)
        self.form = "none" if config.activation == "gelu_exact" else "tanh"

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(functional.silu(self.gate(x)) * self.up(x))
        return self.down(functional.gelu(self.up(x), approximate=self.form))


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation over the width that the configuration names."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.width, eps=config.norm_epsilon)
    return nn.LayerNorm(config.width, eps=config.norm_epsilon, bias=config.bias)


class Block(nn.Module):
    """A pre-norm layer; with cross-attention in a decoder that has a source."""

    def __init__(self, config: ModelConfig, *, causal: bool, cross: bool):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config, causal=causal)
        self.cross_attention_norm = make_norm(config) if cross else None
        self.cross_attention = CrossAttention(config) if cross else None
        self.feedforward_norm = make_norm(config)
        self.feedforward = FeedForward(config)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.cross_attention_norm(x), source)
        return x + self.feedforward(self.feedforward_norm(x))


class Stack(nn.Module):
    """Embedding, positions if they are learned, blocks, and the last norm."""

    def __init__(
        self, config: ModelConfig, vocabulary: int, layers: int, *, causal: bool, cross: bool
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.positions = (
            nn.Embedding(config.max_length, config.width) if config.position == "learned" else None
        )
        self.blocks = nn.ModuleList(
            Block(config, causal=causal, cross=cross) for _ in range(layers)
        )
        self.norm = make_norm(config)

    def forward(self, tokens: Tensor, source: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, source)
        return self.norm(x)


class LanguageModel(nn.Module):
    """GPT or Llama, as the configuration says; returns the mean cross-entropy."""

    def __init__(self, config: ModelConfig, vocabulary: int):
        super().__init__()
        self.decoder = Stack(config, vocabulary, config.layers, causal=True, cross=False)
        self.head = make_head(config, vocabulary, self.decoder)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.decoder(inputs))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class EncoderDecoder(nn.Module):
    """A source is encoded, the target predicted; returns the mean cross-entropy."""

    def __init__(self, config: ModelConfig, vocabulary: int, source_vocabulary: int):
        super().__init__()
        layers = config.layers if config.encoder_layers is None else config.encoder_layers
        self.encoder = Stack(config, source_vocabulary, layers, causal=False, cross=False)
        self.decoder = Stack(config, vocabulary, config.layers, causal=True, cross=True)
        self.head = make_head(config, vocabulary, self.decoder)

    def forward(self, source: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.decoder(inputs, self.encoder(source)))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_head(config: ModelConfig, vocabulary: int, decoder: Stack) -> nn.Linear:
    """The output projection, whose weight may be the embedding."""
    head = nn.Linear(config.width, vocabulary, bias=False)
    if config.tied_embeddings:
        head.weight = decoder.embedding.weight
    return head


def build(shape: Shape) -> nn.Module:
    """The model of a shape, with weights of deviation 0.02 and zero biases."""
    if shape.source_vocabulary is None:
        model: nn.Module = LanguageModel(shape.model, shape.vocabulary)
    else:
        model = EncoderDecoder(shape.model, shape.vocabulary, shape.source_vocabulary)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def make_optimizer(shape: Shape, model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    config = shape.optimizer
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {
                "params": [value for value in parameters if value.dim() >= 2],
                "weight_decay": config.weight_decay,
            },
            {"params": [value for value in parameters if value.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.b1, config.b2),
        eps=config.epsilon,
        fused=fused,
    )


def trainer(
    shape: str,
    precision: str = "float32",
    compile: bool = False,
    fused: bool = True,
    steps_per_turn: int = 20,
    first_steps: int = 1,
    weights: str | None = None,
    tiny: bool = False,
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """A contender (`benchmarks.contest`) whose turn is `steps_per_turn` whole training steps.

    bfloat16 is autocast. Before the first turn, `first_steps` steps are done from the weights in a
    file (`train_weights`), or from weights of its own; their losses are the facts.
    """
    made = train_shapes.named(shape, tiny=tiny)
    torch.manual_seed(0)
    model = build(made)
    if weights is not None:
        train_weights.load_into_torch(model, weights)
    optimizer = make_optimizer(made, model, fused=fused)
    parameters = list(model.parameters())
    forward = torch.compile(model) if compile else model
    host = [_tensors(batch) for batch in train_shapes.batches(made)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    done = 0

    def step() -> Tensor:
        nonlocal done
        batch = host[done % len(host)]
        done += 1
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = forward(**batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, made.optimizer.clip_norm)
        optimizer.step()
        return loss

    def turn() -> dict[str, Any]:
        for _ in range(steps_per_turn):
            loss = step()
        return {"loss": loss.item()}

    losses = [step().item() for _ in range(first_steps)]
    count = sum(value.numel() for value in parameters)
    return turn, {"losses": losses, "parameters": count}


def _tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    names = ("source", "inputs", "targets")
    return {name: torch.from_numpy(batch[name].astype(np.int64)) for name in names if name in batch}
