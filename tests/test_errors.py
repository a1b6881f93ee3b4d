"""The exceptions of the public API."""

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
