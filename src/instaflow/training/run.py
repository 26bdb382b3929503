"""A recipe's stages, one after another; a stage whose output is there is skipped.

runs/<recipe>/recipe.toml      the recipe, every default said
runs/<recipe>/<stage>/         checkpoint, metrics.jsonl, samples/ of one stage
runs/<recipe>/<stage>/bundle/  what it made (pairs: shards in <stage>/pairs/)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from rich.console import Console

from instaflow import __version__
from instaflow.data.emoji import make_emoji
from instaflow.data.pairs import MANIFEST, read_manifest, shard_path
from instaflow.data.pictures import Picture, read_pictures
from instaflow.errors import DataError, RecipeError
from instaflow.models.bundle import Bundle
from instaflow.models.hub import locate
from instaflow.recipe import Evaluate, Pairs, Recipe, Stage, dump_recipe, kind, load_recipe
from instaflow.training.stages import carry_out

Evaluator = Callable[["Run", Evaluate], None]


class Run:
    """A recipe being carried out in `root/<recipe name>`."""

    def __init__(self, recipe: Recipe, root: Path, *, cache: Path) -> None:
        """Nothing is read or written until a stage runs.

        Args:
            recipe: the run.
            root: where run folders go; shared by all processes.
            cache: where data sets and fetched packages go.
        """
        self.recipe, self.folder, self.cache = recipe, root / recipe.name, cache
        self.console = Console(stderr=True)

    @cached_property
    def processes(self) -> PartialState:
        """This process among those that its launcher started; alone when there was none."""
        return PartialState(cpu=not torch.accelerator.is_available())  # unasked it takes each for alone on a CPU

    @property
    def workers(self) -> tuple[int, int]:
        """(number of this process, how many there are)."""
        return self.processes.process_index, self.processes.num_processes

    @property
    def device(self) -> str:
        """This process's torch device."""
        return str(self.processes.device)

    # -- what stages read -----------------------------------------------------------------------

    def data_file(self) -> str:
        """The recipe's data source; 'emoji' is made when it is not there yet."""
        data = self.recipe.data
        if data.source != "emoji":
            return data.source
        folder = self.cache / f"emoji-{data.size}"
        with self.processes.main_process_first():
            return str(make_emoji(folder, size=data.size, styles=data.styles, cache=self.cache / "npm"))

    @cached_property
    def all_pictures(self) -> list[Picture]:
        """The recipe's pictures of all splits, read once."""
        return read_pictures(self.data_file(), styles=self.recipe.data.styles)

    def pictures(self, split: str) -> list[Picture]:
        """The recipe's pictures of one split.

        Raises:
            DataError: there are none.
        """
        found = [p for p in self.all_pictures if p.split == split]
        if not found:
            raise DataError(f"{self.recipe.data.source} has no pictures with split {split!r}")
        return found[: self.recipe.data.limit or None] if split == "train" else found

    @cached_property
    def training_pictures(self) -> list[Picture]:
        """The training split, read once."""
        return self.pictures("train")

    def in_styles(self, styles: Sequence[str]) -> list[Picture]:
        """The training pictures in these styles; all of them for none.

        Raises:
            DataError: the data has no such style.
        """
        there = {p.style for p in self.training_pictures}
        for style in styles:
            if style not in there:
                raise DataError(f"unknown style {style!r}; the data has: {', '.join(sorted(there))}")
        return [p for p in self.training_pictures if not styles or p.style in styles]

    def output(self, name: str) -> Path:
        """Where a stage's bundle or pairs are, or a model given by path or hub id."""
        if "://" in name:
            return _remote(name)
        if "/" in name:
            return locate(name)
        stage = self.recipe.stage(name)
        folder = self.folder / stage.name
        match stage:
            case Pairs():
                return folder / "pairs"
            case Evaluate():
                return folder
            case _:
                return folder / "bundle"

    def bundle(self, name: str) -> Bundle:
        """The bundle that an earlier stage made."""
        return Bundle.load(self.output(name), device=self.device)

    def lineage(self, stage: Stage, **parents: Any) -> dict[str, Any]:
        """What a bundle's card says of how it was made."""
        return {"code": __version__, "recipe": self.recipe.name, "stage": msgspec.to_builtins(stage), **parents}

    # -- running --------------------------------------------------------------------------------

    def done(self, stage: Stage) -> bool:
        """Whether a stage's output is complete."""
        out = self.output(stage.name)
        match stage:
            case Pairs():
                if not (out / MANIFEST).exists():
                    return False
                return all(shard_path(out, i).exists() for i in range(read_manifest(out).shards))
            case Evaluate():
                return (out / "report.json").exists()
            case _:
                return out.is_dir()

    def run(self, evaluate: Evaluator, only: str | None = None) -> None:
        """Carry out every stage, or one by name or kind; what is done is skipped.

        Raises:
            RecipeError: an earlier run in this folder had a stage of this name with other settings.
        """
        stages: Sequence[Stage] = [self.recipe.stage(only)] if only else self.recipe.stages
        with self._alone():
            self._check_unchanged()
            self._check_data(stages)
            self._carry_out_all(stages, evaluate)
        self.processes.destroy_process_group()  # gloo's threads may abort a process that exits with them

    def _carry_out_all(self, stages: Sequence[Stage], evaluate: Evaluator) -> None:
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            dump_recipe(self.recipe, self.folder / "recipe.toml")
        else:
            self.console.quiet = True
        for stage in stages:
            done = self.done(stage)
            self.processes.wait_for_everyone()  # all have looked before one of them writes
            if done:
                self.console.print(f"[dim]{stage.name}: done, in {self.output(stage.name)}[/]")
                continue
            self.console.print(f"[bold]{stage.name}[/]" + f" ({kind(stage)})" * (stage.name != kind(stage)))
            if isinstance(stage, Evaluate):
                evaluate(self, stage)
            else:
                carry_out(self, stage)
            self.processes.wait_for_everyone()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the run's folder, so that the same line typed twice does not write over itself."""
        if not self.processes.is_main_process:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise RecipeError(
                f"{self.folder} is being worked on by another process; wait for it, or stop it"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _check_data(self, stages: Sequence[Stage]) -> None:
        """What would only be found out at the end: evaluation needs pictures that were kept back."""
        wanting = [s.name for s in stages if isinstance(s, Evaluate) and not self.done(s)]
        if wanting and not any(p.split == "test" for p in self.all_pictures):
            raise DataError(
                f"stage {wanting[0]!r} compares with pictures kept back from training, and "
                f"{self.recipe.data.source} has none: put some in a folder test/ (or give them "
                "split = 'test' in Parquet), or take the stage out"
            )

    def _check_unchanged(self) -> None:
        path = self.folder / "recipe.toml"
        if not path.exists() or not any(child.is_dir() for child in self.folder.iterdir()):
            return
        begun = load_recipe(path)
        for field in ("seed", "data"):
            if getattr(begun, field) != getattr(self.recipe, field):
                raise RecipeError(
                    f"{self.folder} was begun with another `{field}`; give the recipe another name, or remove it"
                )
        before = {s.name: s for s in begun.stages}
        for stage in self.recipe.stages:
            old, started = before.get(stage.name), (self.folder / stage.name).exists()
            if started and old is not None and old != stage and not isinstance(stage, Evaluate):
                raise RecipeError(
                    f"stage {stage.name!r} was begun with other settings in {self.folder}; "
                    "give the recipe or the stage another name, or remove that folder"
                )


def _remote(url: str) -> Any:
    """A folder of pairs in an object store, as fsspec names it: 's3://bucket/pairs'.

    Raises:
        DataError: a kind of address that fsspec does not know, or whose package is missing.
    """
    from upath import UPath

    try:
        return UPath(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"cannot read {url}: {error}") from error
