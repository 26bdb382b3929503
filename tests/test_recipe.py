"""Recipes: every one in the repository is valid; every mistake is one line with the value, the rule and the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from instaflow.errors import RecipeError
from instaflow.recipe import Pairs, Teacher, dump_recipe, load_recipe
from instaflow.training.cost import cost

SMOKE = Path("recipes/smoke.toml")


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.toml")), ids=str)
def test_recipes_of_the_repository_load_and_survive_a_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    dump_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr = 2e-3", "lr = -1.0", "stages[autoencoder].train.lr: Expected `float` > 0.0, got -1.0"),
        ("lr = 2e-3", 'lr = "big"', "stages[autoencoder].train.lr: Expected `float`, got 'big'"),
        (
            "steps = 60, batch_size = 16, lr = 2e-3",
            "steps = 0, batch_size = 16, lr = 2e-3",
            "stages[autoencoder].train.steps",
        ),
        ("guidance = 2.0", "guidence = 2.0", "stages[pairs] has no field 'guidence'; did you mean 'guidance'?"),
        ("count = 96\n", "", "stages[pairs]: Object missing required field `count`"),
        (
            'kind = "reflow"',
            'kind = "rewind"',
            "stages[2-rectified].kind: 'rewind' is no kind of stage; allowed: autoencoder, decoder, teacher, pairs,",
        ),
        (
            'loss = "perceptual"',
            'loss = "lpips"',
            "stages[one-step].loss: 'lpips' is not allowed; allowed: 'l2', 'perceptual'",
        ),
        (
            'kind = "distil"',
            'kind = "distil"\nperceptual_crop = 4',
            "perceptual and perceptual_crop are of a perceptual loss; distil-l2 has loss = 'l2'",
        ),
        ('name = "2-rectified"', 'name = "teacher"', "stages[4].name 'teacher' is used twice"),
        ('pairs = "pairs"', 'pairs = "pears"', "stages[4] reads 'pears', which is no earlier stage"),
        ("size = 32", "size = 33", "data.size"),
        ('name = "smoke"', 'name = "../smoke"', "name: Expected `str` matching regex"),
        ('"teacher@4"', '"teacher@x"', "stages[evaluate].models"),
        ("widths = [32, 64]", "widths = [32]", "widths has 1 entries, attention 2"),
        ("[data]", "[data", "broken TOML"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = SMOKE.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert said in message
    assert str(path) in message
    assert "\n" not in message


def test_a_stage_is_found_by_name_or_kind() -> None:
    recipe = load_recipe(SMOKE)
    assert isinstance(recipe.stage("teacher"), Teacher)
    assert recipe.stage("reflow").name == "2-rectified"
    with pytest.raises(RecipeError, match="several stages of kind distil: distil-l2, one-step"):
        recipe.stage("distil")
    with pytest.raises(RecipeError, match="no stage 'x' in recipe 'smoke'"):
        recipe.stage("x")


def test_costs_are_counted_by_hand() -> None:
    recipe = load_recipe(SMOKE)
    pairs = recipe.stage("pairs")
    assert isinstance(pairs, Pairs)
    bill = cost(pairs, recipe)
    assert bill.images == 96
    assert bill.forwards == 96 * 4 * 2  # 4 steps, guided: two forward passes each
    assert bill.storage_mb == round(96 * 8 * 4 * 4 * 2 / 1e6, 1)  # fp16 latents of 8 channels, 4 × 4
    assert cost(recipe.stage("teacher"), recipe).forwards == 60 * 16 * 3
