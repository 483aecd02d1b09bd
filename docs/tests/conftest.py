"""Let the tests import what builds the pages, as Sphinx does."""

import sys
from pathlib import Path

DOCS = Path(__file__).parents[1]
for folder in ("_studies", "_scripts", "_ext", "."):
    sys.path.insert(0, str(DOCS / folder))
