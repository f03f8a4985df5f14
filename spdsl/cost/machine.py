"""machine: the tiles that kernels work in on one architecture, as the launches choose them."""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.runtime.launch.splits import split_count
from spdsl.runtime.tuning.configs import SMALL, Config, lookup, power_of_2, split_dim
from spdsl.runtime.tuning.unit_configs import (
    KEYS_PER_UNIT,
    PARTS_BYTES,
    PARTS_BYTES_INTERPRETED,
    UNIT_TABLES,
    UnitShape,
    fitted,
    job_tiles,
    one_query,
    rows_alone,
    table_row,
)
from spdsl.targets import Target


@dataclass(frozen=True, slots=True)
class Machine:
    """An architecture and how many programs run side by side. None: the interpreter, which has one configuration."""

    architecture: str | None = None
    processors: int = 1

    def config(self, row: str, dim: int, size: int) -> Config:
        return SMALL if self.architecture is None else lookup(row, self.architecture, dim, size)

    def unit_shape(self, kernel: str, dim: int, size: int, group: int, unit: int) -> UnitShape:
        return fitted(self._unit_config(table_row(kernel, unit), dim, size), group, unit)

    def pair_shape(self, kernel: str, dim: int, size: int, unit: int) -> UnitShape:
        """Where keys are outermost."""
        return rows_alone(self._unit_config(f"{kernel}_pairs", dim, size), unit)

    def _unit_config(self, kernel: str, dim: int, size: int) -> Config:
        return SMALL if self.architecture is None else lookup(kernel, self.architecture, dim, size, UNIT_TABLES)

    def unit_step(self, kernel: str, dim: int, size: int, group: int, unit: int) -> UnitShape:
        """For one query of each sequence."""
        return one_query(self.unit_shape(kernel, dim, size, group, unit))

    def job_tiles(self, unit: int) -> int:
        """Of the backward by keys."""
        return job_tiles(unit, self.architecture is None)

    @property
    def parts_bytes(self) -> int:
        return PARTS_BYTES_INTERPRETED if self.architecture is None else PARTS_BYTES

    def splits(self, groups: int, keys: int) -> int:
        """Programs that share the keys of one decode step."""
        return split_count(groups, keys, self.processors)

    def select_splits(self, groups: int, units: int) -> int:
        return min(3, units) if self.architecture is None else self.splits(groups, KEYS_PER_UNIT * units)


def machine_of(target: Target) -> Machine:
    return Machine(target.architecture, target.sm_count)


def padded(dim: int) -> int:
    """The columns that kernels multiply for a head dim; none for none."""
    return sum(split_dim(dim)) if dim else 0


def padded_group(group: int) -> int:
    """The rows of a product in decode."""
    return max(16, power_of_2(group))
