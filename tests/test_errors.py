"""The exceptions of the public API."""

import pytest
from support.tiny import random_model, tiny_config

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


@pytest.mark.parametrize(
    "call", [lambda model: pop.importance(model, [[1]]), pop.calibrate, lambda model: pop.check(model, 0.3)]
)
@pytest.mark.parametrize("wrong", ["smollm2-135m", random_model(tiny_config()), None])
def test_what_is_no_model_is_refused(call, wrong):
    with pytest.raises(pop.InputError, match=f"the model is a {type(wrong).__name__}; load one"):
        call(wrong)
