"""Wrong scores of windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from infllmv2_conformance.mutants.model import Around, Edit, Mutant

from .faults import (
    FIRST_HISTORY,
    LONGEST_HISTORY,
    Arguments,
    positions,
    shared_scale,
    wrapped_offsets,
)

_LSE = "lse = normaliser.logsumexp(dim=-1, keepdim=True)"
_SCALE = "logits = logits.mul_(head_dim**-0.5).view("
_PER_HEAD = "per_head = (logits - lse).exp_()  # [HK, t, G, C]"
_SUM = "scores += per_head[:, :, head]"
_VISIBLE = "return ends <= positions[:, None]"
_NONE = "lse = torch.where(lse == -torch.inf, torch.inf, lse)"
_OWN_WINDOWS = "pad_windows(k_c1[place.windows].to(wide))"
_FUNCTIONS = ("score_windows", "score_blocks", "select")


def _edit(before: str, after: str) -> tuple[Edit, ...]:
    return (Edit("windows", before, after),)


def _approximate(inner: Callable[..., Any], given: Arguments) -> Any:
    given["config"] = replace(given["config"], lse="approximate")
    return inner(**given)


MUTANTS = (
    Mutant(
        "score.normaliser-of-four",
        "score.values-approximate",
        "Windows of K_C2 are taken to be four times as long as those of K_C1.",
        "`lse_kernel` not read, because the released model does not set it.",
        (
            Edit(
                "windows",
                "normaliser = _logits(q, k_c2, positions, c.lse_kernel_size, c.lse_kernel_stride)",
                "normaliser = _logits(q, k_c2, positions, 4 * c.kernel_size, 4 * c.kernel_stride)",
            ),
        ),
    ),
    Mutant(
        "score.no-scale",
        "score.values-exact",
        "Logits are not scaled by 1 / sqrt(D).",
        "The paper's Eq. 5 read literally.",
        _edit(_SCALE, "logits = logits.view("),
    ),
    Mutant(
        "score.approximate-for-exact",
        "score.values-exact",
        "The normaliser is always that of K_C2.",
        "A kernel with only one mode that ignores the argument.",
        wrap=Around(_FUNCTIONS, _approximate),
    ),
    Mutant(
        "score.k-c2-scored",
        "score.values-exact",
        "The windows of K_C2 are scored, each in place of four of K_C1.",
        "The wrong pointer passed on.",
        _edit(
            "logits = _logits(q, k_c1, positions,",
            "four = torch.cat([k_c2.repeat_interleave(4, 0), k_c1])[: len(k_c1)].to(q.dtype)\n"
            "    logits = _logits(q, four, positions,",
        ),
    ),
    Mutant(
        "score.normaliser-per-group",
        "score.values-exact",
        "All heads of a group share one normaliser.",
        "The softmax taken after heads were flattened into one axis.",
        _edit(_LSE, "lse = normaliser.logsumexp(dim=(2, 3), keepdim=True)"),
    ),
    Mutant(
        "score.group-mean",
        "score.values-exact",
        "Scores are averaged over the group.",
        "mean for sum, which upstream code also did for a while.",
        _edit(
            "return scores.masked_fill_(~visible,",
            "return (scores / per_head.shape[2]).masked_fill_(~visible,",
        ),
    ),
    Mutant(
        "score.group-max",
        "score.values-exact",
        "A score is the largest over the heads of the group.",
        "max for sum: the two reductions of stages 2 and 3 swapped.",
        _edit(_SUM, "scores = torch.maximum(scores, per_head[:, :, head])"),
    ),
    Mutant(
        "score.interleaved-heads",
        "score.values-exact",
        "Query head h reads key/value head h % HK.",
        "torch.repeat for repeat_interleave.",
        _edit(
            "q.unflatten(1, (num_kv_heads, group)).transpose(0, 1)  # [HK, t, G, D]",
            "q.unflatten(1, (group, num_kv_heads)).permute(2, 0, 1, 3)",
        ),
    ),
    Mutant(
        "score.bf16-logits",
        "score.values-exact",
        "Logits are rounded to bfloat16.",
        "Scores written between two kernels in the input's dtype.",
        _edit(_SCALE, "logits = logits.mul_(head_dim**-0.5).bfloat16().to(q.dtype).view("),
    ),
    Mutant(
        "score.rounded-before-sum",
        "score.values-exact",
        "Probabilities are rounded to bfloat16 before the sum over the group.",
        "A probability tile cast for a tensor-core product with ones.",
        _edit(_PER_HEAD, "per_head = (logits - lse).exp_().bfloat16().to(q.dtype)"),
    ),
    Mutant(
        "score.history-ignored",
        "score.values-exact",
        "Queries are placed at the start of their keys instead of the end.",
        "Top-left aligned causal masks, as in FlashAttention before 2.1.",
        (positions("torch.arange(self.num_queries, device=device)"),),
    ),
    Mutant(
        "score.first-history-for-all",
        "score.values-exact",
        "The history of the first sequence is used for all.",
        "One scalar cache length for a batch.",
        FIRST_HISTORY,
        functions=_FUNCTIONS,
    ),
    Mutant(
        "score.longest-history-for-all",
        "score.values-exact",
        "max_seqlen_k - max_seqlen_q is used for the history of every sequence.",
        "Lengths of the longest sequence used for all, as in a padded batch.",
        LONGEST_HISTORY,
        functions=_FUNCTIONS,
    ),
    Mutant(
        "score.neighbour-windows",
        "score.values-exact",
        "K_C1 is read one window early, from the sequence before.",
        "cu_seqlens_k divided by the stride, in place of cu_seqlens_c1.",
        (Edit("blocks", _OWN_WINDOWS, _OWN_WINDOWS.replace("k_c1[", "k_c1.roll(1, 0)[")),),
    ),
    Mutant(
        "score.first-kv-head-for-all",
        "score.values-exact",
        "All key/value heads read the windows of the first.",
        "A head's stride of 0 left over from a multi-query model.",
        _edit(
            "columns = windows.permute(1, 2, 0)",
            "columns = windows[:, :1].expand_as(windows).permute(1, 2, 0)",
        ),
    ),
    Mutant(
        "score.normaliser-over-all",
        "score.values-exact",
        "The normaliser counts invisible windows too.",
        "The mask applied behind the softmax.",
        _edit(
            _LSE,
            'parts = (k_c1, 1) if config.lse == "exact" else (k_c2, 4)\n'
            "    normaliser = _logits(q, parts[0], positions + (1 << 40), parts[1], parts[1])\n"
            f"    {_LSE}",
        ),
    ),
    Mutant(
        "score.offset-overflow",
        "score.values-exact",
        "Offsets overflow: rows of queries beyond 2^15 elements are read from the start.",
        "32-bit offsets at 2^31 elements; here at fewer, so that it shows on small cases.",
        wrap=Around(_FUNCTIONS, wrapped_offsets("q")),
    ),
    Mutant(
        "score.chunk-end-aligned",
        "score.visibility",
        "All rows of a call see the windows that its last row sees.",
        "Visibility counted from the length of the sequence.",
        _edit(_VISIBLE, "return (ends <= positions[-1:, None]).expand(len(positions), -1)"),
    ),
    Mutant(
        "score.exact-for-approximate",
        "score.values-approximate",
        "The normaliser is always that of K_C1.",
        "K_C2 left out, because scores look alike.",
        _edit('if config.lse == "exact":', "if True:"),
    ),
    Mutant(
        "score.log-4",
        "score.values-approximate",
        "The normaliser of K_C2 is corrected by log 4.",
        "An estimate of the sum over four times as many windows.",
        _edit(_LSE, f'{_LSE} + 1.3862943611198906 * (config.lse == "approximate")'),
    ),
    Mutant(
        "score.visible-early",
        "score.visibility",
        "A window is visible one token before it ends.",
        "`<` for `<=` with an end taken as exclusive.",
        _edit(_VISIBLE, "return ends - 1 <= positions[:, None]"),
    ),
    Mutant(
        "score.visible-late",
        "score.visibility",
        "A window is visible one token after it ends.",
        "`>` for `>=`.",
        _edit(_VISIBLE, "return ends < positions[:, None]"),
    ),
    Mutant(
        "score.truncating-division",
        "score.visibility",
        "The first window is visible up to a stride before it ends.",
        "(p + 1 - l) / s + 1 in C, where division rounds towards zero.",
        _edit(
            _VISIBLE,
            'seen = (positions + 1 - size).div(stride, rounding_mode="trunc") + 1\n'
            "    return torch.arange(count, device=positions.device) < seen[:, None]",
        ),
    ),
    Mutant(
        "score.normaliser-visible-early",
        "score.values-approximate",
        "Windows of K_C2 are visible as early as windows of K_C1 are.",
        "One mask, made for K_C1, for both.",
        _edit(
            "normaliser = _logits(q, k_c2, positions, c.lse_kernel_size, c.lse_kernel_stride)",
            "normaliser = _logits(q, k_c2, positions, c.kernel_size, c.kernel_stride)",
        ),
    ),
    Mutant(
        "score.max-of-invisible",
        "score.invisible-not-read",
        "The row's maximum is taken over all windows, the invisible ones included.",
        "A maximum taken before the mask: harmless until an invisible key is large.",
        _edit(
            _LSE,
            'windows = k_c1 if config.lse == "exact" else k_c2\n'
            "    every = _logits(q, windows, positions + (1 << 40), 1, 1)\n"
            "    top = torch.nn.functional.pad(every, (0, 1)).amax(dim=-1, keepdim=True)\n"
            "    lse = (normaliser - top).exp().sum(dim=-1, keepdim=True).log() + top",
        ),
    ),
    Mutant(
        "score.unused-k-c2",
        "score.normaliser-only",
        "K_C2 is read with the exact normaliser too, and multiplied by 0.",
        "Both modes computed and blended instead of chosen.",
        _edit(_LSE, f"{_LSE} + 0 * k_c2.to(q.dtype).sum()"),
    ),
    Mutant(
        "score.group-of-16",
        "score.group-sum",
        "Only the first 16 heads of a group are summed.",
        "The group size of the released model compiled into a tile.",
        _edit("range(1, per_head.shape[2])", "range(1, min(per_head.shape[2], 16))"),
    ),
    Mutant(
        "score.zero-heads-skipped",
        "score.group-sum",
        "Query heads that are all zero are taken for padding.",
        "Groups padded to 16 heads, with padding told by its content.",
        _edit(
            _PER_HEAD,
            "per_head = (logits - lse).exp_()\n"
            "    real = q.unflatten(1, (per_head.shape[0], -1)).abs().amax(dim=-1) > 0\n"
            "    per_head = per_head * real.transpose(0, 1)[..., None]",
        ),
    ),
    Mutant(
        "score.clamped-logits",
        "score.shift",
        "Logits are clamped to +-30 before the exponential.",
        "A guard against overflow instead of a subtracted maximum.",
        _edit(_SCALE, "logits = logits.mul_(head_dim**-0.5).clamp(-30, 30).view("),
    ),
    Mutant(
        "score.maximum-from-zero",
        "score.shift",
        "The running maximum starts at 0, so that very negative logits underflow.",
        "m = 0 in place of -inf in an online softmax.",
        _edit(
            _LSE,
            "top = torch.nn.functional.pad(normaliser, (0, 1)).amax(dim=-1, keepdim=True)\n"
            "    lse = (normaliser - top).exp().sum(dim=-1, keepdim=True).log() + top",
        ),
    ),
    Mutant(
        "score.no-normaliser-one",
        "score.no-normaliser",
        "Rows without a normaliser score exp(logit).",
        "-inf replaced by 0 to avoid NaN.",
        _edit(_NONE, "lse = torch.where(lse == -torch.inf, 0, lse)"),
    ),
    Mutant(
        "score.no-normaliser-infinite",
        "score.no-normaliser",
        "Rows without a normaliser divide by zero.",
        "exp(logit - lse) with lse = -inf.",
        _edit(_NONE, ""),
    ),
    Mutant(
        "score.naive-exponential",
        "score.large-logits",
        "No maximum is subtracted before the exponential.",
        "Textbook softmax: overflows at logits of 88.",
        _edit(_LSE, "lse = normaliser.exp().sum(dim=-1, keepdim=True).log()"),
    ),
    Mutant(
        "score.one-maximum-for-both",
        "score.large-logits",
        "The maximum over K_C1 is subtracted from the logits of K_C2 too.",
        "One running maximum for numerators and denominator, which underflows when they differ.",
        _edit(
            _LSE,
            "top = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).amax(-1, True)\n"
            "    total = (normaliser - top).exp().sum(dim=-1, keepdim=True)\n"
            "    none = (normaliser > -torch.inf).sum(dim=-1, keepdim=True) == 0\n"
            "    lse = torch.where(none, -torch.inf, torch.where(total == 0, top - 104, "
            "total.log() + top))",
        ),
    ),
    Mutant(
        "score.batch-scale",
        "score.packed-alone",
        "All queries of a batch share one scale.",
        "Quantised products with one scale for a tensor.",
        wrap=Around(_FUNCTIONS, shared_scale("q")),
    ),
)
