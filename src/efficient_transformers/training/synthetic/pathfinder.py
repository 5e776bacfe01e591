"""Pathfinder: are the two dots at the ends of the same dashed path? (Linsley et al. 2018, arXiv:1805.08315)

Drawn by the recipe of https://github.com/drewlinsley/pathfinder with the parameters of the Long Range Arena for 32 x 32
pixels (Tay et al. 2020, arXiv:2011.04006, and its `data/pathfinder.py`). Points are (row, column).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..settings import InputError
from .generated import Seed, with_special

SIZE = 32
DASH, THICKNESS, MARGIN = 2, 0.5, 1  # pixels: length and thickness of a dash, free space around it
MARKER_RADIUS = 1.5
SEED_DISTANCE = 7  # pixels between the starting points of the two long paths
CONTINUITY = 1.0  # larger values make straighter paths
CONTRAST, LONG_CONTRAST = 2.0, 1.5  # of dashes in distracting and long paths: a thin line has brightness one half
DISTRACTING_DASHES = 20
DASH_TRIALS, PATH_TRIALS = 3, 5
ATTEMPTS = 48  # at drawing two long paths, some of which succeed; grown in parallel as arrays
COLLIDING = 1.8  # two dashes are too close where their margins add up to this
TAKEN = 0.3  # no dash starts where it would cover an occupied pixel by more than this
FULL = 0.01  # no path starts when less than this share of the picture is free
REACH = DASH + MARGIN + 1  # pixels from a point that a dash and its margin may cover
SUBPIXELS = 4  # per side of a pixel: the fraction of them inside a shape is its brightness there


Points = np.ndarray  # (attempts, 2)


@dataclass(frozen=True)
class Pathfinder:
    """Pictures of two long paths and short distracting ones, with dots at two ends of the long ones.

    In pictures with label 1 the dots are at both ends of one path, with label 0 at the start of one and the end of the
    other; the lines are the same in both cases. A long path has `contour_length` dashes: 14 in the hard form of the
    Arena, for which it reports results, 9 in the intermediate and 6 in the easy form. Distracting paths have a third as
    many. The absence of shortcuts was measured on 1,500 pictures each: the distance of the dots alone ranks a connected
    pair above an unconnected one with a probability of 0.51 (14 dashes), 0.55 (9) and 0.57 (6); total brightness and
    number of lit pixels with 0.46 to 0.51.
    """

    contour_length: int = 14

    words = tuple(map(str, range(256)))
    answers = ("not connected", "connected")

    def __post_init__(self):
        if not 3 <= self.contour_length <= 16:
            raise InputError(
                f"contour_length ({self.contour_length}) must lie between 3 and 16: two longer paths rarely fit into "
                f"{SIZE} x {SIZE} pixels."
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
    """`pixels` (SIZE, SIZE), 0 to 255; `dots` are the two points in question."""

    pixels: np.ndarray
    label: int
    dots: tuple[np.ndarray, np.ndarray]


Dashes = list[tuple[int, np.ndarray]]  # of one path: the index of each dash's shape and the point it is drawn at


class Path:
    """One path in each of several attempts. `angles` are the directions of its last dashes.

    The margin of the last dash is marked as taken only after the path has grown, because the next dash may touch it.
    """

    def __init__(self, tails: Points, degrees: np.ndarray):
        """First dashes, starting at `tails`, of shape `degrees`."""
        self.angles = degrees * math.pi / 180
        self.pivots = tails - step(self.angles, MARGIN)
        self.dashes = [(degrees % 360, tails)]
        self.fits = is_inside(tails) & is_inside(tails + step(self.angles, DASH)) & is_inside(self.pivots)

    def grow(self, draw: np.random.Generator, taken: np.ndarray, alive: np.ndarray) -> np.ndarray:
        """Add a dash, roughly in the direction of the last one, to the attempts `alive`; return those with room for it.

        taken: margins of everything drawn in each attempt, (attempts, SIZE, SIZE) with REACH pixels around it.
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
        """Mark the last dash as taken."""
        shape, at = self.dashes[-1]
        rows, columns = around(at[alive])
        where = alive[:, None, None], rows, columns
        taken[where] = np.maximum(taken[where], shapes().margin[shape[alive]])

    def of(self, attempt: int) -> Dashes:
        return [(int(shape[attempt]), at[attempt]) for shape, at in self.dashes]


def two_paths(draw: np.random.Generator, dashes: int) -> tuple[np.ndarray, list[Dashes]] | None:
    """Two paths that grow in turns, and the pixels they occupy; None if all attempts fail."""
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
    taken[:, inner, inner] = 0  # the border stays occupied
    for _ in range(dashes - 1):
        for path in paths:
            alive = path.grow(draw, taken, alive)
    if not len(alive):
        return None
    for path in paths:  # the paper's code omits the first path here, so that others may cross its last dash
        path.leave_margin(taken, alive)
    return taken[alive[0]], [path.of(alive[0]) for path in paths]


def short_path(draw: np.random.Generator, taken: np.ndarray, dashes: int) -> Dashes:
    """Draw one more path and add it to `taken`; return no dashes if there is no room for it."""
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
    """Points at which a first dash could start without covering what is taken, (SIZE, SIZE)."""
    offsets = np.argwhere(shapes().margin[degree] == 1) - REACH
    padded = np.pad(taken, REACH)
    covered = [padded[REACH + y : REACH + y + SIZE, REACH + x : REACH + x + SIZE] for y, x in offsets]
    return np.argwhere(np.maximum.reduce(covered) <= TAKEN)


@functools.cache
def middle(degree: int) -> Points:
    """Possible starting points of the first path: at least twice SEED_DISTANCE away from every border."""
    taken = np.ones((SIZE, SIZE))
    taken[2 * SEED_DISTANCE : -2 * SEED_DISTANCE, 2 * SEED_DISTANCE : -2 * SEED_DISTANCE] = 0
    return room_for(taken, degree)


def step(angles: np.ndarray, length: int) -> Points:
    """Displacement rounded to the nearest pixel; the paper's code rounds up, which drifts to the lower right."""
    return np.rint(length * np.stack([np.sin(angles), np.cos(angles)], -1)).astype(int)


def is_inside(points: np.ndarray) -> np.ndarray:
    return np.logical_and.reduce((points >= 0) & (points < SIZE), axis=-1)


def around(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels covered by a shape drawn at the points, both (points, side, side)."""
    side = np.arange(2 * REACH + 1)  # from REACH pixels before a point to REACH after it, in padded coordinates
    return points[:, 0, None, None] + side[:, None], points[:, 1, None, None] + side


def patches(images: np.ndarray, numbers: np.ndarray, points: Points) -> np.ndarray:
    rows, columns = around(points)
    return images[numbers[:, None, None], rows, columns]


def stamp(image: np.ndarray, shape: np.ndarray, at: np.ndarray) -> None:
    """Draw a shape on an image with REACH pixels around it; each pixel keeps the brighter value."""
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
    """Dashes by index, (indices, side, side): 0 to 359 start at the centre and run at that many degrees; later ones end
    at the centre, in the directions of a path's next dash."""

    light: np.ndarray
    margin: np.ndarray


@functools.cache
def shapes() -> Shapes:
    angles = [*(np.arange(360) * math.pi / 180), *(circle(DASH + MARGIN)[1] + math.pi)]
    radii = THICKNESS / 2, THICKNESS / 2 + MARGIN
    return Shapes(*(np.stack([capsule(float(angle), DASH, radius) for angle in angles]) for radius in radii))


def capsule(angle: float, length: float, radius: float) -> np.ndarray:
    """Coverage of each pixel by all points within `radius` of a line from the centre, (2 REACH + 1, 2 REACH + 1).

    The paper's code draws at twice the size and downsamples with a Lanczos filter; this is the fraction of 4 x 4
    points.
    """
    side = (np.arange((2 * REACH + 1) * SUBPIXELS) + 0.5) / SUBPIXELS - REACH - 0.5
    row, column = side[:, None], side[None, :]
    along = (row * math.sin(angle) + column * math.cos(angle)).clip(0, length)
    away = np.hypot(row - along * math.sin(angle), column - along * math.cos(angle))
    covered = (away <= radius).reshape(2 * REACH + 1, SUBPIXELS, 2 * REACH + 1, SUBPIXELS)
    return covered.mean((1, 3))
