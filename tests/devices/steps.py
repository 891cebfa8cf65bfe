"""A training step and an evaluation of each method on the pretended device, beside the CPU's.

Prints a line of JSON a case. ``python -m tests.devices.steps``
"""

from __future__ import annotations

import json
import traceback
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.commands.conftest import compose
from tests.devices import pretend
from tests.methods.made import batch
from wsss.build import build_method, build_network
from wsss.callbacks.ema import AssignmentEMA
from wsss.data.batch import Batch, EvalBatch
from wsss.methods.base import Method

VIT = [
    "view.crop_size=64",
    "backbone.options.img_size=64",
    "backbone.options.depth=3",
    "backbone.options.embed_dim=24",
    "backbone.options.num_heads=2",
    "method.eval_scales=[1.0,0.5]",
    "method.cam_scales=[1.0,0.5]",
]
CNN = ["view.crop_size=64", "method.eval_scales=[1.0,0.5]", "method.cam_scales=[1.0,0.5]"]
CASES = {
    "cosa": ["experiment=cosa_shapes", *VIT],
    "cosa, otsu, isl_fsl": [
        "experiment=cosa_shapes",
        "method.threshold=otsu",
        "addon=isl_fsl",
        *VIT,
    ],
    "cosa, gmm": ["experiment=cosa_shapes", "method.threshold=gmm", *VIT],
    "cosa, gmm_full": ["experiment=cosa_shapes", "method.threshold=gmm_full", *VIT],
    "cosa, min_error": ["experiment=cosa_shapes", "method.threshold=min_error", *VIT],
    "cosa_release": ["experiment=cosa_shapes", "method=cosa_release", *VIT],
    "cosa, unia, isl_fsl": [
        "experiment=cosa_shapes",
        "neck=uncertainty",
        "addon=[unia,isl_fsl]",
        *VIT,
    ],
    "unia": ["experiment=unia_shapes", *VIT],
    "cam, isl_fsl": ["experiment=cam_shapes", "addon=isl_fsl", *VIT],
    "cam, segment": ["experiment=cam_shapes", "method.segment=true", *VIT],
    "mctformer": ["experiment=mctformer_shapes", *VIT],
    "seam, isl_fsl": ["experiment=seam_shapes", "addon=isl_fsl", *CNN],
    "spatial_bce": ["experiment=spatial_bce_shapes", *CNN],
    "affinity_net": ["experiment=affinity_net_shapes", "+data.masks=none", "view.crop_size=64"],
    "supervised": ["experiment=shapes", "method=supervised", *VIT],
    "second stage": ["experiment=cosa_ms_shapes", "+data.masks=none", *CNN],
}
CLASSES = ("fox", "boat", "star")


def made(settings: list[str]) -> Method:
    """The method at its last step, with terms in a running threshold."""
    cfg = compose("train", [*settings, "boundary=true"])
    torch.manual_seed(0)
    method = build_method(cfg, build_network(cfg, len(CLASSES)), CLASSES)
    steps = int(cfg.trainer.max_steps)
    trainer: Any = SimpleNamespace(
        global_step=steps - 1,
        max_steps=steps,
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
    )
    method._trainer = trainer
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.1}])
    method.log = lambda *a, **k: None  # type: ignore[method-assign]
    method.optimizers = lambda *a, **k: optimizer  # type: ignore[method-assign]
    return method.train()


def on_device(x: Any) -> Any:
    return pretend.OnDevice(x) if isinstance(x, Tensor) else x


def moved(b: Batch) -> Batch:
    """As Lightning moves it."""
    names = ("weak", "strong", "labels", "valid", "index", "mask")
    return replace(b, **{name: on_device(getattr(b, name)) for name in names})


def outcome(method: Method, train: Batch, evaluate: EvalBatch) -> dict[str, Any]:
    """Loss, gradients' norm after two steps, and scores."""
    for i in range(2):
        method.zero_grad()
        torch.manual_seed(i)
        loss = method.training_step(train, i)
        loss.backward()
        for callback in method.configure_callbacks() or ():  # type: ignore[union-attr]
            if isinstance(callback, AssignmentEMA):
                trainer: Any = SimpleNamespace(global_step=i + 1)
                callback.on_train_batch_end(trainer, method, None, train, i)
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    waited = dict(pretend.WAITED)
    method.eval()
    with torch.no_grad():
        method.on_validation_epoch_start()
        method.validation_step(evaluate, 0)
        method.on_validation_epoch_end()
        scores = {name: float(value) for name, value in method.compute_scores().items()}
    return {
        "devices": sorted({str(g.device.type) for g in grads} | {loss.device.type}),
        "loss": float(loss),
        "norm": float(norm),
        "scores": scores,
        "waited": waited,
    }


def run(settings: list[str]) -> dict[str, Any]:
    """The outcomes of a case on both devices."""
    mask = torch.zeros(2, 48, 64, dtype=torch.int64)
    mask[0, :24], mask[1, :, 40:] = 1, 2
    mask[1, :4] = 255
    train = replace(batch(), mask=mask)
    evaluate = EvalBatch(train.weak, train.labels, [mask[0], mask[1, :40]], train.names)
    plain = outcome(made(settings), train, evaluate)
    method = made(settings)
    pretend.WAITED.clear()
    with pretend.running():
        pretend.move(method)
        there = EvalBatch(
            on_device(evaluate.images),
            on_device(evaluate.labels),
            [on_device(m) for m in evaluate.masks],
            evaluate.names,
        )
        return {"cpu": plain, "device": outcome(method, moved(train), there)}


def main() -> None:
    torch.set_num_threads(1)
    pretend.register()
    for name, settings in CASES.items():
        try:
            result = run(settings)
        except Exception as error:
            where = pretend.places(traceback.extract_tb(error.__traceback__))[-1:]
            result = {"error": f"{type(error).__name__}: {error} {where}"}
        print(json.dumps({"case": name, **result}), flush=True)


if __name__ == "__main__":
    main()
