"""A run is continued only as it was begun, and what is done is left alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

from instaflow.data.pictures import Picture, write_parquet
from instaflow.errors import BundleError, DataError, RecipeError
from instaflow.models.bundle import Bundle, load_autoencoder
from instaflow.recipe import Data, Recipe, dump_recipe, load_recipe
from instaflow.training.run import Run


def never(*_: object) -> None:
    raise AssertionError("a stage ran")


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("recipes/smoke.toml")


@pytest.mark.parametrize("changes", [{"seed": 1}, {"data": Data(size=64)}], ids=["seed", "data"])
def test_a_run_begun_otherwise_is_not_continued(tmp_path: Path, recipe: Recipe, changes: dict[str, object]) -> None:
    dump_recipe(msgspec.structs.replace(recipe, **changes), tmp_path / "smoke" / "recipe.toml")
    (tmp_path / "smoke" / "autoencoder").mkdir()
    with pytest.raises(RecipeError, match=f"was begun with another `{next(iter(changes))}`"):
        Run(recipe, tmp_path, cache=tmp_path).run(never)


def test_a_stage_begun_otherwise_is_not_continued(tmp_path: Path, recipe: Recipe) -> None:
    first, *rest = recipe.stages
    before = msgspec.structs.replace(recipe, stages=(msgspec.structs.replace(first, latent_channels=4), *rest))
    dump_recipe(before, tmp_path / "smoke" / "recipe.toml")
    (tmp_path / "smoke" / "autoencoder").mkdir()
    with pytest.raises(RecipeError, match="stage 'autoencoder' was begun with other settings"):
        Run(recipe, tmp_path, cache=tmp_path).run(never)


def test_a_done_stage_is_skipped(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "smoke" / "teacher" / "bundle").mkdir(parents=True)
    (tmp_path / "smoke" / "evaluate").mkdir()
    (tmp_path / "smoke" / "evaluate" / "report.json").write_text("{}")
    run = Run(recipe, tmp_path, cache=tmp_path)
    run.run(never, "teacher")
    run.run(never, "evaluate")
    assert not run.done(recipe.stage("pairs"))


def test_an_autoencoder_with_damaged_weights_is_named(tmp_path: Path, tiny: Bundle) -> None:
    folder = tiny.save(tmp_path / "bundle")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BundleError, match="vae"):
        load_autoencoder(folder, "cpu")


def test_a_stage_takes_the_styles_it_names(tmp_path: Path, recipe: Recipe) -> None:
    pictures = [
        Picture(image=b"", name=n, style=s, split="train") for n, s in [("a", "flat"), ("b", "oil"), ("c", "flat")]
    ]
    path = write_parquet(pictures, tmp_path / "data.parquet")
    run = Run(msgspec.structs.replace(recipe, data=Data(source=str(path))), tmp_path, cache=tmp_path)
    assert [p.name for p in run.in_styles(("flat",))] == ["a", "c"]
    assert [p.name for p in run.in_styles(())] == ["a", "b", "c"]
    with pytest.raises(DataError, match="unknown style 'ink'; the data has: flat, oil"):
        run.in_styles(("flat", "ink"))


def own_data(recipe: Recipe, tmp_path: Path, *splits: str) -> Recipe:
    """The recipe on a Parquet file with a picture of each of these splits."""
    pictures = [Picture(image=b"", name=f"p{i}", split=s) for i, s in enumerate(splits)]
    path = write_parquet(pictures, tmp_path / "data.parquet")
    return msgspec.structs.replace(recipe, data=Data(source=str(path), size=32))


def test_a_run_that_could_not_be_evaluated_is_refused_before_it_trains(tmp_path: Path, recipe: Recipe) -> None:
    run = Run(own_data(recipe, tmp_path, "train", "train"), tmp_path, cache=tmp_path)
    with pytest.raises(DataError, match=r"stage 'evaluate' compares with pictures kept back .* folder test/"):
        run.run(never)
    assert not (tmp_path / "smoke" / "recipe.toml").exists()


def test_a_mistake_in_the_data_can_be_mended_under_the_same_name(tmp_path: Path, recipe: Recipe) -> None:
    dump_recipe(msgspec.structs.replace(recipe, data=Data(source="nowhere/")), tmp_path / "smoke" / "recipe.toml")
    Run(own_data(recipe, tmp_path, "train", "test"), tmp_path, cache=tmp_path)._check_unchanged()


def test_a_run_that_is_being_worked_on_is_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "smoke").mkdir()
    with FileLock(tmp_path / "smoke" / ".lock"), pytest.raises(RecipeError, match="worked on by another process"):
        Run(recipe, tmp_path, cache=tmp_path).run(never, "teacher")
