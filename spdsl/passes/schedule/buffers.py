"""buffers: the tensors that the steps of a stage read and write, by what a plan calls them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spdsl.ir.pattern import Choice, Phase, Query, Stream, Tensor, Values, Weight
from spdsl.ir.plan import ChoicePlan, Plan, Role, SoftmaxPlan
from spdsl.ir.schedule import Buffer, Lifetime, Stage

LIKE_Q = "as q"
LOWEST = "beyond it the lowest scores are left out, forced units last"
WIDE = "float32"  # of sums; float64 for float64 inputs


def source_of(plan: Plan, stream: Stream) -> Stream:
    """The stream of tokens that entries are made of, or the stream itself."""
    if stream.compress is None:
        return stream
    found = plan.pattern.input(stream.compress.source)
    assert isinstance(found, Stream)
    return found


def sides(plan: Plan, stream: Stream) -> tuple[str, ...]:
    """What is kept of a stream, or made of its source: entries that no branch reads have no values."""
    of_tokens = source_of(plan, stream)
    branches = (one for one in plan.softmaxes if one.role is Role.BRANCH)
    read = any(sweep.stream.name == stream.name for one in branches for sweep in one.sweeps)
    own = of_tokens.value is Values.OWN and (read or stream.compress is None)
    return ("k", "v") if own else ("k",)


@dataclass(frozen=True, slots=True)
class Buffers:
    """Those of one stage of a plan."""

    plan: Plan
    stage: Stage

    @property
    def cached(self) -> bool:
        return self.stage.phase is not Phase.TRAIN

    @property
    def queries(self) -> str:
        return "1" if self.stage is Stage.DECODE else "N"

    def query_heads(self, softmax: SoftmaxPlan) -> str:
        return self._heads(self._query(softmax))

    def query(self, softmax: SoftmaxPlan) -> Buffer:
        return self.vectors(self._query(softmax))

    def vectors(self, query: Query) -> Buffer:
        """Those of a query of the caller, or the rows of its cells."""
        axes = (self._heads(query), self.rows(query), str(query.dim or self.plan.pattern.qk_dim or "Dqk"))
        return self._of_call(query.name, axes, Lifetime.CALLER if query.source is None else Lifetime.CALL)

    def source(self, query: Query) -> Query:
        """What a query of cells is made of."""
        found = self.plan.pattern.input(query.source or query.name)
        assert isinstance(found, Query)
        return found

    def rows(self, query: Query) -> str:
        """How many it has in a call: queries, cells, or the last ones."""
        if query.source is None or self.stage is Stage.DECODE:
            return self.queries
        return f"{self.queries} / {query.width}" if query.tail is None else str(query.tail.count)

    def keys(self, softmax: SoftmaxPlan) -> tuple[Buffer, ...]:
        """K of every stream, and V where there is an output."""
        return tuple(one for sweep in softmax.sweeps for one in self.stream_of(softmax, sweep.stream))

    def stream_of(self, softmax: SoftmaxPlan, stream: Stream) -> tuple[Buffer, ...]:
        names = sides(self.plan, stream) if softmax.role is Role.BRANCH else ("k",)
        return tuple(self.side(stream, name) for name in names)

    def side(self, stream: Stream, side: str, made: bool = False) -> Buffer:
        """K or V of a stream; `made`: that of new tokens, not the one in the cache."""
        source, pattern = source_of(self.plan, stream), self.plan.pattern
        name = (stream.key_argument if side == "k" else stream.value_argument) or f"v_{stream.name}"
        dim = (source.qk or pattern.qk_dim or "Dqk") if side == "k" else (source.v or pattern.v_dim or "Dv")
        places = "M" if stream.compress is None else "E"
        axes = ("B", str(source.heads or pattern.kv_heads or "Hkv"), places, str(dim))
        if made:
            axes = (*axes[:2], self.queries, axes[3])
        if self.cached and not made:
            return Buffer(f"cache.{name}", axes, LIKE_Q, Lifetime.CACHE)
        return Buffer(name, axes, LIKE_Q, Lifetime.CALLER if stream.compress is None else Lifetime.CALL)

    def weights(self, stream: Stream, side: str) -> tuple[Buffer, ...]:
        """The learned tensors of the entries of a side."""
        own = (one for one in self.plan.pattern.inputs if isinstance(one, Weight) and one.stream == stream.name)
        found = (one for one in own if one.name.startswith(f"{stream.name}_{side}_"))
        return tuple(Buffer(one.name, tuple(map(str, one.axes)), LIKE_Q, Lifetime.CALLER) for one in found)

    def reads(self, found: tuple[Tensor | Choice, ...]) -> tuple[Buffer, ...]:
        """What tests and biases look up."""
        return tuple(self.tensor(one) if isinstance(one, Tensor) else self._map(one) for one in found)

    def tensor(self, tensor: Tensor) -> Buffer:
        names = {"token": "M", "query": self.queries, "head": str(self.plan.pattern.query_heads or "Hq")}
        axes = ("B", *(names.get(str(axis), str(axis)) for axis in tensor.axes))
        if self.cached and tensor.by_token:
            return Buffer(f"cache.{tensor.name}", axes, tensor.dtype, Lifetime.CACHE)
        return Buffer(tensor.name, axes, tensor.dtype, Lifetime.CALLER)

    def result(self, name: str, branches: int = 1) -> tuple[Buffer, Buffer]:
        """out and lse of a softmax, a joint or a result."""
        pattern = self.plan.pattern
        heads = str(pattern.query_heads or "Hq")
        columns = () if branches == 1 else (str(branches),)
        asking = next((self._query(one) for one in self.plan.softmaxes if one.name == name), Query("q"))
        rows = self.rows(asking)
        return (
            self._of_call(f"{name}.out", (heads, rows, str(pattern.v_dim or "Dv"))),
            replace(self._of_call(f"{name}.lse", (heads, rows, *columns)), dtype=WIDE),
        )

    def of_queries(self, name: str) -> tuple[Buffer, Buffer]:
        """The same of all queries: rows of cells are spread over theirs."""
        spread = any(one.softmax.rows > 1 for one in self.plan.softmaxes if one.name == name)
        return self.result(f"{name} of queries" if spread and self.stage is not Stage.DECODE else name)

    def notes(self, softmax: SoftmaxPlan) -> tuple[Buffer, ...]:
        """What a softmax that skips tiles notes: counts, and but for a step a bit for each tile."""
        skip = softmax.softmax.skip
        if skip is None:
            return ()
        heads = str(self.plan.pattern.query_heads or "Hq")
        if self.stage is Stage.DECODE:
            return (Buffer(f"{softmax.name}.counts", ("B", heads, "splits", "2"), "int32", Lifetime.CALL),)
        axes = ("B", heads, f"N / {skip.rows} + 2", f"2 + M / {32 * skip.unit}")
        return (Buffer(f"{softmax.name}.notes", axes, "int32", Lifetime.CALL),)

    def splits(self, softmax: SoftmaxPlan) -> tuple[Buffer, Buffer]:
        """What the programs leave that share the keys of a decode step."""
        out, lse = self.result(softmax.name)
        parts = "splits by capacity"
        return (
            replace(
                out,
                name=f"{softmax.name}.outs",
                axes=(*out.axes[:2], "splits", out.axes[3]),
                dtype=WIDE,
                capacity=parts,
            ),
            replace(lse, name=f"{softmax.name}.lses", axes=(*lse.axes[:2], "splits"), capacity=parts),
        )

    def list_of(self, choice: Choice) -> Buffer:
        """The units of each query, or of each tile of rows, ascending."""
        heads = self.list_heads(choice)
        most = f"n <= {choice.capacity or f'M / {choice.unit}'}"
        name = f"{choice.name} sorted" if choice.given else choice.name
        overflow = LOWEST if choice.capacity and choice.selected else ""  # else there is room for all units
        rows = self._tiles(choice) if choice.tiled else self.queries
        return Buffer(name, ("B", heads, rows, "n"), "int32", Lifetime.CALL, most, overflow)

    def list_of_rows(self, choice: Choice) -> Buffer:
        """The same as kernels write it: lists of single queries, of each row of the score."""
        found = self.list_of(choice)
        if choice.score is None or choice.tiled or choice.grain == 1 or self.stage is Stage.DECODE:
            return found
        query = self.plan.pattern.input(choice.score.grain.query)
        assert isinstance(query, Query)
        axes = (*found.axes[:2], self.rows(query), found.axes[3])
        return replace(found, name=f"{choice.name} of cells", axes=axes)

    def limits(self, choice: Choice) -> tuple[Buffer, ...]:
        """What a call says of each list, if it says something."""
        if not choice.at_call:
            return ()
        axes = ("B", self.list_heads(choice), "3")
        return (Buffer(f"{choice.name}.limits", axes, "float64", Lifetime.CALL),)

    def sets(self, plan: ChoicePlan) -> tuple[Buffer, ...]:
        """Which units of a tile are forced, and may be chosen, where that is asked token by token."""
        if not plan.sets:
            return ()
        choice = plan.choice
        axes = ("B", self.list_heads(choice), self._tiles(choice), f"M / {choice.unit}")
        return (Buffer(f"{choice.name}.sets", axes, "uint8", Lifetime.CALL),)

    def given(self, choice: Choice) -> tuple[Buffer, ...]:
        """The caller's units of each tile of rows; of a drawn set there are none."""
        if not choice.given:
            return ()
        rows = self.queries if choice.rows == 1 else self._tiles(choice)
        axes = ("B", "1" if choice.share == "all" else self.list_heads(choice), rows, "n")
        return (Buffer(choice.name, axes, "int", Lifetime.CALLER, f"n <= {choice.most}" if choice.most else ""),)

    def list_heads(self, choice: Choice) -> str:
        pattern = self.plan.pattern
        return str((pattern.query_heads or "Hq") if choice.share == "head" else (pattern.kv_heads or "Hkv"))

    def per_list(self, name: str, choice: Choice) -> Buffer:
        """A number for each list and query."""
        return Buffer(name, ("B", self.list_heads(choice), self.queries), WIDE, Lifetime.CALL)

    def made(self, name: str, axes: tuple[str, ...], dtype: str, capacity: str = "") -> Buffer:
        return Buffer(name, axes, dtype, Lifetime.CALL, capacity)

    def gradient(self, buffer: Buffer) -> Buffer:
        owner, dot, name = buffer.name.rpartition(".")
        return replace(buffer, name=f"{owner}{dot}d{name}", lifetime=Lifetime.CALL)

    def gradients(self, buffers: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
        return tuple(self.gradient(one) for one in buffers)

    def key_gradients(self, softmax: SoftmaxPlan) -> tuple[Buffer, ...]:
        return tuple(one for sweep in softmax.sweeps for one in self.gradients_of(softmax, sweep.stream))

    def gradients_of(self, softmax: SoftmaxPlan, stream: Stream) -> tuple[Buffer, ...]:
        """dK and dV of a stream; where V is the front of K, they are added up later."""
        keys = self.stream_of(softmax, stream)
        return self.gradients(keys if len(keys) == 2 else (keys[0], replace(keys[0], name=f"v of {keys[0].name}")))

    def delta(self, softmax: SoftmaxPlan) -> Buffer:
        return replace(self.result(softmax.name)[1], name=f"{softmax.name}.delta")

    def _query(self, softmax: SoftmaxPlan) -> Query:
        found = self.plan.pattern.input(softmax.softmax.query)
        assert isinstance(found, Query)
        return found

    def _heads(self, query: Query) -> str:
        return str(query.heads or self.plan.pattern.query_heads or "Hq")

    def _map(self, choice: Choice) -> Buffer:
        """A set that is given or drawn, or selected for tiles of rows, as a map."""
        rows, units = self._tiles(choice), f"M / {choice.unit}"
        return Buffer(f"{choice.name} map", ("B", self.list_heads(choice), rows, units), "bool", Lifetime.CALL)

    def _tiles(self, choice: Choice) -> str:
        return "1" if choice.for_all else f"{self.queries} / {choice.rows}"

    def _of_call(self, name: str, axes: tuple[str, ...], lifetime: Lifetime = Lifetime.CALL) -> Buffer:
        return Buffer(name, ("B", *axes), LIKE_Q, lifetime)
