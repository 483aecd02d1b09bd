"""Settings of all tests of the repository; pytest loads this file first."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small: threads would only wait
