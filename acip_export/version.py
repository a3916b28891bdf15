"""Name the version, where every module can read it without importing the package's API."""

__version__ = "0.1.0"


def made_by(*others: str) -> str:
    """Say what made something: this version, and whatever ``others`` it depends on."""
    return ", ".join([f"acip-export {__version__}", *others])
