"""The types of what JSON and YAML files hold, before anyone has checked it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = bool | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
"""A value; an int is a float here."""
JsonObject: TypeAlias = dict[str, Json]
