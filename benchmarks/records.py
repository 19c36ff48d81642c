"""Results as JSON that a person can read, and that changes line by line."""

import json
from pathlib import Path


def write(path: Path, record: dict, rows: str) -> None:
    """Write `record`, every element of its list `rows` on a line of its own."""
    head = {key: value for key, value in record.items() if key != rows}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in record[rows])
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "{rows}": [\n{lines}\n ]\n}}\n', encoding="utf-8")
