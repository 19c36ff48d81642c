"""Block sizes that were found for a device, as data: `<device kind>/<op>.json`."""

import functools
import json
import re
from pathlib import Path
from typing import Any


def lookup(op: str, device_kind: str, *keys: str) -> Any:
    """What was found for `op` on a device, or None.

    Args:
        op: the op's name.
        device_kind: as `jax.Device.device_kind` has it, "NVIDIA H100 80GB HBM3".
        keys: the path to the entry in the file.
    """
    entry = _read(op, re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_"))
    for key in keys:
        entry = entry.get(key, {})
    return entry or None


@functools.cache
def _read(op, folder):
    path = Path(__file__).parent / folder / f"{op}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
