"""What a mask is, and the recipe from which every party derives the same one."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from numbers import Real

import numpy as np

from fedmask.errors import CheckpointError, ConfigError, unknown
from fedmask.space import ELIGIBLE, Eligible, ParameterSpace


@dataclass(frozen=True)
class Rule:
    """How a mask was chosen: everything but the checkpoint.

    ``density`` is the share of eligible backbone entries; ``seed`` counts for random rules alone.
    """

    name: str = "magnitude"
    density: float = 0.005
    eligible: Eligible = "linear"
    per_tensor: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.density, Real) or isinstance(self.density, bool) or not 0 < self.density <= 1:
            raise ConfigError(
                f"density: expected a share in (0, 1], found {self.density!r}; the usual is 0.005"
            )
        object.__setattr__(self, "density", float(self.density))  # a NumPy number is no JSON
        if self.eligible not in ELIGIBLE:
            raise ConfigError(unknown("eligible set", str(self.eligible), ELIGIBLE))
        if self.seed < 0:
            raise ConfigError(f"seed: expected a number at least 0, found {self.seed}; give 0 or more")


_KINDS = {"name": (str,), "density": (float, int), "eligible": (str,), "per_tensor": (bool,), "seed": (int,)}


@dataclass(frozen=True, eq=False)
class Mask:
    """Exactly k entries of a parameter space.

    ``indices``: int64 ``[k]``, sorted, unique, flat over ``space``. ``digest``: SHA-256 (hex) of
    the space and the indices; masks with the same digest are equal.
    """

    indices: np.ndarray
    space: ParameterSpace
    rule: Rule

    @property
    def k(self) -> int:
        """Number of masked entries."""
        return int(self.indices.size)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the space's digest and the indices as little-endian int64."""
        digest = hashlib.sha256(self.space.digest.encode())
        digest.update(self.indices.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def per_tensor(self) -> dict[str, np.ndarray]:
        """Flat indices (int64, relative to the tensor) by tensor name; tensors without any are left out."""
        parts = zip(self.space.names, self.space.split(self.indices), strict=True)
        return {name: part for name, part in parts if part.size}

    def recipe(self) -> Recipe:
        """The few bytes from which a holder of the same checkpoint derives this mask."""
        return Recipe(self.rule, checkpoint=self.space.checkpoint, mask=self.digest)


@dataclass(frozen=True)
class Recipe:
    """A rule with the digests (hex) of the checkpoint that it is for and of the mask that it gives."""

    rule: Rule
    checkpoint: str
    mask: str

    def to_json(self) -> str:
        """Fewer than 256 bytes of JSON: digests in base64, settings at their default left out."""
        default = asdict(Rule())
        rule = {k: v for k, v in asdict(self.rule).items() if v != default[k]}
        fields = {"v": 1, **rule, "checkpoint": _short(self.checkpoint), "mask": _short(self.mask)}
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read ``to_json``'s text; ConfigError if it is not a recipe of this version."""
        try:
            fields = json.loads(text)
            if fields.pop("v") != 1:
                raise ValueError("version")
            checkpoint, mask = _long(fields.pop("checkpoint")), _long(fields.pop("mask"))
            for key, value in fields.items():
                if type(value) not in _KINDS[key]:  # exactly: JSON's true is no number
                    raise TypeError(f"{key}: {value!r}")
            return cls(Rule(**fields), checkpoint=checkpoint, mask=mask)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"mask recipe: expected a version 1 recipe, found {text[:80]!r} ({error}); "
                "use the same release of fedmask on server and clients"
            ) from error

    def check_checkpoint(self, found: str) -> None:
        """CheckpointError naming both digests unless ``found`` (hex) is the recipe's checkpoint."""
        if found != self.checkpoint:
            raise CheckpointError(
                f"this federation tunes the checkpoint {self.checkpoint}, found {found} here: "
                "use the same pre-trained weights on every machine"
            )


def _short(digest: str) -> str:
    return base64.urlsafe_b64encode(bytes.fromhex(digest)).decode().rstrip("=")


def _long(text: str) -> str:
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if len(raw) != 32:
        raise ValueError("a digest has 32 bytes")
    return raw.hex()


def mask_size(density: float, eligible_size: int) -> int:
    """k = round(density x N), at least 1."""
    return max(1, round(density * eligible_size))


def mask_from_indices(indices: np.ndarray, space: ParameterSpace, rule: Rule) -> Mask:
    """A mask from indices that came from elsewhere, checked.

    CheckpointError unless they are int64, sorted, unique, inside the space and outside padding rows.
    """
    values = np.asarray(indices)
    sound = values.dtype == np.int64 and values.ndim == 1 and values.size > 0
    sound = sound and bool(np.all(np.diff(values) > 0)) and values[0] >= 0 and values[-1] < space.size
    for start, stop in space.excluded:
        sound = sound and bool(np.searchsorted(values, start) == np.searchsorted(values, stop))
    if not sound:
        raise CheckpointError(
            f"mask: expected sorted unique int64 indices below {space.size} outside padding rows, "
            f"found {values.dtype} {values.shape}; the mask was made for another model or is damaged"
        )
    return Mask(values, space, rule)
