"""The README and its blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


README = (ROOT / "README.md").read_text(encoding="utf-8")


TEXT = re.sub("^```.*?^```$", "", README, flags=re.M | re.S)  # what is not in blocks


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
