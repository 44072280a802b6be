"""Attention operators of other libraries: look-alikes with their names and arguments, found and replaced by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import capture, relative_error, targets
from support.tiny_dit import (
    LATENTS,
    OP,
    SCALE,
    TinyDiT,
    check_sparse,
    dense_attention,
    plan_everything,
    run_rewritten,
    sparse_plan,
    token_mask,
)
from torch import Tensor


def attend(q, k, v, scale=None, transposed=True):
    if transposed:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return (out.transpose(1, 2) if transposed else out).contiguous()


def register(name, transposed=True, outputs=2):
    """Decorator: an operator `name` with the signature of a function, that computes attention of its q, k and v."""

    def wrap(signature):
        import inspect

        parameters = list(inspect.signature(signature, eval_str=True).parameters)

        def run(*args, **kwargs):
            given = dict(zip(parameters, args, strict=False)) | kwargs
            q, k, v = (given[x] for x in parameters[:3])
            scale = next((given[x] for x in ("softmax_scale", "scale", "sm_scale") if x in given), None)
            if q.dim() == 3:  # packed: `cu` says where sequences begin, all as long as each other
                n = (given.get("cu_seqlens_q") if "cu_seqlens_q" in given else None).numel() - 1
                out = attend(*(x.unflatten(0, (n, -1)) for x in (q, k, v)), scale).flatten(0, 1)
            else:
                out = attend(q, k, v, scale, transposed)
            rest = [q.new_zeros(q.shape[:-1], dtype=torch.float32) for _ in range(outputs - 1)]
            return (out, *rest) if outputs > 1 else out

        def fake(*args, **kwargs):
            q = args[0] if args else kwargs[parameters[0]]
            rest = [q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(outputs - 1)]
            return (q.new_empty(q.shape), *rest) if outputs > 1 else q.new_empty(q.shape)

        schema = torch.library.infer_schema(signature, mutates_args=())
        op = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    return wrap


Two = tuple[Tensor, Tensor]


@register("flash_attn::_flash_attn_forward", outputs=4)
def flash2(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip


@register("flash_attn::_flash_attn_varlen_forward", outputs=4)
def flash2_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip


@register("_diffusers_flash_attn_3::_flash_attn_forward_lookalike")
def unknown(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> Two: ...


@register("_diffusers_flash_attn_4::_flash_attn_forward")
def diffusers3(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    qv: Tensor | None = None, q_descale: Tensor | None = None, attention_chunk: int = 0, softcap: float = 0.0,
    num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
) -> Two: ...  # fmt: skip


@register("flash_attn_3::fwd", outputs=4)
def flash3(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
    q_v: Tensor | None = None, cu_seqlens_q: Tensor | None = None, softmax_scale: float | None = None,
    is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0,
    softcap: float = 0.0, num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip


@register("xformers_flash::flash_fwd", outputs=3)
def xformers_flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, p: float, softmax_scale: float, is_causal: bool,
    window_left: int, window_right: int, return_softmax: bool, block_tables: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@register("xformers::efficient_attention_forward_cutlass")
def xformers_cutlass(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None, dropout_p: float,
    custom_mask_type: int, compute_log_sumexp: bool = False, scale: float | None = None,
    seqlen_k: Tensor | None = None, window_size: int | None = None,
) -> Two: ...  # fmt: skip


@register("sageattention::sageattn", transposed=False, outputs=1)
def sage(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, sm_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor: ...  # fmt: skip


@register("sageattention::sageattn_nhd", outputs=1)
def sage_nhd(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool = False, sm_scale: float | None = None
) -> Tensor: ...


@register("sageattention::qk_int8_sv_f16_accum_f32_attn", transposed=False, outputs=1)
def sage_quantised(
    query: Tensor, key: Tensor, value: Tensor, query_scale: Tensor, tensor_layout: int, is_causal: int
) -> Tensor: ...


def flash2_plain(q, k, v, **changes):
    given = dict(dropout_p=0.0, softmax_scale=SCALE, causal=False, window_size_left=-1, window_size_right=-1,
                 softcap=0.0, alibi_slopes=None, return_softmax=False) | changes  # fmt: skip
    return flash2(q, k, v, *given.values())


def packed(starts):
    return lambda q, k, v: flash2_varlen(q, k, v, starts(), starts(), 60, 60, 0.0, SCALE, False)


def starts_of(lengths, tensor=None):
    """As the original repositories write it: the lengths of the sequences, added up."""
    lengths = torch.tensor(lengths, dtype=torch.int32) if tensor is None else tensor
    return torch.cat([lengths.new_zeros([1]), lengths]).cumsum(0, dtype=torch.int32)


@torch.compiler.allow_in_graph
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    return attend(q, k, v, softmax_scale)


flash_attn_func.__module__ = "flash_attn.flash_attn_interface"


REPLACED = {
    "function": (lambda q, k, v: flash_attn_func(q, k, v, causal=False), "bshd"),
    "flash-2": (flash2_plain, "bshd"),
    "flash-2-packed-arange": (packed(lambda: torch.arange(0, 121, 60, dtype=torch.int32)), "thd"),
    "flash-2-packed-literal": (packed(lambda: torch.tensor([0, 60, 120]).to(torch.int32)), "thd"),
    "flash-2-packed-lengths": (packed(lambda: starts_of([60, 60])), "thd"),
    "flash-2-packed-repeated": (packed(lambda: starts_of([60] * 2, torch.full((2,), 60))), "thd"),
    "diffusers-flash": (lambda q, k, v: diffusers3(q, k, v, num_splits=4), "bshd"),
    "flash-3": (lambda q, k, v: flash3(q, k, v, softmax_scale=0.3), "bshd"),
    "xformers-flash": (
        lambda q, k, v: xformers_flash(q, k, v, None, None, None, 60, 60, 0.0, 0.3, False, -1, -1, False, None),
        "bshd",
    ),
    "xformers-cutlass": (lambda q, k, v: xformers_cutlass(q, k, v, None, None, None, 60, 60, 0.0, 0), "bshd"),
    "sage": (lambda q, k, v: sage(q, k, v), "bhsd"),
    "sage-nhd": (lambda q, k, v: sage_nhd(q, k, v, "NHD", sm_scale=0.3), "bshd"),
    "aten-flash": (lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v), "bhsd"),
    "aten-math": (lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v, scale=0.3), "bhsd"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_by_name(name):
    attention, layout = REPLACED[name]
    given_scale = name in ("flash-3", "xformers-flash", "sage-nhd", "aten-math")
    check_sparse(TinyDiT(only_output(attention), layout), scale=0.3 if given_scale else SCALE)


def only_output(attention):
    def attend(q, k, v):
        out = attention(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def lse_used(q, k, v):
    out, lse = diffusers3(q, k, v)
    return out * lse.unsqueeze(-1)


DENSE = {
    "causal": (lambda q, k, v: flash2_plain(q, k, v, causal=True), "causal"),
    "window": (lambda q, k, v: flash2_plain(q, k, v, window_size_left=8), "argument"),
    "softcap": (lambda q, k, v: flash2_plain(q, k, v, softcap=30.0), "argument"),
    "alibi": (lambda q, k, v: flash2_plain(q, k, v, alibi_slopes=torch.ones(2)), "argument"),
    "dropout": (lambda q, k, v: flash2_plain(q, k, v, dropout_p=0.1), "dropout"),
    "extra-query": (lambda q, k, v: diffusers3(q, k, v, qv=q), "argument"),
    "lse": (lse_used, "more_outputs"),
    "bias": (
        lambda q, k, v: xformers_cutlass(q, k, v, torch.eye(60)[None, None], None, None, 60, 60, 0.0, 0),
        "additive_mask",
    ),
    "custom-mask": (lambda q, k, v: xformers_cutlass(q, k, v, None, None, None, 60, 60, 0.0, 1), "argument"),
    "quantised": (
        lambda q, k, v: sage_quantised(*(x.transpose(1, 2) for x in (q, k, v)), q[..., 0], 1, 0).transpose(1, 2),
        "quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_left_dense_with_a_reason(name):
    attention, code = DENSE[name]
    ((context, gm),) = capture(TinyDiT(only_output(attention), "bshd"), LATENTS, build_plan=plan_everything)
    (site,) = context.sites
    assert site.role == "video_self_attention"
    assert site.reason.code == code
    assert OP not in targets(gm)


@pytest.mark.parametrize("ends", [[0, 50, 120], [0, 60, 119]], ids=["uneven", "short"])
def test_packed_sequences_of_unequal_length_stay_dense(ends):
    attention = packed(lambda: torch.tensor(ends, dtype=torch.int32))
    ((context, gm),) = capture(TinyDiT(only_output(attention), "thd"), LATENTS, build_plan=plan_everything)
    assert context.sites[0].reason.code == "packed_sequences"
    assert OP not in targets(gm)


def known_later(end):
    """Starts of one sequence of which the graph does not show the values."""
    return lambda q: torch.tensor([0, end]) + q.isnan().any().long()


@pytest.mark.parametrize("end", [60, 53])
def test_one_packed_sequence_of_any_length(end):
    """Keys behind its end are not attended, and queries there are nobody's."""
    latents, starts = LATENTS[:1], known_later(end)
    model = TinyDiT(
        only_output(lambda q, k, v: flash2_varlen(q, k, v, *[starts(q)] * 2, 60, 60, 0.0, SCALE, False)), "thd"
    )
    plan = sparse_plan()
    for build, allowed in ((plan_everything, torch.ones(60, 60).bool()), (lambda site: plan, token_mask(plan))):
        out, site, _ = run_rewritten(model, (latents,), build)
        assert site.replaced, site.reason
        with torch.no_grad():
            expected = dense_attention(*model.operands(latents), allowed, keep=(torch.arange(60) < end)[None])
        assert relative_error(out[:end], expected.flatten(0, 1)[:end]) < 1e-5


def test_two_packed_sequences_of_lengths_known_later_stay_dense():
    def attention(q, k, v):
        starts = torch.tensor([0, 60, 120]) + q.isnan().any().long()
        return flash2_varlen(q, k, v, starts, starts, 60, 60, 0.0, SCALE, False)

    ((context, _),) = capture(TinyDiT(only_output(attention), "thd"), LATENTS, build_plan=plan_everything)
    assert context.sites[0].reason.code == "packed_sequences"


def test_unknown_operators_are_no_attention():
    ((context, _),) = capture(TinyDiT(unknown, "bshd"), LATENTS)
    assert not context.sites
