"""ONNX clean-up by onnxscript: constants folded, batch norms folded into convolutions, what nothing uses dropped.

torch's own `optimize=True` does the same, and also tries to turn pairs of slices into splits by looking at every pair
of nodes: more than a quarter of the time that exporting torchvision's swin_t takes.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

_ROUNDS = 2
_RULES = (
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_gemm_rule,
)


def optimise(model: ir.Model) -> None:
    """Simplify an ONNX model in place, without a change to what it computes."""
    passes.InlinePass()(model)
    rewrite = RewritePass(_RULES)
    for _ in range(_ROUNDS):
        folded = fold_constants_ir(model).modified
        changed = rewrite(model).modified
        _drop_unused(model)
        if not (folded or changed):
            break
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _drop_unused(model: ir.Model) -> None:
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)


def keep_zeros_in_maxima(model: ir.Model) -> None:
    """Name the axes of every padding that a maximum is taken over.

    ONNX Runtime makes one MaxPool of a Pad with zeros and a MaxPool, whose own padding is below any number: where all
    of a window is negative the result differs (seen in 1.31). It leaves a Pad that names its axes alone.
    """
    for graph in model.graphs():
        for node in [n for n in graph if n.op_type == "Pad" and len(n.inputs) < _PAD_INPUTS]:
            maxima = [user for user, _ in node.outputs[0].uses() if user.op_type == "MaxPool"]
            if not maxima:
                continue
            rank = 2 + len(maxima[0].attributes["kernel_shape"].as_ints())
            axes = ir.tensor(list(range(rank)), name=f"{node.outputs[0].name}_axes")
            value = ir.Value(name=axes.name, const_value=axes, shape=ir.Shape([rank]), type=ir.TensorType(axes.dtype))
            graph.register_initializer(value)
            node.resize_inputs(_PAD_INPUTS)
            node.replace_input_with(_PAD_INPUTS - 1, value)


_PAD_INPUTS = 4
"""Data, pads, value, axes."""
