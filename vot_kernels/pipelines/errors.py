"""Errors that a user can correct, as one sentence."""

CORRECTABLE = (ValueError, OSError, ImportError)


def sentence(error: Exception) -> str:
    """Return what went wrong in one line, without Python's "[Errno 2]"."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__
