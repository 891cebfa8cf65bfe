"""Lightning data module: one global batch, split over ranks, micro-batches and workers.

The tensors of a run depend on the seed and the global sample number alone (``wsss.data.order``):
any number of workers and ranks, any accumulation, and any restart give the same training data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import cv2
import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wsss.data.batch import Batch, EvalBatch, to_unit_range
from wsss.data.given_masks import GivenMasks
from wsss.data.images import VOID, count
from wsss.data.layout import Purpose, Split
from wsss.data.order import MicroBatchSampler, evenly, image_index, sample_rng
from wsss.data.views import TwoViews, ViewPair, resize_image
from wsss.environment import processors
from wsss.errors import UserError


class ImageSet(Protocol):
    """What the samples need of an open split; :class:`wsss.data.layout.Split` is one.

    Attributes:
        classes: C foreground class names; class i has mask value i + 1.
        names: N image names.
        labels: (N, C) float32, 1 where the image holds the class.
        groups: N names of what images belong together, such as a patient; "" for none.
        has_masks: whether every image has a mask.
    """

    classes: tuple[str, ...]
    names: list[str]
    labels: NDArray[np.float32]
    groups: list[str]
    has_masks: bool

    def __len__(self) -> int: ...

    def load_image(self, index: int, longest: int | None = None) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, whose longer side may be as short as ``longest`` pixels."""

    def load_mask(self, index: int) -> NDArray[np.uint8]:
        """(H, W) uint8, 0..C and 255."""


class Source(Protocol):
    """A data set that can open its splits; every :class:`wsss.data.layout.Layout` is one."""

    def open(
        self, split: str, purpose: Purpose, on_error: Literal["raise", "skip"], min_side: int
    ) -> ImageSet:
        """See :meth:`wsss.data.layout.Layout.open`."""


class _TrainSample(NamedTuple):
    views: ViewPair
    labels: NDArray[np.float32]
    name: str
    number: int


class _EvalSample(NamedTuple):
    image: NDArray[np.uint8]
    labels: NDArray[np.float32]
    mask: NDArray[np.uint8]
    name: str
    group: int  # -1: none
    original: NDArray[np.uint8] | None


class _TrainSamples(Dataset[_TrainSample]):
    """Samples by global sample number (not by image index)."""

    def __init__(
        self,
        images: ImageSet,
        view: TwoViews,
        seed: int,
        load_masks: bool,
        max_side: int | None = None,
    ) -> None:
        self.images = images
        self.view = view
        self.seed = seed
        self.load_masks = load_masks
        self.max_side = max_side
        # The view enlarges up to scale[1] from max_side, and never counts from less than that.
        enough = None if max_side is None else max_side * max(1.0, view.scale[1])
        self.longest = None if enough is None else math.ceil(enough)

    def __getitem__(self, number: int) -> _TrainSample:
        index = image_index(self.seed, number, len(self.images))
        image = self.images.load_image(index, self.longest)
        mask = self.images.load_mask(index) if self.load_masks else None
        views = self.view(image, sample_rng(self.seed, number), mask, self.max_side)
        return _TrainSample(views, self.images.labels[index], self.images.names[index], number)


class _EvalSamples(Dataset[_EvalSample]):
    """Images at the evaluation size with masks at their own, by image index."""

    def __init__(self, images: ImageSet, size: int, groups: Sequence[str], originals: bool) -> None:
        self.images = images
        self.size = size
        self.originals = originals
        self.groups = {group: i for i, group in enumerate(groups)}

    def __getitem__(self, index: int) -> _EvalSample:
        images = self.images
        native = images.load_image(index)
        image = resize_image(native, self.size, self.size)
        # Without a mask every pixel is void: pictures are drawn, nothing is scored.
        has_mask = images.has_masks
        mask = images.load_mask(index) if has_mask else np.full(native.shape[:2], VOID, np.uint8)
        group = self.groups.get(images.groups[index], -1)
        original = native if self.originals else None
        return _EvalSample(image, images.labels[index], mask, images.names[index], group, original)


def _to_chw(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def collate_train(samples: Sequence[_TrainSample]) -> Batch:
    """Stack samples into a :class:`Batch` (uint8 images)."""
    masks = [sample.views.mask for sample in samples if sample.views.mask is not None]
    return Batch(
        weak=_to_chw([sample.views.weak for sample in samples]),
        strong=_to_chw([sample.views.strong for sample in samples]),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        valid=torch.from_numpy(np.stack([sample.views.valid for sample in samples])),
        names=[sample.name for sample in samples],
        index=torch.tensor([sample.number for sample in samples], dtype=torch.int64),
        mask=torch.from_numpy(np.stack(masks).astype(np.int64)) if masks else None,
    )


def collate_eval(samples: Sequence[_EvalSample]) -> EvalBatch:
    """Stack samples into an :class:`EvalBatch` (uint8 images, masks of different sizes)."""
    groups = [sample.group for sample in samples]
    originals = [torch.from_numpy(s.original) for s in samples if s.original is not None]
    return EvalBatch(
        images=_to_chw([sample.image for sample in samples]),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        masks=[torch.from_numpy(sample.mask.astype(np.int64)) for sample in samples],
        names=[sample.name for sample in samples],
        groups=torch.tensor(groups) if max(groups) >= 0 else None,
        originals=originals or None,
    )


def _single_thread(worker: int) -> None:
    """Worker start: the workers are the parallelism."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


class WSSSDataModule(lightning.LightningDataModule):
    """Training views and evaluation images of one data set.

    Args:
        dataset: makes the :class:`Source` when called with ``root`` (a Hydra
            ``_partial_`` of ``wsss.data.voc.VOC``, for example). Files are checked in
            :meth:`setup`, so a broken data set fails before the first step.
        root: folder of the data set.
        view: makes the training views.
        train_split, val_split: splits of the data set.
        batch_size: the **global** batch: samples of one optimizer step over all ranks and
            accumulated micro-batches.
        num_workers: loader processes of each rank, at most one for each processor.
        seed: decides image order and augmentation.
        eval_size: side S of the square that evaluation images are resized to.
        eval_batch_size: evaluation images of one forward pass on one rank.
        load_masks: put masks into training batches (``method=supervised``). Evaluation always
            has them.
        masks: folder of NAME.png for the training images, in place of the data set's own masks:
            exported pseudo-labels; see :class:`~wsss.data.given_masks.GivenMasks`. Evaluation keeps
            the data set's own.
        masks_may_be_truth: take them even if they are the data set's own.
        load_originals: put the images at their own size into evaluation batches (for a CRF).
        max_val_images: evaluate on that many images, evenly spaced over the list; None for all.
        on_error: ``raise`` stops at images that cannot be used and names them all; ``skip``
            leaves them out, counted and named in a warning.
        min_side: images whose shorter side has fewer pixels cannot be used.
        max_side: training images whose longer side has more pixels are shrunk to it, before the
            view's random scale; None leaves all as they are. A crop of a large photograph shows
            a small part of it, without most of the classes that it is labelled with. JPEGs are
            decoded no larger than that needs.

    Raises:
        UserError: a number out of range; in :meth:`train_dataloader`, a global batch that does
            not divide over ranks and accumulation, or a run without ``max_steps``.
    """

    def __init__(
        self,
        dataset: Callable[..., Source],
        root: str,
        view: TwoViews,
        train_split: str = "train_aug",
        val_split: str = "val",
        batch_size: int = 4,
        num_workers: int = 4,
        seed: int = 0,
        eval_size: int = 448,
        eval_batch_size: int = 1,
        load_masks: bool = False,
        masks: str | None = None,
        masks_may_be_truth: bool = False,
        load_originals: bool = False,
        max_val_images: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        min_side: int = 16,
        max_side: int | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("eval_size", eval_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("max_val_images", 1 if max_val_images is None else max_val_images, 1),
            ("min_side", min_side, 1),
            ("max_side", min_side if max_side is None else max_side, min_side),
        ):
            if value < least:
                raise UserError(f"data.{key}={value}: must be at least {least}")
        self.dataset = dataset
        self.root = root
        self.view = view
        self.train_split = train_split
        self.val_split = val_split
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.eval_size = eval_size
        self.eval_batch_size = eval_batch_size
        self.load_masks = load_masks
        self.masks = masks
        self.masks_may_be_truth = masks_may_be_truth
        self.load_originals = load_originals
        self.max_val_images = max_val_images
        self.on_error = on_error
        self.min_side = min_side
        self.max_side = max_side
        self.train_images: ImageSet | None = None
        self.val_images: ImageSet | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that ``stage`` needs and check their files; repeated calls are free.

        Args:
            stage: ``fit`` (training and validation), ``validate``, ``test`` or ``predict``
                (validation only), or None for both.
        """
        if stage in (None, "fit") and self.train_images is None:
            if self.masks is not None and not self.load_masks:
                raise UserError(
                    f"data.masks='{self.masks}': the method looks at no masks. Choose "
                    "method=supervised for a second stage, or leave data.masks out."
                )
            given = self.load_masks and self.masks is not None
            purpose: Purpose = "train_masks" if self.load_masks and not given else "train"
            images = self._open(self.train_split, purpose)
            self.train_images = self._with_given_masks(images) if given else images
        if self.val_images is None:
            self.val_images = self._open(self.val_split, "evaluate")
        train, val = self.train_images, self.val_images
        if train is not None and train.classes != val.classes:
            raise UserError(
                f"splits '{self.train_split}' and '{self.val_split}' of {self.root} have different "
                f"classes: {train.classes} and {val.classes}"
            )

    def _open(self, split: str, purpose: Purpose) -> ImageSet:
        try:
            source = self.dataset(root=self.root)
        except TypeError as error:  # a setting that this class does not have
            raise UserError(
                f"data.dataset does not fit this version of wsss ({error}). Of an older "
                "checkpoint, say the data anew: data=... data.root=..."
            ) from error
        return source.open(split, purpose, self.on_error, self.min_side)

    def _with_given_masks(self, images: ImageSet) -> ImageSet:
        assert isinstance(images, Split)
        assert self.masks is not None
        folder = Path(self.masks).expanduser()
        return GivenMasks(images, folder, self.on_error, self.masks_may_be_truth)

    @property
    def about_masks(self) -> str | None:
        """What training masks are, in a sentence; None where no step sees any."""
        if not self.load_masks or self.train_images is None:
            return None
        if isinstance(self.train_images, GivenMasks):
            return self.train_images.about
        return f"ground truth of split '{self.train_split}' (full supervision)"

    def notes(self) -> list[str]:
        """What a user should know of the data: what was assumed, built, or is hardly meant.

        Looks into some masks of the validation split.
        """
        notes: dict[str, None] = {}  # in order, each once
        for images in (self.train_images, self.val_images):
            if isinstance(images, Split | GivenMasks):
                notes |= dict.fromkeys(images.notes)
        if isinstance(self.val_images, Split) and (doubt := self.val_images.doubt()) is not None:
            notes[doubt] = None
        return [*notes]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C foreground classes; known after :meth:`setup`."""
        if self.val_images is None:
            raise RuntimeError("the data module's classes are known after setup(); call it first")
        return self.val_images.classes

    @property
    def num_classes(self) -> int:
        """C, the number of foreground classes; known after :meth:`setup`."""
        return len(self.classes)

    @property
    def groups(self) -> list[str]:
        """Names of what evaluation images belong to (patients), sorted; empty for most data."""
        images = self.val_images
        return sorted({group for group in images.groups if group}) if images is not None else []

    @property
    def has_masks(self) -> bool:
        """Whether evaluation images have masks, so that there is something to score."""
        return self.val_images is not None and self.val_images.has_masks

    def state_dict(self) -> dict[str, Any]:
        """What decides which image a sample number means, for the checkpoint."""
        if self.train_images is None:
            return {}
        names = "\n".join(self.train_images.names).encode(errors="surrogateescape")
        digest = hashlib.sha1(names, usedforsecurity=False).hexdigest()
        return {"train_images": len(self.train_images), "train_names": digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn where the checkpoint's training images are not those of today."""
        now = self.state_dict()
        if state_dict and now and state_dict != now:
            rank_zero_warn(
                f"the checkpoint was trained on {state_dict['train_images']} images, there are "
                f"{now['train_images']} now, or others: some will be seen again before others "
                "are seen at all"
            )

    def val_indices(self) -> list[int]:
        """List the indices into ``val_images`` that are evaluated, over all ranks."""
        self.setup("validate")
        assert self.val_images is not None
        total = len(self.val_images)
        return evenly(total, total if self.max_val_images is None else self.max_val_images)

    def train_dataloader(self) -> DataLoader[_TrainSample]:
        """Loader of this rank's part of every step from the trainer's current step to the last."""
        self.setup("fit")
        assert self.train_images is not None
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("train_dataloader() needs a trainer: it knows ranks and steps")
        if trainer.max_steps < 1:
            raise UserError(
                f"trainer.max_steps={trainer.max_steps}: runs are counted in optimizer steps, set "
                "trainer.max_steps to their number"
            )
        self._check_sampler_is_kept()
        self._check_images_for_all_ranks()
        world, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        micro_batch, rest = divmod(self.batch_size, world * accumulate)
        if rest or not micro_batch:
            fitting = world * accumulate * max(1, round(self.batch_size / (world * accumulate)))
            raise UserError(
                f"data.batch_size={self.batch_size} is the global batch and does not divide over "
                f"{world} ranks x {accumulate} accumulated micro-batches; set it to a multiple of "
                f"{world * accumulate} (for example {fitting}), or change trainer.devices or "
                "trainer.accumulate_grad_batches"
            )
        sampler = MicroBatchSampler(
            global_batch=self.batch_size,
            micro_batch=micro_batch,
            rank=trainer.global_rank,
            world_size=world,
            accumulate=accumulate,
            start_step=trainer.global_step,
            total_steps=trainer.max_steps,
        )
        samples = _TrainSamples(
            self.train_images, self.view, self.seed, self.load_masks, self.max_side
        )
        return DataLoader(
            samples,
            batch_sampler=sampler,
            collate_fn=collate_train,
            **self._loader_options(),
        )

    def val_dataloader(self) -> DataLoader[_EvalSample]:
        """Loader of this rank's evaluation images; the ranks' images are disjoint and complete.

        Nothing is repeated to even out the ranks, so the numbers of batches may differ by one.
        """
        indices = self.val_indices()
        assert self.val_images is not None
        if self.trainer is not None:
            self._check_sampler_is_kept()
            self._check_images_for_all_ranks()
            indices = indices[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(
            _EvalSamples(self.val_images, self.eval_size, self.groups, self.load_originals),
            sampler=indices,
            batch_size=self.eval_batch_size,
            collate_fn=collate_eval,
            **self._loader_options(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 images to float in [0, 1], on the device; other batches pass unchanged."""
        if isinstance(batch, Batch):
            return replace(
                batch, weak=to_unit_range(batch.weak), strong=to_unit_range(batch.strong)
            )
        if isinstance(batch, EvalBatch):
            return replace(batch, images=to_unit_range(batch.images))
        return batch

    def _loader_options(self) -> dict[str, Any]:
        # More workers than processors only slow each other down; the order does not depend on them.
        workers = min(self.num_workers, processors())
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": _single_thread,
        }

    def _check_images_for_all_ranks(self) -> None:
        """Refuse ranks without an image to validate on: they would hang or end the others."""
        assert self.trainer is not None
        images, ranks = len(self.val_indices()), self.trainer.world_size
        if images < ranks:
            raise UserError(
                f"split '{self.val_split}': {count(images, 'image')} to validate on, fewer than "
                f"the {ranks} processes of this run; add images, raise data.max_val_images, or "
                "lower trainer.devices"
            )

    def _check_sampler_is_kept(self) -> None:
        """Refuse Lightning's DistributedSampler in place of ours: it pads and shuffles."""
        trainer = self.trainer
        assert trainer is not None
        connector = getattr(trainer, "_accelerator_connector", None)
        if trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise UserError(
                "trainer.use_distributed_sampler must be false with more than one rank: the data "
                "module already splits the samples over ranks"
            )
