"""Load profiles: files in and out, what they hold, and the built-in sample."""

if __name__ != "eplb.profiles":
    raise ImportError("import eplb.profiles; the bare name would make a second copy of its classes")

from eplb.profiles.compare import add_profiles, compare_profiles
from eplb.profiles.read import read_profile, read_profiles
from eplb.profiles.routings import co_activation, read_routings
from eplb.profiles.sample import sample_profile, sample_routings
from eplb.profiles.summary import ProfileSummary, summarise
from eplb.profiles.write import write_profile

__all__ = [
    "ProfileSummary",
    "add_profiles",
    "co_activation",
    "compare_profiles",
    "read_profile",
    "read_profiles",
    "read_routings",
    "sample_profile",
    "sample_routings",
    "summarise",
    "write_profile",
]
