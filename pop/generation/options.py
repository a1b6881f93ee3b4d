"""The options of `generate`, `stream`, `chat` and `send`: the fields of SamplingParams, and `sampling`."""

import functools
import inspect
from collections.abc import Callable

from pop.errors import InputError
from pop.generation.sampling import SamplingParams

OPTIONS = [*inspect.signature(SamplingParams).parameters.values()]
OPTIONS.append(inspect.Parameter("sampling", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None))
REFUSED = {"images", "videos", "plan"}  # known everywhere; where they cannot be given, a sentence says why


def takes_options(method: Callable) -> Callable:
    """Give a method that takes **options a signature with their names, and errors that name the method.

    `sampling="checkpoint"` stands for the options that the checkpoint's generation_config.json states; other options
    that are given replace these.
    """
    signature = inspect.signature(method)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in OPTIONS]
    known = {one.name for one in (*own, *options)} | REFUSED

    @functools.wraps(method)
    def call(*args, **given):
        for name in given:
            if name not in known:
                raise TypeError(f"{method.__qualname__}() got an unexpected keyword argument {name!r}")
        return method(*args, **given)

    call.__signature__ = signature.replace(parameters=[*own, *options])
    return call


def sampling_params(model, options: dict) -> SamplingParams:
    """The options of a call. Raises InputError for a value that cannot be used."""
    sampling = options.get("sampling")
    if sampling not in (None, "checkpoint"):
        raise InputError(f"sampling is {sampling!r}; it must be 'checkpoint' or None")
    if sampling and model.sampling is None:
        raise InputError("sampling is 'checkpoint', but the checkpoint has no generation_config.json; give the options")
    given = {name: value for name, value in options.items() if name != "sampling"}
    return SamplingParams(**((model.sampling if sampling else {}) | given))
