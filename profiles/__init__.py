if __name__ != "eplb.profiles":
    raise ImportError("import eplb.profiles; the bare name would make a second copy of its classes")
