"""Output that is safe to show."""

CONTROL = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {*b"\n\t"})  # for str.translate: these characters go


class Terminal:
    """A terminal for answers of models and texts of files. It gets no control characters, which could drive it."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(text.translate(CONTROL))

    def dim(self, text: str) -> None:
        self._stream.write("\x1b[2m")
        self.write(text)
        self._stream.write("\x1b[0m")
