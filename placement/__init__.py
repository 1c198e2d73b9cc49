"""Solvers and bounds: counts in, placements with a proof out."""

if __name__ != "eplb.placement":
    raise ImportError(
        "import eplb.placement; the bare name would make a second copy of its classes"
    )
