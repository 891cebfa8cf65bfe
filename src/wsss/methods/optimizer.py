"""Optimizers with the learning rates of encoder and heads."""

from __future__ import annotations

import torch

from wsss.nn import WSSSNetwork

OPTIMIZERS = ("adamw", "sgd")


def make_optimizer(
    network: WSSSNetwork,
    name: str,
    lr: float,
    head_lr_factor: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.9,
    clipped: bool = False,
) -> torch.optim.Optimizer:
    """AdamW as CoSA uses it, or SGD as SEAM and other classic methods do.

    With SGD biases take twice the learning rate and no weight decay (Caffe's custom, which these
    methods kept).

    Args:
        network: frozen parameters are left out.
        name: ``adamw`` or ``sgd``.
        lr: of the encoder.
        head_lr_factor: times ``lr`` for :meth:`WSSSNetwork.head_parameters`.
        weight_decay: of weights; with AdamW of biases too.
        betas: of AdamW.
        momentum: of SGD.
        clipped: the gradient will be clipped, which Lightning refuses in mixed precision with a
            fused optimizer.
    """
    heads = {id(p) for p in network.head_parameters()}
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    rates = ((False, lr), (True, lr * head_lr_factor))
    if name == "adamw":
        groups = [
            {"params": [p for p in trained.values() if (id(p) in heads) == head], "lr": rate}
            for head, rate in rates
        ]
        return torch.optim.AdamW(
            groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=not clipped
        )
    groups = [
        {
            "params": [
                p
                for key, p in trained.items()
                if (id(p) in heads) == head and key.endswith("bias") == bias
            ],
            "lr": rate * (2 if bias else 1),
            "weight_decay": 0.0 if bias else weight_decay,
        }
        for head, rate in rates
        for bias in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)
