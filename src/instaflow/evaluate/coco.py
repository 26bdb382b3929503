"""`coco2017-5k` and `coco2014-30k`: FID and CLIP score on MS COCO's validation pictures, as downloaded from its site.

FID on the TensorFlow Inception network of the metric's authors (Heusel et al. 2017), as torch-fidelity carries it;
KID, precision and recall on the same features; CLIP score with ViT-g/14 of LAION. A number at 5,000 pictures and
one at 30,000 are two metrics and have two names.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.progress import track

from instaflow.errors import DataError
from instaflow.evaluate.clip import ClipScore
from instaflow.evaluate.distances import bootstrap, frechet, kid_interval, precision_recall, replicates
from instaflow.evaluate.drawing import Task
from instaflow.evaluate.features import Inception
from instaflow.evaluate.field import Field, Point, Protocol

CLIP = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
REAL = "centre-cropped to a square, resized by Lanczos to {side} px, RGB, 8 bits, kept without loss"
SHARED = {
    "features": "Inception-v3 of the TensorFlow graph 2015-12-05, pool_3, 2,048-d, by torch-fidelity",
    "distance": "FID, KID (cubic kernel, all pictures), precision and recall (k = 3, 10,000 pictures at most), "
    f"CLIP score: mean cosine of {CLIP}, between −1 and 1",
}
COCO_2017 = Protocol(
    name="coco2017-5k",
    version=1,
    metric="fid_5k",
    label="FID-5k",
    prompts="of each of the 5,000 pictures of val2017 the caption with the lowest id, in the order of picture ids",
    drawn="512 px; picture i from seed + i",
    real=REAL.format(side=512),
    **SHARED,
)
COCO_2014 = Protocol(
    name="coco2014-30k",
    version=1,
    metric="fid_30k",
    label="FID-30k",
    prompts="30,000 of the 40,504 pictures of val2014, those whose ids have the lowest CRC-32, in that order; "
    "of each the caption with the lowest id",
    drawn="512 px, resized by Lanczos to 256 px; picture i from seed + i",
    real=REAL.format(side=256),
    **SHARED,
)
SIZES = {COCO_2017.name: (5_000, 5_000, 512), COCO_2014.name: (40_504, 30_000, 256)}  # pictures, drawn, side
PROTOCOLS = {p.name: p for p in (COCO_2017, COCO_2014)}
RESAMPLES = 20  # of a 2,048-dimensional distance, each some seconds
NEIGHBOURS = 10_000  # pictures in precision and recall, whose distances are a table of them


def read_captions(protocol: str, images: Path, annotations: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of a protocol, in its order; everything is looked at before anything is drawn.

    Raises:
        DataError: no such files, an annotation file that is not the protocol's, or pictures missing.
    """
    wanted, count, _ = SIZES[protocol]
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        files = {int(i["id"]): str(i["file_name"]) for i in content["images"]}
        captions: dict[int, tuple[int, str]] = {}
        for a in content["annotations"]:
            own = (int(a["id"]), " ".join(str(a["caption"]).split()))
            captions[int(a["image_id"])] = min(own, captions.get(int(a["image_id"]), own))
    except OSError as error:
        raise DataError(f"cannot read the annotations {annotations}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{annotations} is no file of COCO captions: {type(error).__name__} {error}") from error
    if len(files) != wanted:
        raise DataError(
            f"{annotations} names {len(files):,} pictures; {protocol} has {wanted:,}: is it another year's?"
        )
    if without := [files[i] for i in files if not captions.get(i, (0, ""))[1]]:
        raise DataError(f"{annotations} has no caption for {len(without)} pictures, the first {without[0]}")
    if not images.is_dir():
        raise DataError(f"no folder of pictures {images}")
    there = {p.name for p in images.iterdir()}
    if missing := [name for name in files.values() if name not in there]:
        raise DataError(f"{images} lacks {len(missing):,} of the {wanted:,} pictures, the first {missing[0]}")
    order = sorted(files) if count == wanted else sorted(files, key=lambda i: (zlib.crc32(str(i).encode()), i))
    return [(images / files[i], captions[i][1]) for i in order[:count]]


def square(path: Path, side: int) -> np.ndarray:
    """uint8 (side, side, 3): the middle of a picture, resized by Lanczos.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"cannot read the picture {path}: {error}") from error
    width, height = picture.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    middle = picture.crop((left, top, left + edge, top + edge))
    return np.asarray(middle.resize((side, side), Image.Resampling.LANCZOS))


@dataclass(frozen=True, kw_only=True)
class CocoRuler:
    """Real features, and the captions that pictures should show."""

    metric: str
    prompts: Sequence[str]
    features: Callable[[np.ndarray], np.ndarray]
    clip: Callable[[np.ndarray, Sequence[str]], np.ndarray]
    real: np.ndarray
    """(N, 2048)"""

    def extract(self, pictures: np.ndarray) -> np.ndarray:
        """Inception features (N, 2048)."""
        return self.features(pictures)

    def measure(self, pictures: np.ndarray, features: np.ndarray) -> dict[str, Any]:
        """FID, KID, precision, recall and CLIP score."""
        fid = bootstrap(frechet, features, self.real, n=RESAMPLES)
        kernel = kid_interval(features, self.real, n=RESAMPLES)
        near = precision_recall(self.real[:NEIGHBOURS], features[:NEIGHBOURS])
        scores = self.clip(pictures, self.prompts)
        error = 1.96 * scores.std(ddof=1) / len(scores) ** 0.5
        return {
            "pictures": len(features),
            "real_pictures": len(self.real),
            self.metric: round(fid.value, 3),
            f"{self.metric}_95": [round(fid.low, 3), round(fid.high, 3)],
            "kid": round(kernel.value, 6),
            "kid_95": [round(kernel.low, 6), round(kernel.high, 6)],
            "precision": round(near.precision, 4),
            "recall": round(near.recall, 4),
            "clip_score": round(float(scores.mean()), 4),
            "clip_score_95": [round(float(scores.mean() + s * error), 4) for s in (-1, 1)],
        }

    def distance(self, pictures: np.ndarray) -> Point:
        """FID with its interval."""
        found = bootstrap(frechet, self.features(pictures), self.real, n=RESAMPLES)
        return round(found.value, 3), round(found.low, 3), round(found.high, 3)

    def replicates(self, features: np.ndarray) -> np.ndarray:
        """FID of features, and its bootstrap replicates, paired with another model's."""
        return replicates(frechet, features, self.real, n=RESAMPLES)

    def floor(self) -> float:
        """FID of one half of the real pictures to the other; at half the count, so higher than a perfect model's."""
        return round(frechet(self.real[::2], self.real[1::2]), 3)


def coco_field(
    protocol: str,
    images: Path,
    annotations: Path,
    *,
    seed: int,
    device: str,
    inception: Path | None = None,
    clip: str = CLIP,
) -> Field:
    """A COCO protocol.

    Args:
        protocol: coco2017-5k or coco2014-30k.
        images: val2017/ or val2014/ as unpacked.
        annotations: captions_val2017.json or captions_val2014.json.
        seed: first seed of the noises.
        device: where features are computed.
        inception: Inception's weights; None lets torch-fidelity find them in its cache or download them.
        clip: a folder or hub id instead of the pinned CLIP; the report names it.

    Raises:
        DataError: what `read_captions` finds, or networks that cannot be had.
    """
    pinned, (_, _, side) = PROTOCOLS[protocol], SIZES[protocol]
    pairs = read_captions(protocol, images, annotations)
    network, score = Inception(inception, device), ClipScore(clip, device)
    prompts = [caption for _, caption in pairs]
    task = Task(name="validation", prompts=prompts, seeds=range(seed, seed + len(pairs)), size=512, side=side)

    def rulers() -> list[CocoRuler]:
        starts = track(range(0, len(pairs), 64), "real pictures")
        parts = [network(np.stack([square(p, side) for p, _ in pairs[i : i + 64]])) for i in starts]
        return [
            CocoRuler(metric=pinned.metric, prompts=prompts, features=network, clip=score, real=np.concatenate(parts))
        ]

    return Field(
        protocol=pinned,
        splits=[task],
        rulers=rulers,
        reference=lambda _: {},
        said={"inception_weights": network.hash, "clip": clip},
    )
