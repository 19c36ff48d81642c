"""Every lesson runs, and what its committed page says is what was measured."""

import re

import pytest

from lessons.framework import (
    PAGES,
    Lesson,
    LessonError,
    all_lessons,
    check_claims,
    figure_file,
    index,
    load,
    make,
    render,
    rounded,
    table,
)

LESSONS = all_lessons()
LARGEST_FIGURE = 100_000  # bytes


def lesson(**changed) -> Lesson:
    fields = {
        "number": 7,
        "name": "scaled-scores",
        "title": "A title",
        "summary": "a summary",
        "measure": lambda *, small, seed: {"answer": 42},
        "figures": lambda results: {},
        "claims": lambda results: {"the answer is 42": results["answer"] == 42},
    }
    return Lesson(**(fields | changed))


def record(**results):
    return {
        "lesson": 7,
        "command": "make lessons LESSON=7",
        "seed": 0,
        "small": False,
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "machine": "a machine",
        "versions": {"jax": "0"},
        "results": results,
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", sorted(LESSONS))
def test_a_small_run_fills_the_whole_page(number, tmp_path):
    page = make(LESSONS[number], tmp_path, small=True)
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text.replace("}}{{", "")
    for shown in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert (tmp_path / shown).stat().st_size > 0


@pytest.mark.parametrize("number", sorted(LESSONS))
def test_the_committed_page_is_what_its_numbers_render_to(number):
    found = load(LESSONS[number])
    check_claims(LESSONS[number], found)
    assert not found["small"]
    assert (PAGES / f"{LESSONS[number].stem}.md").read_text(encoding="utf-8") == render(
        LESSONS[number], found
    )


@pytest.mark.parametrize("number", sorted(LESSONS))
def test_every_figure_is_shown_and_small(number):
    one = LESSONS[number]
    text = (PAGES / f"{one.stem}.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text))
    assert shown == {figure_file(one, name) for name in one.figures(load(one)["results"])}
    assert {name for name in shown if (PAGES / name).stat().st_size > LARGEST_FIGURE} == set()


def test_the_list_names_every_lesson_and_no_file_is_left_over():
    assert (PAGES / "README.md").read_text(encoding="utf-8") == index(LESSONS.values())
    stems = {one.stem for one in LESSONS.values()}
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    assert pages == stems
    assert {path.stem for path in PAGES.glob("*.json")} == stems


@pytest.fixture
def templates(tmp_path, monkeypatch):
    monkeypatch.setattr("lessons.framework.TEMPLATES", tmp_path)
    return tmp_path / "07-scaled-scores.md"


def test_a_gap_takes_a_number_in_its_format(templates):
    templates.write_text("{{answer}} {{rows.1.share:.1%}} {{twice:.2f}} $\\frac{a}{b}$")
    text = render(
        lesson(values=lambda results: {"twice": 2 * results["answer"]}),
        record(answer=42, rows=[{}, {"share": 0.25}]),
    )
    assert "42 25.0% 84.00 $\\frac{a}{b}$" in text


@pytest.mark.parametrize("gap", ["{{question}}", "{{answer.more}}", "{{answer:.2q}}", "{{rows.5}}"])
def test_a_gap_that_nothing_fills_is_named(templates, gap):
    templates.write_text(f"The answer is {gap}.")
    with pytest.raises(LessonError, match=re.escape(gap)):
        render(lesson(), record(answer=42, rows=[1]))


def test_a_claim_that_no_longer_holds_stops_the_page(templates, tmp_path):
    templates.write_text("The answer is {{answer}}.")
    wrong = lesson(measure=lambda *, small, seed: {"answer": 41})
    with pytest.raises(LessonError, match="the answer is 42"):
        make(wrong, tmp_path / "pages")
    assert not (tmp_path / "pages" / "07-scaled-scores.md").exists()
    assert make(wrong, tmp_path / "pages", small=True).exists()


def test_numbers_are_kept_with_six_digits_and_must_be_finite():
    assert rounded({"a": [1 / 3, 2]}) == {"a": [0.333333, 2]}
    with pytest.raises(LessonError, match="nan"):
        rounded({"a": float("nan")})


def test_a_table_is_markdown():
    assert table(("", "a"), [("x", "1")]) == "|  | a |\n| :-- | --: |\n| x | 1 |"
