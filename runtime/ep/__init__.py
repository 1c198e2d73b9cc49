"""Expert parallelism on torch.distributed: slots, placement tables, and the layer over them."""

if __name__ != "eplb.runtime.ep":
    raise ImportError(
        "import eplb.runtime.ep; the bare name would make a second copy of its classes"
    )
