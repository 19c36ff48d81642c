"""The page of measurements is filled from records, and only between its marks."""

import json

import pytest

from benchmarks import measure, performance, report

PAGE = """# Performance

Prose before.
<!-- train -->
old
<!-- end -->
Prose after.
<!-- decode -->
kept
<!-- end -->
<!-- kernels_lengths -->
<!-- end -->
"""


@pytest.fixture
def folder(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "performance.md").write_text(PAGE)
    for date, milliseconds in (("2026-01-01", 99.0), ("2026-01-02", 12.5)):
        record = {
            "date": date,
            "command": "python -m benchmarks.train",
            "cores": 2,
            "processor": "Abacus",
            "versions": {"jax": "0.10.2"},
            "rows": [
                {
                    "shape": "small",
                    "contender": "jaxformer",
                    "ms": milliseconds,
                    "p20": 12.0,
                    "p80": 13.0,
                },
                {"shape": "small", "contender": "torch", "ours_to_this": 0.5},
            ],
        }
        for part in ("train_cpu", "kernels_lengths_cpu"):
            (results / f"{date}_{part}.json").write_text(json.dumps(record))
            (results / f"{date}_{part}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def run(folder):
    page = folder / "performance.md"
    performance.main(["--results", str(folder / "results"), "--page", str(page)])
    return page.read_text()


def test_newest_record_replaces_what_stood_between_the_marks(folder):
    page = run(folder)
    assert "| small | jaxformer | 12.5 (12–13) |  |" in page
    assert "| small | torch |  | 0.5 |" in page
    assert "99" not in page
    assert "old" not in page
    assert "2 cores of Abacus, jax 0.10.2." in page


def test_prose_and_tables_without_a_record_stay_and_a_second_run_changes_nothing(folder):
    page = run(folder)
    assert page.startswith("# Performance\n\nProse before.\n<!-- train -->\n")
    assert "<!-- end -->\nProse after.\n<!-- decode -->\nkept\n<!-- end -->\n" in page
    assert run(folder) == page


def test_plots_lie_beside_the_page_that_shows_them(folder):
    assert "](performance/2026-01-02_train_cpu.png)" in run(folder)
    assert (folder / "performance" / "2026-01-02_train_cpu.png").exists()


def test_a_part_of_many_rows_is_shown_by_its_plot_alone(folder):
    page = run(folder)
    shown = page[page.index("<!-- kernels_lengths -->") :]
    assert "](performance/2026-01-02_kernels_lengths_cpu.png)" in shown
    assert "Abacus" in shown
    assert "|" not in shown


@pytest.mark.parametrize("part", [part for part, columns in performance.TABLES.items() if columns])
def test_every_column_is_of_a_key_that_the_newest_record_has(part):
    # Without competitors, columns that compare us with them are missing.
    records = [
        record
        for record in report.read_folder(measure.RESULTS)
        if record.part == part and "torch" in record.facts.get("versions", {})
    ]
    if not records:
        pytest.skip(f"no record of {part} beside torch in {measure.RESULTS}")
    rows = records[0].rows
    missing = {key for key in performance.TABLES[part].values() if all(key not in r for r in rows)}
    assert not missing


def test_missing_page_is_one_line_that_names_it(folder):
    with pytest.raises(SystemExit, match=r"benchmarks\.performance: .*nowhere\.md"):
        performance.main(
            ["--results", str(folder / "results"), "--page", str(folder / "nowhere.md")]
        )
