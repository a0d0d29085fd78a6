"""Errors of one form: "<Layer>: Expected <argument> to ...; got ..."."""

from typing import NoReturn

__all__ = ["refuse"]


def refuse(owner: object, argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with the one message that all checks share; ``owner`` is a layer or its name."""
    name = owner if isinstance(owner, str) else type(owner).__name__
    raise error(f"{name}: Expected {argument} to {expected}; got {got}")
