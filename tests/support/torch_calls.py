"""The functions of torch that a piece of code calls."""

from torch.overrides import TorchFunctionMode


def calls_of(function, *args):
    """Call function(*args). Returns its result, and (function, args, kwargs) of each call of a torch function."""
    called = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            called.append((function, args, kwargs))
            return function(*args, **kwargs)

    with Watch():
        return function(*args), called
