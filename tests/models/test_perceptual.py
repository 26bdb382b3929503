"""Perceptual distances: LPIPS against the published implementation, and what is said when weights are missing."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from instaflow.errors import BundleError
from instaflow.models import perceptual
from instaflow.models.perceptual import LPIPS, Lite1, load_perceptual


def vgg(folder: Path) -> Path:
    """Random VGG-16 weights under torchvision's names."""
    torch.manual_seed(0)
    state = {f"features.{k}": v for k, v in LPIPS().features.state_dict().items()}
    save_file({**state, "classifier.0.bias": torch.zeros(3)}, folder / "vgg16.safetensors")
    return folder / "vgg16.safetensors"


HEADS = perceptual._heads_file()


def lpips_of_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The one file of the package: all of it would import torchvision, which has no build here."""
    availability = ModuleType("torchmetrics.utilities.imports")
    availability._TORCHVISION_AVAILABLE = False
    for name in ("torchmetrics", "torchmetrics.utilities"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, availability.__name__, availability)
    spec = importlib.util.spec_from_file_location("lpips", HEADS.parents[1] / "lpips.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(seed: int, count: int = 3) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_is_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchmetrics carries the authors' code; it asks torchvision for VGG-16, here of our random weights."""
    ours = load_perceptual(str(vgg(tmp_path)))
    published = lpips_of_torchmetrics(monkeypatch)
    assert isinstance(ours, LPIPS)
    monkeypatch.setattr(published, "_get_tv_model_features", lambda *_, **__: nn.Sequential(*ours.features))
    theirs = published._LPIPS(pretrained=True, net="vgg", use_dropout=True).eval()
    a, b = pictures(1), pictures(2)
    assert float(ours(a, b)) == pytest.approx(float(theirs(a, b).mean()), rel=1e-5) and float(ours(a, b)) > 0.01
    assert float(ours(a, a)) == 0


def test_a_pickle_of_weights_alone_is_read_too(tmp_path: Path) -> None:
    path = vgg(tmp_path)
    ours = load_perceptual(str(path))
    state = {f"features.{k}": v for k, v in ours.features.state_dict().items()}
    torch.save(state, tmp_path / "vgg16.pth")
    again = load_perceptual(str(tmp_path / "vgg16.pth"))
    assert torch.equal(ours(pictures(1), pictures(2)), again(pictures(1), pictures(2)))


@pytest.mark.parametrize("network", ["lite1", "lpips"])
def test_the_gradient_goes_to_the_first_alone(tmp_path: Path, network: str) -> None:
    distance = load_perceptual("" if network == "lite1" else str(vgg(tmp_path)))
    out, target = pictures(1).requires_grad_(), pictures(2).requires_grad_()
    distance.train()(out, target).backward()
    assert out.grad is not None and out.grad.abs().sum() > 0 and target.grad is None
    assert not any(p.requires_grad for p in distance.parameters())
    assert not any(m.training for m in distance.modules() if isinstance(m, nn.BatchNorm2d))


def test_an_id_that_cannot_be_had_gives_lite1_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def offline(name: str, *files: str) -> Path:
        raise BundleError(f"no model {name!r} in the local cache")

    monkeypatch.setattr("instaflow.models.perceptual.download", offline)
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_perceptual("timm/vgg16.tv_in1k"), Lite1)
    assert "timm/vgg16.tv_in1k" in caplog.text and "in place of LPIPS" in caplog.text


def test_what_is_no_vgg_is_refused(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    for name, said in (("a", "holds no VGG-16"), ("b", "cannot read"), ("c", "cannot read")):
        with pytest.raises(BundleError, match=said) as caught:
            load_perceptual(str(tmp_path / f"{name}.safetensors"))
        assert f"{name}.safetensors" in str(caught.value)
