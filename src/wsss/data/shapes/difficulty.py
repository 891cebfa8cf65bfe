"""What makes ``shapes`` difficult, in one place."""

from __future__ import annotations

BEASTS = ("fox", "lynx", "hare", "bear")
CLASSES = (*BEASTS, "boat", "train", "lizard", "ball", "star", "crate")
TOYS = ("ball", "star", "crate")
COEXISTENCE_CLASSES = ("boat", "train")
VERSION = 17  # raise whenever the same parameters would give other files

PART_FRACTION = (0.12, 0.20)
"""Area of a beast's head patch over that of the object: the range drawn from."""
HEAD_CONTRAST = 1.0
"""0: a beast's head patch has the tint of its body; 1: it has only colours of its own."""
TINT_OVERLAP = 0.15
"""Probability that a beast's body tint is drawn from all four instead of being its own."""
COEXISTENCE = 0.85
"""Probability that an image with a boat (train) shows water (rails) under it."""
CONTEXT_ALONE = 0.15
"""Probability of water (of rails) in an image without a boat (train)."""
LIVERY_HUES = 30.0
"""Range in degrees of the hues of boats and of trains. The wider, the more a classifier leans on
the context: at 360 a boat's activation map covers the water and leaves the boat out."""
TEXTURE_SIMILARITY = 0.25
"""0: the lizard's colours are its own; 1: they are those of the foliage background."""
CAMOUFLAGE = 0.4
"""Probability that an image with a lizard is given the foliage background on purpose."""
OBJECTS_PER_IMAGE = (0.4, 0.4, 0.2)
"""Probabilities of one, two and three objects."""
MIN_VISIBLE_AREA = 0.01
"""Visible area of every object over the image's area; below it the placement is drawn again."""
MIN_VISIBLE_FRACTION = 0.45
"""Visible area of every object over its own area, likewise."""
MIN_VISIBLE_PART = 0.7
"""Visible area of a head patch over its own area: without the patch the label is a guess."""
NOISE = (0.01, 0.03)
"""Range of the standard deviation of the pixel noise, of intensities in [0, 1]."""
VOID_BORDER = True
"""Mark pixels that straddle an outline as 255 (void), as PASCAL VOC does."""

KNOBS = (
    "PART_FRACTION",
    "HEAD_CONTRAST",
    "TINT_OVERLAP",
    "COEXISTENCE",
    "CONTEXT_ALONE",
    "LIVERY_HUES",
    "TEXTURE_SIMILARITY",
    "CAMOUFLAGE",
    "OBJECTS_PER_IMAGE",
    "MIN_VISIBLE_AREA",
    "MIN_VISIBLE_FRACTION",
    "MIN_VISIBLE_PART",
    "NOISE",
    "VOID_BORDER",
)  # go into shapes.json, so that a tree drawn with other constants is not taken for this one
