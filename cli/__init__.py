"""The ``eplb`` command line."""

if __name__ != "eplb.cli":
    raise ImportError("import eplb.cli; the bare name would make a second copy of its classes")
