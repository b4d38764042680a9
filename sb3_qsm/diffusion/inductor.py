"""How the updates are compiled. Imports TorchInductor: import it only to compile."""

from collections.abc import Sequence
from typing import Any

import torch as th
import torch._inductor.inductor_prims  # registers one of the operators that are inserted
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from sb3_qsm.diffusion.linear import MIN_ROWS, MIN_WEIGHTS, _matmul, prefers_onednn

_LIBRARY = th.library.Library("sb3_qsm", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(th.Tag.flexible_layout,))  # type: ignore[no-untyped-call]
_LIBRARY.impl("linear", _matmul, "CPU")  # type: ignore[no-untyped-call]


@th.library.register_fake("sb3_qsm::linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _linear_shape(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class CpuPass(CustomGraphPass):
    """
    Changes to a graph on the CPU, forward and backward.

    :param onednn: Whether to replace the float32 matrix products by oneDNN's
    """

    def __init__(self, onednn: bool) -> None:
        self.onednn = onednn

    def __call__(self, graph: Graph) -> None:
        """
        Make them.

        :param graph: Graph of ATen operators, changed in place
        """
        for node in list(graph.nodes):
            if node.target is th.ops.aten.rsqrt.default:
                self._keep(graph, node)
            elif self.onednn and node.target is th.ops.aten.mm.default and node.args[0].meta["val"].shape[1] > 1:
                a, b = node.args
                self._replace(graph, node, a, b, None)
            elif (
                self.onednn
                and node.target is th.ops.aten.addmm.default
                and not node.kwargs
                and node.args[0].meta["val"].dim() == 1
            ):
                bias, a, b = node.args
                self._replace(graph, node, a, b, bias)
            elif node.target is th.ops.aten.mm.default and node.args[0].meta["val"].shape[1] == 1:
                self._outer(graph, node)
        for node in list(graph.nodes):
            if node.target is th.ops.aten.addmm.default and not node.kwargs and node.meta["val"].device.type == "cpu":
                self._split(graph, node)

    @staticmethod
    def _keep(graph: Graph, node: Node) -> None:
        """Have the reciprocal square roots, one a row in layer normalisation, in memory: else each use makes them anew."""
        value = node.meta["val"]
        if value.device.type != "cpu":
            return
        with graph.inserting_after(node):
            kept = graph.call_function(th.ops.prims.inductor_force_stride_order.default, (node, list(value.stride())))
        kept.meta["val"] = value
        node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)

    @staticmethod
    def _outer(graph: Graph, node: Node) -> None:
        """Have an outer product as a multiplication, which is fused with what follows."""
        if node.meta["val"].device.type != "cpu":
            return
        with graph.inserting_before(node):
            product = graph.call_function(th.ops.aten.mul.Tensor, node.args)
            product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)

    @staticmethod
    def _split(graph: Graph, node: Node) -> None:
        """
        Have an addition after the product instead of in it: there it is fused with what follows, while the product itself
        would first copy what is added into its result.
        """
        shift, a, b = node.args
        value = node.meta["val"]
        with graph.inserting_before(node):
            product = graph.call_function(th.ops.aten.mm.default, (a, b))
            product.meta["val"] = value
            total = graph.call_function(th.ops.aten.add.Tensor, (product, shift))
            total.meta["val"] = value
        node.replace_all_uses_with(total)
        graph.erase_node(node)

    def _replace(self, graph: Graph, node: Node, a: Node, b: Node, bias: Node | None) -> None:
        """Have oneDNN compute a @ b + bias, if that is worth a call."""
        product = node.meta["val"]
        inner, (rows, columns) = a.meta["val"].shape[1], product.shape
        if product.device.type != "cpu" or product.dtype != th.float32 or inner < 2:
            return
        with graph.inserting_before(node):
            # oneDNN copies an input that is not contiguous: the smaller of the two is it
            if bias is None and not a.meta["val"].is_contiguous() and columns < rows:
                if columns < MIN_ROWS or rows * inner < MIN_WEIGHTS:
                    return
                product_t = self._linear(graph, _transpose(graph, b), a, None, product.t())
                new = _transpose(graph, product_t)
            else:
                if rows < MIN_ROWS or columns * inner < MIN_WEIGHTS:
                    return
                new = self._linear(graph, a, _transpose(graph, b), bias, product)
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    @staticmethod
    def _linear(graph: Graph, x: Node, weight: Node, bias: Node | None, product: th.Tensor) -> Node:
        node = graph.call_function(th.ops.sb3_qsm.linear.default, (x, weight, bias))
        node.meta["val"] = product.new_empty(product.shape)
        return node

    def uuid(self) -> Any:
        """
        Tell cached graphs apart.

        :return: Hash of this file and of what the pass does
        """
        return get_hash_for_files((__file__,), str(self.onednn))


def _transpose(graph: Graph, node: Node) -> Node:
    transposed = graph.call_function(th.ops.aten.permute.default, (node, [1, 0]))
    transposed.meta["val"] = node.meta["val"].t()
    return transposed


def _guards(guards: Sequence[Any]) -> list[bool]:
    """
    What to look at before each call: the arguments and PyTorch's own state. The networks and the modules of a model stay the
    same objects, and to look at all of their parameters takes half a millisecond.
    """
    return [guard.name == "" or guard.name.startswith("args") for guard in guards]


def options(device: th.device) -> dict[str, Any]:
    """
    :param device: Device of the networks
    :return: Options of ``torch.compile`` for the updates
    """
    return {
        "guard_filter_fn": _guards,
        "post_grad_custom_post_pass": CpuPass(prefers_onednn()),
        # The calls of the kernels in C++ too: there are about a hundred in an update
        "cpp_wrapper": device.type == "cpu",
    }
