"""Errors that are a user's to mend, each with what was found, what was expected and a way out."""


class ConfigError(Exception):
    """A setting that cannot work. Printed as one line; the process exits with code 2.

    Args:
        key: the dotted configuration key, or the file (with line) at fault, e.g. ``train.steps``.
        got: what was found there.
        expected: what would have been right.
        way_out: what the user can do now.
    """

    def __init__(self, key: str, got: object, expected: str, way_out: str) -> None:
        self.key, self.got, self.expected, self.way_out = key, got, expected, way_out
        super().__init__(f"{key}: got {got}; expected {expected}; {way_out}")
