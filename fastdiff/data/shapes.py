"""A toy data set: coloured shapes on a plain background, as PNG files."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "square", "triangle")
_OVERSAMPLING = 8
_GROUND = (24, 28, 44)
_INKS = ((226, 74, 66), (64, 140, 230), (80, 180, 90), (245, 190, 60))


def draw_shape(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw a shape of SHAPES with random position, scale, rotation and colour: size x size pixels, smooth edges."""
    side = size * _OVERSAMPLING
    ink = _INKS[rng.integers(len(_INKS))]
    image = Image.new("RGB", (side, side), _GROUND)
    radius = side * rng.uniform(0.26, 0.36)
    x, y = rng.uniform(radius, side - radius, size=2)
    turn = rng.uniform(-0.25, 0.25)
    draw = ImageDraw.Draw(image)
    if name == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    else:
        c, s = math.cos(turn), math.sin(turn)
        turned = [(c * px - s * py, s * px + c * py) for px, py in _OUTLINES[name]]
        draw.polygon([(x + radius * px, y + radius * py) for px, py in turned], fill=ink)
    return image.resize((size, size), Image.Resampling.BOX)


def write_shapes(folder: Path, count: int, size: int, seed: int) -> None:
    """Write ``count`` PNG files named circle_00000.png and so on, with the shapes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        name = SHAPES[i % len(SHAPES)]
        draw_shape(name, size, rng).save(folder / f"{name}_{i:05d}.png")


def _regular(corners: int, first: float) -> list[tuple[float, float]]:
    angles = [first + 2 * math.pi * i / corners for i in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


_ARM = 0.3
_OUTLINES = {
    "triangle": _regular(3, -math.pi / 2),
    "square": _regular(4, math.pi / 4),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
