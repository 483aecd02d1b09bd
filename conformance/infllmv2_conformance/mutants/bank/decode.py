"""Faults of the cache and of decoding."""

from __future__ import annotations

from infllmv2_conformance.mutants.model import Edit, Mutant

from .attention import switch
from .faults import positions

_COUNTS = "first, last = num_windows(start, size, stride), num_windows(end, size, stride)"
_STORE = "windows[sequence, first:last] = compress(keys, size, stride, first)"
CACHE = ("new_cache", "append", "decode", "reset", "cached_windows")
_CHECK = "checks.check_append(k, v, cu_seqlens, max_seqlen, selection_k, *limits)"
_LOOP = "for i in range(len(ends) - 1):"


def _cache(before: str, after: str) -> Edit:
    return Edit("cache", before, after)


MUTANTS = (
    Mutant(
        "decode.one-window-per-append",
        "decode.one-token",
        "An append adds one window at most.",
        "Decode code that compresses the last window, used for a prompt as well.",
        (
            _cache(_COUNTS, f"{_COUNTS}\n            last = min(last, first + 1)"),
            _cache(_STORE, _STORE.replace("stride, first)", "stride, first)[: last - first]")),
        ),
    ),
    Mutant(
        "decode.window-late",
        "decode.one-token",
        "A window is added one token after it is complete.",
        "The window updated before the token is stored.",
        (
            _cache(
                _COUNTS,
                "first, last = (num_windows(max(n - 1, 0), size, stride) for n in (start, end))",
            ),
            _cache(_STORE, _STORE.replace("compress(keys,", "compress(keys[: max(end - 1, 0)],")),
        ),
    ),
    Mutant(
        "decode.k-c2-not-updated",
        "decode.one-token",
        "K_C2 is made from the first append and never updated.",
        "A second cache that only prefill writes.",
        (
            _cache(
                "for windows, size, stride in self._kinds():\n            first,",
                "for windows, size, stride in self._kinds()[: 2 if start == 0 else 1]:\n"
                "            first,",
            ),
        ),
    ),
    Mutant(
        "decode.window-of-new-keys",
        "decode.one-token",
        "A window is the mean of those of its keys that came with the last append.",
        "Compression of the new tokens alone, without the window's older ones.",
        (
            _cache(
                "keys = self.selection_keys[sequence, :end]",
                "keys = self.selection_keys[sequence, :end].clone()\n        keys[:start] = 0",
            ),
        ),
    ),
    Mutant(
        "decode.value-late",
        "decode.one-token",
        "Values are stored one row late.",
        "A length that is raised between storing keys and values.",
        (
            _cache(
                "self.values[sequence, start:end] = v",
                "late = min(start + 1, self.capacity), min(end + 1, self.capacity)\n"
                "        self.values[sequence, late[0] : late[1]] = v[: late[1] - late[0]]",
            ),
        ),
    ),
    Mutant(
        "decode.neighbour-storage",
        "decode.ragged",
        "Keys are read one row early, from the storage of the sequence before.",
        "An offset into paged or padded storage.",
        (_cache("first = i * self.capacity\n", "first = max(i * self.capacity - 1, 0)\n"),),
    ),
    Mutant(
        "decode.offset-overflow",
        "decode.ragged",
        "Offsets overflow: storage beyond row 2^8 is read from the start.",
        "32-bit offsets at 2^31 elements; here at fewer, so that it shows on small cases.",
        (_cache("first = i * self.capacity\n", "first = i * self.capacity % (1 << 8)\n"),),
    ),
    Mutant(
        "decode.last-position-for-all",
        "decode.several-tokens",
        "All query rows of a decode take the position of the last.",
        "A decode kernel for one token, used for several.",
        (positions("torch.full((self.num_queries,), self.num_keys - 1, device=device)"),),
        functions=CACHE,
    ),
    Mutant(
        "decode.stops-at-idle-sequence",
        "decode.ragged",
        "Sequences behind one that gets no token are not served.",
        "A loop that takes an empty row for the end of the batch.",
        (
            Edit(
                "implementation",
                f"ends = cu_seqlens.tolist()\n        {_LOOP}\n",
                f"ends = cu_seqlens.tolist()\n        {_LOOP}\n"
                "            if i and ends[i] == ends[i + 1]:\n                break\n",
            ),
        ),
    ),
    Mutant(
        "decode.first-length-for-all",
        "decode.ragged",
        "The length of the first sequence is used for all.",
        "One scalar cache length for a batch.",
        (
            _cache(
                "zip(num_queries, self.lengths, strict=True)",
                "zip(num_queries, [max(self.lengths[0], n) for n in num_queries], strict=True)",
            ),
        ),
    ),
    Mutant(
        "decode.switch-late",
        "decode.switch",
        "A cache of just dense_len tokens runs dense.",
        "`>` for `>=`.",
        switch("config.dense_len < 0 or place.num_keys > config.dense_len"),
        functions=("decode",),
    ),
    Mutant(
        "decode.switch-at-prompt",
        "decode.switch",
        "Whether to run sparse is decided once, by the first append.",
        "A mode chosen at prefill and kept.",
        (
            Edit(
                "implementation",
                "sparse, dense = _switch(cache.places(lengths_of(cu_seqlens_q)), config)",
                "places = cache.places(lengths_of(cu_seqlens_q))\n"
                "        is_sparse = config.is_sparse(getattr(cache, 'prompt', 0))\n"
                "        sparse, dense = (places, []) if is_sparse else ([], places)",
            ),
            Edit(
                "implementation",
                f"ends = cu_seqlens.tolist()\n        {_LOOP}\n",
                "ends = cu_seqlens.tolist()\n"
                "        cache.prompt = getattr(cache, 'prompt', max(ends))\n"
                f"        {_LOOP}\n",
            ),
        ),
    ),
    Mutant(
        "decode.error-of-another",
        "decode.bad-input",
        "An error about k names v.",
        "Arguments swapped on their way to the checks, which treat both alike.",
        (Edit("implementation", _CHECK, _CHECK.replace("(k, v,", "(v, k,")),),
    ),
    Mutant(
        "decode.refused-append-counts",
        "decode.bad-input",
        "An append that is refused has already advanced the lengths.",
        "State that is changed before the arguments are checked.",
        (
            Edit(
                "implementation",
                _CHECK,
                "old, cache.lengths = cache.lengths, [n + 1 for n in cache.lengths]\n"
                f"        {_CHECK}\n"
                "        cache.lengths = old",
            ),
        ),
    ),
    Mutant(
        "decode.padded-windows",
        "decode.windows",
        "The cache shows a window of K_C2 that is not complete.",
        "A count of windows rounded up.",
        (
            _cache(
                "counts = [num_windows(n, size, stride) for n in self.lengths]",
                "late = stride * (size == self.config.lse_kernel_size)\n"
                "            counts = [min(num_windows(n + late, size, stride), windows.shape[1]) "
                "for n in self.lengths]",
            ),
        ),
    ),
    Mutant(
        "decode.stale-after-reset",
        "decode.state-machine",
        "After a reset, windows that were there before are not computed again.",
        "A high-water mark that a reset does not lower.",
        (
            _cache(
                _STORE,
                "marks = self.__dict__.setdefault('marks', {})\n"
                "            first = max(first, min(marks.get((sequence, size), 0), last))\n"
                "            marks[sequence, size] = max(last, marks.get((sequence, size), 0))\n"
                f"            {_STORE}",
            ),
        ),
    ),
    Mutant(
        "decode.reset-to-zero",
        "decode.state-machine",
        "A reset empties a sequence instead of cutting it back.",
        "clear() for truncate().",
        (
            Edit(
                "implementation",
                "cache.lengths = list(lengths)",
                "cache.lengths = [n if n == old else 0 for n, old in zip(lengths, cache.lengths)]",
            ),
        ),
    ),
    Mutant(
        "decode.selection-k-ignored",
        "decode.state-machine",
        "Windows are made of k, although selection_k is given.",
        "An argument that is accepted and not passed on.",
        (_cache("keys = self.selection_keys[sequence, :end]", "keys = self.keys[sequence, :end]"),),
    ),
)
