"""Pathfinder: do the two dots lie at the ends of one dashed path? (Linsley et al. 2018, arXiv:1805.08315)

Drawn by the recipe of https://github.com/drewlinsley/pathfinder with the numbers that the Long Range Arena gives for
32 x 32 pixels (Tay et al. 2020, arXiv:2011.04006, and its `data/pathfinder.py`). Points are (row, column).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..settings import InputError
from .generated import Seed, with_special

SIZE = 32
DASH, THICKNESS, MARGIN = 2, 0.5, 1  # pixels: length of a dash, its breadth, what is kept free around it
MARKER_RADIUS = 1.5
SEED_DISTANCE = 7  # pixels between the beginnings of the two long paths
CONTINUITY = 1.0  # the larger, the straighter a path
CONTRAST, LONG_CONTRAST = 2.0, 1.5  # of dashes in distracting and in long paths: a thin line is half a pixel bright
DISTRACTING_DASHES = 20
DASH_TRIALS, PATH_TRIALS = 3, 5
ATTEMPTS = 48  # at two long paths, of which a few find room; grown side by side, as numpy likes it
COLLIDING = 1.8  # two dashes are too near where their margins add up to this
TAKEN = 0.3  # no dash begins where it would cover a pixel that belongs to others by more than this
FULL = 0.01  # no path begins when less than this share of the picture is left
REACH = DASH + MARGIN + 1  # pixels from a point that a dash and its margin may cover
SUBPIXELS = 4  # to a side of a pixel: the share of them inside a shape is its brightness there


Points = np.ndarray  # (attempts, 2)


@dataclass(frozen=True)
class Pathfinder:
    """Pictures of two long paths and short distracting ones, with dots at two ends of the long ones.

    Label 1 has dots at both ends of one path, label 0 at the beginning of one and the end of the other: the lines are
    the same in both. `contour_length` dashes make a long path, 14 in the Arena's hard form, on which it reports, 9 in
    the intermediate and 6 in the easy one; a third as many make a distracting path. That the recipe leaves no shortcut
    was measured on 1,500 pictures each: the distance of the dots alone ranks a connected pair over another one with a
    probability of 0.51 (14 dashes), 0.55 (9) and 0.57 (6), the light and the number of lit pixels with 0.46 to 0.51.
    """

    contour_length: int = 14

    words = tuple(map(str, range(256)))
    answers = ("not connected", "connected")

    def __post_init__(self):
        if not 3 <= self.contour_length <= 16:
            raise InputError(
                f"contour_length ({self.contour_length}) must lie between 3 and 16: two longer paths hardly find room "
                f"in {SIZE} x {SIZE} pixels."
            )

    def __call__(self, seed: Seed) -> tuple[np.ndarray, int]:
        picture = self.picture(seed)
        return with_special(picture.pixels.ravel(), has_cls=True), picture.label

    def picture(self, seed: Seed) -> "Picture":
        draw = np.random.default_rng(seed)
        label, first = draw.integers(2, size=2).tolist()
        while (drawn := two_paths(draw, self.contour_length)) is None:
            pass
        taken, long_paths = drawn
        dashes = self.contour_length // 3
        short_paths = [short_path(draw, taken, dashes) for _ in range(DISTRACTING_DASHES // dashes)]
        light = np.zeros((SIZE + 2 * REACH, SIZE + 2 * REACH))
        for paths, contrast in ((long_paths, LONG_CONTRAST), (short_paths, CONTRAST)):
            for path in paths:
                for shape, at in path:
                    stamp(light, contrast * shapes().light[shape], at)
        dots = long_paths[first][0][1], long_paths[first if label else 1 - first][-1][1]
        for dot in dots:
            stamp(light, capsule(0.0, 0, MARKER_RADIUS), dot)
        pixels = np.rint(255 * light[REACH:-REACH, REACH:-REACH].clip(0, 1)).astype(np.uint8)
        return Picture(pixels, label, dots)


@dataclass
class Picture:
    """`pixels` (SIZE, SIZE), 0 to 255; `dots` are the two points that are asked about."""

    pixels: np.ndarray
    label: int
    dots: tuple[np.ndarray, np.ndarray]


Dashes = list[tuple[int, np.ndarray]]  # of one path: the number of each dash's shape and the point it is drawn from


class Path:
    """One path in each of several attempts. Angles are those in which it runs, where it does.

    The margin of its last dash is no part of what is taken before the path has grown on: the next dash may touch it.
    """

    def __init__(self, tails: Points, degrees: np.ndarray):
        """First dashes, from `tails`, of shape `degrees`."""
        self.angles = degrees * math.pi / 180
        self.pivots = tails - step(self.angles, MARGIN)
        self.dashes = [(degrees % 360, tails)]
        self.fits = is_inside(tails) & is_inside(tails + step(self.angles, DASH)) & is_inside(self.pivots)

    def grow(self, draw: np.random.Generator, taken: np.ndarray, alive: np.ndarray) -> np.ndarray:
        """One more dash, about where the last one points to, for the attempts numbered `alive`; those it has room in.

        taken: margins of all that is drawn in each attempt, (attempts, SIZE, SIZE) with REACH pixels around it.
        """
        ways, way_angles = circle(DASH + MARGIN)
        self.pivots = self.pivots + step(self.angles, DASH + 2 * MARGIN)
        heads = self.pivots[alive, None] + ways  # (alive, ways, 2)
        turn = np.abs(way_angles - self.angles[alive, None]) % (2 * math.pi)
        turn = np.minimum(CONTINUITY * np.minimum(turn, 2 * math.pi - turn), math.pi / 2)
        inside = is_inside(heads)
        beside = heads.clip(0, SIZE - 1)[:, :, None] + REACH + circle_filled(MARGIN)
        near = taken[alive[:, None, None], beside[..., 0], beside[..., 1]].max(-1)
        sums = (np.cos(turn) ** 2 * (1 - near) * inside).cumsum(-1)  # (alive, ways)
        possible = sums[:, -1] >= 1e-4
        alive, sums, heads = alive[possible], sums[possible], heads[possible]

        shape, at = (x.copy() for x in self.dashes[-1])
        grown = np.zeros(len(alive), bool)
        for _ in range(DASH_TRIALS):
            choice = (sums > draw.random((len(alive), 1)) * sums[:, -1:]).argmax(-1)
            head, margin = heads[np.arange(len(alive)), choice], shapes().margin[360 + choice]
            room = (patches(taken, alive, head) + margin).max((1, 2)) < COLLIDING
            now = alive[room & ~grown]
            shape[now], at[now] = 360 + choice[room & ~grown], head[room & ~grown]
            grown |= room
        alive = alive[grown]
        self.leave_margin(taken, alive)
        self.angles[alive] = way_angles[shape[alive] - 360]
        self.dashes.append((shape, at))
        return alive

    def leave_margin(self, taken: np.ndarray, alive: np.ndarray) -> None:
        """Marks the last dash as taken."""
        shape, at = self.dashes[-1]
        rows, columns = around(at[alive])
        where = alive[:, None, None], rows, columns
        taken[where] = np.maximum(taken[where], shapes().margin[shape[alive]])

    def of(self, attempt: int) -> Dashes:
        return [(int(shape[attempt]), at[attempt]) for shape, at in self.dashes]


def two_paths(draw: np.random.Generator, dashes: int) -> tuple[np.ndarray, list[Dashes]] | None:
    """Two paths that grow in turns, and what they take; None if in all attempts one of them runs into something."""
    degrees = draw.integers(360, size=(2, ATTEMPTS))
    choices, tails = draw.random(ATTEMPTS), np.zeros((ATTEMPTS, 2), int)
    begun = np.zeros(ATTEMPTS, bool)
    for number, (degree, choice) in enumerate(zip(degrees[0].tolist(), choices.tolist(), strict=True)):
        free = middle(degree)
        begun[number] = len(free) > 0
        if len(free):
            tails[number] = free[int(choice * len(free))]
    apart = step(draw.integers(360, size=ATTEMPTS) * math.pi / 180, SEED_DISTANCE)
    paths = [Path(tails, degrees[0]), Path(tails + apart, degrees[1])]
    alive = np.flatnonzero(begun & paths[0].fits & paths[1].fits)
    taken = np.ones((ATTEMPTS, SIZE + 2 * REACH, SIZE + 2 * REACH))
    inner = slice(REACH + MARGIN, -REACH - MARGIN)
    taken[:, inner, inner] = 0  # the border is nobody's
    for _ in range(dashes - 1):
        for path in paths:
            alive = path.grow(draw, taken, alive)
    if not len(alive):
        return None
    for path in paths:  # the paper's code forgets the first path here, and lets others run over its last dash
        path.leave_margin(taken, alive)
    return taken[alive[0]], [path.of(alive[0]) for path in paths]


def short_path(draw: np.random.Generator, taken: np.ndarray, dashes: int) -> Dashes:
    """One more path, which is added to what is `taken`; no dashes where no room is found for it."""
    if (taken[REACH:-REACH, REACH:-REACH] <= TAKEN).mean() < FULL:
        return []
    degrees, tails = draw.integers(360, size=PATH_TRIALS), np.zeros((PATH_TRIALS, 2), int)
    begun = np.zeros(PATH_TRIALS, bool)
    for number, degree in enumerate(degrees.tolist()):
        free = room_for(taken[REACH:-REACH, REACH:-REACH], degree)
        begun[number] = len(free) > 0
        if len(free):
            tails[number] = free[draw.integers(len(free))]
    path = Path(tails, degrees)
    alive = np.flatnonzero(begun & path.fits)
    attempts = np.repeat(taken[None], PATH_TRIALS, 0)
    for _ in range(dashes - 1):
        alive = path.grow(draw, attempts, alive)
    path.leave_margin(attempts, alive)
    if not len(alive):
        return []
    taken[:] = attempts[alive[0]]
    return path.of(alive[0])


def room_for(taken: np.ndarray, degree: int) -> Points:
    """The points from which a first dash could run without covering what is taken, (SIZE, SIZE)."""
    offsets = np.argwhere(shapes().margin[degree] == 1) - REACH
    padded = np.pad(taken, REACH)
    covered = [padded[REACH + y : REACH + y + SIZE, REACH + x : REACH + x + SIZE] for y, x in offsets]
    return np.argwhere(np.maximum.reduce(covered) <= TAKEN)


@functools.cache
def middle(degree: int) -> Points:
    """Where the first path of a picture may begin: twice the distance of the two beginnings off every border."""
    taken = np.ones((SIZE, SIZE))
    taken[2 * SEED_DISTANCE : -2 * SEED_DISTANCE, 2 * SEED_DISTANCE : -2 * SEED_DISTANCE] = 0
    return room_for(taken, degree)


def step(angles: np.ndarray, length: int) -> Points:
    """To the nearest pixel; the paper's code rounds up, which drifts to the lower right."""
    return np.rint(length * np.stack([np.sin(angles), np.cos(angles)], -1)).astype(int)


def is_inside(points: np.ndarray) -> np.ndarray:
    return np.logical_and.reduce((points >= 0) & (points < SIZE), axis=-1)


def around(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels that a shape covers which is drawn from the points, (points, side, side) both."""
    side = np.arange(2 * REACH + 1)  # REACH to the left of a point, which has as many pixels in front of it
    return points[:, 0, None, None] + side[:, None], points[:, 1, None, None] + side


def patches(images: np.ndarray, numbers: np.ndarray, points: Points) -> np.ndarray:
    rows, columns = around(points)
    return images[numbers[:, None, None], rows, columns]


def stamp(image: np.ndarray, shape: np.ndarray, at: np.ndarray) -> None:
    """Lays a shape on an image with REACH pixels around it; the brighter one of both is seen."""
    rows, columns = around(at[None])
    image[rows[0], columns[0]] = np.maximum(image[rows[0], columns[0]], shape)


@functools.cache
def circle(radius: int) -> tuple[Points, np.ndarray]:
    """The pixels at that distance, one for each pixel of the circumference, and their angles."""
    angles = np.arange(0, 2 * math.pi, 1 / radius)
    ways = np.unique(step(angles, radius), axis=0)
    return ways, np.arctan2(ways[:, 0], ways[:, 1])


@functools.cache
def circle_filled(radius: int) -> Points:
    side = np.arange(-radius, radius + 1)
    return np.argwhere(side[:, None] ** 2 + side**2 <= radius**2) - radius


@dataclass
class Shapes:
    """Dashes by number, (numbers, side, side): 0 to 359 begin at the middle and run at so many degrees; those behind
    them end at the middle, and come from the ways of a path's next dash."""

    light: np.ndarray
    margin: np.ndarray


@functools.cache
def shapes() -> Shapes:
    angles = [*(np.arange(360) * math.pi / 180), *(circle(DASH + MARGIN)[1] + math.pi)]
    radii = THICKNESS / 2, THICKNESS / 2 + MARGIN
    return Shapes(*(np.stack([capsule(float(angle), DASH, radius) for angle in angles]) for radius in radii))


def capsule(angle: float, length: float, radius: float) -> np.ndarray:
    """All that is within `radius` of a line from the middle, (2 REACH + 1, 2 REACH + 1): how much of each pixel.

    The paper's code draws at twice the size and shrinks by Lanczos' filter; this is the share of 4 x 4 points.
    """
    side = (np.arange((2 * REACH + 1) * SUBPIXELS) + 0.5) / SUBPIXELS - REACH - 0.5
    row, column = side[:, None], side[None, :]
    along = (row * math.sin(angle) + column * math.cos(angle)).clip(0, length)
    away = np.hypot(row - along * math.sin(angle), column - along * math.cos(angle))
    covered = (away <= radius).reshape(2 * REACH + 1, SUBPIXELS, 2 * REACH + 1, SUBPIXELS)
    return covered.mean((1, 3))
