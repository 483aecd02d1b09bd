"""The rules as data: what each one says, and what an implementation must offer for it to apply."""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Rule:
    """State one rule of conformance.

    Args:
        id: stage and name, for example "attend.values".
        sentence: what holds for a conforming implementation.
        functions: contract functions that the rule calls.
        claims: capabilities that must be claimed for the rule to apply.
        each: apply the rule to each offered function of `functions`, one at a time.
        page: the page of the documentation that explains it; the anchor is the id.
    """

    id: str
    sentence: str
    functions: tuple[str, ...]
    claims: tuple[str, ...] = ()
    each: bool = False
    page: str = ""

    @property
    def stage(self) -> str:
        """Return the stage that the rule belongs to."""
        return self.id.split(".")[0]

    @property
    def link(self) -> str:
        """Return where the documentation explains the rule."""
        return f"docs/rules.md#{self.id.replace('.', '-')}"


STAGE_FUNCTIONS = (
    "compress_keys",
    "score_windows",
    "pool_blocks",
    "select_blocks",
    "score_blocks",
    "select",
    "attend",
    "attention",
)
CACHE_FUNCTIONS = ("new_cache", "append", "decode")
LONG = "long"
"""The stage that runs only when its length is given: its rules take minutes."""


def _rules(functions: tuple[str, ...], *rows: tuple[str, ...]) -> list[Rule]:
    return [Rule(row[0], row[1], functions, claims=tuple(row[2:])) for row in rows]


_ALL = [
    *_rules(
        ("compress_keys",),
        ("compress.values", "Every window is the mean of its keys."),
        ("compress.complete-windows", "Exactly the complete windows exist, at every length."),
        ("compress.prefix-stable", "Keys that arrive later do not change earlier windows."),
        ("compress.tail-not-read", "Keys after the last complete window are not used."),
        (
            "compress.packed-alone",
            "A sequence's windows do not depend on its neighbours.",
            "packed",
        ),
    ),
    *_rules(
        ("score_windows",),
        ("score.values-exact", "Scores are right with the exact normaliser."),
        ("score.values-approximate", "Scores are right with the normaliser of K_C2."),
        (
            "score.visibility",
            "A window counts for a query exactly from the position where it ends.",
        ),
        ("score.invisible-not-read", "Windows that have not ended have no influence on a score."),
        ("score.normaliser-only", "K_C2 changes the normaliser and nothing else."),
        ("score.group-sum", "A score is the sum over the query heads h with h // G equal."),
        ("score.shift", "A constant added to all logits of a head changes no score."),
        ("score.no-normaliser", "A row that sees no window of the normaliser scores 0."),
        ("score.large-logits", "Large logits give no NaN, and infinity only beyond the range."),
        ("score.packed-alone", "A sequence's scores do not depend on its neighbours.", "packed"),
    ),
    *_rules(
        ("pool_blocks",),
        ("pool.values", "A block's score is the highest among the visible windows touching it."),
        ("pool.edges", "The first, the last and the partial block pool the windows they have."),
        ("pool.invisible-not-read", "Windows that have not ended never count."),
        (
            "pool.packed-alone",
            "A sequence's block scores do not depend on its neighbours.",
            "packed",
        ),
    ),
    *_rules(
        ("score_blocks",),
        ("score_blocks.values", "Fused scores of the blocks that compete are right."),
        ("score_blocks.packed-alone", "Fused scores do not depend on neighbours.", "packed"),
    ),
    *_rules(
        ("select_blocks",),
        ("select.exact", "The selection follows from the block scores, ties included."),
        ("select.ties", "Blocks of equal score are taken in the order of their index."),
        ("select.forced", "Initial and local blocks are always selected, and pay from the budget."),
        ("select.format", "Indices ascend strictly, then -1; their number is as specified."),
        ("select.no-future", "A block behind the query's own is never selected."),
        ("select.budget-covers-all", "A budget for all visible blocks selects them all."),
        ("select.forced-not-read", "Scores of forced and of future blocks are not used."),
        ("select.packed-alone", "A sequence's selection does not depend on neighbours.", "packed"),
    ),
    *_rules(
        ("select",),
        ("fused_select.certificate", "No block is passed over for one that provably scores less."),
        ("fused_select.ties", "Blocks of exactly equal score are taken in the order of index."),
        ("fused_select.format", "Indices ascend, then -1; forced blocks in, future ones out."),
        (
            "fused_select.packed-alone",
            "A sequence's selection does not depend on neighbours.",
            "packed",
        ),
    ),
    *_rules(
        ("attend",),
        ("attend.values", "The output is softmax attention over the selected tokens."),
        (
            "attend.lse",
            "The LSE is the natural logarithm of the softmax denominator.",
            "returns_lse",
        ),
        ("attend.every-token", "Every selected token up to the query's position takes part, once."),
        ("attend.causal", "Tokens after the query have no influence, in the diagonal block too."),
        ("attend.partial-block", "The last, partial block is attended up to its last token."),
        ("attend.few-blocks", "Rows with few blocks are right; with none: output 0, LSE -inf."),
        ("attend.unselected-no-effect", "Tokens of unselected blocks have no influence."),
        (
            "attend.unselected-not-read",
            "Unselected blocks are not loaded: NaN there does not spread.",
            "skips_unselected",
        ),
        ("attend.group-mapping", "Query head h reads key/value head h // G."),
        ("attend.value-scale", "Doubling v doubles the output, bit by bit."),
        ("attend.equals-dense", "With every visible block selected it is dense causal attention."),
        ("attend.packed-alone", "A sequence's output does not depend on its neighbours.", "packed"),
        ("attend.gradients", "Gradients of q, k and v are right.", "gradients"),
        ("attend.gradient-unselected", "Keys that nobody selected get gradient 0.", "gradients"),
        (
            "attend.gradient-empty-rows",
            "Rows with nothing to attend give no gradient.",
            "gradients",
        ),
        (
            "attend.gradient-repeatable",
            "The same call gives the same bits in the gradients.",
            "gradients",
            "deterministic",
        ),
    ),
    *_rules(
        ("attention",),
        ("attention.values", "Output and LSE fit the implementation's own selection."),
        ("attention.selection", "The selection is one that the scores allow.", "returns_selection"),
        ("attention.chunks", "Any split into chunks gives the result of one prefill.", "history"),
        ("attention.append", "Appending keys changes no earlier row."),
        ("attention.packed-alone", "Sequences packed together give their results alone.", "packed"),
        ("attention.permutation", "Permuting sequences permutes the result.", "packed"),
        ("attention.kv-heads", "Key/value heads are independent: any subset gives its part."),
        ("attention.switch", "Sequences of dense_len keys or more run sparse, shorter ones dense."),
        ("attention.equals-dense", "A budget for all visible blocks gives dense attention."),
        (
            "attention.selection-inputs",
            "selection_q and selection_k select, and no more.",
            "use_nope",
        ),
        (
            "attention.unselected-not-read",
            "Values of unselected blocks are not loaded: NaN there does not spread.",
            "skips_unselected",
            "returns_selection",
            "deterministic",
        ),
        ("attention.gradients", "Gradients flow through attend alone.", "gradients"),
    ),
    *_rules(
        CACHE_FUNCTIONS,
        ("decode.one-token", "Decoding token by token gives the rows of one prefill."),
        ("decode.several-tokens", "Decoding several tokens at once gives the rows of one prefill."),
        ("decode.ragged", "Sequences of a batch advance on their own, also by no token.", "packed"),
        ("decode.switch", "Decoding switches from dense to sparse at dense_len keys."),
    ),
    Rule(
        "decode.bad-input",
        "Bad input raises an error that names the argument, and leaves the cache as it was.",
        CACHE_FUNCTIONS,
        ("validates",),
    ),
    Rule(
        "decode.windows",
        "Appending adds exactly the windows that the new tokens complete.",
        ("new_cache", "append", "cached_windows"),
    ),
    Rule(
        "decode.state-machine",
        "Any sequence of append, decode and reset agrees with a fresh prefill.",
        (*CACHE_FUNCTIONS, "reset"),
    ),
    *(
        Rule(id, sentence, STAGE_FUNCTIONS, claims, each=True)
        for id, sentence, claims in (
            ("contract.inputs-unchanged", "Inputs are not modified.", ()),
            ("contract.fully-written", "Results do not depend on what memory held before.", ()),
            ("contract.form", "Results have the right shape, dtype and device.", ()),
            ("contract.own-memory", "A result is a plain tensor in memory of its own.", ()),
            ("contract.red-zones", "Nothing outside the tensors is read or written.", ()),
            ("contract.loose-lengths", "max_seqlen may exceed the longest sequence.", ()),
            ("contract.settings", "Settings of PyTorch do not matter, and stay as they are.", ()),
            ("contract.streams", "Work is queued in the current CUDA stream.", ()),
            (
                "contract.strided",
                "Non-contiguous inputs give the same result.",
                ("non_contiguous",),
            ),
            ("contract.empty", "Empty batches and sequences are legal.", ("empty_sequences",)),
            ("contract.repeatable", "The same call gives the same bits.", ("deterministic",)),
            ("contract.fresh-data", "New data at an old address gives a new result.", ()),
            (
                "contract.batch-invariant",
                "A row's bits do not depend on its batch.",
                ("batch_invariant",),
            ),
            (
                "contract.bad-input",
                "Bad input raises an error that names the argument.",
                ("validates",),
            ),
        )
    ),
    Rule(
        "contract.padding-not-read",
        "Rows and columns behind the last sequence have no influence, nor has what no query needs.",
        STAGE_FUNCTIONS[1:],
        each=True,
    ),
    *(
        Rule(f"{LONG}.{name}", sentence, functions, claims)
        for name, sentence, functions, claims in (
            ("compress", "All windows of a long context are right.", ("compress_keys",), ()),
            ("score", "Scores are right behind a long context.", ("score_windows",), ()),
            ("pool", "Scores are pooled rightly behind a long context.", ("pool_blocks",), ()),
            (
                "block-scores",
                "Fused scores are right far back, too.",
                ("score_blocks",),
                (),
            ),
            ("select", "Selections follow from the scores of many blocks.", ("select_blocks",), ()),
            ("fused-select", "Selections among many blocks are certified.", ("select",), ()),
            ("attend", "Blocks far back are attended rightly.", ("attend",), ()),
            (
                "gradients",
                "Gradients reach blocks far back, and no others.",
                ("attend",),
                ("gradients",),
            ),
            ("attention", "The whole forward is right at full length.", ("attention",), ()),
            ("decode", "Decoding is right behind a long context.", CACHE_FUNCTIONS, ()),
        )
    ),
]

RULES: dict[str, Rule] = {rule.id: rule for rule in _ALL}

ORDINARY = tuple(rule.id for rule in _ALL if rule.stage != LONG)
"""The rules that run without a length being given."""


def rule(id: str) -> pytest.MarkDecorator:
    """Mark a test of the suite with the rule that it tests."""
    return pytest.mark.rule(RULES[id].id)
