"""pydantic's errors in one line each: the key, what was expected, what was found, what to give instead."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from fedmask.errors import ConfigError, unknown


def short(value: object) -> str:
    """``value`` in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _where(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """``('tasks', 0)`` as ``tasks[0]``; the tags that pydantic adds for unions are left out."""
    keys = list(location[:2]) if location and location[0] in model.model_fields else list(location[:1])
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _expected(model: type[BaseModel], key: object) -> str:
    """The bounds of a field in words (``a number greater than 0 and at most 1``), or nothing."""
    field = model.model_fields.get(str(key))
    limits = {name: getattr(rule, name) for rule in (field.metadata if field else ()) for name in _BOUNDS
              if getattr(rule, name, None) is not None}  # fmt: skip
    words = " and ".join(f"{_BOUNDS[name]} {limit}" for name, limit in limits.items())
    return f"expected a number {words}" if words else ""


def _remedy(model: type[BaseModel], key: object) -> str:
    """What to give instead of a wrong number: the default where there is one."""
    field = model.model_fields.get(str(key))
    if field is None:
        return ""
    default = field.get_default(call_default_factory=False)
    if isinstance(default, int | float) and not isinstance(default, bool):
        return f"; give such a number (the default is {default})"
    return "; give such a number" + (" or leave it out" if not field.is_required() else "")


_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
_NUMBER_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


def one_line(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One error of pydantic as ``key: what was expected, found what``."""
    where, found, inner = _where(detail["loc"], model), detail["input"], detail.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):  # from a nested model or a validator: it says what is wrong itself
        joint = "" if not where else "." if _starts_with_key(str(inner)) else ": "
        return f"{where}{joint}{inner}"
    if detail["type"] == "extra_forbidden":
        return unknown("key", where, model.model_fields)
    if detail["type"] == "missing":
        return f"{where}: missing, and it has no default"
    key = detail["loc"][0] if detail["loc"] else ""
    annotation = model.model_fields[str(key)].annotation if key in model.model_fields else None
    if get_origin(annotation) is Literal and isinstance(found, str):
        return f"{where}: {unknown('value', found, get_args(annotation))}"
    if detail["type"] == "string_pattern_mismatch":
        said = "expected letters, digits, '.', '_' or '-', the first a letter or digit"
    elif detail["type"] in _NUMBER_ERRORS:
        said = _expected(model, key) or detail["msg"]
    elif str(key) == "options":  # numbers of two kinds: pydantic names only one of them
        return f"{where}: expected a number, found {short(found)}; give one, as in {where.split('.')[-1]}=0.1"
    else:
        said = (
            detail["msg"]
            .removeprefix("Input ")
            .removeprefix("Value error, ")
            .replace(" after validation", "")
        )
    remedy = _remedy(model, key) if detail["type"] in _NUMBER_ERRORS else ""
    return f"{where}: {said}, found {short(found)}{remedy}"


def _starts_with_key(message: str) -> bool:
    head = message.split(":", 1)[0]
    return ":" in message and " " not in head
