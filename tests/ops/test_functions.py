"""Functions of torch between two layers, beyond those whose operator has a rule of the same name.

Which ones leave their input uncut is listed, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_plan, random_dead
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

from surgery.capture import tracing
from surgery.capture.tracing import trace
from surgery.coupling.coupler import couple
from surgery.cutting import check, cut
from surgery.ops import rules

ARGUMENTS = {  # of features x and y of shape (2, 8, 10, 10) between 0 and 1: functions of torch
    "x": """
        absolute adjoint all aminmax angle any arccos arcsin arcsinh arctan arctanh argsort atleast_1d
        atleast_2d atleast_3d broadcast_tensors conj conj_physical count_nonzero fix flipud isinf isneginf isposinf
        isreal sgn trapz gradient det inverse matrix_exp pinverse qr resolve_conj
        cumulative_trapezoid deg2rad diagflat diagonal diff flatten fliplr frexp isfinite logit max mean median min
        msort nanmean nanmedian nansum negative norm positive prod rad2deg ravel real rot90 sinc sort squeeze std
        std_mean sum trapezoid tril triu var var_mean special.expit special.entr special.ndtr special.round linalg.norm
        linalg.matrix_norm linalg.inv linalg.svdvals linalg.diagonal F.instance_norm F.normalize F.relu_ F.softsign
        F.tanhshrink""",
    "x, y": """
        arctan2 float_power greater greater_equal kron less less_equal polar isin F.soft_margin_loss
        F.binary_cross_entropy_with_logits F.poisson_nll_loss F.multilabel_soft_margin_loss
        clamp clip conv2d cosine_similarity dist divide floor_divide hypot inner isclose ldexp lerp:.3 logaddexp
        matmul multiply nextafter not_equal pairwise_distance remainder subtract true_divide cdist slice_scatter
        F.binary_cross_entropy F.huber_loss F.kl_div F.l1_loss F.mse_loss F.smooth_l1_loss F.hinge_embedding_loss
        linalg.solve linalg.vecdot special.xlog1py""",
    "x, y, y": "addcmul addcdiv F.margin_ranking_loss F.scaled_dot_product_attention F.triplet_margin_loss",
    "(x, y)": "cat concat concatenate column_stack dstack hstack row_stack vstack",
    "x, 2": """
        matrix_power unsafe_split vsplit
        argmax argmin cummax cummin cumprod cumsum dsplit group_norm hsplit kthvalue:3 logcumsumexp log_softmax
        logsumexp repeat_interleave softmax topk unsqueeze amax amin median mode
        max min channel_shuffle pixel_shuffle pixel_unshuffle F.softmin F.unfold F.upsample F.interpolate
        F.adaptive_avg_pool2d F.adaptive_max_pool2d F.avg_pool2d F.max_pool2d F.lp_pool2d:3""",
    "x, 2, 1": "chunk tensor_split unsafe_chunk",
    "x, 2, 3": "moveaxis movedim swapaxes swapdims transpose select",
}
EXPRESSIONS = """
F.adaptive_max_pool1d(x.flatten(2), 5) | F.adaptive_max_pool3d(x.unsqueeze(2), 5) | F.lp_pool1d(x.flatten(2), 2, 3)
F.interpolate(x.flatten(2), scale_factor=2) | F.interpolate(x.flatten(2), scale_factor=2, mode='linear')
F.interpolate(x.unsqueeze(2), scale_factor=2) | F.interpolate(x.unsqueeze(2), scale_factor=2, mode='trilinear')
F.interpolate(x.flatten(2), scale_factor=2, mode='nearest-exact')
F.interpolate(x, scale_factor=2, mode='nearest-exact')
F.interpolate(x.unsqueeze(2), scale_factor=2, mode='nearest-exact')
F.interpolate(x, scale_factor=0.5, mode='bilinear', antialias=True)
F.interpolate(x, scale_factor=0.5, mode='bicubic', antialias=True) | F.interpolate(x, scale_factor=0.5, mode='area')
F.grid_sample(x, y[:, :2].permute(0, 2, 3, 1) * 2 - 1, align_corners=False)
F.grid_sample(x, F.affine_grid(torch.eye(2, 3).expand(x.shape[0], 2, 3), x.shape))
x.index_put((ROWS[:1],), y.mean(0)) | x.index_put((x > 0.5,), torch.tensor(0.0))
x.scatter(2, y.argsort(2), y) | x.scatter_add(2, x.argsort(2), y) | x.gather(2, y.argsort(2))
x.index_add(2, ROWS, y[:, :, :2]) | x.index_fill(2, ROWS, 0.0)
x.index_copy(2, ROWS, y[:, :, :2]) | x.masked_scatter(y > 0.5, y) | x.masked_fill(y > 0.5, 0.0)
x.narrow(1, 2, 4) | x.mT | x.mH | x.clip(0.1, 0.4) | x.unflatten(1, (2, 4)) | x.expand_as(y) | x.type_as(y) | 2**x
x.broadcast_to(-1, 8, 10, 10) | x.reshape(-1, 8, 10, 10) | x.diag_embed() | x.flip(3)
x.roll((1, 2), (2, 3)) | x.repeat(1, 2, 1, 1) | x.topk(3, 1) | x.amax(1) | x.max() | x.quantile(0.5, 2)
torch.clamp(x, y.mean(), y.amax()) | torch.linalg.norm(x, dim=1) | torch.norm(x, dim=(2, 3)) | x.norm(p=1, dim=1)
x.norm(p=float('inf'), dim=1) | torch.std_mean(x, dim=(2, 3)) | F.cosine_similarity(x, y, dim=1)
F.bilinear(x.mean((2, 3)), y.mean((2, 3)), torch.ones(4, 8, 8)) | torch.meshgrid(x.sum((0, 2, 3)), y.sum((0, 2, 3)))
torch.cross(x[:, :3], y[:, :3], dim=1) | torch.tensordot(x, y, dims=([1, 2], [1, 2]))
torch.mv(x.permute(0, 2, 3, 1).reshape(-1, 8), y.mean((0, 2, 3))) | torch.dot(x.mean((0, 2, 3)), y.mean((0, 2, 3)))
torch.vdot(x.mean((0, 2, 3)), y.mean((0, 2, 3))) | torch.outer(x.mean((0, 2, 3)), y.mean((0, 2, 3)))
torch.inner(x.permute(0, 2, 3, 1), y.mean((0, 2, 3))) | x.permute(0, 2, 3, 1).matmul(y.mean((0, 2, 3)))
F.linear(x.permute(0, 2, 3, 1), y.mean((0, 2, 3))) | F.linear(x.permute(0, 2, 3, 1), y.mean((0, 2, 3)), y.mean())
F.linear(x.unflatten(1, (2, 4)).softmax(2).movedim(2, -1), torch.arange(4.0))
x.unflatten(1, (2, 4)).softmax(2).movedim(2, -1).matmul(torch.arange(4.0)) | y.mean((0, 2, 3)).matmul(x.flatten(2))
torch.einsum('nchw,c->nhw', x, y.mean((0, 2, 3))) | torch.einsum('c,d->cd', x.mean((0, 2, 3)), y.mean((0, 2, 3)))
torch.addmv(x.new_zeros(8), x.mean(0).flatten(1), y.mean((0, 1)).flatten())
torch.addbmm(x.new_zeros(8, 8), x.flatten(2), y.flatten(2).mT) | x.flatten(2) @ y.flatten(2).mT
F.layer_norm(x, (10, 10)) | F.rms_norm(x, (10, 10)) | F.local_response_norm(x, 3) | F.prelu(x, torch.full((8,), 0.2))
F.dropout1d(x.flatten(2), training=False) | F.dropout2d(x, training=False) | F.feature_alpha_dropout(x, training=False)
F.fold(F.unfold(x, 2, stride=2), (10, 10), 2, stride=2) | F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)
F.pad(x, (1, 1, 1, 1), mode='circular') | F.pad(x.flatten(2), (1, 1), mode='reflect') | x * torch.linspace(0, 1, 10)
torch.block_diag(x.mean((2, 3)), y.mean((2, 3))) | torch.fft.rfft2(x).abs() | x.softmax(1)
torch.arccosh(x + 1) | torch.mvlgamma(x + 1, 2)
torch.take_along_dim(x, y.argsort(2), 2) | torch.renorm(x, 2, 2, 1.0) | torch.select_scatter(x, y[:, :, 0], 2, 1)
torch.baddbmm(x.new_zeros(8, 8), x.flatten(2), y.flatten(2).mT) | torch.ger(x.mean((0, 2, 3)), y.mean((0, 2, 3)))
torch.addr(x.new_zeros(8, 8), x.mean((0, 2, 3)), y.mean((0, 2, 3))) | F.max_pool3d(x.unsqueeze(2), (1, 2, 2))
torch.chain_matmul(x.mean((2, 3)), y.mean((2, 3)).mT)
F.lp_pool3d(x.unsqueeze(2), 2, (1, 2, 2)) | torch.trace(x.mean((2, 3)))
x.contiguous().as_strided((x.shape[0], 8, 10, 10), x.contiguous().stride()) | x.cumsum(1)
"""

LEFT_UNCUT = {
    "depends on every index of this axis": ["x.topk(3, 1)", "x.amax(1)", "x.cumsum(1)", "torch.aminmax(x)"],
    "softmax runs over this axis": ["x.softmax(1)"],
    "pooled or resized": ["F.local_response_norm(x, 3)"],  # pools over channels
    "meets an axis that is not cut": ["torch.diagflat(x)", "torch.gradient(x)"],
    "no rule for this operator": [
        # one number of all values that no other operator computes without them
        *("torch.max(x)", "x.max()", "torch.min(x)", "torch.median(x)", "torch.nanmedian(x)", "torch.prod(x)"),
        # matrices as a whole
        *("torch.linalg.inv(x)", "torch.linalg.svdvals(x)", "torch.linalg.solve(x, y)", "torch.fft.rfft2(x).abs()"),
        *("torch.det(x)", "torch.inverse(x)", "torch.matrix_exp(x)", "torch.pinverse(x)", "torch.qr(x)"),
        "torch.trace(x.mean((2, 3)))",
        # indices in an order of their own
        *("x.masked_scatter(y > 0.5, y)", "torch.diagonal(x)", "torch.linalg.diagonal(x)"),
        "x.contiguous().as_strided((x.shape[0], 8, 10, 10), x.contiguous().stride())",
        "F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)",
        # products of three values, distances
        *("F.bilinear(x.mean((2, 3)), y.mean((2, 3)), torch.ones(4, 8, 8))", "torch.cdist(x, y)"),
        "torch.addbmm(x.new_zeros(8, 8), x.flatten(2), y.flatten(2).mT)",
        # rare
        *("torch.angle(x)", "torch.polar(x, y)", "torch.isin(x, y)"),
        *("torch.frexp(x)", "torch.isclose(x, y)", "torch.nextafter(x, y)", "F.hinge_embedding_loss(x, y)"),
        *("torch.special.entr(x)", "torch.special.round(x)"),
    ],
}

NOT_TRIED = r"""
.*_copy .*quantize.* .*fake_quant q_.* int_repr fbgemm_.* miopen_.* native_.* batch_norm_.* .*_with_indices sym_.*
(lstm|gru|rnn_tanh|rnn_relu)(_cell)? choose_qparams_optimized .*[dsp]mm saddmm sspaddmm spmm smm
is_.* allclose equal numel get_device
fractional_max_.* bernoulli binomial multinomial poisson gumbel_softmax dropout3d autocast empty_like
nonzero nonzero_static masked_select argwhere unique_consecutive bincount histc histogram histogramdd hash_tensor
bitwise_left_shift bitwise_right_shift gcd lcm unravel_index one_hot cartesian_prod combinations
cholesky cholesky_inverse cholesky_solve geqrf lobpcg logdet lu_solve lu_unpack ormqr orgqr slogdet svd
triangular_solve norm_except_dim nuclear_norm frobenius_norm corrcoef cov pdist diag diagonal_scatter as_strided_scatter
complex imag view_as_complex view_as_real resolve_neg stft istft conv_tbc convolution slice_inverse
affine_grid_generator grid_sampler_2d grid_sampler_3d nanquantile polygamma put take bucketize cross_entropy
index_reduce searchsorted unsafe_split_with_sizes
cosine_embedding_loss ctc_loss embedding_bag gaussian_nll_loss linear_cross_entropy max_unpool.* multi_margin_loss
multilabel_margin_loss nll_loss triplet_margin_with_distance_loss multi_head_attention_forward
"""
"""Functions of backends, for tensors that are quantised, sparse, integer or complex, recurrent or random ones, those
whose sizes depend on values, factorisations, and others that are rare in a network's forward."""


def _calls() -> list[str]:
    """Expressions of x and y."""
    found = [call for line in EXPRESSIONS.strip().splitlines() for call in line.split(" | ")]
    for arguments, names in ARGUMENTS.items():
        for name, _, more in (entry.partition(":") for entry in names.split()):
            given = f"{arguments}, {more}" if more else arguments
            found.append(f"{name if name.startswith('F.') else f'torch.{name}'}({given})")
    return found


def test_every_function_of_torch_has_a_rule_or_is_tried_here_or_listed() -> None:
    known = {name.split(".")[1] for name in rules()} | set(re.findall(r"\w+", " ".join(_calls())))
    functions = get_overridable_functions()
    names = {f.__name__ for module in (torch, F) for f in functions[module]} - known
    listed = re.compile("|".join(NOT_TRIED.split()))
    assert [n for n in sorted(names) if not (n.startswith("_") or n.endswith("_") or listed.fullmatch(n))] == []


class Between(nn.Module):
    """A function of two convolutions' results before another convolution."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.one, self.two, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        names = {"torch": torch, "F": F, "ROWS": torch.tensor([0, 1])}
        self.function: Callable[[Tensor, Tensor], Any] = eval(f"lambda x, y: {call}", names)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, 10, 10) to (N, 2, 10, 10)."""
        x, y = self.one(image).sigmoid(), self.two(image).sigmoid()
        result = self.function(x, y)
        if not (isinstance(result, Tensor) and result.shape == x.shape and result.dtype == x.dtype):
            result = x * sum(r.to(x.dtype).sum() for r in ([result] if isinstance(result, Tensor) else result))
        return self.after(result) + image[:, :2]  # so that the output varies, whatever the function


class Side(nn.Module):
    """Several networks on one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The results of all branches."""
        return tuple(branch(image) for branch in self.branches)


def test_functions_of_torch_are_cut_through_but_for_the_listed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "slow_to_capture", lambda *_: True)  # with fixed height and width
    monkeypatch.setattr(tracing, "wrong_at_other_batch", lambda *_: "")  # single batches are guarded against
    calls = _calls()
    program = trace(Side(*map(Between, calls)), torch.randn(2, 3, 10, 10))
    coupling = couple(program)
    cuttable = {site.tensor for group in coupling.groups for site in group.sites if site.axis == 0}
    reasons = {f.tensor: f.reason for f in reversed(coupling.frozen) if f.axis == 0}
    uncut = {call: name for k, call in enumerate(calls) if (name := f"branches.{k}.one.weight") not in cuttable}
    found = {why: [call for call, name in uncut.items() if why in reasons[name]] for why in LEFT_UNCUT}
    assert {why: sorted(named) for why, named in found.items()} == {w: sorted(n) for w, n in LEFT_UNCUT.items()}
    assert len(uncut) == sum(map(len, LEFT_UNCUT.values()))
    plan = make_plan(program, coupling, random_dead(coupling, 0))
    assert check(program, plan, cut(program, plan, coupling=coupling), coupling=coupling).error_float64 <= 1e-10
