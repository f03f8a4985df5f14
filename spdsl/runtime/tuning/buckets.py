"""Which calls share a configuration: kernel, GPU, types, head dims, and lengths up to the same power of two."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from spdsl.runtime.tuning.candidates import candidates
from spdsl.runtime.tuning.configs import Config, has_bias, plain_name
from spdsl.runtime.tuning.footprint import KernelShape, fits
from spdsl.runtime.tuning.warps import product_repeats

_SHORT = 128  # lengths up to here are one bucket: a tile of rows or two


class Bucket(NamedTuple):
    """Calls that share a configuration."""

    function: str  # which launches the kernel: its name holds that of the softmax or choice
    kernel: str  # as in the tables
    architecture: str
    processors: int
    triton: str
    dtype: str
    size: int  # bytes per element
    qk: int
    v: int
    group: int  # heads that are rows of one tile
    queries: int  # up to
    keys: int  # up to
    most_n: int  # keys of a page or unit; 0: no bound
    paged: bool
    listed: bool


def length_bucket(length: int) -> int:
    """1, 128, 256, 512, ..."""
    return 1 if length <= 1 else max(_SHORT, 1 << (length - 1).bit_length())


@lru_cache(maxsize=4096)
def bucket_key(bucket: Bucket) -> str:
    return " ".join(f"{name}={value}" for name, value in bucket._asdict().items())


def bucket_candidates(bucket: Bucket, default: Config) -> list[Config]:
    return candidates(_kernel_shape(bucket), default, bucket.architecture, bucket.most_n, rows_fixed(bucket))


def rows_fixed(bucket: Bucket) -> bool:
    """The heads of a group are the rows of a tile, whatever the table says."""
    return plain_name(bucket.kernel).endswith("decode") or (bucket.kernel == "select" and bucket.queries == 1)


def _kernel_shape(bucket: Bucket) -> KernelShape:
    name = plain_name(bucket.kernel)
    size = min(bucket.size, 4)  # fp64 is for the interpreter
    return KernelShape(
        name, bucket.qk, bucket.v, size, bucket.group, has_bias(bucket.kernel), bucket.paged, bucket.listed
    )


def bucket_allows(bucket: Bucket, config: Config) -> bool:
    """A configuration from a file, or for another call: it is predicted to run here, and to compute nothing twice."""
    kernel = _kernel_shape(bucket)
    return fits(kernel, config, bucket.architecture) and product_repeats(kernel, config, bucket.architecture) == 1
