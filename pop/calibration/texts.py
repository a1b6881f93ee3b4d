"""The texts of calibration, cut into windows of token ids."""

from collections.abc import Iterator
from importlib.resources import files
from itertools import islice

from pop.inputs.processors import Prepared

SHORTEST = 16  # tokens; a shorter window is left out
TOKENS_AT_ONCE = 4096  # the most tokens in one forward pass

Window = tuple[list[int], list[Prepared]]  # token ids, and the images and videos among them


def builtin_texts() -> list[str]:
    """The texts for texts=None: public-domain English of five kinds, and some Python."""
    folder = files("pop").joinpath("data", "calibration")
    return [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir(), key=lambda file: file.name)]


def text_windows(model, texts, images, videos, size: int) -> list[Window]:
    """Cut texts into windows of at most `size` token ids. A text with images stays whole.

    If a text begins with BOS, so do its windows.
    """
    windows = []
    for text, media in zip(texts, model.vision.prepare_batch(images, videos, len(texts)), strict=True):
        tokens = model.encode(text, "text", media=media)
        if media:
            model.check_fits(len(tokens), "a text with images")
            windows.append((tokens, media))
            continue
        bos = tokens[:1] if tokens[0] == model.config.bos_id else []
        step = max(1, size - len(bos))
        windows += [(bos + tokens[begin : begin + step], []) for begin in range(len(bos), len(tokens), step)]
    return [(tokens, media) for tokens, media in windows if len(tokens) >= SHORTEST]


def batches(windows: list[Window]) -> Iterator[list[Window]]:
    """Batch windows of similar lengths, as many as TOKENS_AT_ONCE allows."""
    queue = iter(sorted(windows, key=lambda window: len(window[0]), reverse=True))
    while first := next(queue, None):
        others = max(0, TOKENS_AT_ONCE // len(first[0]) - 1)
        yield [first, *islice(queue, others)]
