"""The texts of calibration, cut into windows of token ids."""

import contextlib
import datetime
import math
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path

from pop.errors import InputError, PopError
from pop.inputs.processors import Prepared

SHORTEST = 16  # tokens; a shorter window is left out
TOKENS_AT_ONCE = 4096  # the most tokens in one forward pass
FITTED = 0.8  # the share of each text that calibration sees; the verdict is about the rest
DOCUMENTS = 24  # texts from Python's documentation
MODULES = 40  # texts from Python's standard library
CHARACTERS = (4_000, 12_000)  # of each of them, from and to
# Modules that tools/evaluate tests plans on, so no plan is fitted to them.
LEFT_OUT = {"argparse", "heapq", "mailbox", "statistics"}
PER_INPUT = 60  # tokens that suffice for each of the 2 * D inputs of a fit, see README.md
BUILTIN = 50_000  # tokens of the built-in texts to fit, about
PYTHON = 90_000  # and of DOCUMENTS and MODULES
DATE = datetime.date(2026, 1, 1)  # for chat templates that write today's, so that each day's plan is the same
MESSAGE = (6, 13)  # the logarithms to base 2 of a message's characters, from and to

Window = tuple[list[int], list[Prepared]]  # token ids, and the images and videos among them


def builtin_texts() -> list[str]:
    """The texts that come with the package: public-domain English of five kinds, and some Python."""
    folder = Path(__file__).parents[1] / "data" / "calibration"
    return [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir())]


def default_texts(model) -> list[str]:
    """The built-in texts, and as many of Python's as the model's width asks for."""
    times = (tokens_needed(model) - BUILTIN) / PYTHON
    return builtin_texts() + python_texts(max(1, math.ceil(times)))


def texts_to_fit(model) -> list[str | list[int]]:
    """What calibration sees of the default texts: of each, one half as text and one as a conversation.

    Prompts of chats begin with control tokens, which no text has. Without a chat format, or with one that refuses such
    conversations, the texts stay whole.
    """
    fitted, _ = parted(default_texts(model))
    rng = random.Random(0)
    texts = []
    try:
        encode = model.chat_format().as_of(DATE).encode
        for text in fitted:
            middle = len(text) // 2
            texts += [text[:middle], encode(conversation(text[middle:], rng), False)]
    except PopError:
        return fitted
    return texts


def conversation(text: str, rng: random.Random) -> list[dict]:
    """A conversation whose messages are the consecutive parts of a text, of random lengths."""
    messages = []
    while rest := text.lstrip():
        size = round(2 ** rng.uniform(*MESSAGE))
        role = ("user", "assistant")[len(messages) % 2]
        messages.append({"role": role, "content": rest[:size]})
        text = rest[size:]
    return messages


def tokens_needed(model) -> int:
    """How many tokens suffice to fit the corrections of a model."""
    return PER_INPUT * 2 * model.config.hidden_size


def python_texts(times: int = 1) -> list[str]:
    """Random parts of Python's documentation and standard library, as the running interpreter has them.

    The choice is always the same. But another version of Python has other texts, and one without sources has none.

    Args:
        times: How many times DOCUMENTS and MODULES texts.
    """
    rng = random.Random(0)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        [(file.stem, file.read_text(encoding="utf-8", errors="ignore")) for file in sorted(library.glob("*.py"))]
    ]
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        sources.append(sorted(topics.items()))
    least, most = CHARACTERS
    texts = []
    for source, count in zip(sources, (MODULES, DOCUMENTS), strict=False):
        long_enough = [(name, text) for name, text in source if len(text) > least]
        for name, text in rng.sample(long_enough, min(times * count, len(long_enough))):
            begin = rng.randrange(max(1, len(text) - most))
            if name not in LEFT_OUT:
                texts.append(text[begin : begin + most])
    return texts


def as_list(values, name: str = "texts", of: str = "strings or of lists of token ids") -> list:
    """The values as a list. Raises InputError, with their name, for a single text or what is none."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{name} is a {type(values).__name__}; give a list of {of}")
    return list(values)


def parted(texts: list) -> tuple[list, list]:
    """Split each text, a string or token ids, into the part that calibration sees, and the rest for the verdict."""
    fitted = []
    rest = []
    for text in texts:
        cut = int(len(text) * FITTED)
        fitted.append(text[:cut])
        rest.append(text[cut:])
    return fitted, rest


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
        head = head_of(tokens, model.config.bos_id)
        step = max(1, size - len(head))
        windows += [(head + tokens[begin : begin + step], []) for begin in range(len(head), len(tokens), step)]
    return [window for window in windows if size_of(window) >= SHORTEST]


def head_of(tokens: list[int], bos_id: int | None) -> list[int]:
    """BOS, if the tokens begin with it."""
    return [bos_id] if tokens[:1] == [bos_id] else []


def size_of(window: Window) -> int:
    """The tokens of a window."""
    return len(window[0])


def total_size(windows: Iterable[Window]) -> int:
    """The tokens of all windows."""
    return sum(map(size_of, windows))


def without_images(windows: list[Window]) -> list[Window]:
    """The windows that are text only."""
    return [window for window in windows if not window[1]]


def first_tokens(windows: list[Window], count: int) -> list[Window]:
    """The first windows that hold `count` tokens together, or all."""
    begins = accumulate(map(size_of, windows), initial=0)  # and the end of the last one
    return [window for window, begin in zip(windows, begins, strict=False) if begin < count]


def choose(windows: Sequence[Window], count: int, rng: random.Random) -> list[Window]:
    """Choose windows at random. A longer window is chosen more often."""
    return rng.choices(windows, [*map(size_of, windows)], k=count)


def excerpt(tokens: list[int], size: int, rng: random.Random, bos_id: int | None = None) -> list[int]:
    """`size` consecutive tokens from a random place, or all if they are fewer. It begins with BOS if the tokens do."""
    begin = rng.randint(0, max(0, len(tokens) - size))
    head = head_of(tokens, bos_id)
    return head + tokens[begin + len(head) : begin + size]


def batches(windows: list[Window]) -> Iterator[list[Window]]:
    """Batch windows of similar lengths, as many as TOKENS_AT_ONCE allows."""
    queue = iter(sorted(windows, key=size_of, reverse=True))
    for first in queue:
        others = max(0, TOKENS_AT_ONCE // size_of(first) - 1)
        yield [first, *islice(queue, others)]
