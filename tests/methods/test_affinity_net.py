"""AffinityNet: what a step computes and trains, how it is scored, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.made import batch as made_batch
from tests.methods.made import total
from tests.oracle import pixel_affinity as oracle
from wsss.addons.feature_similarity import FeatureSimilarity
from wsss.data.batch import Batch, EvalBatch
from wsss.errors import UserError
from wsss.methods import AffinityNet
from wsss.nn.affinity_net import AffinityNetwork

CLASSES = ("cat", "dog", "cow")


def make(**kwargs: Any) -> AffinityNet:
    torch.manual_seed(0)
    network = AffinityNetwork("resnet10t", 3, output_stride=8, channels=[8, 8, 16, 16])
    method = AffinityNet(network=network, classes=CLASSES, **kwargs)
    method._trainer = SimpleNamespace(global_step=0, max_steps=100)  # type: ignore[assignment]
    method.log = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    return method.train()


def _mask(size: tuple[int, int], seed: int) -> Tensor:
    """Blocks of 8 pixels, so that most cells agree."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, 0, 1, 2, 3, 255])
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    blocks = values[torch.randint(0, 6, (rows, columns), generator=generator)]
    return blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)[: size[0], : size[1]]


def batch() -> Batch:
    made = partial(made_batch, height=40, width=56)()
    return replace(made, mask=torch.stack([_mask((40, 56), seed) for seed in (0, 1)]))


def _cells(masks: list[Tensor]) -> Tensor:
    return torch.tensor([oracle.grid_labels(mask, (8, 8)) for mask in masks])


def test_the_loss_is_of_the_strong_view() -> None:
    method, b = make(radius=3).eval(), batch()
    assert b.mask is not None
    assert isinstance(method.network, AffinityNetwork)
    features = method.network.affinity_features(b.strong)
    expected = oracle.loss(features.double(), _cells([*b.mask]), 3)
    terms = method.step(b).terms
    assert list(terms) == ["affinity"]
    torch.testing.assert_close(terms["affinity"].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total(method, terms), terms["affinity"])
    assert not torch.isclose(
        method.step(replace(b, strong=b.weak)).terms["affinity"].double(), expected
    )


def test_what_is_trained() -> None:
    method = make()
    method.step(batch()).terms["affinity"].backward()
    for name, parameter in method.network.named_parameters():
        frozen = name.startswith(("decoder", "classifier", "early_classifier"))
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is not None) != frozen, name


@pytest.mark.parametrize("value", [0, 255])
def test_one_label_everywhere_is_finite(value: int) -> None:
    method, b = make(), batch()
    assert b.mask is not None
    loss = method.step(replace(b, mask=torch.full_like(b.mask, value))).terms["affinity"]
    loss.backward()
    assert loss.isfinite()
    assert (loss == 0) == (value == 255)


def test_scores() -> None:
    """Masks of other sizes are brought to that of the images by their nearest pixels."""
    method, b = make(radius=3).eval(), batch()
    generator = torch.Generator().manual_seed(2)
    own = [torch.randint(0, 3, (80, 112), generator=generator), _mask((40, 56), 5)]
    # Twice the size: the nearest of each 2 x 2 pixels is the last one, by convention.
    used = [_mask((40, 56), 0), own[1]]
    own[0][1::2, 1::2] = used[0]
    method.on_validation_epoch_start()
    with torch.no_grad():
        for i in range(2):
            batch_i = EvalBatch(b.weak[i : i + 1], b.labels[i : i + 1], [own[i]], [str(i)])
            method.validation_step(batch_i, i)
        assert isinstance(method.network, AffinityNetwork)
        features = method.network.affinity_features(b.weak)
    expected = oracle.shares(features.double(), _cells(used), 3)
    assert None not in expected
    found = method.compute_scores()
    names = ("foreground", "background", "negative")
    for name, share in zip(names, expected, strict=True):
        assert float(found[f"on/affinity/{name}"]) == pytest.approx(share)
    mean = sum(share for share in expected if share is not None) / 3
    assert float(found[method.monitor]) == pytest.approx(mean)
    assert method.compute_tables() == {}
    method.on_validation_epoch_start()
    assert not method.pairs.counts.any()


def test_without_masks_there_is_no_score() -> None:
    method, b = make().eval(), batch()
    method.on_validation_epoch_start()
    void = torch.full((30, 20), 255)
    method.validation_step(EvalBatch(b.weak, b.labels, [void, void], ["a", "b"]), 0)
    assert all(math.isnan(float(value)) for value in method.compute_scores().values())


def _with_data(method: AffinityNet, masks: str | None) -> AffinityNet:
    data = SimpleNamespace(masks=masks)
    method._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    return method


def test_it_wants_confident_labels() -> None:
    assert AffinityNet.wants_masks({})
    method = _with_data(make(), None)
    with pytest.raises(UserError, match=r"data\.masks is not set: method=affinity_net"):
        method.setup("fit")
    method.setup("validate")
    _with_data(method, "somewhere").setup("fit")
    with pytest.raises(UserError, match="needs masks"):
        make().step(replace(batch(), mask=None))


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"method\.radius=1: give 2"):
        make(radius=1)
    with pytest.raises(UserError, match="method=affinity_net trains no CAM"):
        make(addons={"fsl": FeatureSimilarity()})


def test_name() -> None:
    assert make().short_name() == "affinity_net"
