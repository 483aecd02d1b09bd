"""Wrong compressions of keys into windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infllmv2_conformance.mutants.model import Around, Edit, Mutant

from .faults import Arguments, rescale, wrapped_offsets

_MEANS = "_sliding_sums(tokens, size)[::stride] / size"
_COUNTS = "counts = [num_windows(n, kernel_size, kernel_stride) for n in lengths_of(cu_seqlens_k)]"
_KEYS = "keys = k[key_ends[i] : key_ends[i + 1]]"


def _mean(after: str) -> tuple[Edit, ...]:
    return (Edit("windows", _MEANS, after),)


def _counted(count: str, keys: str) -> tuple[Edit, ...]:
    """Count the windows of `n` keys otherwise, and pool these `keys`."""
    counts = f"counts = [{count} for n in lengths_of(cu_seqlens_k)]"
    return Edit("implementation", _COUNTS, counts), Edit("implementation", _KEYS, f"keys = {keys}")


def _half_stride(inner: Callable[..., Any], given: Arguments) -> Any:
    given["kernel_stride"] = max(given["kernel_size"] // 2, 1)
    return inner(**given)


def _as_long_as_the_longest(inner: Callable[..., Any], given: Arguments) -> Any:
    ends = given["cu_seqlens_k"]
    steps = given["max_seqlen_k"] * (ends.diff() > 0).int()
    given["cu_seqlens_k"] = ends.clone()
    given["cu_seqlens_k"][1:] = steps.cumsum(0).clamp(max=len(given["k"]))
    given["k"] = given["k"][: int(given["cu_seqlens_k"][-1])]
    return inner(**given)


def _shared_scale(inner: Callable[..., Any], given: Arguments) -> Any:
    windows, ends = inner(**given)
    return rescale(windows), ends


MUTANTS = (
    Mutant(
        "compress.low-precision-sum",
        "compress.values",
        "Keys are summed in their own dtype instead of float32.",
        "torch.mean or a kernel accumulator left in bfloat16.",
        (Edit("windows", "* stride + size].to(wide)", "* stride + size]"),),
    ),
    Mutant(
        "compress.max",
        "compress.values",
        "A window is the maximum of its keys.",
        "Max pooling mixed up between stages 1 and 3.",
        _mean("tokens.unfold(0, size, stride).amax(dim=-1)"),
    ),
    Mutant(
        "compress.sum",
        "compress.values",
        "A window is the sum of its keys.",
        "The division left to a scale that is never applied.",
        _mean("_sliding_sums(tokens, size)[::stride]"),
    ),
    Mutant(
        "compress.last-token-lost",
        "compress.values",
        "The last key of each window is left out of its mean.",
        "A loop to l - 1 instead of l.",
        _mean(
            "_sliding_sums(tokens, size - 1)[::stride][: stop - start] / (size - 1) "
            "if size > 1 else tokens[::stride]"
        ),
    ),
    Mutant(
        "compress.half-stride",
        "compress.values",
        "The stride is always half the length, whatever was asked for.",
        "The released 32/16 compiled in.",
        wrap=Around(("compress_keys",), _half_stride),
    ),
    Mutant(
        "compress.longest-length-for-all",
        "compress.values",
        "Every sequence is taken to be as long as the longest.",
        "A grid over max_seqlen without a look at cu_seqlens.",
        wrap=Around(("compress_keys",), _as_long_as_the_longest),
    ),
    Mutant(
        "compress.neighbour-keys",
        "compress.values",
        "Windows read one key early, from the sequence before.",
        "cu_seqlens that do not start at 0, or an exclusive sum taken for an inclusive one.",
        (Edit("implementation", _KEYS, "keys = k.roll(1, 0)[key_ends[i] : key_ends[i + 1]]"),),
    ),
    Mutant(
        "compress.fp16-sum",
        "compress.values",
        "Keys are summed in float16, whatever their dtype.",
        "Half-precision accumulators, fast on consumer GPUs.",
        _mean("_sliding_sums(tokens.half(), size)[::stride].to(wide) / size"),
    ),
    Mutant(
        "compress.offset-overflow",
        "compress.values",
        "Offsets overflow: rows of keys beyond 2^15 elements are read from the start.",
        "32-bit offsets at 2^31 elements; here at fewer, so that it shows on small cases.",
        wrap=Around(("compress_keys",), wrapped_offsets("k")),
    ),
    Mutant(
        "compress.incomplete-window",
        "compress.complete-windows",
        "The incomplete window at the end counts, filled up with zeros.",
        "ceil division for the number of windows; padding to a multiple of the stride.",
        _counted(
            "num_windows(n + kernel_stride - 1, kernel_size, kernel_stride)",
            "torch.nn.functional.pad(k[key_ends[i] : key_ends[i + 1]], "
            "(0, 0, 0, 0, 0, kernel_stride - 1))",
        ),
    ),
    Mutant(
        "compress.window-too-few",
        "compress.complete-windows",
        "A window that ends with the last key does not count.",
        "`>` for `>=` in the test whether a window is complete.",
        _counted(
            "num_windows(max(n - 1, 0), kernel_size, kernel_stride)",
            "k[key_ends[i] : max(key_ends[i + 1] - 1, key_ends[i])]",
        ),
    ),
    Mutant(
        "compress.truncating-division",
        "compress.complete-windows",
        "A sequence up to a stride shorter than a window gets one window.",
        "(S - l) / s + 1 in C, where division rounds towards zero.",
        _counted(
            "max(int((n - kernel_size) / kernel_stride) + 1, 0)",
            "torch.nn.functional.pad(k[key_ends[i] : key_ends[i + 1]], "
            "(0, 0, 0, 0, 0, max(kernel_size - key_ends[i + 1] + key_ends[i], 0)))",
        ),
    ),
    Mutant(
        "compress.first-window-missing",
        "compress.complete-windows",
        "A sequence just as long as one window has none.",
        "An early return for S <= l.",
        _counted(
            "num_windows(n, kernel_size, kernel_stride) * (n != kernel_size)",
            "k[key_ends[i] : key_ends[i + 1]] if counts[i] else k[:0]",
        ),
    ),
    Mutant(
        "compress.order-by-length",
        "compress.prefix-stable",
        "The order of summation depends on the length of the sequence.",
        "Split-K heuristics and autotuning by length, which break prefix caches.",
        _mean(
            "(_sliding_sums(tokens, size)[::stride] / size if len(keys) % 2 else "
            "tokens.unfold(0, size, stride).mean(dim=-1))"
        ),
    ),
    Mutant(
        "compress.zero-weight-tail",
        "compress.tail-not-read",
        "Means are a product with a matrix of zeros and ones over all keys.",
        "Pooling by matmul: 0 times NaN is NaN.",
        _mean(
            "torch.einsum('cs,shd->chd', ((torch.arange(len(keys), device=keys.device) - stride * "
            "torch.arange(start, stop, device=keys.device)[:, None]) // size == 0).to(wide), "
            "keys.to(wide)) / size"
        ),
    ),
    Mutant(
        "compress.padded-tile",
        "compress.tail-not-read",
        "The key behind the last window is loaded with it, and weighted by 0.",
        "A tile rounded up to a power of two: 0 times NaN is NaN.",
        (
            Edit(
                "windows",
                "return means\n",
                "tail = keys[(end - 1) * stride + size :][:1]\n"
                "    if end > first and len(tail):\n        means[-1] += 0 * tail[0]\n"
                "    return means\n",
            ),
        ),
    ),
    Mutant(
        "compress.batch-scale",
        "compress.packed-alone",
        "All windows of a batch share one scale.",
        "Quantised caches with one scale for a tensor: one bad sequence spoils all.",
        wrap=Around(("compress_keys",), _shared_scale),
    ),
)
