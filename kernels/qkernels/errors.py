"""The one error class that this package raises for what a user can cause."""


class KernelError(ValueError):
    """A tensor, format or dtype that a kernel does not take: what was found, what is expected."""
