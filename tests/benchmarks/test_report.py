"""The report: what the page shows of a folder of records, and what it says of a bad one."""

import base64
import html.parser
import json

import pytest

from benchmarks import measure, report, tables

PNG = b"\x89PNG\r\n\x1a\n" + b"drawn"
ROWS = [
    {"op": "attention", "library": "ours", "ms": 1.5, "p20": 1.25, "p80": 1.75, "ratio": 1.0},
    {"op": "attention", "library": "jax", "ms": 3.0, "p20": 2.9, "p80": 3.1, "ratio": 0.5},
    {"op": "attention", "library": "<torch>", "ms": 1.2, "p20": 1.1, "p80": 1.3, "ratio": 1.25},
    {"op": "attention", "library": "none", "ms": None, "error": 123456},
]


class Page(html.parser.HTMLParser):
    """Tables as lists of rows of text, and every address the page needs."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.needs, self.open, self.kinds, self.ids, self.links = (
            [],
            [],
            [],
            {},
            [],
            [],
        )
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.needs += [attributes[key] for key in ("src", "srcset") if key in attributes]
        self.needs += [attributes["href"]] if tag == "link" else []
        self.links += [attributes["href"]] if tag == "a" else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        assert tag != "script"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.kind = attributes.get("class", "")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "table" in self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1] += text
            self.kinds[self.tables[-1][-1][-1]] = self.kind


def put(folder, name, rows=ROWS, **facts):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"date": name[:10], **facts, "rows": rows}), encoding="utf-8")
    return path


@pytest.fixture
def made(tmp_path):
    """folder -> the page that the command writes, and its text."""

    def make():
        path = report.main(
            ["--results", str(tmp_path), "--output", str(tmp_path / "out" / "p.html")]
        )
        text = path.read_text(encoding="utf-8")
        return Page(text), text

    return make


def test_a_table_has_its_numbers_at_the_right_and_says_who_is_faster(tmp_path, made):
    put(tmp_path, "2026-01-02_kernels_cpu")
    page, text = made()
    assert page.tables == [
        [
            ["library", "ratio", "ms", "error"],
            ["ours", "1", "1.5 1.25–1.75", ""],
            ["jax", "0.5 faster", "3 2.9–3.1", ""],
            ["<torch>", "1.25 slower", "1.2 1.1–1.3", ""],
            ["none", "", "", "123,456"],
        ]
    ]
    assert "In every row: op attention." in text
    assert page.kinds["123,456"] == page.kinds["0.5 faster"] == page.kinds["error"] == "number"
    assert page.kinds["jax"] == ""
    assert '<span class="faster">0.5 faster</span>' in text
    assert "faster in 1 of 2 comparisons" in text


def test_what_made_it_and_where_stands_under_a_table(tmp_path, made):
    facts = dict(command="python -m benchmarks.kernels --op <x>", processor="Z80", cores=2)
    facts |= {"fits": [{"axis": "length", "exponent": 1.5}]}
    put(tmp_path, "2026-01-02_kernels_cpu", **facts, versions={"jax": "0.1"}, turns=7)
    page, text = made()
    assert len(page.tables) == 1
    assert "axis length, exponent 1.5" in text
    for said in ("benchmarks.kernels --op &lt;x&gt;", "Z80, 2 cores", "jax 0.1", "<dd>7</dd>"):
        assert said in text


def test_the_newest_record_is_shown_and_older_ones_are_listed(tmp_path, made):
    put(tmp_path, "2026-01-02_kernels_cpu", [{"op": "old"}])
    put(tmp_path, "2026-01-10_kernels_cpu", [{"op": "new"}])
    put(tmp_path, "2026-01-01_kernels_tpu-v5e", [{"op": "elsewhere"}], device="TPU v5e")
    page, text = made()
    assert page.tables == [[["op"], ["elsewhere"]], [["op"], ["new"]]]
    assert "<li>2026-01-02_kernels_cpu.json</li>" in text
    assert page.links[:2] == ["#kernels-tpu-v5e", "#kernels-cpu"]
    assert set(page.links) <= {f"#{name}" for name in page.ids}
    assert len(set(page.ids)) == len(page.ids)


def test_plots_that_lie_beside_a_record_are_in_the_page_and_nothing_else_is_needed(tmp_path, made):
    put(tmp_path, "2026-01-02_train_cpu")
    put(tmp_path, "2026-01-02_train_cpu-2", device="cpu-2")
    (tmp_path / "2026-01-02_train_cpu_step_time.png").write_bytes(PNG)
    (tmp_path / "2026-01-02_train_cpu-2_memory.png").write_bytes(PNG + b"2")
    (tmp_path / "unrelated.png").write_bytes(PNG)
    page, text = made()
    starts = ("data:image/png;base64," + base64.b64encode(x).decode() for x in (PNG, PNG + b"2"))
    assert page.needs == list(starts)
    assert 'alt="Plot: Step time"' in text
    assert "http" not in text
    assert "url(" not in text


def test_rows_of_several_kinds_stand_in_tables_of_their_own():
    times = [{"shape": [2, 3], "library": "a", "ms": 1.0, "ratio": 1.0}]
    answers = [
        {"call": "x", "library": "a", "loss": "nan"},
        {"call": "y", "library": "b", "loss": 0},
    ]
    assert tables.alike(times + answers + times) == [times * 2, answers]
    assert "2&nbsp;× 3" in tables.table(times)


def test_percentiles_stand_beside_what_they_belong_to():
    row = {"token_ms": 2.0, "token_p20": 1.0, "token_p80": 3.0, "ours_to_this": 0.5}
    page = Page(tables.table([row | {"ratio_p20": 0.4, "ratio_p80": 0.6}]))
    assert page.tables == [[["ours to this", "token ms"], ["0.5 faster 0.4–0.6", "2 1–3"]]]


def test_ours_is_not_compared_with_ours():
    rows = [{"contender": "xla", "ours": True, "ours_share": 0.5}]
    assert tables.verdicts(rows) == []
    assert "faster" not in tables.table(rows)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("ratio", 0.9, "faster"),
        ("ours_to_this", 1.1, "slower"),
        ("ratio_to_eager", 0.999, "even"),
        ("speedup", 3.0, "faster"),
        ("times_faster", 0.5, "slower"),
        ("over_ours", 3.0, "faster"),
        ("ours_share", 0.5, "faster"),
        ("ratio_p20", 0.9, None),
        ("ms", 0.9, None),
        ("ratio", None, None),
    ],
)
def test_who_is_faster_follows_from_what_a_column_says(column, value, said):
    assert tables.verdict(column, value) == said


def test_the_records_of_this_repository_are_shown(tmp_path):
    page = Page(report.page(report.read_folder(measure.RESULTS)))
    assert len(page.tables) >= 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", b'{"rows": [', "x.json is not JSON"),
        ("x.json", b"\xff\xfe", "x.json is not JSON"),
        ("x.json", b"[]", "x.json has no list of rows"),
        ("x.json", b'{"rows": []}', "x.json has no list of rows"),
        ("x.txt", b"", "no records (*.json) in"),
    ],
)
def test_a_bad_folder_gets_one_line_that_names_the_file(tmp_path, made, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        made()
    message = str(stopped.value)
    assert said in message
    assert "run" in message
    assert "\n" not in message


def test_a_plot_that_is_none_is_named(tmp_path, made):
    put(tmp_path, "2026-01-02_train_cpu")
    (tmp_path / "2026-01-02_train_cpu.png").write_bytes(b"empty")
    with pytest.raises(SystemExit, match=r"train_cpu\.png is not a PNG image"):
        made()
