"""MCTformer: attention of class tokens, CAM of patch tokens (CVPR 2022, its V2)."""

from __future__ import annotations

from typing import Any

from wsss.addons import Step
from wsss.data.batch import Batch
from wsss.losses import classification_loss
from wsss.methods.base import Method
from wsss.nn.mctformer import MCTformerNetwork


class MCTformer(Method):
    """Multi-class Token Transformer for Weakly Supervised Semantic Segmentation (Xu et al., 2022).

    Two classification losses of one weight: of the patch tokens, whose CAM add-ons act on, and of
    the class tokens. At inference the class tokens' attention to the patches weighs that CAM, and
    the attention of patches to each other spreads it, see
    :class:`~wsss.nn.mctformer.MCTformerNetwork`. The decoder is neither trained nor evaluated.

    Args:
        network: with class tokens.
        attention_blocks: K, last blocks whose class-to-patch attention counts.
        refine: patch affinity at inference.
        pooling: ``gap``, as published, or ``gmp`` of the patch-token CAM.
        **kwargs: of :class:`~wsss.methods.base.Method`.

    Raises:
        UserError: ``attention_blocks`` below 1.
    """

    network_class = MCTformerNetwork
    network: MCTformerNetwork
    monitor = "on/cpl/miou_ms_flip"
    evaluates_segmentation = False
    evaluates_early_cam = False

    def __init__(
        self,
        network: MCTformerNetwork,
        attention_blocks: int = 3,
        refine: bool = True,
        pooling: str = "gap",
        **kwargs: Any,
    ) -> None:
        super().__init__(network=network, pooling=pooling, **kwargs)
        network.set_attention(attention_blocks, refine)
        network.decoder.requires_grad_(False)
        network.early_classifier.requires_grad_(False)

    def step(self, batch: Batch) -> Step:
        output, token_logits = self.network.forward_with_tokens(batch.strong, decode=False)
        terms = self.classification(output, batch)
        terms["cls_token"] = classification_loss(token_logits, batch.labels)
        return Step(terms, self.views(output, batch))
