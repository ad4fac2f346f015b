"""One thread a test process, said before any array library is imported.

pytest-xdist fills the cores, and the arrays are tiny: threads that wait for each other made some tests forty times slower.
"""

import os

for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(pool, "1")
