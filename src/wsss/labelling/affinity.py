"""A trained AffinityNet as a refinement of pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.build import restore_method
from wsss.checkpoints import find_checkpoint, read_checkpoint, saved_config
from wsss.data.batch import to_unit_range
from wsss.data.views import resize_image
from wsss.errors import UserError
from wsss.files import sha256_of
from wsss.methods import AffinityNet
from wsss.methods.base import check_classes
from wsss.nn.affinity_net import AffinityNetwork
from wsss.pseudo import affinity_walk


class AffinityRun:
    """Class scores spread along the affinities that a run of ``method=affinity_net`` has learned.

    In float32 whatever the run's precision: affinities are taken to the power ``beta``, which
    makes rounding errors of the features as many times larger.

    Args:
        path: its checkpoint file or folder.
        classes: foreground class names of the data.
        device: where it runs.
        beta: see :func:`~wsss.pseudo.affinity_walk`.
        logt: see there.

    Raises:
        UserError: no such checkpoint, one of another method or of other classes.
    """

    def __init__(
        self,
        path: str,
        classes: Sequence[str],
        device: torch.device,
        beta: float = 8.0,
        logt: int = 6,
    ) -> None:
        try:
            self.path = find_checkpoint(path)
        except UserError as error:
            raise UserError(str(error).replace("checkpoint=", "affinity=", 1)) from error
        content = read_checkpoint(self.path)
        config = saved_config(content, self.path)
        check_classes(content, classes, str(self.path))
        method = restore_method(content, config, self.path)
        if not isinstance(method, AffinityNet):
            raise UserError(
                f"affinity='{self.path}' was trained with method={method.short_name()}: give a run "
                "of method=affinity_net."
            )
        self.network = cast(AffinityNetwork, method.network).to(device)
        self.device = device
        self.size = int(config.data.eval_size)
        self.radius = method.radius
        self.beta = beta
        self.logt = logt

    def settings(self) -> dict[str, Any]:
        """What decides its result, for the record."""
        return {
            "affinity_sha256": sha256_of(self.path),
            "affinity_beta": self.beta,
            "affinity_logt": self.logt,
        }

    @torch.no_grad()
    def spread(self, scores: Tensor, image: Tensor) -> Tensor:
        """Average class scores over the affinity's grid and spread them.

        Args:
            scores: (K, h, w), those of the background among them.
            image: (H, W, 3) uint8 RGB at its own size; it is resized to the square that the
                affinity run was validated at.

        Returns:
            (K, h', w') float32 on the affinity's grid.
        """
        pixels = torch.from_numpy(resize_image(image.cpu().numpy(), self.size, self.size))
        images = to_unit_range(pixels.permute(2, 0, 1)[None].to(self.device))
        features = self.network.affinity_features(images)
        grid = (features.shape[-2], features.shape[-1])
        averaged = F.adaptive_avg_pool2d(scores[None].float(), grid)
        return affinity_walk(averaged, features, self.radius, self.beta, self.logt)[0]
