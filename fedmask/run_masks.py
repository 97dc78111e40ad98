"""A run's masks: the one of its rule, one that was handed in, or those of a schedule."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np
from torch import nn

from fedmask.config import RunConfig
from fedmask.errors import ConfigError
from fedmask.mask_cache import kept_or_derived
from fedmask.masks import RULES, Mask, Recipe, Rule, mask_from_indices, mask_size
from fedmask.masks.bands import Schedule
from fedmask.methods import METHODS
from fedmask.positions import ByRecipe
from fedmask.run_data import RunData
from fedmask.space import ParameterSpace, checkpoint_digest, parameter_space


class RunMasks(RunData):
    """The mask side of a workspace. Models are built by what derives from it."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._given: Mask | None = None

    @property
    @abstractmethod
    def _masked_model(self) -> nn.Module:
        """The backbone whose entries the masks choose."""

    @abstractmethod
    def _forget_models(self) -> None:
        """Let go of models that were built on another mask."""

    @property
    def rule(self) -> Rule | None:
        """How the run's mask is chosen; None for methods without one."""
        name = METHODS[self.config.method].mask
        if name is None:
            return None
        seed = self.config.seed if name.startswith("random") else 0
        return Rule(name, self.config.density, self.config.eligible, self.config.per_tensor, seed)

    @cached_property
    def _derived(self) -> Mask | None:
        found = self.rule is not None and self.rule.name in RULES
        return kept_or_derived(self._masked_model, self.rule) if found and self.rule else None

    @property
    def mask(self) -> Mask | None:
        """The mask in use: the one that was handed in, else the one derived from the checkpoint.

        None without a mask, and as long as one that comes from labelled rows has not been agreed on.
        """
        return self._given or self._derived

    @cached_property
    def space(self) -> ParameterSpace:
        """The space over which masks are indexed."""
        return (
            self._derived.space
            if self._derived
            else parameter_space(self._masked_model, self.config.eligible)
        )

    @cached_property
    def checkpoint_digest(self) -> str:
        """SHA-256 (hex) of the backbone's stored values."""
        return self._derived.space.checkpoint if self._derived else checkpoint_digest(self._masked_model)

    @property
    def digest(self) -> str:
        """What an update's envelope names: the mask's digest, or the checkpoint's where there is no mask."""
        return self.mask.digest if self.mask is not None else self.checkpoint_digest

    def recipe(self) -> Recipe | None:
        """What the server offers; None for methods without a mask."""
        return self.mask.recipe() if self.mask is not None else None

    def use_mask(self, indices: np.ndarray) -> None:
        """Use a mask that came by wire (int64, sorted) instead. CheckpointError if it is unsound."""
        if self.rule is None:
            raise ConfigError(f"method {self.config.method!r} has no mask to replace")
        given = mask_from_indices(indices, self.space, self.rule)
        if self.mask is not None and given.digest == self.mask.digest:
            return
        self._forget_models()
        self._given = given

    def forget_mask(self) -> None:
        """Go back to the mask derived from the checkpoint, or to none."""
        self._forget_models()
        self._given = None

    @cached_property
    def schedule(self) -> Schedule:
        """Which entries train in which round, where the mask moves. ConfigError for a rule without bands."""
        if self.rule is None:
            raise ConfigError(f"method {self.config.method!r} has no mask that could move")
        config = self.config
        return Schedule(self._masked_model, self.space, self.rule, config.mask_schedule, config.mask_bands)

    @cached_property
    def positions(self) -> ByRecipe:
        """Which entries a moving mask has trained by which round."""
        return ByRecipe(self.schedule)

    @cached_property
    def no_mask(self) -> Mask:
        """A mask of this run's rule without entries."""
        rule = self.rule
        if rule is None:
            raise ConfigError(f"method {self.config.method!r} has no mask")
        return Mask(np.empty(0, np.int64), self.space, rule)

    @property
    def k(self) -> int:
        """Number of entries that a client trains in a round; 0 without a mask."""
        return mask_size(self.rule.density, self.space.eligible_size) if self.rule is not None else 0
