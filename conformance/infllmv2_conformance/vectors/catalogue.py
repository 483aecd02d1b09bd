"""Which vectors a set holds: a few of every function, small enough to be committed."""

from __future__ import annotations

from dataclasses import dataclass

from infllmv2_conformance.cases import Case


@dataclass(frozen=True)
class Vector:
    """Describe one vector.

    Args:
        name: of the file, without its ending.
        function: the contract function, or "attend_gradients" or "decode".
        case: shapes, configuration and the numbers that inputs are drawn from.
        what: one sentence that says what it shows.
        kind: which scores or selections are drawn, for functions that take them.
    """

    name: str
    function: str
    case: Case
    what: str
    kind: str = ""


_RELEASED = Case(((6, 500),), 1, 16, 128, "bfloat16", 64, 32, 16, window_size=128, topk=3)
"""Shape of the released model: 16 heads of 128 channels share one key/value head."""
_MIDDLE = Case(((12, 400), (5, 5)), 2, 2, 64, "bfloat16", 64, 32, 16, window_size=64, topk=2)
_SMALL = Case(((14, 90), (20, 20)), 2, 2, 16, "float32", topk=3)
_ODD = Case(((11, 75), (1, 40)), 2, 3, 16, "float16", 16, 5, 3, init_blocks=2, topk=4)

_COMPRESS = (
    Vector(
        "compress-bf16",
        "compress_keys",
        _MIDDLE.with_(sequences=((1, 31), (1, 32), (0, 0), (1, 100)), head_dim=32),
        "Windows of 32 tokens every 16: no window, one, an empty sequence, and a tail.",
    ),
    Vector(
        "compress-f16",
        "compress_keys",
        _ODD,
        "Windows of 5 tokens every 3.",
    ),
    Vector(
        "compress-f32",
        "compress_keys",
        _SMALL,
        "Float32: the bound is that of the sum.",
    ),
)
_SCORE = (
    Vector(
        "score-approximate-bf16",
        "score_windows",
        _MIDDLE,
        "The normaliser of K_C2; in the sequence of 5 tokens there is no window.",
    ),
    Vector("score-exact-f16", "score_windows", _ODD.with_(lse="exact"), "The normaliser of K_C1."),
    Vector(
        "score-no-normaliser-f32",
        "score_windows",
        _SMALL.with_(sequences=((40, 40),)),
        "Rows that see windows of K_C1 and none of K_C2 score 0.",
    ),
    Vector(
        "score-huge-f32",
        "score_windows",
        _SMALL.with_(lse="exact", regime="huge"),
        "Logits in the hundreds: exp overflows unless the maximum is taken off.",
    ),
)
_POOL = (
    Vector("pool-overlap", "pool_blocks", _MIDDLE, "Blocks of 64: windows 4b-1 to 4b+3.", "random"),
    Vector("pool-odd", "pool_blocks", _ODD, "Windows that do not divide the block.", "random"),
    Vector(
        "pool-paper-eq7",
        "pool_blocks",
        _SMALL.with_(pooling="paper_eq7"),
        "The literal Eq. 7.",
        "random",
    ),
    Vector("block-scores-bf16", "score_blocks", _MIDDLE, "Stages 2 and 3 in one."),
    Vector("block-scores-f32", "score_blocks", _SMALL.with_(lse="exact"), "The same in float32."),
)
_SELECT = (
    Vector(
        "select-random",
        "select_blocks",
        _SMALL.with_(sequences=((30, 400), (17, 17)), topk=22),
        "Random scores, -inf among them; NaN at forced and at future blocks.",
        "random",
    ),
    Vector(
        "select-ties",
        "select_blocks",
        _SMALL.with_(sequences=((30, 200),), topk=5),
        "Three levels of score: ties go to the smaller index.",
        "ties",
    ),
    Vector(
        "select-tight",
        "select_blocks",
        _ODD.with_(sequences=((25, 150),), topk=3, window_size=16),
        "A budget of 4 for 2 initial and 2 local blocks, which score -inf.",
        "worst",
    ),
    Vector(
        "select-paper-preset",
        "select_blocks",
        _SMALL.with_(sequences=((30, 200),), window_size=48, local_override=3),
        "w / B local blocks, as the paper lists, instead of one more; they score -inf.",
        "worst",
    ),
    Vector("fused-select-bf16", "select", _MIDDLE, "A certificate: near ties are free."),
    Vector("fused-select-released-bf16", "select", _RELEASED, "The released shape."),
    Vector(
        "fused-select-f32",
        "select",
        _SMALL.with_(sequences=((30, 600), (20, 20)), lse="exact"),
        "Exact normaliser, float32, many blocks.",
    ),
    Vector(
        "fused-select-ties",
        "select",
        _SMALL.with_(sequences=((20, 200),), topk=4),
        "All windows score exactly the same: ties go to the smaller index.",
        "ties",
    ),
)
_ATTEND = (
    Vector("attend-released-bf16", "attend", _RELEASED, "The released shape.", "random"),
    Vector("attend-f16", "attend", _ODD, "Blocks of 16, three heads in a group.", "random"),
    Vector(
        "attend-f32",
        "attend",
        _SMALL.with_(regime="peaked"),
        "Peaked weights; some rows select nothing: output 0, LSE -inf.",
        "few",
    ),
    Vector(
        "attend-huge-f32",
        "attend",
        _SMALL.with_(regime="huge"),
        "Logits in the hundreds and values in the thousands.",
        "random",
    ),
    Vector(
        "attend-many-blocks-f16",
        "attend",
        _ODD.with_(sequences=((8, 420),), topk=24, kv_heads=1),
        "More blocks than fit into one tile of most kernels.",
        "random",
    ),
    Vector(
        "gradients-bf16",
        "attend_gradients",
        _SMALL.with_(dtype="bfloat16"),
        "Of q, k and v.",
        "random",
    ),
    Vector(
        "gradients-f32",
        "attend_gradients",
        _SMALL.with_(sequences=((14, 70),), head_dim=32),
        "Of q, k and v; rows that select nothing send none.",
        "few",
    ),
)
_WHOLE = (
    Vector(
        "attention-switch-bf16",
        "attention",
        _MIDDLE.with_(sequences=((6, 420), (3, 319), (4, 320)), dense_len=320, kv_heads=1),
        "Sequences of dense_len keys or more run sparse, shorter ones dense.",
    ),
    Vector(
        "attention-released-bf16",
        "attention",
        _RELEASED.with_(sequences=((3, 500),), seed=2),
        "The released shape.",
    ),
    Vector(
        "attention-f32",
        "attention",
        _SMALL.with_(sequences=((16, 150), (20, 20)), topk=4, seed=21),
        "Always sparse; one sequence with history, one prefill.",
    ),
    Vector(
        "attention-exact-f16",
        "attention",
        _ODD.with_(sequences=((11, 130),), lse="exact", topk=5, seed=26),
        "Exact normaliser, odd windows.",
    ),
    Vector(
        "attention-nope-f32",
        "attention",
        _SMALL.with_(sequences=((10, 150),), use_nope=True, topk=4, seed=11),
        "Selection by its own q and k.",
    ),
)
_CACHE = (
    Vector(
        "decode-one-token-f32",
        "decode",
        _SMALL.with_(
            sequences=((170, 170),),
            window_size=0,
            topk=5,
            lse="exact",
            seed=25,
            steps="a155-d1-" + "-".join(["a1-d1"] * 13),
        ),
        "A prompt, then token by token across the ends of windows and of a block.",
    ),
    Vector(
        "decode-several-tokens-f32",
        "decode",
        _SMALL.with_(
            sequences=((180, 180),),
            window_size=0,
            topk=4,
            seed=12,
            steps="a60-d1-a30-d2-a30-d2-a30-d2-a20-d3",
        ),
        "Many tokens at a time, each completing windows of K_C1 and of K_C2.",
    ),
    Vector(
        "decode-nope-f32",
        "decode",
        _SMALL.with_(
            sequences=((130, 130),), topk=4, use_nope=True, seed=2, steps="a100-d1-a9-d3-a1-d1"
        ),
        "Selection by its own q and k.",
    ),
    Vector(
        "decode-ragged-f16",
        "decode",
        _ODD.with_(
            sequences=((125, 125), (80, 80), (60, 60)),
            topk=5,
            seed=14,
            steps="a90.50.40-d1.0.1-a1.0.1-d1.0.1-a11.3.0-d2.3.0-r7.5.1-d1.1.1-a20.20.9-d3.1.2",
        ),
        "Sequences advance on their own, by no token and by several; some are taken back.",
    ),
    Vector(
        "decode-switch-f32",
        "decode",
        _SMALL.with_(
            sequences=((110, 110),), dense_len=104, seed=2, steps="a102-d1-a1-d1-a1-d1-a1-d1"
        ),
        "Dense, and from 104 keys on sparse.",
    ),
)
CATALOGUE: tuple[Vector, ...] = (
    *_COMPRESS,
    *_SCORE,
    *_POOL,
    *_SELECT,
    *_ATTEND,
    *_WHOLE,
    *_CACHE,
)
"""All vectors of a set, in the order of the stages."""
