"""Writes tests/fixtures/torch_lstm.npz and torch_recurrent.npz: LSTMs and attention in PyTorch.

Needs torch (2.13.0 was used) and numpy, and nothing of this project. Layers are torch.nn.LSTM over
packed sequences, decoders are written with torch.nn.LSTMCell and torch.nn.Linear after Luong et al.
(2015) and Bahdanau et al. (2015); everything is computed in float64.

    pip install torch==2.13.0 && python tests/make_golden_recurrent.py
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

FIXTURES = Path(__file__).parent / "fixtures"
INPUTS, HIDDEN = 3, 4
WIDTH, VOCABULARY, LAYERS = 4, 7, 2
SOURCE_LENGTHS, STEPS = (6, 2, 4), 5
DECODERS = (
    ("final", False),
    ("uniform", True),
    ("additive", True),
    ("dot", True),
    ("general", True),
    ("additive", False),
    ("general", False),
)

READERS = {
    "param": lambda parameter: parameter.detach().numpy(),
    "gradient": lambda parameter: parameter.grad.numpy(),
}


def layer(module: nn.Module, suffixes: list[str], kind: str) -> dict[str, np.ndarray]:
    """A layer's weights by the names of this project, its directions stacked."""
    read = READERS[kind]

    def stacked(name: str, turn) -> np.ndarray:
        return np.stack([turn(read(getattr(module, name + suffix))) for suffix in suffixes])

    biases = [stacked(name, lambda value: value) for name in ("bias_ih", "bias_hh")]
    return {
        "kernel": stacked("weight_ih", np.transpose),
        "recurrent_kernel": stacked("weight_hh", np.transpose),
        # One bias stands for the sum of torch's two, whose gradients are equal.
        "bias": biases[0] + biases[1] if kind == "param" else biases[0],
    }


def stack(module: nn.LSTM, kind: str) -> dict[str, np.ndarray]:
    """All layers of a torch.nn.LSTM."""
    named = {}
    for number in range(module.num_layers):
        suffixes = [f"_l{number}"] + [f"_l{number}_reverse"] * module.bidirectional
        for name, value in layer(module, suffixes, kind).items():
            named[f"layers.{number}.{name}"] = value
    return named


def draw(*modules: nn.Module) -> None:
    """Weights large enough that every gate and score matters."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0.0, 0.6)


def packed(module: nn.LSTM, x: torch.Tensor, lengths) -> tuple:
    """States, 0 on padding, and the final (h, c)."""
    rows = nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    states, final = module(rows)
    states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
    return states, final


def make_lstm(layers: int, bidirectional: bool) -> dict[str, np.ndarray]:
    """States, final states, and the gradients of their product with random numbers."""
    module = nn.LSTM(INPUTS, HIDDEN, layers, batch_first=True, bidirectional=bidirectional)
    draw(module)
    x = torch.randn(3, max(SOURCE_LENGTHS), INPUTS, requires_grad=True)
    states, (h, c) = packed(module, x, SOURCE_LENGTHS)
    results = {"states": states, "h": h, "c": c}
    cotangents = {f"{name}_cotangent": torch.randn_like(value) for name, value in results.items()}
    pairs = zip(results.values(), cotangents.values(), strict=True)
    sum((value * cotangent).sum() for value, cotangent in pairs).backward()
    assert x.grad is not None
    arrays = {name: value.detach().numpy() for name, value in (results | cotangents).items()}
    arrays |= {"x": x.detach().numpy(), "gradient_x": x.grad.numpy()}
    for kind in READERS:
        arrays |= {f"{kind}.{name}": value for name, value in stack(module, kind).items()}
    return arrays


class Decoder(nn.Module):
    """What follows the encoder, after the equations of the papers."""

    def __init__(self, context: str, feeding: bool):
        super().__init__()
        self.context, self.feeding = context, feeding
        inputs = 2 * WIDTH if feeding else WIDTH
        self.cells = nn.ModuleList(
            nn.LSTMCell(inputs if number == 0 else WIDTH, WIDTH) for number in range(LAYERS)
        )
        if context in ("additive", "general"):
            self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        if context == "additive":
            self.query = nn.Linear(WIDTH, WIDTH, bias=False)
            self.vector = nn.Linear(WIDTH, 1, bias=False)
        if context != "final":
            self.combine = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, embedded, states, final, real):
        """Attentional states [B, T, D] and weights [B, T, S]."""
        h, c = (list(part) for part in final)
        fed = torch.zeros_like(h[0])
        outputs, looks = [], []
        for t in range(embedded.shape[1]):
            x = embedded[:, t]
            if self.feeding:
                x = torch.cat([x, fed], -1)
            for number, cell in enumerate(self.cells):
                h[number], c[number] = cell(x, (h[number], c[number]))
                x = h[number]
            if self.context != "final":
                scores = self.scores(x, states).masked_fill(~real, -torch.inf)
                weights = torch.softmax(scores, -1)
                seen = (weights[..., None] * states).sum(1)
                x = fed = torch.tanh(self.combine(torch.cat([seen, x], -1)))
                looks.append(weights)
            outputs.append(x)
        return torch.stack(outputs, 1), looks

    def scores(self, h, states):
        """[B, S]"""
        if self.context == "uniform":
            return torch.zeros(states.shape[:2])
        if self.context == "additive":
            return self.vector(torch.tanh(self.query(h)[:, None] + self.key(states)))[..., 0]
        keys = self.key(states) if self.context == "general" else states
        return (keys @ h[..., None])[..., 0]


def decoder_parameters(decoder: Decoder, kind: str) -> dict[str, np.ndarray]:
    """All but the encoder and the embeddings."""
    named = {}
    for number, cell in enumerate(decoder.cells):
        for name, value in layer(cell, [""], kind).items():
            named[f"decoder.{number}.{name}"] = value
    for name in ("key", "query"):
        if hasattr(decoder, name):
            linear = getattr(decoder, name)
            named[f"alignment.{name}.kernel"] = READERS[kind](linear.weight).T
    if hasattr(decoder, "vector"):
        named["alignment.vector"] = READERS[kind](decoder.vector.weight)[0]
    if hasattr(decoder, "combine"):
        named["combine.kernel"] = READERS[kind](decoder.combine.weight).T
    return named


def make_model(context: str, feeding: bool) -> dict[str, np.ndarray]:
    """Logits of a whole model, its attention weights, and the gradients of its loss."""
    encoder = nn.LSTM(WIDTH, WIDTH // 2, LAYERS, batch_first=True, bidirectional=True)
    decoder = Decoder(context, feeding)
    embeddings = {
        name: nn.Embedding(VOCABULARY, WIDTH) for name in ("source_embedding", "embedding")
    }
    draw(encoder, decoder, *embeddings.values())
    random = np.random.default_rng(0)
    source = random.integers(4, VOCABULARY, (3, max(SOURCE_LENGTHS)))
    inputs, targets = random.integers(3, VOCABULARY, (2, 3, STEPS))
    real = np.arange(source.shape[1]) < np.array(SOURCE_LENGTHS)[:, None]
    states, final = packed(
        encoder, embeddings["source_embedding"](torch.tensor(source)), SOURCE_LENGTHS
    )
    # The directions' final states side by side, layer by layer.
    start = [
        part.reshape(LAYERS, 2, 3, -1).transpose(1, 2).reshape(LAYERS, 3, WIDTH) for part in final
    ]
    x, looks = decoder(
        embeddings["embedding"](torch.tensor(inputs)), states, start, torch.tensor(real)
    )
    logits = x @ embeddings["embedding"].weight.T
    loss = nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), torch.tensor(targets).reshape(-1), reduction="sum"
    )
    loss.backward()
    arrays = {
        "source": source,
        "source_segment_ids": real,
        "inputs": inputs,
        "targets": targets,
        "logits": logits.detach().numpy(),
    }
    if looks:
        arrays["attention"] = torch.stack(looks, 1).detach().numpy()
    for kind, read in READERS.items():
        values = {f"encoder.{name}": value for name, value in stack(encoder, kind).items()}
        values |= decoder_parameters(decoder, kind)
        values |= {f"{name}.table": read(module.weight) for name, module in embeddings.items()}
        arrays |= {f"{kind}.{name}": value for name, value in values.items()}
    return arrays


def save(name: str, cases: dict[str, dict[str, np.ndarray]]) -> None:
    """One file of all cases; an array's name begins with its case."""
    np.savez_compressed(
        FIXTURES / name,
        **{
            f"{case}/{key}": value.astype(
                np.float32 if np.issubdtype(value.dtype, np.floating) else np.int32
            )
            for case, arrays in cases.items()
            for key, value in arrays.items()
        },
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    save(
        "torch_lstm.npz",
        {
            f"{layers}-{'both' if both else 'forward'}": make_lstm(layers, both)
            for layers in (1, 2)
            for both in (False, True)
        },
    )
    save(
        "torch_recurrent.npz",
        {
            f"{context}-{'fed' if feeding else 'plain'}": make_model(context, feeding)
            for context, feeding in DECODERS
        },
    )
