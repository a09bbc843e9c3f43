"""Nodes, constants and names of one graph or function body, on onnx-ir.

A builder appends nodes in the order of the calls. Names follow scopes, so that a node of layer 3
can be found by its name; constants are shared. A graph keeps constants as initializers, a function,
which has none, as Constant nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

_Attribute = int | float | str | Sequence[int] | ir.Graph | ir.Attr  # a DataType is an int
Attributes = Mapping[str, _Attribute]

# Beyond every sequence, as an end of Slice that means "up to the end".
END = 2**62


class GraphBuilder:
    """Collects the nodes of one graph, or of one function body with `in_function`."""

    def __init__(self, *, opset: int, in_function: bool = False, prefix: str = "") -> None:
        """Start empty."""
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.domains: set[str] = set()
        self._in_function = in_function
        self._scope = prefix
        self._counts: Counter[str] = Counter()
        self._constants: dict[object, ir.Value] = {}

    def body(self, name: str) -> GraphBuilder:
        """Return a builder of a subgraph, which shares names and constants with this one."""
        inner = GraphBuilder(opset=self.opset, in_function=self._in_function)
        inner._scope = f"{self._scope}{name}."
        inner._counts = self._counts
        inner._constants = self._constants
        inner.initializers = self.initializers
        inner.domains = self.domains
        return inner

    @contextmanager
    def scope(self, name: str) -> Generator[None]:
        """Begin the names of what is made inside with `name`."""
        before, self._scope = self._scope, f"{self._scope}{name}."
        try:
            yield
        finally:
            self._scope = before

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        attributes: Attributes | None = None,
        domain: str = "",
        name: str | None = None,
    ) -> ir.Value:
        """Append a node with one output and return that."""
        (output,) = self.ops(
            op_type, *inputs, attributes=attributes, domain=domain, names=(name or "",)
        )
        return output

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        attributes: Attributes | None = None,
        domain: str = "",
        names: Sequence[str],
    ) -> tuple[ir.Value, ...]:
        """Append a node with an output per name; an empty name becomes one."""
        given = {key: _attribute(key, value) for key, value in (attributes or {}).items()}
        outputs = [ir.Value(name=self._name(name or op_type)) for name in names]
        node = ir.Node(
            domain,
            op_type,
            inputs,
            given.values(),
            outputs=outputs,
            name=outputs[0].name,
        )
        self.nodes.append(node)
        self.domains.add(domain)
        return tuple(outputs)

    def add_initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Make a tensor part of the graph under its own name."""
        assert not self._in_function
        name = tensor.name
        assert name is not None
        assert name not in self.initializers
        shape = tensor.shape
        assert isinstance(shape, ir.Shape)
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, const_value=tensor, type=kind, shape=shape)
        self.initializers[name] = value
        return value

    def integers(self, *values: int) -> ir.Value:
        """Return an int64 vector."""
        name = "ints." + "_".join(str(value) for value in values)
        return self.constant(np.array(values, dtype=np.int64), name)

    def integer(self, value: int) -> ir.Value:
        """Return an int64 scalar."""
        return self.constant(np.array(value, dtype=np.int64), f"int.{value}")

    def number(self, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Return a scalar of a floating dtype."""
        array = np.array(value, dtype=dtype.numpy())
        return self.constant(array, f"number.{dtype.name.lower()}.{value!r}")

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """Return a constant; the same name means the same values."""
        found = self._constants.get(name)
        if found is None:
            found = self._make_constant(array, name)
            self._constants[name] = found
        return found

    def value(self, name: str, dtype: ir.DataType, shape: Sequence[int] | None = None) -> ir.Value:
        """Make an input of a body."""
        size = None if shape is None else ir.Shape(shape)
        return ir.Value(name=self._name(name), type=ir.TensorType(dtype), shape=size)

    def _make_constant(self, array: np.ndarray, name: str) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        if not self._in_function:
            return self.add_initializer(tensor)
        value = ir.Value(name=self._name(name))
        node = ir.Node("", "Constant", (), (ir.AttrTensor("value", tensor),), outputs=(value,))
        self.nodes.append(node)
        return value

    def _name(self, base: str) -> str:
        name = self._scope + base
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}_{self._counts[name]}"

    # What layers say often.

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape to fixed sizes; 0 keeps a size, -1 is what is left."""
        return self.op("Reshape", x, self.integers(*shape))

    def transpose(self, x: ir.Value, *order: int) -> ir.Value:
        """Reorder axes."""
        return self.op("Transpose", x, attributes={"perm": order})

    def concat(self, *parts: ir.Value, axis: int, name: str | None = None) -> ir.Value:
        """Join along an axis."""
        return self.op("Concat", *parts, attributes={"axis": axis}, name=name)

    def split(self, x: ir.Value, sizes: Sequence[int], *, axis: int = -1) -> tuple[ir.Value, ...]:
        """Cut along an axis."""
        names = [""] * len(sizes)
        return self.ops("Split", x, self.integers(*sizes), attributes={"axis": axis}, names=names)

    def slice(self, x: ir.Value, start: int, stop: int, *, axis: int) -> ir.Value:
        """Take a part of an axis."""
        integers = self.integers
        return self.op("Slice", x, integers(start), integers(stop), integers(axis))

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert to a dtype."""
        return self.op("Cast", x, attributes={"to": dtype})

    def silu(self, x: ir.Value) -> ir.Value:
        """Return x sigmoid(x)."""
        return self.op("Mul", x, self.op("Sigmoid", x))


def reference(name: str, value: str, kind: ir.AttributeType) -> ir.Attr:
    """Return a node's attribute that is the function's attribute `value`."""
    return ir.RefAttr(name, value, kind)


def _attribute(name: str, value: _Attribute) -> ir.Attr:
    if isinstance(value, ir.Attr):
        return value
    if isinstance(value, ir.Graph):
        return ir.AttrGraph(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, int):
        return ir.AttrInt64(name, int(value))
    return ir.AttrInt64s(name, list(value))
