"""An image as a grid of patches and back, by reshaping alone."""

import math
from collections.abc import Sequence

from jaxtyping import Array, Float


def patchify(x: Float[Array, "H W C"], patch: int) -> Float[Array, "h w d"]:
    """Gather each `patch` x `patch` square of pixels into one vector.

        out[i, j, (a patch + b) C + c] = x[i patch + a, j patch + b, c]

    Args:
        x: [H, W, C], with H and W multiples of `patch`.
        patch: side of a square, in pixels.

    Returns:
        [H / patch, W / patch, patch^2 C].
    """
    height, width, channels = x.shape
    x = x.reshape(height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(1, 2).reshape(height // patch, width // patch, patch * patch * channels)


def unpatchify(x: Float[Array, "h w d"], patch: int) -> Float[Array, "H W C"]:
    """Lay patches out as an image; the inverse of `patchify`.

    Args:
        x: [h, w, patch^2 C].
        patch: side of a square, in pixels.

    Returns:
        [h patch, w patch, C].
    """
    rows, columns, size = x.shape
    x = x.reshape(rows, columns, patch, patch, size // patch**2)
    return x.swapaxes(1, 2).reshape(rows * patch, columns * patch, size // patch**2)


def check_patch(patch: int, shape: Sequence[int]) -> None:
    """Refuse a side that does not divide the sides of an image.

    Args:
        patch: side of a square, in pixels.
        shape: (H, W, C) of the image.

    Raises:
        ValueError: if `patch` is below 1 or divides H or W with a rest.
    """
    side = math.gcd(*shape[:2])
    if patch < 1 or side % patch:
        fits = [n for n in range(1, side + 1) if side % n == 0]
        raise ValueError(
            f"patch: got {patch} for an image of {tuple(shape[:2])}, expected a divisor of both sides; use one "
            f"of {fits}, or pad the image"
        )
