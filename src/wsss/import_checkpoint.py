"""The authors' published CoSA weights in our network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from wsss.errors import UserError
from wsss.nn import WSSSNetwork

# Their key names on the left, ours on the right. The encoder is a timm ViT in both.
_COSA_RELEASE = {
    "decoder.conv6.weight": "decoder.conv1.weight",
    "decoder.conv7.weight": "decoder.conv2.weight",
    "decoder.conv8.weight": "decoder.classifier.weight",
    "classifier.weight": "classifier.weight",
    "aux_classifier.weight": "early_classifier.weight",
}
_ENCODER = "encoder."


def load_cosa_release(network: WSSSNetwork, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict with the published code's key names, strictly.

    A prefix that all keys share (``module.`` of DDP) is dropped, and so is the encoder's unused
    ImageNet classifier. The classifiers' (C, D, 1, 1) weights become (C, D).

    Args:
        network: a ViT backbone with a :class:`~wsss.nn.LargeFOV` decoder.
        state_dict: their names to tensors, of one network (online or assignment).

    Raises:
        UserError: missing, unexpected or differently shaped tensors, each named.
    """
    own = network.state_dict()
    loaded: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in state_dict.items():
        theirs = name.removeprefix("module.")
        if theirs.startswith((f"{_ENCODER}head.", f"{_ENCODER}head_dist.")):
            continue
        if theirs.startswith(_ENCODER):
            ours = f"encoder.vit.{theirs.removeprefix(_ENCODER)}"
        else:
            ours = _COSA_RELEASE.get(theirs, "")
        if ours not in own:
            unexpected.append(name)
            continue
        if theirs.endswith("classifier.weight") and tensor.dim() == 4:
            tensor = tensor.flatten(1)
        loaded[ours] = tensor
    missing = sorted(set(own) - set(loaded))
    shapes = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in loaded.items()
        if v.shape != own[k].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if names
    ]
    if problems:
        raise UserError(
            f"Not the published CoSA weights of this network ({'; '.join(problems)}). Check the "
            "backbone and the number of classes."
        )
    network.load_state_dict(loaded)
