"""oneDNN in compiled graphs, see :mod:`sb3_qsm.diffusion.linear`. Imports TorchInductor: import it only to compile."""

from typing import Any

import torch as th
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from sb3_qsm.diffusion.linear import MIN_ROWS, MIN_WEIGHTS, _matmul, prefers_onednn

_LIBRARY = th.library.Library("sb3_qsm", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(th.Tag.flexible_layout,))  # type: ignore[no-untyped-call]
_LIBRARY.impl("linear", _matmul, "CPU")  # type: ignore[no-untyped-call]


@th.library.register_fake("sb3_qsm::linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _linear_shape(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class OneDnnLinear(CustomGraphPass):
    """Replaces the float32 matrix products of a graph on the CPU, forward and backward, by oneDNN's."""

    def __call__(self, graph: Graph) -> None:
        """
        Replace them.

        :param graph: Graph of ATen operators, changed in place
        """
        for node in list(graph.nodes):
            if node.target is th.ops.aten.mm.default:
                bias, (a, b) = None, node.args
            elif node.target is th.ops.aten.addmm.default and not node.kwargs and node.args[0].meta["val"].dim() == 1:
                bias, a, b = node.args
            else:
                continue
            product = node.meta["val"]
            inner, (rows, columns) = a.meta["val"].shape[1], product.shape
            if product.device.type != "cpu" or product.dtype != th.float32 or inner < 2:
                continue
            with graph.inserting_before(node):
                # oneDNN copies an input that is not contiguous: the smaller of the two is it
                if bias is None and not a.meta["val"].is_contiguous() and columns < rows:
                    if columns < MIN_ROWS or rows * inner < MIN_WEIGHTS:
                        continue
                    product_t = self._linear(graph, _transpose(graph, b), a, None, product.t())
                    new = _transpose(graph, product_t)
                else:
                    if rows < MIN_ROWS or columns * inner < MIN_WEIGHTS:
                        continue
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

        :return: Hash of this file
        """
        return get_hash_for_files((__file__,))


def _transpose(graph: Graph, node: Node) -> Node:
    transposed = graph.call_function(th.ops.aten.permute.default, (node, [1, 0]))
    transposed.meta["val"] = node.meta["val"].t()
    return transposed


def options(onednn: CustomGraphPass) -> dict[str, Any]:
    """
    :param onednn: The pass above
    :return: Options of ``torch.compile`` for the updates
    """
    # The networks of a model stay the same objects: looking at each of their parameters before every call costs half a
    # millisecond
    found: dict[str, Any] = {"guard_filter_fn": th.compiler.skip_guard_on_all_nn_modules_unsafe}
    if prefers_onednn():
        found["post_grad_custom_post_pass"] = onednn
    return found
