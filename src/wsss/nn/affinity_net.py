"""AffinityNet's network: an encoder whose stages are embedded so that like cells lie together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.nn.network import WSSSNetwork
from wsss.nn.pyramid import PyramidEncoder

#: channels that stages are embedded in, the last stage last
WIDTHS = (64, 128, 256)


class AffinityHead(nn.Module):
    """Stages through a 1x1 convolution and ELU each, and a common one (AffinityNet, CVPR 2018).

    Args:
        dims: channels of the stages, three at most, the last stage last.
        widths: of their embeddings; the last ones where there are fewer stages.

    Shape: stages (B, dims[i], h, w) of one grid -> (B, sum of widths, h, w).
    """

    def __init__(self, dims: Sequence[int], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        widths = widths[-len(dims) :]
        self.stages = nn.ModuleList(
            nn.Conv2d(dim, width, 1, bias=False) for dim, width in zip(dims, widths, strict=True)
        )
        self.common = nn.Conv2d(sum(widths), sum(widths), 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for stage in self.stages:
            nn.init.kaiming_normal_(stage.weight)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.common.weight, gain=4)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        parts = [F.elu(layer(x)) for layer, x in zip(self.stages, stages, strict=True)]
        return F.elu(self.common(torch.cat(parts, 1)))


class AffinityNetwork(WSSSNetwork):
    """Encoder and affinity head; classifiers and decoder are there, but nobody trains them.

    The head reads the last three stages, of ResNet-38d conv4, conv5 and conv6; of a plain ViT the
    early and the final features. Finer stages are averaged to the final grid.

    Args:
        *args, **kwargs: of :class:`WSSSNetwork`.

    Raises:
        UserError: a neck, which the head would pass by.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.neck is not None:
            raise UserError(
                "neck: method=affinity_net reads the encoder's own features. Leave the neck out."
            )
        dims: Sequence[int] = (self.encoder.early_dim, self.encoder.dim)
        if isinstance(self.encoder, PyramidEncoder):
            dims = self.encoder.stage_dims[-len(WIDTHS) :]
        self.affinity_head = AffinityHead(dims)

    def affinity_features(self, images: Tensor) -> Tensor:
        """What :func:`~wsss.pseudo.affinity_walk` compares cells by.

        Args:
            images: (B, 3, H, W) RGB in [0, 1].

        Returns:
            (B, D, h, w) on the encoder's final grid; D is 448 with three stages.
        """
        if not isinstance(self.encoder, PyramidEncoder):
            final, early = self.encoder(images)
            return self.affinity_head((early, final))
        count = len(self.encoder.stage_dims)
        wanted = range(max(0, count - len(WIDTHS)), count)
        stages = self.encoder.chosen_stages(images, wanted)
        return self.affinity_head([self.encoder.on_final_grid(stages[i], i) for i in wanted])

    def head_parameters(self) -> list[nn.Parameter]:
        return [*super().head_parameters(), *self.affinity_head.parameters()]
