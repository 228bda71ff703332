"""What can be wrong with what a user gave, as opposed to what is wrong with the program."""


class UserError(ValueError):
    """A setting, a file or an input that cannot be used. The message names it and says what would do; exit code 2."""


class UnsupportedError(RuntimeError):
    """This machine or this combination cannot do what was asked. Becomes the outcome `unsupported`; exit code 3."""
