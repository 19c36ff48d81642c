"""Rows of a record as tables in HTML: numbers to the right, and who is faster in words."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# As much as a ratio may be off one and its second digit not show it.
_EVEN = 0.005
_CONSTANT_FROM = 4
_LONG = 40


def alike(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in tables: one joins the first table that has more than half of its columns."""
    found: list[tuple[set[str], list[Row]]] = []
    for row in rows:
        keys = set(row)
        fitting = (entry for entry in found if 2 * len(keys & entry[0]) > len(keys))
        columns, members = next(fitting, (set(), []))
        if not members:
            found.append((columns, members))
        columns |= keys
        members.append(row)
    return [members for _, members in found]


def verdict(column: str, value: Any) -> str | None:
    """Who is faster, where a column compares us with another.

    Ratios of times (`ratio`, `ours_to_this`, `ours_share`) speak for us below one, factors of speed
    (`speedup`, `times_faster`, `over_ours`) above.
    """
    words = column.split("_")
    if not _is_number(value) or words[-1] in ("p20", "p80"):
        return None
    if "speedup" in words or "faster" in words or words[:2] == ["over", "ours"]:
        better = value - 1
    elif "ratio" in words or words[:2] in (["ours", "to"], ["ours", "share"]):
        better = 1 - value
    else:
        return None
    if abs(better) < _EVEN:
        return "even"
    return "faster" if better > 0 else "slower"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Every verdict in the rows that is not a comparison with ourselves."""
    others = [row for row in rows if row.get("ours") is not True]
    found = [verdict(key, value) for row in others for key, value in row.items() if value != 1]
    return [it for it in found if it]


def table(rows: Sequence[Row]) -> str:
    """One table that scrolls by itself, under a line of what is the same in every row."""
    rows = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    ranges = {name: between for name in columns if (between := _range_of(name, columns))}
    columns = [name for name in columns if name not in sum(ranges.values(), ())]
    same = [name for name in columns if _is_constant(name, rows)]
    columns = [name for name in columns if name not in same] or columns
    numeric = {name for name in columns if _is_numeric(name, rows)}
    compared = {name for name in numeric if any(verdict(name, row.get(name)) for row in rows)}
    # What a row is, who is faster, by what numbers: a narrow screen shows the left of it.
    columns.sort(key=lambda name: (name in numeric) + (name in numeric - compared))
    head = "".join(
        f"<th{_kind(name, numeric)}>{html.escape(heading(name))}</th>" for name in columns
    )
    body = "\n".join(_line(row, columns, ranges, numeric) for row in rows)
    caption = ", ".join(f"{html.escape(heading(name))} {text(rows[0][name])}" for name in same)
    above = f'<p class="everywhere">In every row: {caption}.</p>' if same else ""
    return (
        f'{above}<div class="table" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def heading(name: str) -> str:
    """A key for a reader."""
    return name.replace("_", " ").replace(".", " ")


def text(value: Any) -> str:
    """Any value of JSON, escaped."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return _number(value)
    if isinstance(value, Mapping):
        return ", ".join(
            f"{html.escape(heading(key))} {text(entry)}" for key, entry in value.items()
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        if _is_shape(value):
            return "&nbsp;× ".join(str(entry) for entry in value)
        between = "<br>" if any(isinstance(entry, Mapping) for entry in value) else ", "
        return between.join(text(entry) for entry in value)
    return html.escape(str(value))


def _line(row: Row, columns: Sequence[str], ranges: Mapping[str, tuple], numeric: set[str]) -> str:
    cells = []
    for index, name in enumerate(columns):
        content = text(row.get(name))
        word = verdict(name, row.get(name))
        if word and word != "even" and row.get("ours") is not True:
            content = f'<span class="{word}">{content} {word}</span>'
        low, high = (row.get(key) for key in ranges.get(name, ("", "")))
        if low is not None and high is not None:
            content += f" <small>{text(low)}–{text(high)}</small>"
        tag = "td" if index else "th"
        scope = "" if index else ' scope="row"'
        long = " long" if len(content) > _LONG and "<" not in content else ""
        cells.append(f"<{tag}{scope}{_kind(name, numeric, long)}>{content}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _kind(name: str, numeric: set[str], others: str = "") -> str:
    classes = ("number" if name in numeric else "") + others
    return f' class="{classes.strip()}"' if classes else ""


def _flat(row: Row) -> dict[str, Any]:
    """Entries of a dict in a row as columns of their own."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": entry for name, entry in value.items()}
        else:
            flat[key] = value
    return flat


def _range_of(name: str, columns: Sequence[str]) -> tuple[str, str] | None:
    """The columns of the percentiles that belong to a column."""
    stem = "ratio_" if name == "ours_to_this" else name.removesuffix("ms")
    pairs = ((f"{stem}p20", f"{stem}p80"), (f"{name}_p20", f"{name}_p80"))
    return next((pair for pair in pairs if set(pair) <= set(columns)), None)


def _is_constant(name: str, rows: Sequence[Row]) -> bool:
    if len(rows) < _CONSTANT_FROM or any(name not in row for row in rows):
        return False
    return not _is_number(rows[0][name]) and all(row[name] == rows[0][name] for row in rows)


def _is_numeric(name: str, rows: Sequence[Row]) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(_is_number(value) or _is_numbers(value) for value in values)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(it) for it in value) and not _is_shape(value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(it) is int for it in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"
