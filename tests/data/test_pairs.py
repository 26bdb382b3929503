"""Pairs on disk and the job that draws them: damage is found, a killed job goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from upath import UPath

from instaflow.data.pairs import (
    MANIFEST,
    Manifest,
    PairReader,
    PairSet,
    open_manifest,
    open_pairs,
    prompt_hash,
    read_manifest,
    read_shard,
    shard_path,
    write_shard,
)
from instaflow.errors import DataError
from instaflow.models.bundle import Bundle
from instaflow.models.sampling import noise, sample
from instaflow.noise import NOISE
from instaflow.recipe import Pairs
from instaflow.training import pairs as drawing
from instaflow.training.batches import TextCache, pair_batch
from instaflow.training.pairs import draw_pairs
from instaflow.training.trainer import Draw

PROMPTS = ["a red apple", "", "größer, “quoted”\nand two lines", "🍅"]
MINE = Manifest(
    teacher="t", sampler="euler", steps=4, guidance=2.5, noise=NOISE, prompts=prompt_hash(PROMPTS), seed=7, count=4,
    shard_size=3, shape=(1, 4, 4),
)  # fmt: skip


def latents(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def shard(path: Path, count: int = 4) -> Path:
    write_shard(path, prompts=PROMPTS[:count], seeds=[7, 8, 2**63 - 1, 0][:count], x1=latents(count))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_shard(path)
    text = str(error.value)
    assert str(path) in text and "\n" not in text
    return text


# -- shards ------------------------------------------------------------------------------------


def everything(folder: Path) -> PairSet:
    """All pairs of a folder, in the order they were drawn."""
    shards = [read_shard(shard_path(folder, i)) for i in range(read_manifest(folder).shards)]
    return PairSet(
        prompts=[p for s in shards for p in s.prompts],
        seeds=[n for s in shards for n in s.seeds],
        x1=torch.cat([s.x1 for s in shards]),
    )


def in_memory(pairs: PairSet) -> PairReader:
    return PairReader([len(pairs)], lambda shard: pairs)


def test_a_shard_gives_back_what_was_written(tmp_path: Path) -> None:
    back = read_shard(shard(tmp_path / "00000.safetensors"))
    assert back.prompts == PROMPTS and back.seeds == [7, 8, 2**63 - 1, 0] and len(back) == 4
    assert back.x1.dtype == torch.float16 and torch.equal(back.x1, latents().half())
    assert [p.name for p in tmp_path.iterdir()] == ["00000.safetensors"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = shard(tmp_path / "00000.safetensors")
    whole = path.read_bytes()
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << i % 8
        path.write_bytes(damaged)
        refusal(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = shard(tmp_path / "00000.safetensors")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)


def test_pairs_are_read_from_an_object_store_as_from_a_folder(tmp_path: Path) -> None:
    open_manifest(tmp_path, MINE)
    write_shard(shard_path(tmp_path, 0), prompts=PROMPTS[:3], seeds=[7, 8, 9], x1=latents(3))
    write_shard(shard_path(tmp_path, 1), prompts=PROMPTS[3:], seeds=[10], x1=latents(1))
    store = UPath("memory://bucket/pairs")
    for file in tmp_path.iterdir():
        (store / file.name).write_bytes(file.read_bytes())
    here, there = open_pairs(tmp_path).batch(0, 0, 6), open_pairs(store).batch(0, 0, 6)
    assert here.prompts == there.prompts and here.seeds == there.seeds and torch.equal(here.x1, there.x1)
    content = bytearray((store / "00001.safetensors").read_bytes())
    content[-1] ^= 1
    (store / "00001.safetensors").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"damaged shard memory://bucket/pairs/00001.safetensors: its checksum"):
        open_pairs(store).batch(0, 0, 6)
    (store / "00001.safetensors").unlink()
    with pytest.raises(DataError, match="lacks 1 of its 2 shards, the first 00001"):
        open_pairs(store)


def test_memory_stays_bounded_over_a_hundred_thousand_pairs(tmp_path: Path) -> None:
    """128 MB of shards, read in training's order in a process of its own: what it holds stays flat."""
    count = 100_352
    open_manifest(tmp_path, msgspec.structs.replace(MINE, count=count, shard_size=1024, shape=(4, 16, 16)))
    x1 = torch.zeros(1024, 4, 16, 16)
    for i in range(count // 1024):
        seeds = list(range(1024 * i, 1024 * i + 1024))
        write_shard(shard_path(tmp_path, i), prompts=[f"prompt {s}" for s in seeds], seeds=seeds, x1=x1)
    program = (
        "import sys, psutil; from pathlib import Path; from instaflow.data.pairs import open_pairs\n"
        "pairs, size, seen = open_pairs(Path(sys.argv[1])), [], 0\n"
        "for step in range(len(pairs) // 512):\n"
        "    seen += sum(pairs.batch(0, step, 512).seeds)\n"
        "    size.append(psutil.Process().memory_info().rss)\n"
        "quarter = len(size) // 4\n"
        "print(seen, max(size[quarter:2 * quarter]), max(size[3 * quarter:]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    seen, early, late = map(int, out.stdout.split())
    assert seen == count * (count - 1) // 2  # every pair once
    assert late - early < 20e6 < count * 4 * 16 * 16 * 2 / 8


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    refusal(tmp_path / "00000.safetensors")


# -- manifests ---------------------------------------------------------------------------------


def test_a_manifest_is_written_once_and_then_agreed_with(tmp_path: Path) -> None:
    open_manifest(tmp_path / "pairs", MINE)
    open_manifest(tmp_path / "pairs", MINE)
    assert read_manifest(tmp_path / "pairs") == MINE
    assert [p.name for p in (tmp_path / "pairs").iterdir()] == [MANIFEST]


@pytest.mark.parametrize("field", MINE.__struct_fields__)
def test_pairs_drawn_differently_are_refused_by_the_field(tmp_path: Path, field: str) -> None:
    open_manifest(tmp_path, MINE)
    value = getattr(MINE, field)
    other = (4, 4, 4) if field == "shape" else value + "x" if isinstance(value, str) else value + 1
    with pytest.raises(DataError) as error:
        open_manifest(tmp_path, msgspec.structs.replace(MINE, **{field: other}))
    assert f"{field}={value!r}" in str(error.value) and repr(other) in str(error.value)
    assert "\n" not in str(error.value)
    assert read_manifest(tmp_path) == MINE


def test_a_folder_without_pairs_and_a_damaged_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pairs were drawn there"):
        everything(tmp_path)
    (tmp_path / MANIFEST).write_text('{"teacher": "t"')
    with pytest.raises(DataError, match="damaged"):
        everything(tmp_path)


@pytest.mark.parametrize(("count", "size", "sizes"), [(4, 3, [3, 1]), (4, 4, [4]), (4, 9, [4]), (6, 2, [2, 2, 2])])
def test_shards_cover_every_pair_once(count: int, size: int, sizes: list[int]) -> None:
    manifest = msgspec.structs.replace(MINE, count=count, shard_size=size)
    indices = [manifest.indices(i) for i in range(manifest.shards)]
    assert [len(r) for r in indices] == sizes
    assert [i for r in indices for i in r] == list(range(count))


def test_a_set_is_its_shards_in_order_and_misses_none(tmp_path: Path) -> None:
    open_manifest(tmp_path, MINE)
    write_shard(shard_path(tmp_path, 1), prompts=PROMPTS[3:], seeds=[10], x1=latents()[3:])
    with pytest.raises(DataError, match="lacks 1 of its 2 shards, the first 00000"):
        open_pairs(tmp_path)
    write_shard(shard_path(tmp_path, 0), prompts=PROMPTS[:3], seeds=[7, 8, 9], x1=latents()[:3])
    pairs = everything(tmp_path)
    assert pairs.prompts == PROMPTS and pairs.seeds == [7, 8, 9, 10]
    assert torch.equal(pairs.x1, latents().half())


# -- an order that is a function of the step ---------------------------------------------------


def reader(counts: list[int], loads: list[int] | None = None) -> PairReader:
    """Pairs whose seed is 1000·shard + row."""

    def load(shard: int) -> PairSet:
        if loads is not None:
            loads.append(shard)
        seeds = [1000 * shard + row for row in range(counts[shard])]
        return PairSet(prompts=["p"] * len(seeds), seeds=seeds, x1=torch.zeros(len(seeds), 1, 1, 1))

    return PairReader(counts, load)


@pytest.mark.parametrize("counts", [[1], [5], [3, 3, 1], [4] * 40 + [2]])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_epoch_visits_every_pair_once(counts: list[int], size: int) -> None:
    pairs, total = reader(counts), sum(counts)
    steps = -(-2 * total // size)
    seen = [n for step in range(steps) for n in pairs.batch(5, step, size).seeds]
    everything = sorted(1000 * s + r for s, c in enumerate(counts) for r in range(c))
    assert sorted(seen[:total]) == sorted(seen[total : 2 * total]) == everything
    if total > 4:
        assert seen[:total] != seen[total : 2 * total] != everything


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    counts = [7] * 50
    forward = [reader(counts).batch(1, s, 16).seeds for s in range(40)]
    pairs = reader(counts)
    assert [pairs.batch(1, s, 16).seeds for s in reversed(range(40))] == forward[::-1]
    assert reader(counts).batch(2, 0, 16).seeds != forward[0]


def test_memory_holds_two_windows_and_each_shard_is_read_once_an_epoch() -> None:
    loads: list[int] = []
    pairs = reader([8] * 100, loads)
    for step in range(100):
        pairs.batch(0, step, 8)
        assert len(pairs.loaded) <= 2 * PairReader.WINDOW
    assert sorted(loads) == list(range(100))


# -- batches of pairs --------------------------------------------------------------------------


def test_a_batch_has_the_noise_of_its_seeds_whatever_its_size() -> None:
    pairs = in_memory(PairSet(prompts=["a", "b", "c", "d"], seeds=[11, 12, 13, 14], x1=latents().half()))
    encode = TextCache(lambda prompts: torch.tensor([[[float(ord(p))]] for p in prompts]))
    for size in (1, 5, 32):
        batch = pair_batch(pairs, encode, Draw(0, 3), size)
        chosen = [row for _, row in pairs.chosen(0, 3, size)]
        assert torch.equal(batch["x1"], latents().half().float()[chosen])
        assert torch.equal(batch["states"][:, 0, 0], torch.tensor([float(ord("abcd"[i])) for i in chosen]))
        for row, i in zip(batch["x0"], chosen, strict=True):
            assert torch.equal(row, torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(11 + i)))


def test_some_prompts_of_a_batch_are_dropped() -> None:
    pairs = in_memory(PairSet(prompts=["a"] * 4, seeds=[1, 2, 3, 4], x1=latents().half()))
    encode = TextCache(lambda prompts: torch.tensor([[[float(len(p))]] for p in prompts]))
    kept = torch.cat([pair_batch(pairs, encode, Draw(0, s), 64, 0.25)["states"].flatten() for s in range(30)])
    assert kept.mean() == pytest.approx(0.75, abs=0.04)
    assert (pair_batch(pairs, encode, Draw(0, 0), 64)["states"] == 1).all()


# -- drawing -----------------------------------------------------------------------------------

SPEC = Pairs(name="pairs", model="teacher", count=10, steps=2, guidance=2.0, shard_size=4, batch_size=3, seed=100)
ASKED = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("apple", "house", "sun", "tree", "car")]


@pytest.fixture(scope="module")
def unbroken(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    draw_pairs(SPEC, tiny, ASKED, folder, teacher="hash")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The seeds of every call of the sampler."""
    seen: list[list[int]] = []

    def spied(*args: object, **options: object) -> Tensor:
        seen.append(list(options["seeds"]))
        return sample(*args, **options)

    monkeypatch.setattr(drawing, "sample", spied)
    return seen


def same(a: Path, b: Path) -> bool:
    """The same files with the same content; only the order of a shard's metadata may differ."""
    files = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    left, right = everything(a), everything(b)
    return (
        files[0] == files[1]
        and read_manifest(a) == read_manifest(b)
        and (left.prompts, left.seeds) == (right.prompts, right.seeds)
        and torch.equal(left.x1, right.x1)
    )


def test_pairs_are_what_the_sampler_draws(tiny: Bundle, unbroken: Path) -> None:
    pairs = everything(unbroken)
    assert pairs.prompts == ASKED and pairs.seeds == list(range(100, 110))
    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample(tiny, ASKED[4:7], seeds=[104, 105, 106], steps=2, guidance=2.0)
    assert torch.equal(pairs.x1[4:7], drawn.half())
    manifest = read_manifest(unbroken)
    assert (manifest.sampler, manifest.shards, manifest.shape, manifest.noise) == ("dpm-solver++", 3, (4, 4, 4), NOISE)
    assert noise([104], (4, 4, 4)).shape[1:] == pairs.x1.shape[1:]


@pytest.mark.parametrize("killed_at", [0, 1, 3, 4])
def test_a_killed_job_goes_on_and_equals_an_unbroken_one(
    tiny: Bundle,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[list[int]],
    killed_at: int,
) -> None:
    spied = drawing.sample

    def killed(*args: object, **options: object) -> Tensor:
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return spied(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            draw_pairs(SPEC, tiny, ASKED, tmp_path, teacher="hash")
    whole = sorted(tmp_path.glob("*.safetensors"))
    assert len(whole) == killed_at // 2  # two calls a shard
    times = {p: p.stat().st_mtime_ns for p in whole}
    (tmp_path / "00002.tmp").write_bytes(b"half a shard")
    calls.clear()
    draw_pairs(SPEC, tiny, ASKED, tmp_path, teacher="hash")
    assert {p: p.stat().st_mtime_ns for p in whole} == times
    assert sum(map(len, calls)) == 10 - 4 * len(whole)
    assert same(tmp_path, unbroken)


def test_a_kill_while_a_shard_is_written_loses_that_shard_alone(
    tiny: Bundle, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "00001.safetensors":
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            draw_pairs(SPEC, tiny, ASKED, tmp_path, teacher="hash")
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["00000.safetensors"]
    draw_pairs(SPEC, tiny, ASKED, tmp_path, teacher="hash")
    assert same(tmp_path, unbroken)


def test_a_damaged_shard_is_drawn_anew(tiny: Bundle, unbroken: Path, tmp_path: Path, calls: list[list[int]]) -> None:
    draw_pairs(SPEC, tiny, ASKED, tmp_path, teacher="hash")
    path = shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    calls.clear()
    draw_pairs(SPEC, tiny, ASKED, tmp_path, teacher="hash")
    assert calls == [[104, 105, 106], [107]]
    assert same(tmp_path, unbroken)


def test_several_workers_draw_what_one_draws(tiny: Bundle, unbroken: Path, tmp_path: Path) -> None:
    for rank in (1, 0):
        draw_pairs(SPEC, tiny, ASKED, tmp_path, teacher="hash", workers=(rank, 2))
    assert same(tmp_path, unbroken)


def test_another_teacher_does_not_mix_in(tiny: Bundle, tmp_path: Path, unbroken: Path) -> None:
    with pytest.raises(DataError, match="teacher='hash', asked for 'another'"):
        draw_pairs(SPEC, tiny, ASKED, unbroken, teacher="another")


def test_a_broken_teacher_is_named_not_stored(tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "sample", lambda *args, **options: torch.full((3, 4, 4, 4), torch.nan))
    with pytest.raises(DataError, match="pairs: the teacher drew NaN in shard 0"):
        draw_pairs(SPEC, tiny, ASKED, tmp_path, teacher="hash")
    assert not list(tmp_path.glob("*.safetensors"))
