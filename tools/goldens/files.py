"""Where golden files are, how they are written, and what to say when the reference is not installed."""

import json
import re
from pathlib import Path

from tools.common import ROOT

GOLDENS = ROOT / "tests" / "goldens"
MISSING = "golden files are made with {}; install it in a separate virtual environment, and run this script there"


def write_json(file: Path, content: dict, indent: int = 2) -> None:
    """Write JSON in which a list of integers takes one line."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    text = re.sub(r"\[[\d\s,]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    file.write_text(text + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
