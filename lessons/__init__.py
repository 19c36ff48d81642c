"""The lessons: claims that textbooks make, each measured by a script and written down by it.

    python -m lessons          # all; `make lessons` does this
    python -m lessons 7        # one
    python -m lessons 7 --render    # text and figures anew from the numbers of docs/lessons

A lesson is a module `lesson_NN_name` that ends in `LESSON = Lesson(...)`, and a page with gaps,
`templates/NN-name.md`. `measure` does the experiment and returns numbers; everything else (the
figures, the claims that the prose rests on, the page) is computed from these, so that the text
cannot say what was not measured. `lessons.framework` holds this together, `lessons.drawing` is the
look of the figures, `lessons.training` trains the library's models and anything else small.
"""
