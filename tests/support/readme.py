"""The README.md files of the repository, and one longer guide: their text and their blocks of code."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted(path for name in ("pop", "tools") for path in (ROOT / name).rglob("README.md"))]
FILES.append(ROOT / "tools/vllm/ROLLOUT.md")
READMES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README = READMES["README.md"]


def blocks(language: str, path: str | None = None) -> list[str]:
    """The fenced blocks in `language` of one README, or of all, in order."""
    texts = READMES.values() if path is None else [READMES[path]]
    found = (pair for text in texts for pair in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S))
    return [block for name, block in found if name == language]


def prose(path: str | None = None) -> str:
    """One README, or all of them, without the fenced blocks."""
    text = "\n".join(READMES.values()) if path is None else READMES[path]
    return re.sub("^```.*?^```$", "", text, flags=re.M | re.S)


TEXT = prose()
