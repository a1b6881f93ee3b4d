"""The exceptions of the public API."""

from functools import partial

import pytest

import pop


def test_every_error_is_a_pop_error_and_the_fitting_builtin():
    pairs = {
        pop.InputError: ValueError,
        pop.PlanError: ValueError,
        pop.WeightsNotFound: FileNotFoundError,
        pop.UnknownModel: LookupError,
        pop.MissingExtra: ImportError,
        pop.CacheMemoryError: MemoryError,
    }
    for error, builtin in pairs.items():
        assert issubclass(error, pop.PopError)
        assert issubclass(error, builtin)


def test_what_a_message_quotes_cannot_drive_a_terminal():
    hostile = "\x1b]0;title\x07 \x9b2J \r\n \u202e \udc80 é 漢 \t"
    for error in (pop.InputError(hostile), pop.WeightsNotFound(hostile), pop.UnknownModel(hostile)):
        assert str(error) == r"\x1b]0;title\x07 \x9b2J \r\n \u202e \udc80 é 漢 \t"


def test_what_is_no_model_is_refused():
    for call in (pop.calibrate, partial(pop.importance, samples=[[1]]), partial(pop.check, plan=0.3)):
        with pytest.raises(pop.InputError, match="the model is a str; load one"):
            call("smollm2-135m")
