"""A user's own images: which ones are meant, and reading them."""

from __future__ import annotations

import glob
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsss.data.images import IMAGE_SUFFIXES, DatasetError, count, read_rgb
from wsss.data.views import resize_image
from wsss.errors import UserError

#: what is taken for an image in a folder, in any case of letters; other formats that PIL reads
#: must be named, or matched by a pattern
FOLDER_SUFFIXES = frozenset(
    {*map(str.lower, IMAGE_SUFFIXES), ".jfif", ".tif", ".tiff", ".webp", ".bmp"}
)
#: images with more pixels are decoded one at a time, for the memory that this takes
_LARGE = 2**24
_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """The images that ``input`` means.

    Attributes:
        base: folder that names are relative to.
        files: in the order of their paths.
        passed_over: files beside them that are no images.
    """

    base: Path
    files: tuple[Path, ...]
    passed_over: tuple[Path, ...] = ()


def find_images(source: str, output_dir: Path) -> Found:
    """The images of a file, a folder (with its subfolders) or a pattern such as ``a/**/*.jpg``.

    Hidden files and folders are passed over, and so is ``output_dir`` where it lies inside.

    Args:
        source: as the user wrote it; a pattern may hold ``*``, ``?``, ``[...]`` and ``**``.
        output_dir: where the results will be written.

    Raises:
        UserError: nothing there, no image among it, or results that would mix with the images.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Found(path.parent, (path,))
    if path.is_dir():
        base, candidates = path, sorted(path.rglob("*"))
        suffixes = FOLDER_SUFFIXES
    elif glob.has_magic(source):
        fixed = 0
        while not glob.has_magic(path.parts[fixed]) or Path(*path.parts[: fixed + 1]).is_dir():
            fixed += 1  # a folder may be called "[2024] trip"
            if fixed == len(path.parts) or not glob.has_magic(str(Path(*path.parts[fixed:]))):
                raise UserError(_missing(path))
        base = Path(*path.parts[:fixed])
        pattern = str(Path(*path.parts[fixed:]))
        # Unlike Path.glob, it leaves hidden files out.
        names = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207
        candidates = [base / name for name in sorted(set(names))]
        suffixes = readable_suffixes()
    else:
        raise UserError(_missing(path))

    visible = [
        p
        for p in candidates
        if not p.is_dir() and not any(n.startswith(".") for n in p.relative_to(base).parts)
    ]
    results = output_dir.resolve()
    inside = {p for p in visible if results in p.resolve().parents}
    if results == base.resolve() and inside:
        raise UserError(
            f"output_dir='{output_dir}' is the folder of the images: a second run would take "
            "masks for images. Choose another folder with output_dir=..."
        )
    if base.resolve() in results.parents:
        visible = [p for p in visible if p not in inside]
    files = tuple(p for p in visible if p.suffix.lower() in suffixes)
    others = tuple(p for p in visible if p.suffix.lower() not in suffixes)
    if not files:
        found = f" Found there: {describe_others(others)}." if others else ""
        raise UserError(
            f"input='{source}': no images.{found} Name a file, a folder (searched for "
            f"{', '.join(sorted(FOLDER_SUFFIXES))}), or a pattern such as 'input=photos/**/*.jp2'."
        )
    return Found(base, files, others)


def readable_suffixes() -> frozenset[str]:
    """Suffixes of all formats that PIL reads here."""
    Image.init()
    return frozenset(s for s, name in Image.EXTENSION.items() if name in Image.OPEN)


def describe_others(files: tuple[Path, ...]) -> str:
    """How many files, and of which kinds."""
    kinds = Counter(p.suffix.lower() or "no suffix" for p in files)
    shown = ", ".join(kind for kind, _ in kinds.most_common(_SHOWN))
    more = ", ..." if len(kinds) > _SHOWN else ""
    return f"{count(len(files), 'other file')} ({shown}{more})"


def _missing(path: Path) -> str:
    near = []
    if path.parent.is_dir():
        near = sorted(
            p.name for p in path.parent.iterdir() if p.stem.casefold() == path.stem.casefold()
        )
    hint = f" There is {', '.join(near[:_SHOWN])}." if near else " Check the path."
    return f"input='{path}': no such file or folder.{hint}"


@dataclass
class Photo:
    """A decoded image.

    Attributes:
        height, width: its own.
        square: (S, S, 3) uint8, all of it at the inference size.
        thumbnail: (h, w, 3) uint8, all of it, for the overlay.
        native: (H, W, 3) uint8; None where it is not needed any more.
    """

    height: int
    width: int
    square: NDArray[np.uint8]
    thumbnail: NDArray[np.uint8]
    native: NDArray[np.uint8] | None


class Reader:
    """Decodes images, from several threads.

    Args:
        size: side of the inference square.
        exif: turn images as their EXIF orientation says.
        max_pixels: an image with more is refused before it is decoded.
        remedy: what to do about that.
        thumbnail: longer side of the thumbnail at most.
        keep_native: keep the image at its own size.
    """

    def __init__(
        self,
        size: int,
        exif: bool,
        max_pixels: int,
        remedy: str,
        thumbnail: int,
        keep_native: bool,
    ) -> None:
        self.size = size
        self.exif = exif
        self.max_pixels = max_pixels
        self.remedy = remedy
        self.thumbnail = thumbnail
        self.keep_native = keep_native
        self._one_large = threading.Lock()

    def __call__(self, path: Path) -> Photo:
        """Read one image.

        Raises:
            DatasetError: it cannot be decoded, or is too large.
        """
        pixels = self._check_size(path)
        with self._one_large if pixels > _LARGE else nullcontext():
            try:
                image = read_rgb(path, self.exif)
            except DatasetError:
                raise
            except Exception as error:  # PIL's plugins raise many types on broken files
                raise DatasetError(
                    f"{path}: cannot decode the image ({type(error).__name__}: {error})"
                ) from error
            height, width = image.shape[:2]
            return Photo(
                height,
                width,
                resize_image(image, self.size, self.size),
                resize_image(image, *fitted(height, width, self.thumbnail)),
                image if self.keep_native else None,
            )

    def _check_size(self, path: Path) -> int:
        """Pixels of an image whose header can be read, else 0."""
        try:
            with Image.open(path) as image:
                width, height = image.size
        except Exception:  # said better by read_rgb
            return 0
        if width * height > self.max_pixels:
            raise DatasetError(
                f"{path}: {width}x{height} are {width * height} pixels, {self.remedy}"
            )
        return width * height


def fitted(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size with its longer side at most ``longest``; never larger than it was."""
    factor = min(1.0, longest / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


@contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Switch off PIL's limit on pixels, for code that has its own."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
