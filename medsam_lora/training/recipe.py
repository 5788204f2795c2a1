"""What a pre-training does at which step: courses of picture sizes, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP = 50
"""Steps over which the rate rises from nothing."""


@dataclass(frozen=True)
class Course:
    """A part of the training: step by step the sizes take turns.

    Parameters
    ----------
    steps : int
    sizes : sequence of int
        Sides of the pictures.
    pictures : sequence of int
        Per step, for each size.
    shapes : float
        Share of pictures that are of `datasets.shapes` instead of scenes.
    shaken : float
        Share of boxes whose edges are moved.
    restart : float
        Where above 0, the learning rate warms up to this share of its peak and falls anew from here.
    """

    steps: int
    sizes: Sequence[int]
    pictures: Sequence[int]
    shapes: float = 0.0
    shaken: float = 0.5
    restart: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How long, on what sizes and at what rate.

    Parameters
    ----------
    courses : sequence of Course
        One after the other. Small pictures first: where to look is learned in a tenth of the time on a few tokens.
    lr, weight_decay : float
        Peak rate of AdamW (linear warm-up over 50 steps, then a half cosine to zero, once for all courses or anew
        where one restarts it), and its decay.
    seed : int
    """

    courses: Sequence[Course]
    lr: float
    weight_decay: float
    seed: int

    @property
    def steps(self) -> int:
        """Steps of all courses."""
        return sum(course.steps for course in self.courses)

    def pictures(self, step: int) -> tuple[int, int]:
        """Side and number of the pictures of a step (from 1).

        Examples
        --------
        >>> recipe = Recipe([Course(2, [64], [16]), Course(4, [128, 256], [16, 4])], 1e-3, 0.05, 0)
        >>> [recipe.pictures(step) for step in range(1, 7)]
        [(64, 16), (64, 16), (128, 16), (256, 4), (128, 16), (256, 4)]
        """
        course, left = self._course(step)
        turn = left % len(course.sizes)
        return course.sizes[turn], course.pictures[turn]

    def course(self, step: int) -> Course:
        """The course of a step (from 1)."""
        return self._course(step)[0]

    @property
    def ends(self) -> list[int]:
        """Steps at which the rate has fallen to zero: the last before each restart, and the last of all.

        Examples
        --------
        >>> Recipe([Course(2, [64], [8]), Course(3, [64], [8]), Course(4, [64], [8], restart=0.6)], 1.0, 0.0, 0).ends
        [5, 9]
        """
        found, steps = [], 0
        for course in self.courses:
            if course.restart and steps:
                found.append(steps)
            steps += course.steps
        return [*found, steps]

    def rate(self, step: int) -> float:
        """Learning rate of a step.

        Examples
        --------
        >>> recipe = Recipe([Course(100, [64], [8]), Course(200, [64], [8], restart=0.6)], 1.0, 0.0, 0)
        >>> [round(recipe.rate(step), 3) for step in (25, 51, 100, 125, 201, 300)]
        [0.5, 0.5, 0.0, 0.3, 0.3, 0.0]
        """
        first, last, peak = 0, 0, self.lr
        for course in self.courses:
            if course.restart:
                if step <= last:
                    break
                first, peak = last, self.lr * course.restart
            last += course.steps
        done, whole = step - first, last - first
        return peak * min(done / WARM_UP, 0.5 * (1 + math.cos(math.pi * (done - 1) / whole)))

    def _course(self, step: int) -> tuple[Course, int]:
        """The course of a step, and how many steps of it were before."""
        left = step - 1
        for course in self.courses:
            if left < course.steps:
                return course, left
            left -= course.steps
        raise ValueError(f"step {step} is behind the last, {self.steps}")
