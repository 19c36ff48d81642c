"""Images of lines: sequences of pixel columns, from files, in batches, and back into files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxformer.config import DataConfig
from jaxformer.data.corpus import DataError
from jaxformer.data.ragged import Ragged

HEIGHT = 16
"""Pixels of a line from top to bottom."""
INK = 255
"""The darkest stroke; the paper is 0."""
FAINTEST = 0.1
"""Least difference between ink and paper of a picture, as a share of that of black and white."""


@dataclass(frozen=True)
class Images(Ragged):
    """Images of one height and differing width in one array, `tokens` uint8[columns, height]."""

    @classmethod
    def join(cls, images: Sequence[np.ndarray]) -> "Images":
        """Puts images, uint8[columns, height] each, one behind the other."""
        offsets = np.zeros(len(images) + 1, np.int64)
        np.cumsum([len(image) for image in images], out=offsets[1:])
        empty = np.zeros((0, HEIGHT), np.uint8)
        return cls(np.concatenate([empty, *images]), offsets)

    def __getitem__(self, number: int) -> np.ndarray:
        """One image, uint8[columns, height]."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def gather(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Images `rows` side by side; a row of -1 is empty.

        Returns pixels float32[len(rows), width, height] in 0..1 (1 is ink), 0 at padding, and where
        columns are real, bool[len(rows), width].
        """
        places, real = self.places(rows, width)
        pixels = np.where(real[..., None], self.tokens[places], 0)
        return pixels.astype(np.float32) / INK, real


def image_height(config: DataConfig) -> int | None:
    """The height of a source in pixels, as `models.build` takes it; None where sources are text."""
    return HEIGHT if config.kind == "digits" else None


def read_image(path: str | Path) -> np.ndarray:
    """A picture of one line as an image, uint8[columns, HEIGHT], of ink (255) on paper (0).

    Any PNG will do: colours become grey, transparency white, and the picture is scaled to the
    height as a whole, so it should be cut to the line. The paper is what the picture's edge mostly
    shows, be it lighter or darker than the ink, and contrast is stretched to the full range. Raises
    DataError on what is no picture, and on one without ink.
    """
    from matplotlib import image as png  # slow to import, and training on text has no need of it

    try:
        pixels = np.asarray(png.imread(path), np.float64)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Fix: give the path of a PNG") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is not a picture ({error}). Fix: save it as PNG") from error
    ink = _ink(pixels if pixels.max(initial=0) <= 1 else pixels / INK)
    if ink is None:
        raise DataError(f"{path} is blank. Fix: give dark digits on light paper, or light on dark")
    width = max(round(ink.shape[1] * HEIGHT / ink.shape[0]), 1)
    return np.rint(resize(ink, HEIGHT, width).T * INK).astype(np.uint8)


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes an image, uint8[columns, height], as a PNG of dark ink on white paper."""
    from matplotlib import image as png

    png.imsave(path, INK - image.T, cmap="gray", vmin=0, vmax=INK)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images float[*B, H, W] as float[*B, height, width]: linear between pixels.

    Where it shrinks, a pixel is the weighted mean of all those that it stands for, so that thin
    strokes grow faint and do not vanish.
    """
    rows, columns = _weights(image.shape[-2], height), _weights(image.shape[-1], width)
    return rows @ image @ columns.T


def _weights(old: int, new: int) -> np.ndarray:
    """The share of every old pixel in every new one, float[new, old]: a triangle's."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale - 0.5
    # Beyond the edges stands what the edge shows.
    distance = np.abs(centres.clip(0, old - 1)[:, None] - np.arange(old)) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(1, keepdims=True)


def _ink(pixels: np.ndarray) -> np.ndarray | None:
    """Where a picture, float[H, W] or float[H, W, channels] in 0..1, has ink; None: nowhere."""
    if pixels.size == 0:
        return None
    if pixels.ndim == 3:
        colours, alpha = pixels[..., :3], pixels[..., 3:]
        if alpha.size:
            colours = colours * alpha + (1 - alpha)
        pixels = colours.mean(-1)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = np.median(edge)
    darker, lighter = paper - pixels.min(), pixels.max() - paper
    ink = paper - pixels if darker >= lighter else pixels - paper
    return None if ink.max() < FAINTEST else ink.clip(0) / ink.max()
