"""Data module: the same tensors for every number of workers, ranks and restarts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image

from wsss.data.batch import Batch, EvalBatch
from wsss.data.datamodule import WSSSDataModule
from wsss.data.folder import Folder
from wsss.data.images import DatasetError
from wsss.data.layout import Split
from wsss.data.order import image_index, sample_rng
from wsss.data.views import TwoViews
from wsss.data.voc import VOC
from wsss.errors import UserError

TRAIN, VAL = 7, 11


class InMemory:
    """Random images of one split; remembers how the data module opened it."""

    def __init__(self, split: str, *arguments: Any) -> None:
        size = TRAIN if split == "train_aug" else VAL
        self.classes: tuple[str, ...] = ("one", "two", "three")
        self.names = [f"{split}{i}" for i in range(size)]
        rng = np.random.default_rng(size)
        self.labels = rng.integers(0, 2, (size, 3)).astype(np.float32)
        self.shapes = [(20 + i, 30 - i) for i in range(size)]
        self.groups = [""] * size
        self.has_masks = True
        self.arguments = (split, *arguments)

    def __len__(self) -> int:
        return len(self.names)

    def load_image(self, index: int, longest: int | None = None) -> NDArray[np.uint8]:
        rng = np.random.default_rng(index)
        return rng.integers(0, 256, (*self.shapes[index], 3), dtype=np.uint8)

    def load_mask(self, index: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng(index)
        return rng.integers(0, 4, self.shapes[index], dtype=np.uint8)


class InMemorySource:
    """A data set of random images."""

    kind: type[InMemory] = InMemory

    def __init__(self, root: str) -> None:
        self.root = root

    def open(self, split: str, purpose: str, on_error: str, min_side: int) -> InMemory:
        return self.kind(split, self.root, purpose, on_error, min_side)


def make(trainer: Any = None, dataset: Any = InMemorySource, **arguments: Any) -> WSSSDataModule:
    settings: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "seed": 5, "eval_size": 16}
    module = WSSSDataModule(dataset, "somewhere", TwoViews(24), **{**settings, **arguments})
    module.trainer = trainer
    return module


def fake_trainer(
    rank: int = 0, world: int = 1, accumulate: int = 1, step: int = 0, max_steps: int = 3
) -> Any:
    return SimpleNamespace(
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        global_step=step,
        max_steps=max_steps,
    )


def assert_same(first: Batch, second: Batch) -> None:
    assert list(first.names) == list(second.names)
    for key in ("weak", "strong", "labels", "valid", "index"):
        torch.testing.assert_close(getattr(first, key), getattr(second, key), rtol=0, atol=0)
    assert (first.mask is None) == (second.mask is None)
    if first.mask is not None and second.mask is not None:
        assert torch.equal(first.mask, second.mask)


def joined(batches: list[Batch]) -> Batch:
    def cat(key: str) -> torch.Tensor:
        return torch.cat([getattr(batch, key) for batch in batches])

    names = [name for batch in batches for name in batch.names]
    masks = None if batches[0].mask is None else cat("mask")
    return Batch(
        cat("weak"), cat("strong"), cat("labels"), cat("valid"), names, cat("index"), masks
    )


# --- training batches ------------------------------------------------------------------------


def test_training_batch() -> None:
    batches = list(make(fake_trainer(), load_masks=True).train_dataloader())
    assert len(batches) == 3
    batch = batches[0]
    assert isinstance(batch, Batch)
    assert batch.weak.shape == batch.strong.shape == (4, 3, 24, 24)
    assert batch.weak.dtype == batch.strong.dtype == torch.uint8
    assert batch.labels.shape == (4, 3)
    assert batch.labels.dtype == torch.float32
    assert batch.valid.shape == (4, 24, 24)
    assert batch.valid.dtype == torch.bool
    assert batch.index.tolist() == [0, 1, 2, 3]
    assert batch.index.dtype == torch.int64
    assert batch.mask is not None
    assert batch.mask.dtype == torch.int64
    assert (batch.mask[~batch.valid] == 255).all()
    assert batch.mask[batch.valid].max() <= 3


def test_labels_and_names_belong_to_the_image() -> None:
    data = InMemory("train_aug")
    for batch in make(fake_trainer(max_steps=5)).train_dataloader():
        for i, number in enumerate(batch.index.tolist()):
            index = image_index(5, number, TRAIN)
            assert batch.names[i] == data.names[index]
            assert batch.labels[i].tolist() == data.labels[index].tolist()


def test_views_are_those_of_the_global_sample_number() -> None:
    """Not of the image: it looks different in every epoch."""
    data, view = InMemory("train_aug"), TwoViews(24)
    for batch in make(fake_trainer(max_steps=4)).train_dataloader():
        for i, number in enumerate(batch.index.tolist()):
            pair = view(data.load_image(image_index(5, number, TRAIN)), sample_rng(5, number))
            np.testing.assert_array_equal(batch.weak[i].permute(1, 2, 0), pair.weak)
            np.testing.assert_array_equal(batch.strong[i].permute(1, 2, 0), pair.strong)
            np.testing.assert_array_equal(batch.valid[i], pair.valid)


def test_an_epoch_shows_every_image_once() -> None:
    batches = list(make(fake_trainer(max_steps=TRAIN)).train_dataloader())  # 4 epochs
    names = joined(batches).names
    for epoch in range(4):
        assert len(set(names[epoch * TRAIN : (epoch + 1) * TRAIN])) == TRAIN


def test_masks_are_read_only_when_asked_for() -> None:
    module = make(fake_trainer())
    assert next(iter(module.train_dataloader())).mask is None
    assert module.train_images is not None
    assert module.train_images.arguments == ("train_aug", "somewhere", "train", "raise", 16)  # type: ignore[attr-defined]
    assert module.val_images is not None
    assert module.val_images.arguments == ("val", "somewhere", "evaluate", "raise", 16)  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    alone = list(make(fake_trainer(), load_masks=True).train_dataloader())
    loader = make(fake_trainer(), load_masks=True, num_workers=workers).train_dataloader()
    assert loader.persistent_workers
    for first, second in zip(alone, list(loader), strict=True):
        assert_same(first, second)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_accumulation_change_nothing(world: int, accumulate: int) -> None:
    whole = list(make(fake_trainer()).train_dataloader())
    ranks = [
        list(make(fake_trainer(rank, world, accumulate)).train_dataloader())
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [
            ranks[rank][step * accumulate + part]
            for part in range(accumulate)
            for rank in range(world)
        ]
        assert_same(batch, joined(parts))


def test_resume_continues_where_it_stopped() -> None:
    whole = list(make(fake_trainer(max_steps=5)).train_dataloader())
    loader = make(fake_trainer(max_steps=5, step=3)).train_dataloader()
    assert len(loader) == 5
    for first, second in zip(whole[3:], list(loader), strict=True):
        assert_same(first, second)


def test_seed_decides() -> None:
    first, second = (
        next(iter(make(fake_trainer(), seed=seed).train_dataloader())) for seed in (0, 1)
    )
    assert not torch.equal(first.weak, second.weak)


def test_transfer_hook_makes_floats_and_leaves_the_rest() -> None:
    module = make(fake_trainer())
    batch = next(iter(module.train_dataloader()))
    after = module.on_after_batch_transfer(batch, 0)
    assert after.weak.dtype == after.strong.dtype == torch.float32
    torch.testing.assert_close(after.weak, batch.weak / 255)
    assert after.valid is batch.valid
    evaluation = next(iter(module.val_dataloader()))
    assert module.on_after_batch_transfer(evaluation, 0).images.max() <= 1
    tensor = torch.ones(2, dtype=torch.uint8)
    assert module.on_after_batch_transfer(tensor, 0) is tensor


# --- evaluation ------------------------------------------------------------------------------


def test_evaluation_batch() -> None:
    module = make(eval_batch_size=3)
    data = InMemory("val")
    batches = list(module.val_dataloader())
    assert [len(batch.names) for batch in batches] == [3, 3, 3, 2]
    batch = batches[0]
    assert isinstance(batch, EvalBatch)
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    for i, mask in enumerate(batch.masks):
        assert mask.dtype == torch.int64
        np.testing.assert_array_equal(mask.numpy(), data.load_mask(i))
        assert batch.labels[i].tolist() == data.labels[i].tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [None, 5])
def test_every_image_is_evaluated_once_over_the_ranks(world: int, limit: int | None) -> None:
    seen: list[str] = []
    for rank in range(world):
        module = make(fake_trainer(rank, world), eval_batch_size=2, max_val_images=limit)
        seen += [name for batch in module.val_dataloader() for name in batch.names]
    assert len(seen) == (limit or VAL)
    assert len(set(seen)) == len(seen)


def test_fewer_images_than_ranks_are_told_before_training() -> None:
    """A rank without an image would end the others after all the steps are done."""
    for module in (make(fake_trainer(0, 12)), make(fake_trainer(0, 4), max_val_images=3)):
        for loader in (module.train_dataloader, module.val_dataloader):
            with pytest.raises(UserError, match=r"(11|3) images to .*fewer than the (12|4) "):
                loader()


def test_large_images_are_shrunk_before_the_random_scale() -> None:
    """A quarter of the side: the same view as of the image that is stored so."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    large = small.repeat(4, 0).repeat(4, 1)
    mask = rng.integers(0, 4, (40, 50), dtype=np.uint8)
    views = TwoViews(24, scale=(0.5, 1.0), blur=0.0)
    for number in range(20):
        expected = views(small, sample_rng(0, number), mask)
        for image, most in ((small, 50), (small, 99), (large, 50)):
            labels = mask if image is small else mask.repeat(4, 0).repeat(4, 1)
            found = views(image, sample_rng(0, number), labels, max_side=most)
            assert np.array_equal(found.valid, expected.valid)
            assert np.abs(found.weak.astype(int) - expected.weak).max() <= 2
            if image is small:
                assert np.array_equal(found.mask, expected.mask)
    with pytest.raises(UserError, match=r"data\.max_side=10: must be at least 16"):
        make(max_side=10)


def test_large_jpegs_are_decoded_no_larger_than_views_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views stay those of the whole image; up to scale 2 of 32 pixels asks for 64 or more."""
    rows, columns = np.mgrid[:300, :400]
    smooth = np.stack([rows % 200, columns % 230, (rows + columns) % 250], 2).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(smooth).save(tmp_path / "images" / "a.jpg", quality=95, subsampling=0)
    (tmp_path / "labels.csv").write_text("image,labels\na.jpg,cat\n")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("a\n")
    decoded = []

    def watched(self: Split, index: int, longest: int | None = None) -> NDArray[np.uint8]:
        decoded.append((longest, load(self, index, longest).shape))
        return load(self, index, longest)

    load = Split.load_image
    monkeypatch.setattr(Split, "load_image", watched)
    views = TwoViews(32)
    module = WSSSDataModule(
        Folder, str(tmp_path), views, train_split="train", num_workers=0, max_side=32
    )
    module.trainer = fake_trainer()
    batches = joined(list(module.train_dataloader()))
    assert decoded == [(64, (75, 100, 3))] * 12
    whole = np.array(Image.open(tmp_path / "images" / "a.jpg"))
    for number in range(12):
        expected = views(whole, sample_rng(0, number), None, max_side=32)
        assert np.array_equal(batches.valid[number], expected.valid)
        found = batches.weak[number].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - expected.weak).mean() < 4


def test_other_training_images_are_told_when_a_run_goes_on() -> None:
    module = make()
    module.setup("fit")
    state = module.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(dict(state))
        module.load_state_dict({})  # of an older version
        make().load_state_dict(dict(state))  # nothing is open yet
    assert module.train_images is not None
    module.train_images.names[3] = "another"
    with pytest.warns(UserWarning, match="was trained on 7 images, there are 7 now, or others"):
        module.load_state_dict(state)


def test_subset_is_evenly_spaced() -> None:
    assert make(max_val_images=3).val_indices() == [0, 5, 10]
    assert make(max_val_images=1).val_indices() == [0]
    assert make(max_val_images=99).val_indices() == list(range(VAL))


def test_evaluation_needs_no_training_split() -> None:
    module = make()
    module.setup("validate")
    assert module.train_images is None
    assert module.classes == ("one", "two", "three")
    assert module.num_classes == 3


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "world", "accumulate"), [(4, 3, 1), (6, 2, 2), (2, 4, 1)])
def test_batch_that_does_not_divide(batch: int, world: int, accumulate: int) -> None:
    module = make(fake_trainer(0, world, accumulate), batch_size=batch)
    message = rf"data\.batch_size={batch} .*{world} ranks x {accumulate} .*multiple of"
    with pytest.raises(UserError, match=message):
        module.train_dataloader()


def test_run_without_a_length() -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps=-1"):
        make(fake_trainer(max_steps=-1)).train_dataloader()


def test_lightning_may_not_replace_the_sampler() -> None:
    trainer = fake_trainer(0, 2)
    trainer._accelerator_connector = SimpleNamespace(use_distributed_sampler=True)
    with pytest.raises(UserError, match="use_distributed_sampler"):
        make(trainer).train_dataloader()
    with pytest.raises(UserError, match="use_distributed_sampler"):
        make(trainer).val_dataloader()


def test_calls_out_of_order() -> None:
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        _ = make().classes
    with pytest.raises(RuntimeError, match="needs a trainer"):
        make().train_dataloader()


@pytest.mark.parametrize(
    "argument", [{"batch_size": 0}, {"num_workers": -1}, {"seed": -1}, {"max_val_images": 0}]
)
def test_numbers_out_of_range(argument: dict[str, int]) -> None:
    key, value = next(iter(argument.items()))
    with pytest.raises(UserError, match=rf"data\.{key}={value}"):
        make(**argument)


def test_splits_with_other_classes() -> None:
    class Renamed(InMemory):
        def __init__(self, split: str, *arguments: Any) -> None:
            super().__init__(split, *arguments)
            if split == "val":
                self.classes = ("one", "two", "four")

    class RenamedSource(InMemorySource):
        kind = Renamed

    with pytest.raises(UserError, match="different classes"):
        make(dataset=RenamedSource).setup("fit")


# --- with Lightning and files ----------------------------------------------------------------


class Recorder(lightning.LightningModule):
    """Remembers the samples of every step; its one weight makes a run resumable."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.evaluated: list[str] = []
        self.kinds: set[torch.dtype] = set()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.index.tolist())
        self.kinds.add(batch.weak.dtype)
        return self.weight * batch.weak.mean()

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.evaluated += batch.names
        self.kinds.add(batch.images.dtype)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def run(
    folder: Path, until: int, accumulate: int, ckpt: Path | None = None, max_steps: int = 6
) -> tuple[Recorder, Path]:
    class StopAt(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.global_step == until:
                trainer.should_stop = True

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        num_sanity_val_steps=0,
        callbacks=[StopAt()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Recorder()
    trainer.fit(model, make(eval_batch_size=4), ckpt_path=ckpt, weights_only=True)
    path = folder / f"{trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    return model, path


@pytest.fixture
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_run_and_resume(tmp_path: Path, accumulate: int) -> None:
    whole, _ = run(tmp_path, 6, accumulate)
    micro = 4 // accumulate
    everything = [list(range(i, i + micro)) for i in range(0, 24, micro)]
    assert whole.seen == everything
    assert whole.kinds == {torch.float32}
    assert sorted(set(whole.evaluated)) == sorted(InMemory("val").names)
    assert len(whole.evaluated) == 3 * VAL

    first, checkpoint = run(tmp_path, 3, accumulate)
    second, _ = run(tmp_path, 6, accumulate, checkpoint)
    assert first.seen == everything[: 3 * accumulate]
    assert second.seen == everything[3 * accumulate :]
    assert torch.equal(second.weight, whole.weight)


def write_tree(root: Path, broken: bool = False) -> None:
    for folder in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    for split, names in (("train_aug", "ab"), ("val", "cd")):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for name in names:
            image, mask = np.full((20, 24, 3), 60, np.uint8), np.full((20, 24), 3, np.uint8)
            Image.fromarray(image).save(root / f"JPEGImages/{name}.jpg")
            if not (broken and name == "d"):
                Image.fromarray(mask).save(root / f"SegmentationClassAug/{name}.png")


def config(name: str) -> Any:
    return OmegaConf.load(Path(__file__).parents[2] / f"conf/{name}.yaml")


def test_config_files_make_a_data_module(tmp_path: Path) -> None:
    from hydra.utils import instantiate

    write_tree(tmp_path / "tree")
    data = OmegaConf.merge(config("data/base"), config("data/voc"))
    cfg = OmegaConf.create({"seed": 3, "data": data, "view": config("view/cosa")})
    cfg.data.pop("defaults")
    cfg.data.root, cfg.data.num_workers = str(tmp_path / "tree"), 0
    module = instantiate(cfg.data)
    assert isinstance(module, WSSSDataModule)
    assert module.seed == 3
    assert module.view.crop_size == (448, 448)
    assert module.view.__dict__ == TwoViews().__dict__  # the file says what the code does
    module.trainer = fake_trainer()
    assert next(iter(module.train_dataloader())).weak.shape == (4, 3, 448, 448)
    assert isinstance(module.train_images, Split)
    assert [list(batch.names) for batch in module.val_dataloader()] == [["c"], ["d"]]


def test_broken_tree_fails_in_setup(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", broken=True)
    module = WSSSDataModule(VOC, str(tmp_path / "tree"), TwoViews(8))
    with pytest.raises(DatasetError, match=r"problem in split 'val'(.|\n)*d\.png: no such mask"):
        module.setup("fit")


def test_a_setting_of_another_version() -> None:
    def dataset(root: str, *, known: int = 0) -> Any:
        raise AssertionError

    data = make(dataset=partial(dataset, forgotten=1))
    with pytest.raises(UserError, match=r"forgotten.*data=\.\.\."):
        data.setup("validate")


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_breaks_during_a_run_is_named(tmp_path: Path, workers: int) -> None:
    write_tree(tmp_path / "tree")
    module = WSSSDataModule(
        VOC, str(tmp_path / "tree"), TwoViews(8), batch_size=2, num_workers=workers
    )
    module.trainer = fake_trainer()
    module.setup("fit")
    path = tmp_path / "tree/JPEGImages/a.jpg"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DatasetError, match=r"a\.jpg: cannot decode"):
        list(module.train_dataloader())
