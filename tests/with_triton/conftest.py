"""Kernels are interpreted: said before anything imports Triton, here and in spawned processes."""

import os

os.environ["TRITON_INTERPRET"] = "1"
