"""How far a result may lie from the oracle: a-priori error bounds, element by element.

Every function evaluates one stage of the reference in float64 on the inputs that the implementation
saw, and with it a bound on the error of any implementation that computes in the declared
`Arithmetic`. Nothing is measured or typed in: a bound follows from unit roundoffs, the number of
operations, and sums such as `sum p|v|`. `docs/tolerances.md` derives each one.
"""

from .attention import attend, attend_tokens
from .gradients import attend_gradients
from .model import Bounded, dtype_name, rounding, unit_roundoff
from .scoring import block_scores, scores, scores_at
from .windows import compress, stored_windows

__all__ = [
    "Bounded",
    "attend",
    "attend_gradients",
    "attend_tokens",
    "block_scores",
    "compress",
    "dtype_name",
    "rounding",
    "scores",
    "scores_at",
    "stored_windows",
    "unit_roundoff",
]
