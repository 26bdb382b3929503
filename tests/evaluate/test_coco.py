"""The COCO protocols: FID as torch-fidelity's, CLIP score by hand, and every mistake found before anything is drawn.

`python test_coco.py` writes what torch-fidelity itself says of the pictures below into `fid.json`. It needs
torch-fidelity as installed with torchvision, which the tests do not; it was run with stand-ins for the two functions
of torchvision that torch-fidelity calls on pictures in a folder (`pil_to_tensor` and `Compose`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from instaflow.errors import DataError
from instaflow.evaluate import coco
from instaflow.evaluate.clip import ClipScore
from instaflow.evaluate.coco import coco_field, read_captions, square
from instaflow.evaluate.distances import frechet
from instaflow.evaluate.features import Inception, _inside
from instaflow.models.ldm import clip_tokenizer

RECORD = Path(__file__).with_name("fid.json")


def inception_weights(folder: Path) -> Path:
    """A file as torch-fidelity's, of random weights."""
    code = _inside("torch_fidelity", "feature_extractor_inceptionv3")

    class Unloaded(code.FeatureExtractorInceptionV3):
        def load_state_dict(self, state: dict) -> None:
            """Keep what was drawn."""

    torch.save({}, folder / "nothing.pth")
    torch.manual_seed(0)
    network = Unloaded("fid", ["2048"], feature_extractor_weights_path=str(folder / "nothing.pth"))
    for layer in network.modules():  # torch's own initialisation would fade to nothing over so many layers
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def two_sets(count: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Coloured noise, coarse and fine, so that the sets differ."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    return coarse, rng.integers(0, 200, (count, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inception_weights(tmp_path_factory.mktemp("inception"))


def test_fid_is_torch_fidelitys(weights: Path) -> None:
    network = Inception(weights)
    a, b = (network(pictures) for pictures in two_sets())
    assert a.shape == (24, 2048)
    assert frechet(a, b) == pytest.approx(json.loads(RECORD.read_text())["fid"], rel=1e-3)


def test_inceptions_weights_are_refused_with_a_reason(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(Path("a pickle"), tmp_path / "pickle.pth")
    for name in ("other.pth", "pickle.pth", "nowhere.pth"):
        with pytest.raises(DataError, match=r"cannot load Inception's weights from .*--inception") as caught:
            Inception(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


# -- CLIP score --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights and the real tokenizer."""
    out = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=tiny, vision_config={**tiny, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(out)
    clip_tokenizer().save_pretrained(out)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(out)
    return out


def test_clip_score_is_the_cosine_of_the_embeddings(clip: Path) -> None:
    pictures, prompts = two_sets(5)[0], ["a red apple", "a cat", "", "two dogs on a lawn", "snow"]
    scores = ClipScore(str(clip))(pictures, prompts, batch_size=2)
    model = CLIPModel.from_pretrained(clip)
    tokenizer, processor = clip_tokenizer(), CLIPImageProcessor.from_pretrained(clip)
    for picture, prompt, score in zip(pictures, prompts, scores, strict=True):
        with torch.no_grad():
            pixels = processor(images=Image.fromarray(picture), return_tensors="pt").pixel_values
            seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
            read = model.text_projection(model.text_model(**tokenizer([prompt], return_tensors="pt")).pooler_output)[0]
        assert score == pytest.approx(float(torch.nn.functional.cosine_similarity(seen, read, dim=0)), abs=1e-5)
    assert len({round(float(s), 4) for s in scores}) == 5


def test_a_clip_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load CLIP") as caught:
        ClipScore(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


# -- pictures and captions ---------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "SIZES", {"coco2017-5k": (6, 6, 512), "coco2014-30k": (6, 4, 256)})


def write_coco(folder: Path, change: Callable[[dict], None] = lambda content: None) -> tuple[Path, Path]:
    images = folder / "val"
    images.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    files = [{"id": 900 - 7 * i, "file_name": f"{i:012d}.jpg"} for i in range(6)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(images / file["file_name"])
    captions = [
        {"id": 50 - 2 * i + j, "image_id": files[i]["id"], "caption": f" caption {j}\n of {i} "}
        for i in range(6)
        for j in range(2)
    ]
    content = {"images": files, "annotations": captions}
    change(content)
    (folder / "captions.json").write_text(json.dumps(content))
    return images, folder / "captions.json"


def test_captions_are_those_that_the_protocol_says(tmp_path: Path, small: None) -> None:
    images, annotations = write_coco(tmp_path)
    found = read_captions("coco2017-5k", images, annotations)
    assert [c for _, c in found] == [f"caption 0 of {i}" for i in range(5, -1, -1)]  # lowest caption id; by picture id
    assert [p.name for p, _ in found] == [f"{i:012d}.jpg" for i in range(5, -1, -1)]
    fewer = read_captions("coco2014-30k", images, annotations)
    assert len(fewer) == 4 and set(fewer) < set(found) and fewer == read_captions("coco2014-30k", images, annotations)


def drop_an_image(content: dict) -> None:
    del content["images"][0]


def drop_captions(content: dict) -> None:
    del content["annotations"][:2]


def rename(content: dict) -> None:
    content["images"][1]["file_name"] = "elsewhere.jpg"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_an_image, "names 5 pictures; coco2017-5k has 6: is it another year's?"),
        (drop_captions, "has no caption for 1 pictures, the first 000000000000.jpg"),
        (rename, "lacks 1 of the 6 pictures, the first elsewhere.jpg"),
        (dict.clear, "is no file of COCO captions"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(
    tmp_path: Path, small: None, change: Callable[[dict], None], said: str
) -> None:
    images, annotations = write_coco(tmp_path, change)
    with pytest.raises(DataError) as caught:
        coco_field("coco2017-5k", images, annotations, seed=0, device="cpu", clip="never loaded")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no folder of pictures"):
        read_captions("coco2017-5k", tmp_path / "no", write_coco(tmp_path)[1])
    with pytest.raises(DataError, match="cannot read the annotations"):
        read_captions("coco2017-5k", images, tmp_path / "no.json")


def test_a_picture_is_cut_to_its_middle_and_resized(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (10, 200, 90)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (square(tmp_path / "a.png", 16) == (10, 200, 90)).all()
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot read the picture .*b\.png"):
        square(tmp_path / "b.png", 16)


def test_a_ruler_measures_what_it_says(
    tmp_path: Path, small: None, weights: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco, "RESAMPLES", 2)  # each takes seconds in 2,048 dimensions
    images, annotations = write_coco(tmp_path)
    field = coco_field("coco2014-30k", images, annotations, seed=7, device="cpu", inception=weights, clip=str(clip))
    [task], [ruler] = field.splits, field.rulers()
    assert (task.size, task.side, list(task.seeds)) == (512, 256, [7, 8, 9, 10])
    assert (
        field.protocol.metric == "fid_30k"
        and field.said["clip"] == str(clip)
        and len(field.said["inception_weights"]) == 64
    )
    drawn = two_sets(4)[0]
    features = ruler.extract(drawn)
    found = ruler.measure(drawn, features)
    real = Inception(weights)(np.stack([square(p, 256) for p, _ in read_captions("coco2014-30k", images, annotations)]))
    assert found["fid_30k"] == pytest.approx(frechet(features, real), abs=1e-3)
    assert found["clip_score"] == pytest.approx(ClipScore(str(clip))(drawn, task.prompts).mean(), abs=1e-4)
    assert ruler.distance(drawn)[0] == found["fid_30k"] and ruler.replicates(features)[0] == pytest.approx(
        found["fid_30k"], abs=1e-3
    )
    assert ruler.floor() > 0


if __name__ == "__main__":
    import torch_fidelity

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, pictures in enumerate(two_sets()):
            (folder / str(i)).mkdir()
            for j, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / str(i) / f"{j:03d}.png")
        found = torch_fidelity.calculate_metrics(
            input1=str(folder / "0"),
            input2=str(folder / "1"),
            fid=True,
            cuda=False,
            cache=False,
            feature_extractor_weights_path=str(inception_weights(folder)),
        )
    fid = {"fid": found["frechet_inception_distance"], "torch_fidelity": torch_fidelity.__version__}
    RECORD.write_text(json.dumps(fid) + "\n")
    print(RECORD.read_text(), sys.version)
