"""What runs inside a serving process."""

if __name__ != "eplb.runtime":
    raise ImportError("import eplb.runtime; the bare name would make a second copy of its classes")
