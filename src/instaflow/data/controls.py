"""Pictures → the pictures that control a drawing, by OpenCV: edges, scribbles, colours, a masked picture.

Depth and poses are for controlnet_aux; what it makes is taken as any other control picture is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from instaflow.errors import DataError
from instaflow.recipe import ControlKind


def control_picture(kind: ControlKind, pixels: np.ndarray, hole: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """What controls a drawing of `pixels`, uint8 (H, W, 3) → uint8 (H, W, 3).

    Args:
        kind: edges are Canny's (1986), one pixel wide, white on black; scribble those of the blurred picture,
            thickened to three; colours the picture at an eighth of its side; inpaint the picture with a hole.
        pixels: the picture.
        hole: (top, left, bottom, right) of inpaint, filled with grey.

    Raises:
        DataError: OpenCV is not installed.
    """
    cv = _opencv()
    grey = cv.cvtColor(pixels, cv.COLOR_RGB2GRAY)
    match kind:
        case "edges":
            return np.repeat(cv.Canny(grey, 100, 200)[..., None], 3, axis=2)
        case "scribble":
            lines = cv.Canny(cv.GaussianBlur(grey, (0, 0), 1.5), 40, 100)
            return np.repeat(cv.dilate(lines, np.ones((3, 3), np.uint8))[..., None], 3, axis=2)
        case "colours":
            height, width = grey.shape
            small = cv.resize(pixels, (width // 8, height // 8), interpolation=cv.INTER_AREA)
            return np.asarray(cv.resize(small, (width, height), interpolation=cv.INTER_LINEAR))
        case "inpaint":
            out = pixels.copy()
            if hole is not None:
                top, left, bottom, right = hole
                out[top:bottom, left:right] = 128
            return out


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise DataError("control pictures are made by OpenCV; pip install 'instaflow[control]'") from error
    return cv2
