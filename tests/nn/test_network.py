"""Network: grids, output contract, weights of other makers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from wsss.errors import UserError
from wsss.import_checkpoint import load_cosa_release
from wsss.nn import LargeFOV, NeckOutput, UncertaintyNeck, WSSSNetwork

TINY = {"depth": 3, "embed_dim": 24, "num_heads": 2}


def make(**kwargs: object) -> WSSSNetwork:
    torch.manual_seed(0)
    return WSSSNetwork("vit_tiny_patch16_224", 5, **(TINY | kwargs)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (48, 100), (16, 16)])
def test_any_grid(size: tuple[int, int]) -> None:
    out = make()(torch.rand(2, 3, *size))
    h, w = -(-size[0] // 16), -(-size[1] // 16)
    assert out.class_logits.shape == out.early_class_logits.shape == (2, 5)
    assert out.cam.shape == out.early_cam.shape == (2, 5, h, w)
    assert out.seg_logits is not None
    assert out.seg_logits.shape == (2, 6, h, w)
    assert out.features.shape == (2, 24, h, w)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
        "eva02_tiny_patch14_224",
    ],
)
def test_other_vits(name: str) -> None:
    network = WSSSNetwork(
        name, 3, early_block=-1, depth=2, img_size=56, **{"embed_dim": 48, "num_heads": 2}
    ).eval()
    patch = network.patch_size[0]
    out = network(torch.rand(1, 3, 60, 90))
    assert out.cam.shape == (1, 3, -(-60 // patch), -(-90 // patch))


def test_grid_covers_the_image_and_nothing_else() -> None:
    """A ramp that the patches average is a ramp over the whole grid, at any size of image."""
    encoder = make().encoder
    vit = encoder.vit
    torch.nn.init.zeros_(vit.pos_embed)
    torch.nn.init.zeros_(vit.patch_embed.proj.bias)
    torch.nn.init.constant_(vit.patch_embed.proj.weight, 1 / (3 * 16 * 16))
    seen: list[torch.Tensor] = []
    vit.patch_embed.register_forward_hook(lambda module, args, out: seen.append(out))
    for width in (48, 56, 33):
        ramp = (torch.arange(width) + 0.5) / width
        images = ramp.expand(1, 3, 32, width) * encoder.std + encoder.mean
        encoder(images)
        columns = seen.pop().flatten(0, -2)[:, 0].reshape(2, -1)
        count = -(-width // 16)
        expected = (torch.arange(count) + 0.5) / count
        torch.testing.assert_close(columns, expected.expand(2, -1), atol=2e-3, rtol=0)


def test_cam_and_class_logits_are_one_classifier() -> None:
    """M = W F and Z = W maxpool(F)."""
    network = make()
    out = network(torch.rand(2, 3, 48, 64))
    weight = network.classifier.weight
    expected = torch.einsum("cd,bdhw->bchw", weight, out.features)
    torch.testing.assert_close(out.cam, expected)
    torch.testing.assert_close(out.class_logits, out.features.amax((2, 3)) @ weight.T)


def test_features_are_timms_own() -> None:
    """Final: patch tokens after the norm. Early: an earlier block's, without it."""
    network = make(early_block=-2)
    vit = network.encoder.vit
    x = torch.rand(1, 3, 32, 48)
    tokens = {}
    vit.blocks[1].register_forward_hook(lambda m, i, o: tokens.__setitem__("early", o))
    final, early = network.encoder(x)
    whole = vit.forward_features((x - 0.5) / 0.5)  # this model's own mean and std
    torch.testing.assert_close(final, whole[:, 1:].transpose(1, 2).reshape(1, 24, 2, 3))
    torch.testing.assert_close(early, tokens["early"][:, 1:].transpose(1, 2).reshape(1, 24, 2, 3))
    normed = make(early_block=-2, early_norm=True).encoder(x)[1]
    assert not torch.allclose(normed, early)


def test_normalisation_is_the_backbones() -> None:
    assert make().encoder.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    clip = WSSSNetwork("vit_base_patch16_clip_224", 2, early_block=-1, depth=1)
    expected = timm.get_pretrained_cfg("vit_base_patch16_clip_224").mean
    assert clip.encoder.mean.flatten().tolist() == pytest.approx(expected)


def test_decode_can_be_left_out() -> None:
    assert make()(torch.rand(1, 3, 32, 32), decode=False).seg_logits is None


def test_decoder_says_nothing_at_the_start() -> None:
    out = make()(torch.rand(1, 3, 32, 32))
    assert out.seg_logits is not None
    assert not out.seg_logits.any()


def test_own_decoder_is_taken() -> None:
    decoder = nn.Conv2d(24, 6, 1)
    assert make(decoder=decoder).decoder is decoder


@pytest.mark.parametrize(
    ("detach", "features", "weight"),
    [
        ("none", True, True),
        ("feature", False, True),
        ("classifier", True, False),
        ("both", False, False),
    ],
)
def test_detach(detach: str, features: bool, weight: bool) -> None:
    classifier = make().classifier
    x = torch.rand(1, 24, 3, 3, requires_grad=True)
    cam = classifier.cam(x, detach)
    if cam.requires_grad:
        cam.sum().backward()
    assert (x.grad is not None) == features
    assert (classifier.weight.grad is not None) == weight


def test_bf16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = make()(torch.rand(1, 3, 32, 32))
    assert out.cam.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_tiny_patch16_24", 5), "Nearest: vit_tiny_patch16_224"),
    ],
)
def test_unfit_backbones(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WSSSNetwork(*arguments)


def test_early_block_out_of_range() -> None:
    with pytest.raises(UserError, match=r"early_block=-4 is outside the 3 blocks"):
        make(early_block=-4)


class TestBackboneWeights:
    """A local file of the same model, strictly."""

    def test_loads_and_drops_the_head(self, tmp_path: Path) -> None:
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)
        path = tmp_path / "vit.pth"
        torch.save(vit.state_dict(), path)
        network = make(weights=path)
        torch.testing.assert_close(network.encoder.vit.norm.weight, vit.norm.weight)
        torch.testing.assert_close(network.encoder.vit.pos_embed, vit.pos_embed)

    def test_position_embeddings_of_another_grid_are_resampled(self, tmp_path: Path) -> None:
        path = tmp_path / "vit.pth"
        torch.save(timm.create_model("vit_tiny_patch16_224", **TINY).state_dict(), path)
        assert make(weights=path, img_size=96).encoder.vit.pos_embed.shape[1] == 37

    def test_another_depth(self, tmp_path: Path) -> None:
        path = tmp_path / "vit.pth"
        deep = timm.create_model("vit_tiny_patch16_224", **(TINY | {"depth": 4}))
        torch.save(deep.state_dict(), path)
        with pytest.raises(UserError, match=r"not expected: blocks\.3\.attn.* and \d+ more"):
            make(weights=path)

    def test_pickled_code_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pth"
        torch.save(make(), path)  # a whole module, not a state dict
        with pytest.raises(UserError, match="pickled code are refused"):
            make(weights=path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="No weights file"):
            make(weights=tmp_path / "none.safetensors")

    def test_real_vit_tiny(self, shared_dir: Path) -> None:
        path = shared_dir / "data/weights/vit_tiny_patch16_224.safetensors"
        network = WSSSNetwork("vit_tiny_patch16_224", 20, weights=path)
        assert sum(p.numel() for p in network.encoder.parameters()) > 5e6


def release_state(network: WSSSNetwork) -> dict[str, torch.Tensor]:
    """A state dict with the key names of the published code."""
    names = {
        "decoder.conv1.weight": "decoder.conv6.weight",
        "decoder.conv2.weight": "decoder.conv7.weight",
        "decoder.classifier.weight": "decoder.conv8.weight",
        "classifier.weight": "classifier.weight",
        "early_classifier.weight": "aux_classifier.weight",
    }
    state = {}
    for i, (name, tensor) in enumerate(network.state_dict().items()):
        theirs = names.get(name, name.replace("encoder.vit.", "encoder."))
        value = torch.full_like(tensor, i + 1)
        state[theirs] = value[:, :, None, None] if theirs.endswith("classifier.weight") else value
    state["encoder.head.weight"] = torch.zeros(1000, 24)
    return state


class TestCosaRelease:
    """The authors' key names, strictly."""

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_every_tensor_arrives(self, prefix: str) -> None:
        network = make()
        load_cosa_release(network, {prefix + k: v for k, v in release_state(network).items()})
        for i, tensor in enumerate(network.state_dict().values()):
            assert (tensor == i + 1).all()

    def test_missing_and_unexpected_are_named(self) -> None:
        network = make()
        state = release_state(network)
        state["decoder.conv9.weight"] = state.pop("decoder.conv8.weight")
        with pytest.raises(UserError, match=r"missing: decoder\.classifier.*decoder\.conv9"):
            load_cosa_release(network, state)

    def test_other_class_count(self) -> None:
        state = release_state(WSSSNetwork("vit_tiny_patch16_224", 7, **TINY))
        with pytest.raises(UserError, match=r"\(8, 512, 1, 1\) instead of \(6, 512, 1, 1\)"):
            load_cosa_release(make(), state)


def test_size_of_the_papers_network() -> None:
    """92 M parameters for ViT-B with 20 classes."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        decoder = LargeFOV(768, 21)
    total = sum(p.numel() for m in (vit, decoder) for p in m.parameters()) + 2 * 20 * 768
    assert round(total / 1e6) == 92


class Double(nn.Module):
    """A neck that gives a tensor, and notes what it is given."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((dim, 1, 1), 2.0))
        self.given: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        self.given.append(features)
        return features * self.factor


class TestNeck:
    def test_heads_see_what_it_gives(self) -> None:
        network, plain = make(neck=Double()), make()
        plain.load_state_dict(network.state_dict(), strict=False)
        for net in (network, plain):
            nn.init.ones_(net.decoder.classifier.weight)  # type: ignore[union-attr,arg-type]
        images = torch.rand(2, 3, 32, 48)
        out, without = network(images), plain(images)
        assert out.neck is not None
        assert out.tokens is not None
        assert torch.equal(out.tokens, network.encoder(images)[0])
        assert torch.equal(out.tokens, without.features)
        torch.testing.assert_close(out.features, 2 * without.features)
        torch.testing.assert_close(out.cam, 2 * without.cam)
        torch.testing.assert_close(out.class_logits, 2 * without.class_logits)
        torch.testing.assert_close(out.seg_logits, network.decoder(out.features))
        assert not torch.allclose(out.seg_logits, without.seg_logits)
        assert out.neck.features is out.features
        assert out.neck[1:] == (None, None, None)

    def test_early_features_do_not_pass_it(self) -> None:
        network = make(neck=Double())
        images = torch.rand(2, 3, 32, 48)
        out = network(images)
        early = network.encoder(images)[1]
        assert torch.equal(out.early_cam, network.early_classifier(early)[1])
        assert torch.equal(out.early_class_logits, network.early_classifier(early)[0])
        (given,) = network.neck.given  # type: ignore[union-attr,misc]
        assert torch.equal(given, network.encoder(images)[0])

    def test_without_one(self) -> None:
        out = make()(torch.rand(1, 3, 32, 32))
        assert make().neck is None
        assert out.tokens is out.features
        assert out.neck == NeckOutput(out.features)

    def test_a_module_as_it_is_and_a_function_of_the_channels(self) -> None:
        given = Double()
        assert make(neck=given).neck is given
        dims = []

        def build(dim: int) -> nn.Module:
            dims.append(dim)
            return UncertaintyNeck(dim, window=2)

        network = make(neck=build)
        assert dims == [24]
        assert isinstance(network.neck, UncertaintyNeck)
        assert network.neck.window == 2
        cnn = WSSSNetwork("resnet10t", 2, early_block=-2, channels=[8, 8, 16, 40], neck=build)
        assert dims == [24, 40]
        out = cnn(torch.rand(1, 3, 64, 64))
        assert out.features.shape == out.tokens.shape  # type: ignore[union-attr]

    def test_all_that_it_infers_is_in_the_output(self) -> None:
        network = make(neck=UncertaintyNeck)
        images = torch.rand(2, 3, 32, 48)
        out = network(images)
        assert out.tokens is not None
        expected = network.neck(out.tokens)  # type: ignore[misc]
        assert out.neck is not None
        for found, wanted in zip(out.neck, expected, strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(out.features, expected.features)
        assert not torch.allclose(out.features, out.tokens)

    def test_it_learns_at_the_rate_of_heads(self) -> None:
        network = make(neck=UncertaintyNeck)
        heads = [id(p) for p in network.head_parameters()]
        assert len(heads) == len(set(heads))
        assert {id(p) for p in network.neck.parameters()} < set(heads)  # type: ignore[union-attr]
        rest = {id(p) for p in network.parameters()} - set(heads)
        assert rest == {id(p) for p in network.encoder.parameters()}

    def test_reset(self) -> None:
        network = make(neck=UncertaintyNeck)
        encoder = copy.deepcopy(network.encoder.state_dict())
        for parameter in network.parameters():
            nn.init.constant_(parameter, 7.0)
        network.encoder.load_state_dict(encoder)
        network.reset_heads()
        for name, parameter in network.named_parameters():
            assert not parameter.eq(7.0).any(), name
        make(neck=Double()).reset_heads()  # one that cannot stays
        kept = make(neck=Double())
        kept.reset_heads()
        assert kept.neck.factor.eq(2).all()  # type: ignore[union-attr,operator]

    def test_a_copy_is_another(self) -> None:
        network = make(neck=UncertaintyNeck)
        other = copy.deepcopy(network)
        images = torch.rand(1, 3, 32, 32)
        before = network(images).cam
        assert torch.equal(other(images).cam, before)
        for parameter in other.neck.parameters():  # type: ignore[union-attr]
            nn.init.constant_(parameter, 0.5)
        assert torch.equal(network(images).cam, before)
        assert not torch.allclose(other(images).cam, before)

    def test_its_weights_are_saved(self) -> None:
        network = make(neck=UncertaintyNeck)
        assert any(name.startswith("neck.") for name in network.state_dict())
