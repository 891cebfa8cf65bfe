"""ProtocolScores against an evaluation of one image, one scale and one flip at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import protocols as oracle
from tests.oracle.protocols import Picture
from wsss.data.batch import EvalBatch
from wsss.metrics import protocols
from wsss.metrics.protocols import (
    CAM_PROTOCOLS,
    CRF_PROTOCOLS,
    SEGMENTATION_PROTOCOLS,
    ProtocolScores,
)
from wsss.nn import NetworkOutput

CLASSES = ("cat", "dog", "eel")
ALL = (*SEGMENTATION_PROTOCOLS, *CRF_PROTOCOLS, *CAM_PROTOCOLS)
SCALES = {"scales": (1.0, 0.5, 1.5), "cam_scales": (1.0, 0.75), "cpl_threshold": 0.45}


class Toy:
    """Maps that mind place, scale and mirroring, from the colours of 4 x 4 pixels alone.

    Element by element: an image gets the same numbers in every batch.
    """

    def __init__(self, classes: int = len(CLASSES)) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weights = [3 * torch.randn(3, k, generator=generator) for k in (classes, classes + 1)]
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, images: Tensor, decode: bool = True) -> NetworkOutput:
        self.calls.append((images.shape[-1], decode))
        grid = F.avg_pool2d(images, 4)
        place = torch.linspace(0, 2, grid.shape[-1], device=grid.device)
        features = torch.sin(4 * grid + place)
        few, all_labels = (
            sum(features[:, None, c] * w[c, :, None, None].to(grid.device) for c in range(3))
            for w in self.weights
        )
        cam, early = few, few.flip(1) + features[:, :1]
        logits = cam.mean((2, 3))
        return NetworkOutput(
            logits, early.mean((2, 3)), cam, early, all_labels if decode else None, features
        )


def refine(image: Tensor, probabilities: Tensor) -> Tensor:
    """In place of the CRF: the colours decide where the network is in doubt."""
    assert image.dtype == torch.uint8
    bright = image.float().mean(-1) / 255
    changed = probabilities.clone()
    changed[0] = changed[0] + 0.8 * bright
    return changed


def picture(name: str, size: tuple[int, int], labels: Sequence[int], group: int) -> Picture:
    """Random colours; a mask of blocks with the classes of ``labels`` (1..C), and void."""
    generator = torch.Generator().manual_seed(hash_of(name))
    image = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size=24, mode="bilinear")[0]
    original = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
    values = torch.tensor([0, *labels, *labels, 255])
    blocks = values[torch.randint(0, len(values), (1, 1, 4, 5), generator=generator)]
    mask = F.interpolate(blocks.float(), size=size, mode="nearest")[0, 0].long()
    present = torch.zeros(len(CLASSES))
    present[[c - 1 for c in labels]] = 1
    return Picture(name, image, present, mask, original, group)


def hash_of(name: str) -> int:
    return sum(i * ord(letter) for i, letter in enumerate(name, 1))


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    """Among them one without any label, one without a pixel to score, one in no group.

    Group 1 has no cat to score: its Dice is left out of the mean over groups.
    """
    found = [
        picture("one", (19, 26), [1, 2], 0),
        picture("two", (33, 20), [2], 1),
        picture("unlabelled", (24, 24), [], 1),
        picture("void", (21, 30), [1], 1),
        picture("three", (27, 31), [1, 2], 0),
        picture("last", (22, 23), [1], -1),
    ]
    found[3].mask.fill_(255)
    return found


def batch(pictures: Sequence[Picture], device: str = "cpu") -> EvalBatch:
    return EvalBatch(
        torch.stack([p.image for p in pictures]).to(device),
        torch.stack([p.labels for p in pictures]).to(device),
        [p.mask.to(device) for p in pictures],
        [p.name for p in pictures],
        torch.tensor([p.group for p in pictures]).to(device),
        [p.original.to(device) for p in pictures],
    )


def make(chosen: tuple[str, ...] | None = None, **options: Any) -> ProtocolScores:
    """Everything switched on."""
    scores = ProtocolScores(CLASSES, **(SCALES | options))
    scores.crf = "afa"
    scores.boundary = True
    scores.coexistence = (2, 0)
    scores.chosen = chosen
    scores.reset(num_groups=2)
    return scores


def run(scores: ProtocolScores, pictures: Sequence[Picture], batch_size: int = 4) -> Toy:
    network = Toy()
    for i in range(0, len(pictures), batch_size):
        scores.update(network, batch(pictures[i : i + batch_size]))  # type: ignore[arg-type]
    return network


@pytest.fixture(autouse=True)
def _no_crf_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(image: Tensor, probabilities: Tensor, preset: str) -> Tensor:
        assert preset == "afa"
        return refine(image, probabilities)

    monkeypatch.setattr(protocols, "dense_crf", call)


def compute(scores: ProtocolScores) -> dict[str, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eel is in no mask
        return scores.compute()


def classification(scores: ProtocolScores) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scores.compute_classification()


def assert_is(found: Tensor, expected: Sequence[float], what: str) -> None:
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-9, nan_ok=True), what


def assert_equal(found: ProtocolScores, expected: ProtocolScores) -> None:
    """The very same scores of every protocol that ``found`` takes, of images and of labels."""
    reference = compute(expected)
    for protocol, table in compute(found).items():
        for name, value in table.items():
            other = reference[protocol][name]
            assert torch.equal(value.nan_to_num(-1), other.nan_to_num(-1)), (protocol, name)
    columns = [expected.protocols.index(p) for p in found.protocols]
    images = expected.image_scores()
    for name, row in found.image_scores().items():
        whole = images.pop(name)
        assert row == pytest.approx([whole[k] for k in columns], rel=0, abs=0, nan_ok=True)
    assert not images
    labels = classification(expected)
    for name, value in classification(found).items():
        assert torch.equal(value.nan_to_num(-1), labels[name].nan_to_num(-1)), name


# --- against the oracle ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        SCALES,
        {"scales": (0.5, 1.5), "cam_scales": (1.0, 0.75), "cpl_threshold": 0.3},
        {"scales": (0.5,), "cam_scales": (0.75,), "cpl_threshold": 0.6},
        {"scales": (1.0,), "cam_scales": (0.5, 1.5), "cpl_threshold": 0.45},
    ],
    ids=["as usual", "scale 1 for CAMs alone", "no scale 1", "scale 1 not for CAMs"],
)
def test_everything_equals_the_oracle(pictures: list[Picture], options: dict[str, Any]) -> None:
    scores = make(**options)
    run(scores, pictures)
    expected = oracle.evaluate(
        Toy(),
        pictures,
        options["scales"],
        options["cam_scales"],
        options["cpl_threshold"],
        refine,
        coexistence=scores.coexistence,
    )
    tables = compute(scores)
    assert tuple(tables) == scores.protocols == ALL
    for protocol in ALL:
        wanted = expected.tables[protocol]
        names = ["iou", "dice", "miou", "cmiou", "group_dice", "mean_group_dice"]
        if "ms_flip" in protocol:
            names += ["boundary_f", "mean_boundary_f"]
        for name in names:
            assert_is(tables[protocol][name], wanted[name], f"{protocol} {name}")
        assert ("boundary_f" in tables[protocol]) == ("ms_flip" in protocol)
    images = scores.image_scores()
    assert set(images) == {p.name for p in pictures}
    for name, row in images.items():
        wanted_row = [expected.images[name][p] for p in ALL]
        assert row == pytest.approx(wanted_row, rel=1e-9, nan_ok=True), name
    found = classification(scores)
    for name, values in expected.classification.items():
        assert_is(found[name], values, name)


def test_protocols_differ(pictures: list[Picture]) -> None:
    """The test above would not see one protocol in place of another if they agreed."""
    scores = make()
    run(scores, pictures)
    found = {float(table["miou"]) for table in compute(scores).values()}
    assert len(found) == len(ALL)
    assert all(0.02 < value < 0.9 for value in found)


# --- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [*((p,) for p in ALL), (ALL[0], ALL[6]), (ALL[3], ALL[4])])
def test_chosen_protocols_score_as_among_all(
    pictures: list[Picture], chosen: tuple[str, ...]
) -> None:
    whole, part = make(), make(chosen)
    run(whole, pictures)
    run(part, pictures)
    assert part.protocols == chosen
    assert_equal(part, whole)


def test_networks_run_for_what_is_chosen_alone(pictures: list[Picture]) -> None:
    assert sorted(run(make(), pictures[:1]).calls) == [
        (12, True),
        (18, False),
        (24, True),
        (36, True),
    ]
    assert sorted(run(make(("cpl/miou_ms_flip",)), pictures[:1]).calls) == [
        (18, False),
        (24, False),
    ]
    # The image labels are scored at scale 1.
    assert run(make(("cpl/miou_ms_flip",), cam_scales=(0.5,)), pictures[:1]).calls == [
        (12, False),
        (24, False),
    ]
    assert run(make(("seg/miou_ss",)), pictures[:1]).calls == [(24, True)]
    no_labels = make(("seg/miou_ms_flip",), cam=False, scales=(0.5,))
    assert run(no_labels, pictures[:1]).calls == [(12, True)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_batch_size_changes_nothing(pictures: list[Picture], batch_size: int) -> None:
    whole, other = make(), make()
    run(whole, pictures, batch_size=4)
    run(other, pictures, batch_size)
    assert_equal(other, whole)


def test_methods_without_segmentation_or_cams(pictures: list[Picture]) -> None:
    whole = make()
    run(whole, pictures)
    for options, protocols_left in (
        ({"segmentation": False}, CAM_PROTOCOLS),
        ({"cam": False}, (*SEGMENTATION_PROTOCOLS, *CRF_PROTOCOLS)),
        ({"segmentation": False, "early_cam": False}, CAM_PROTOCOLS[:1]),
    ):
        part = make(**options)
        network = run(part, pictures)
        assert part.protocols == protocols_left
        assert_equal(part, whole)
        assert bool(classification(part)) == ("cam" not in options)
        assert any(decode for _, decode in network.calls) == ("cam" in options)


def test_without_its_switches(pictures: list[Picture]) -> None:
    scores = ProtocolScores(CLASSES, **SCALES)  # type: ignore[arg-type]
    assert scores.protocols == (*SEGMENTATION_PROTOCOLS, *CAM_PROTOCOLS)
    without = batch(pictures)
    without.originals = without.groups = None
    scores.update(Toy(), without)  # type: ignore[arg-type]
    for table in compute(scores).values():
        assert not {"cmiou", "boundary_f", "group_dice"} & set(table)


# --- masks and labels --------------------------------------------------------------------------


def test_images_without_labels_are_all_background_where_labels_are_known(
    pictures: list[Picture],
) -> None:
    """Background slices of a volume, or photos of nothing: no CAM is resized at all."""
    scores = make()
    run(scores, [pictures[2]])
    for protocol, table in compute(scores).items():
        if not protocol.startswith("seg/"):
            assert table["confusion"][:, 1:].sum() == 0, protocol
            assert float(table["iou"][0]) == 1, protocol


def test_void_images_have_labels_alone(pictures: list[Picture]) -> None:
    scores = make()
    network = run(scores, [pictures[3], pictures[3]])
    assert network.calls == [(24, False)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # data without masks: every class is absent
        tables = scores.compute()
        labels = scores.compute_classification()
    assert all(math.isnan(table["miou"]) for table in tables.values())
    assert all(math.isnan(v) for row in scores.image_scores().values() for v in row)
    assert not math.isnan(labels["image_ap"])


def test_absent_classes_are_named_on_the_first_rank_alone(
    pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (0, 1):
        scores = make()
        run(scores, pictures)
        monkeypatch.setattr(protocols, "world_size", lambda: 2)
        monkeypatch.setattr(protocols.dist, "get_rank", lambda rank=rank: rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores.compute()
            scores.compute_classification()
        named = [str(w.message) for w in caught if "eel" in str(w.message)]
        assert bool(named) == (rank == 0)
        assert rank or {"a boundary" in m for m in named} == {True, False}
        assert rank or any("a positive image" in m for m in named)


def test_a_crf_needs_the_original_images(pictures: list[Picture]) -> None:
    without = batch(pictures)
    without.originals = None
    with pytest.raises(ValueError, match=r"data\.load_originals"):
        make().update(Toy(), without)  # type: ignore[arg-type]
    make(("seg/miou_ss",)).update(Toy(), without)  # type: ignore[arg-type]


def test_one_class_keeps_its_dimension(pictures: list[Picture]) -> None:
    scores = ProtocolScores(["cat"], **SCALES)  # type: ignore[arg-type]
    scores.boundary = True
    scores.reset()
    one = batch([pictures[5]])
    one.labels = one.labels[:, :1]
    scores.update(Toy(1), one)  # type: ignore[arg-type]
    for protocol, table in scores.compute().items():
        if "ms_flip" in protocol:
            assert table["boundary_f"].shape == (1,)
    assert scores.compute_classification()["ap"].shape == (1,)


# --- state -------------------------------------------------------------------------------------


def test_reset_forgets(pictures: list[Picture]) -> None:
    scores, fresh = make(), make()
    run(scores, pictures[:3])
    scores.reset(num_groups=2)
    assert not scores.scored
    assert scores.image_scores() == {}
    run(scores, pictures[3:])
    run(fresh, pictures[3:])
    assert_equal(scores, fresh)


def test_nothing_of_it_is_in_a_checkpoint() -> None:
    assert make().state_dict() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(pictures: list[Picture]) -> None:
    here, there = make(), make().to("cuda")
    run(here, pictures)
    there.reset(num_groups=2)  # what it makes anew lies on the GPU as well
    network = Toy()
    for i in range(0, len(pictures), 4):
        there.update(network, batch(pictures[i : i + 4], "cuda"))  # type: ignore[arg-type]
    expected = compute(here)
    for protocol, table in compute(there).items():
        for name in ("miou", "cmiou", "mean_group_dice", "boundary_f"):
            if name in table:
                assert table[name].device.type == "cuda"
                # A pixel between two classes may fall to the other.
                wanted = pytest.approx(expected[protocol][name].tolist(), abs=5e-3, nan_ok=True)
                assert table[name].tolist() == wanted, f"{protocol} {name}"
    for name, row in there.image_scores().items():
        assert row == pytest.approx(here.image_scores()[name], abs=1e-2, nan_ok=True)
