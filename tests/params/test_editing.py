"""Editing a parameter file keeps comments and order."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from lgp.errors import LgpError
from lgp.params.editing import with_value, write_values

TEXT = """# title
seed: 5                       # of all
data:
  source: digits              # where
  channels: 1

labels:
  shares: {1pct: 0.01}        # of train
  base_lrs: [
    1, 2,
    3,
  ]
  lists:
  - a.txt
  - b.txt                   # second
  subsets: 5
  of:
    share: 0.1              # inner
  threads: 1                # each
                            # of them
"""


@pytest.mark.parametrize(
    ("key", "value", "old", "new"),
    [
        ("seed", 7, "seed: 5                       # of all", "seed: 7                       # of all"),
        ("data.channels", 3, "  channels: 1", "  channels: 3"),
        ("data.source", [{"folder": "raw"}, "b.csv"], "source: digits  ", "source: [{folder: raw}, b.csv]  "),
        ("labels.base_lrs", [4], "base_lrs: [\n    1, 2,\n    3,\n  ]", "base_lrs: [4]"),
        ("data.labels", ["labels.csv"], "data:\n", "data:\n  labels: [labels.csv]\n"),
        ("arms", ["mim"], "# title\n", "arms: [mim]\n# title\n"),
        ("labels.of.share", 0.5, "    share: 0.1              # inner", "    share: 0.5              # inner"),
        ("labels.of.shot", 5, "  of:\n", "  of:\n    shot: 5\n"),
        (
            "labels.lists",
            ["c.txt"],
            "  lists:\n  - a.txt\n  - b.txt                   # second\n",
            "  lists: [c.txt]\n",
        ),
        ("labels.threads", 2, "threads: 1", "threads: 2"),
    ],
)
def test_one_value_changes_and_nothing_else(key: str, value: object, old: str, new: str) -> None:
    assert old in TEXT
    assert with_value(TEXT, key, value) == TEXT.replace(old, new)


def test_every_key_of_the_preset_can_be_written_and_read_back() -> None:
    text = (ROOT / "presets" / "digits.yaml").read_text()
    values = yaml.safe_load(text)
    for section in ("data", "labels", "model", "mim", "graft", "fewshot", "run"):
        for key, value in values[section].items():
            written = with_value(text, f"{section}.{key}", value)
            assert yaml.safe_load(written) == values, f"{section}.{key}"


def test_file_that_would_not_be_valid_keeps_its_text(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    text = (ROOT / "presets" / "digits.yaml").read_text()
    file.write_text(text)
    with pytest.raises(LgpError, match=r"data.image_size"):
        write_values(file, {"data.image_size": "large"})
    assert file.read_text() == text
    with pytest.raises(LgpError, match="no section nothing"):
        write_values(file, {"nothing.at_all": 1})
    assert write_values(file, {"data.image_size": 16, "data.labels": ["a.csv"]}).data.labels == ("a.csv",)
