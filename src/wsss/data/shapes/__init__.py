"""``shapes``: a small generated data set with the difficulties of weakly supervised segmentation.

Every image holds one to three objects of ten classes at different scales, with occlusion, on a
procedural background. It is easy enough that a tiny ViT learns it from scratch on a CPU, and it is
built so that a classifier's activation map is *not* a segmentation (the names in capitals are
constants of :mod:`wsss.data.shapes.difficulty`):

- ``fox``, ``lynx``, ``hare``, ``bear``: **a small discriminative part.** All four share one body
  (shape family, fur); only the head patch, ``PART_FRACTION`` of the object, tells
  them apart for sure. Their body tints hint at the class: each has its own, but with probability
  ``TINT_OVERLAP`` a beast wears that of any of the four.
- ``boat``, ``train``: **coexistence.** With probability ``COEXISTENCE`` the object sits on water
  (on rails), which is background; of the other images, few show it (``CONTEXT_ALONE``). The colours
  of boat and train vary (``LIVERY_HUES``), those of the context hardly do.
- ``lizard``: **camouflage.** Its texture is mixed with that of the foliage background
  (``TEXTURE_SIMILARITY``), which it is put on with probability ``CAMOUFLAGE``.
- ``ball``, ``star``, ``crate``: **a shared part.** Large patches of a colour of their own and of a
  white that all three (and the windows of trains and boats) have.

The image numbered ``n`` is a pure function of (seed, image size, n): each has its own Philox stream
and does not depend on how many others there are. :func:`generate` writes them as a tree of PASCAL
VOC, MS COCO, ACDC or plain folders, :func:`render` returns one in memory.
"""

from wsss.data.shapes.difficulty import BEASTS, CLASSES, COEXISTENCE_CLASSES, TOYS, VERSION
from wsss.data.shapes.reader import open_tree
from wsss.data.shapes.scene import Sample, ShapeObject, class_names, render
from wsss.data.shapes.tree import generate

__all__ = [
    "BEASTS",
    "CLASSES",
    "COEXISTENCE_CLASSES",
    "TOYS",
    "VERSION",
    "Sample",
    "ShapeObject",
    "class_names",
    "generate",
    "open_tree",
    "render",
]
