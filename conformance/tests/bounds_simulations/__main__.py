"""Print the tables: `python -m bounds_simulations` in the folder above."""

from .problem import DTYPES
from .tables import print_faulty, print_honest

print_honest()
for dtype in DTYPES:
    print()
    print_faulty(dtype)
