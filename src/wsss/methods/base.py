"""What every method shares: optimizer, named losses, evaluation and what a checkpoint says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from wsss import __version__
from wsss.addons import AddOn, Step, View
from wsss.data.batch import Batch, EvalBatch
from wsss.distributed import mean_over_ranks
from wsss.errors import UserError
from wsss.losses import classification_loss
from wsss.methods.checks import check_scales, check_threshold
from wsss.methods.optimizer import OPTIMIZERS, make_optimizer
from wsss.methods.schedule import warmup_poly
from wsss.metrics.protocols import HEADLINES, ProtocolScores
from wsss.nn import NetworkOutput, WSSSNetwork
from wsss.pseudo import MultiScaleOutput

CHECKPOINT_KEY = "wsss"
#: raised when an older version could not read what a newer one writes
CHECKPOINT_FORMAT = 1
RATIO = "confusion_ratio"
#: steps between two looks at the losses on an accelerator, where a look holds the step up
FINITE_CHECK_EVERY = 50
#: settings of methods that say from which step on a part of them acts
STARTS = ("loss_warmup_steps", "aux_steps", "refine_start_step")
#: factor of add-ons that name none, as published with these optimizers
ADDON_SCALE = {"adamw": 0.1, "sgd": 1.0}


class Method(L.LightningModule):
    """Base of all methods: a subclass says which losses a batch gives.

    Args:
        network: the trained ("online") network.
        classes: foreground class names, in label order.
        lr: learning rate of the encoder; heads and decoder use ``head_lr_factor`` times it.
        weight_decay: of AdamW on all parameters, of SGD on all but biases.
        head_lr_factor: factor for classifiers and decoder.
        optimizer: ``adamw`` or ``sgd``, see :func:`~wsss.methods.optimizer.make_optimizer`.
        betas: of AdamW.
        sgd_momentum: of SGD.
        warmup_steps: learning-rate warm-up, in optimizer steps.
        warmup_ratio: factor at step 0.
        power: of the polynomial decay.
        eval_scales: scales of the segmentation logits at evaluation, with flips.
        cam_scales: scales of the CAMs at evaluation (and of CoSA's assignment network).
        cpl_threshold: background threshold at which CAM pseudo-labels are scored.
        pooling: of features to image logits: ``gmp`` (maximum) or ``gap`` (mean).
        addons: losses on top of the method's own, by name.

    Raises:
        UserError: classes that are not the network's, an unknown optimizer or pooling, an add-on
            on a CAM that the method does not train.
    """

    #: names of :meth:`networks`, which prefix their scores; the first is the one to deploy
    network_names: tuple[str, ...] = ("on",)
    #: score that decides which checkpoint is best
    monitor = "on/seg/miou_ms_flip"
    evaluates_segmentation = True
    evaluates_cam = True
    evaluates_early_cam = True
    #: what builds its network from a backbone's settings
    network_class: type[WSSSNetwork] = WSSSNetwork

    def __init__(
        self,
        network: WSSSNetwork,
        classes: Sequence[str],
        lr: float = 6e-5,
        weight_decay: float = 0.01,
        head_lr_factor: float = 10.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 1500,
        warmup_ratio: float = 1e-6,
        power: float = 0.9,
        eval_scales: Sequence[float] = (1.0, 0.5, 1.5, 0.75, 1.25),
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
        cpl_threshold: float = 0.5,
        pooling: str = "gmp",
        optimizer: str = "adamw",
        sgd_momentum: float = 0.9,
        addons: Mapping[str, AddOn] | None = None,
    ) -> None:
        super().__init__()
        if len(classes) != network.num_classes:
            raise UserError(
                f"The network has {network.num_classes} classes, the data set {len(classes)}."
            )
        network.set_pooling(pooling)
        self.network = network
        self.classes = tuple(classes)
        self.addons = nn.ModuleDict(dict(addons or {}))
        self._check_addons()
        if optimizer not in OPTIMIZERS:
            raise UserError(
                f"method.optimizer='{optimizer}': choose one of {', '.join(OPTIMIZERS)}."
            )
        check_scales("method.eval_scales", eval_scales)
        check_scales("method.cam_scales", cam_scales)
        check_threshold("method.cpl_threshold", cpl_threshold)
        self.optimizer = optimizer
        self.sgd_momentum = sgd_momentum
        self.lr = lr
        self.weight_decay = weight_decay
        self.head_lr_factor = head_lr_factor
        self.betas = (float(betas[0]), float(betas[1]))
        self.warmup_steps = warmup_steps
        self.warmup_ratio = warmup_ratio
        self.power = power
        self.eval_scales = tuple(eval_scales)
        self.cam_scales = tuple(cam_scales)
        self.scores = nn.ModuleDict(
            {
                name: ProtocolScores(
                    self.classes,
                    eval_scales,
                    cam_scales,
                    cpl_threshold,
                    segmentation=self.evaluates_segmentation,
                    cam=self.evaluates_cam,
                    early_cam=self.evaluates_early_cam,
                )
                for name in self.network_names
            }
        )
        #: plain configuration of the run, kept in checkpoints so that commands can rebuild it
        self.run_config: dict[str, Any] = {}
        #: names of the groups (patients) of the images last validated
        self.groups: list[str] = []
        #: mIoU of each image last validated: network, image name, a value a protocol
        self.image_scores: dict[str, dict[str, list[float]]] = {}
        self._last_terms: dict[str, Tensor] = {}

    @classmethod
    def short_name(cls) -> str:
        """Its name in tables and messages: ``spatial_bce`` of ``SpatialBCE``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z]{3})", "_", cls.__name__).lower()

    # --- what a method defines -------------------------------------------------------------

    @classmethod
    def wants_masks(cls, settings: Mapping[str, Any]) -> bool:
        """Whether training batches need masks.

        Args:
            settings: the constructor's arguments, as far as the configuration names them.
        """
        return False

    def require_given_masks(self, stage: str, why: str, how: str) -> None:
        """For ``setup``: refuse to train without ``data.masks``.

        Args:
            stage: that of ``setup``; only ``fit`` needs them.
            why: what they are needed for.
            how: the command that makes them, and what else could be done.

        Raises:
            UserError: they are not set.
        """
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and getattr(data, "masks", None) is None:
            raise UserError(f"data.masks is not set: {why}. Give a folder of them, such as {how}.")

    def step(self, batch: Batch) -> Step:
        """Named loss terms of one micro-batch, before weighting, and what add-ons may act on."""
        raise NotImplementedError

    def loss_weights(self) -> Mapping[str, float]:
        """Weight of each term; a term that is not named counts 1."""
        return {}

    def networks(self) -> dict[str, WSSSNetwork]:
        """The networks that ``network_names`` names."""
        return {"on": self.network}

    # --- training --------------------------------------------------------------------------

    def classification(self, output: NetworkOutput, batch: Batch) -> dict[str, Tensor]:
        """The classification terms of final and early features (CoSA, eq. 1)."""
        terms = {"cls": classification_loss(output.class_logits, batch.labels)}
        if self.evaluates_early_cam:
            terms["cls_early"] = classification_loss(output.early_class_logits, batch.labels)
        return terms

    def views(
        self, output: NetworkOutput, batch: Batch, activations: MultiScaleOutput | None = None
    ) -> tuple[View, ...]:
        """What add-ons may act on: the CAMs whose terms :meth:`classification` gives.

        Args:
            output: of the pass on the strong view.
            batch: the micro-batch.
            activations: what the method's pseudo-labels are made of, if it made any.
        """
        # The weak view has the colours of the image; the strong one may be solarised.
        about = (batch.weak, batch.labels, batch.valid, output)
        fused = (None, None) if activations is None else (activations.cam, activations.early_cam)
        views = [View("cam", "cls", output.cam, *about, fused[0])]
        if self.evaluates_early_cam:
            views.append(View("early_cam", "cls_early", output.early_cam, *about, fused[1]))
        return tuple(views)

    def _check_addons(self) -> None:
        for name, addon in self.addons.items():
            addon.name = name  # type: ignore[assignment]  # two of one kind log two terms
            for cam in addon.cams:  # type: ignore[union-attr]
                if self.evaluates_cam and (cam == "cam" or self.evaluates_early_cam):
                    continue
                which = "early CAM" if self.evaluates_cam else "CAM"
                remedy = f" or change addon.{name}.cams" if self.evaluates_cam else ""
                raise UserError(
                    f"addon.{name} acts on '{cam}', but method={self.short_name()} "
                    f"trains no {which}: leave it out{remedy}."
                )
            addon.prepare(self.network)  # type: ignore[operator]

    def with_addons(self, step: Step) -> tuple[dict[str, Tensor], dict[str, float]]:
        """All terms of a step and their weights; a term that is not named counts 1."""
        own_weights = self.loss_weights()
        terms, weights = dict(step.terms), dict(own_weights)
        for addon in self.addons.values():
            if self.trainer.global_step < addon.start_step:  # type: ignore[operator]
                continue
            scale = ADDON_SCALE[self.optimizer]
            addon.add_to(step, terms, weights, own_weights, scale)  # type: ignore[operator]
        return terms, weights

    def reads_attention(self, step: int) -> bool:
        """Whether the method or an add-on looks at the attention that the network keeps.

        Args:
            step: optimizer step.
        """
        return any(
            addon.needs_attention and step >= addon.start_step  # type: ignore[operator]
            for addon in self.addons.values()
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Every matrix of it that is kept costs a product and memory until the backward pass.
        self.network.attention_is_read = self.reads_attention(self.trainer.global_step)
        terms, weights = self.with_addons(self.step(batch))
        total = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        self._check_finite(terms)
        # Means over ranks: a term whose count is the global batch's is no loss on one rank alone.
        logged = dict(self._last_terms)
        logged["total"] = torch.stack(
            [weights.get(name, 1.0) * value for name, value in logged.items()]
        ).sum()
        for name, value in logged.items():
            self.log(f"loss/{name}", value, prog_bar=True, batch_size=len(batch.names))
        self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return total

    def _check_finite(self, terms: Mapping[str, Tensor]) -> None:
        """Stop on NaN or infinity and say which term.

        On the CPU every step, before the optimizer's; on an accelerator at every
        ``FINITE_CHECK_EVERY``-th and before a checkpoint is written.
        """
        # The mean over ranks is not finite where any rank's is not: all of them stop together.
        values = mean_over_ranks(torch.stack([term.detach() for term in terms.values()]))
        self._last_terms = dict(zip(terms, values, strict=True))
        looks = self.device.type == "cpu" or (self.trainer.global_step % FINITE_CHECK_EVERY == 0)
        if looks:
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        bad = [name for name, term in self._last_terms.items() if not bool(term.isfinite())]
        if bad:
            raise UserError(
                f"loss/{bad[0]} is {float(self._last_terms[bad[0]])} at step "
                f"{self.trainer.global_step}. Training stops; the last checkpoint written before "
                "it is good. Lower method.lr, use trainer.precision=32-true, or look at the images "
                "of this step."
            )

    def on_fit_start(self) -> None:
        total = self.trainer.max_steps
        starts = {f"method.{key}": getattr(self, key, None) for key in STARTS}
        starts |= {f"addon.{key}.start_step": it.start_step for key, it in self.addons.items()}
        for key, step in starts.items():
            if step is not None and step >= total:
                rank_zero_warn(
                    f"{key}={step} is not below trainer.max_steps={total}: what it starts will "
                    "take no part in this run."
                )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Whatever a step draws (stochastic depth, sampled losses) depends on seed, micro-batch
        # and rank alone: a resumed run repeats an uninterrupted one.
        seed = int(self.run_config.get("seed", 0))
        torch.manual_seed(((seed * 1_000_003 + batch_idx) * 1009 + self.global_rank) % 2**63)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(
            self.network,
            self.optimizer,
            self.lr,
            self.head_lr_factor,
            self.weight_decay,
            self.betas,
            self.sgd_momentum,
            clipped=bool(getattr(self.trainer, "gradient_clip_val", None)),
        )
        total = self.trainer.max_steps

        def factor(step: int) -> float:
            return warmup_poly(step, total, self.warmup_steps, self.warmup_ratio, self.power)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # --- evaluation ------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        data = getattr(self._trainer, "datamodule", None)  # neither is there in a plain loop
        self.groups = list(getattr(data, "groups", []))
        for scores in self.scores.values():
            scores.reset(len(self.groups))  # type: ignore[operator]

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        networks = self.networks()
        for name, scores in self.scores.items():
            scores.update(networks[name], batch)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        self.image_scores = {
            name: scores.image_scores()  # type: ignore[operator]
            for name, scores in self.scores.items()
        }
        for name, value in self.compute_scores().items():
            self.log(name, value, prog_bar=name == self.monitor)

    def compute_scores(self) -> dict[str, Tensor]:
        """Every score of every network in [0, 1] by full name (``an/seg/miou_ms_flip``).

        mIoU of each protocol; of :data:`~wsss.metrics.protocols.HEADLINES` also mean precision,
        recall and confusion ratio FP / TP (``an/seg/precision_ms_flip``); average precisions of the
        image labels (``an/cls/map``); where the tables have them, the mean Dice over groups
        (``an/seg/group_dice_ms_flip``), boundary F, its mean with mIoU (``an/seg/jf_ms_flip``), and
        C-mIoU.
        """
        scores = {}
        for network, value_by_protocol in self.compute_tables().items():
            for protocol, value in value_by_protocol.items():
                full = f"{network}/{protocol}"
                scores[full] = value["miou"].float()
                more = {
                    "group_dice": value.get("mean_group_dice"),
                    "boundary_f": value.get("mean_boundary_f"),
                    "cmiou": value.get("cmiou"),
                }
                if protocol in HEADLINES:
                    more |= {n: value[f"mean_{n}"] for n in ("precision", "recall", RATIO)}
                if "mean_boundary_f" in value:
                    more["jf"] = (value["miou"] + value["mean_boundary_f"]) / 2
                for name, found in more.items():
                    if found is not None:
                        scores[full.replace("miou", name)] = found.float()
            classification = self.scores[network].compute_classification()  # type: ignore[operator]
            for name in ("map", "image_ap"):
                if name in classification:
                    scores[f"{network}/cls/{name}"] = classification[name].float()
        return scores

    def compute_tables(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """All scores: network, protocol, then the dict of :class:`SegmentationScores`."""
        return {name: scores.compute() for name, scores in self.scores.items()}  # type: ignore[operator]

    # --- checkpoints -----------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._raise_if_not_finite()
        # A finite loss may have a gradient that is not.
        parameters = [p.detach() for p in self.network.parameters()]
        if not bool(torch.stack(torch._foreach_norm(parameters)).isfinite().all()):
            raise UserError(
                f"The weights are not finite after step {self.trainer.global_step}. Training "
                "stops; the last checkpoint written before it is good. Lower method.lr or use "
                "trainer.precision=32-true."
            )
        checkpoint[CHECKPOINT_KEY] = {
            "format": CHECKPOINT_FORMAT,
            "version": __version__,
            "classes": list(self.classes),
            "config": self.run_config,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_classes(checkpoint, self.classes)


def check_classes(checkpoint: Mapping[str, Any], classes: Sequence[str], path: str = "") -> None:
    """Compare a checkpoint's class list with the data set's.

    Raises:
        UserError: they differ, in number, names or order.
    """
    saved = list(checkpoint.get(CHECKPOINT_KEY, {}).get("classes", []))
    if not saved:
        raise UserError(f"{path or 'The checkpoint'} was not written by wsss: it names no classes.")
    if saved == list(classes):
        return
    where = f"'{path}'" if path else "The checkpoint"
    if len(saved) != len(classes):
        detail = f"{len(saved)} classes, the data set has {len(classes)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(saved, classes, strict=True)) if a != b)
        detail = f"'{saved[i]}' as class {i + 1}, the data set has '{classes[i]}'"
    raise UserError(
        f"{where} was trained with {detail}. Choose the data that it was trained on, or another "
        "checkpoint."
    )
