"""The weights of one of our models, in a file, for a contender that starts from the same ones."""

from typing import Any

import numpy as np


def save(params: dict[str, Any], path: str) -> None:
    """Writes a nested dict of arrays."""
    np.savez(path, **_flat(params))


def load(path: str) -> dict[str, Any]:
    """Reads what `save` wrote."""
    params: dict[str, Any] = {}
    with np.load(path) as file:
        for name in file.files:
            *groups, last = name.split("/")
            node = params
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = file[name]
    return params


def load_into_torch(model: Any, path: str) -> None:
    """Copies our weights into a model of `torch_models`; every one of both must find its place."""
    import torch

    wanted = model.state_dict()
    state = {name: torch.from_numpy(array.copy()) for name, array in to_torch(load(path)).items()}
    if "head.weight" in wanted and "head.weight" not in state:
        state["head.weight"] = state["decoder.embedding.weight"]
    model.load_state_dict(state)


def to_torch(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our weights by the names and in the layout of `torch_models`.

    Ours are stored inputs first, layers stacked, queries, keys and values apart; torch's outputs
    first, a module a layer, projections of one input together.
    """
    state = _stack("decoder", params["decoder"], params["embedding"])
    if "encoder" in params:
        state |= _stack("encoder", params["encoder"], params["source_embedding"])
    projection = params["output"].get("projection") if "output" in params else None
    if projection:
        state["head.weight"] = projection["kernel"].T
    return state


def _stack(name: str, params: dict[str, Any], embedding: dict[str, Any]) -> dict[str, np.ndarray]:
    state = {f"{name}.embedding.weight": embedding["table"]}
    if "positions" in params:
        state[f"{name}.positions.weight"] = params["positions"]["table"]
    state |= _norm(f"{name}.norm", params["norm"])
    blocks = params["blocks"]
    for layer in range(len(blocks["attention_norm"]["scale"])):
        block = _sliced(blocks, layer)
        for part, of_part in _block(block).items():
            state[f"{name}.blocks.{layer}.{part}"] = of_part
    return state


def _block(block: dict[str, Any]) -> dict[str, np.ndarray]:
    state = {}
    for name, of_module in block.items():
        if name.endswith("norm"):
            state |= _norm(name, of_module)
        elif name == "feedforward":
            for part, linear in of_module.items():
                state |= _linear(f"{name}.{part}", [linear], inputs=1)
        else:
            query, key, value = (of_module[part] for part in ("query", "key", "value"))
            if name == "attention":
                state |= _linear(f"{name}.qkv", [query, key, value], inputs=1)
            else:
                state |= _linear(f"{name}.query", [query], inputs=1)
                state |= _linear(f"{name}.kv", [key, value], inputs=1)
            state |= _linear(f"{name}.out", [of_module["out"]], inputs=2)
    return state


def _linear(name: str, parts: list[dict[str, Any]], *, inputs: int) -> dict[str, np.ndarray]:
    kernels = [part["kernel"] for part in parts]
    rows = int(np.prod(kernels[0].shape[:inputs]))
    state = {f"{name}.weight": np.concatenate([k.reshape(rows, -1).T for k in kernels])}
    if "bias" in parts[0]:
        state[f"{name}.bias"] = np.concatenate([part["bias"].reshape(-1) for part in parts])
    return state


def _norm(name: str, params: dict[str, Any]) -> dict[str, np.ndarray]:
    named = {"scale": "weight", "bias": "bias"}
    return {f"{name}.{named[part]}": array for part, array in params.items()}


def _sliced(tree: dict[str, Any], layer: int) -> dict[str, Any]:
    return {
        name: _sliced(node, layer) if isinstance(node, dict) else node[layer]
        for name, node in tree.items()
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            flat |= _flat(node, f"{prefix}{name}/")
        else:
            flat[prefix + name] = np.asarray(node)
    return flat
