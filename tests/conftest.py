"""Two files of tests run at a time, each with one thread: more would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any test imports torch
