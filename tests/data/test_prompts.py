"""Prompts from files: streamed, counted, and what is wrong with them said."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instaflow.data.prompts import read_prompts
from instaflow.errors import DataError


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \na fox\n", encoding="utf-8")
    assert read_prompts(str(path), 3) == ["a cat", "a dog", "a fox"]
    assert read_prompts(str(path), 2) == ["a cat", "a dog"]
    with pytest.raises(DataError, match="has 3 prompts, and 4 are asked for"):
        read_prompts(str(path), 4)


@pytest.mark.parametrize("column", ["prompt", "text", "caption", "TEXT"])
def test_parquet_has_them_in_a_column(tmp_path: Path, column: str) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"url": ["x"] * 4, column: ["a", None, "b", " c "]}), path, row_group_size=2)
    assert read_prompts(str(path), 3) == ["a", "b", "c"]


def test_no_more_is_read_than_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a cat\n" * 100_000 + b"\xff\xff\n")
    assert len(read_prompts(str(path), 50_000)) == 50_000
    with pytest.raises(DataError, match="is no text in UTF-8"):
        read_prompts(str(path), 200_000)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file of prompts"):
        read_prompts(str(tmp_path / "none.txt"), 1)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"cannot read .*bad\.parquet"):
        read_prompts(str(bad), 1)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"url": ["x"]}), other)
    with pytest.raises(DataError, match="has the columns url; prompts are looked for in prompt, text, caption"):
        read_prompts(str(other), 1)
