"""Reading one entry of a record, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boa_edge.errors import BoaEdgeError


class Fields:
    """The fields of an entry, each taken once.

    Args:
        where: the file and entry, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self.where = dict(values), where

    def _take(self, name: str, wanted: str) -> Any:
        if name not in self._values:
            raise BoaEdgeError("the field is missing", where=f"{self.where}.{name}", fix=f"Expected: {wanted}")
        return self._values.pop(name)

    def _refuse(self, name: str, value: object, wanted: str) -> BoaEdgeError:
        return BoaEdgeError(f"is {value!r}", where=f"{self.where}.{name}", fix=f"Expected: {wanted}")

    def integer(self, name: str) -> int:
        """A whole number."""
        value = self._take(name, "a whole number")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._refuse(name, value, "a whole number")
        return value

    def optional_integer(self, name: str) -> int | None:
        """A whole number or null."""
        if name in self._values and self._values[name] is None:
            return self._values.pop(name)
        return self.integer(name)

    def choice(self, name: str, accepted: tuple[str, ...]) -> str:
        """One of the accepted words."""
        value = self._take(name, ", ".join(accepted))
        if value not in accepted:
            raise self._refuse(name, value, ", ".join(accepted))
        return value

    def names(self, name: str) -> list[str]:
        """A list of different words."""
        value = self._take(name, "a list of names")
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._refuse(name, value, "a list of names")
        if len(set(value)) != len(value):
            raise self._refuse(name, value, "names that differ")
        return value

    def finish(self) -> None:
        """Raises BoaEdgeError where a field is left that nobody knows."""
        for name in self._values:
            raise BoaEdgeError("is a field that is not known", where=f"{self.where}.{name}")
