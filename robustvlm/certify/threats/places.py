"""Points of a small ball, evenly spread: what an audit tries of a threat with one, two or three parameters."""

import math

import numpy as np

from robustvlm.certify.normal import Array


def in_ball(dimensions: int, radius: float, count: int) -> Array:
    """Return about `count` points [N, dimensions] of the ball: three fifths on its surface, others on shells within.

    Example:
        >>> in_ball(1, 2.0, 4).ravel().tolist()
        [-2.0, -1.0, 1.0, 2.0]
        >>> bool(np.linalg.norm(in_ball(3, 0.5, 100), axis=1).max() <= 0.5 + 1e-12)
        True
    """
    if dimensions == 1:
        parts = radius * np.arange(1, max(1, count // 2) + 1) / max(1, count // 2)
        return np.concatenate([-parts[::-1], parts])[:, None]
    outer = max(2 * dimensions, round(0.6 * count))
    inner = max(dimensions, (count - outer) // 2)
    shells = ((outer, 1.0), (inner, 0.75), (inner, 0.5))
    return np.concatenate([part * radius * on_sphere(dimensions, size) for size, part in shells])


def on_sphere(dimensions: int, count: int) -> Array:
    """Return `count` unit vectors: even on a circle, along a Fibonacci spiral on a sphere.

    Example:
        >>> on_sphere(2, 4).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-0.0, -1.0]]
    """
    if dimensions == 2:
        angle = 2.0 * np.pi * np.arange(count) / count
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if dimensions != 3:
        raise ValueError(f"points on spheres of 2 or 3 dimensions, got {dimensions}")
    height = 1.0 - 2.0 * (np.arange(count) + 0.5) / count
    turn = np.pi * (3.0 - math.sqrt(5.0)) * np.arange(count)
    ring = np.sqrt(1.0 - height * height)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), height], axis=1)
