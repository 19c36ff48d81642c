"""Reading UTF-8 files, with every complaint naming file, line and fix."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxformer.data.corpus import DataError, OnBad, Report

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF8_FIX = "save the file as UTF-8 (for example: iconv -f latin1 -t utf-8 OLD > NEW)"


def find_files(patterns: Sequence[str], option: str, report: Report) -> list[Path]:
    """The files that paths and globs (`**` allowed) stand for, each once, in a stable order.

    A file that several patterns match is read once and noted in the report. `option` is the name
    of the option that the patterns came from. Raises DataError on a missing file, a folder, or a
    glob that matches no file.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise DataError(
                f"{pattern} is a folder. Fix: give the files in it, "
                f"for example --data.{option} '{pattern}/**/*.txt'"
            )
        if path.exists():
            matches = [path]
        elif glob.has_magic(pattern):
            matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise DataError(f"no file matches {pattern}. Fix: check --data.{option}")
        else:
            raise DataError(f"{pattern} does not exist. Fix: check --data.{option}")
        for match in matches:
            if match.resolve() in found:
                report.skip("file named more than once, read once", str(match))
            else:
                found[match.resolve()] = match
    return list(found.values())


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises DataError if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return data


def read_text(path: Path, report: Report, on_bad: OnBad) -> str | None:
    """A whole file as text: byte order mark removed, CRLF line ends made LF.

    None if the file is unusable and `on_bad` is 'skip'. Raises DataError on an empty file (or one
    of white space alone) and on invalid UTF-8, naming the line and the byte.
    """
    data = read_bytes(path)
    try:
        text = data.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, start) + 1
        report.reject(
            on_bad, f"{path}:{line}", "invalid UTF-8", UTF8_FIX, detail=f"byte {start} of the file"
        )
        return None
    if not text.strip():
        report.reject(on_bad, str(path), "empty file", "remove it from the data files")
        return None
    return text.replace("\r\n", "\n")


def read_lines(path: Path, report: Report, on_bad: OnBad) -> Iterator[tuple[str, str]]:
    """Yields (`file:line`, line) of a file, without line ends (LF or CRLF) and byte order mark.

    Lines of white space alone are passed over and counted in the report. Raises DataError on an
    empty file and on a line of invalid UTF-8, naming the byte.
    """
    data = read_bytes(path)
    start = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
    if not data[start:].strip():
        report.reject(on_bad, str(path), "empty file", "remove it from the data files")
        return
    lines = data[start:].split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, raw in enumerate(lines, start=1):
        location = f"{path}:{number}"
        try:
            line = raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            detail = f"byte {start + error.start} of the file"
            report.reject(on_bad, location, "invalid UTF-8", UTF8_FIX, detail=detail)
        else:
            if line.strip(" "):
                yield location, line
            else:
                report.skip("blank line", location)
        start += len(raw) + 1
