"""The base of every error that this package defines."""


class FxSparsityError(Exception):
    """What every error of this package is, beside the `ValueError` or `RuntimeError` that it is."""
