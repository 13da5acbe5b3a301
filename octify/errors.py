"""The exception tree: everything that a user can cause is an OctifyError."""

from __future__ import annotations


class OctifyError(Exception):
    """Base of all errors with a message meant for the user."""


class RecipeError(OctifyError):
    """A recipe that cannot be read, or that does not fit the model."""


class ModelError(OctifyError):
    """A model that cannot be named, built or given input."""


class TraceError(OctifyError):
    """A model that cannot be traced, or whose trace does not compute what the model does."""


class ConversionError(OctifyError):
    """A conversion that cannot be done as asked, or that would change nothing."""


class CheckError(OctifyError):
    """A converted graph that breaks one of its invariants."""


class CheckpointError(OctifyError):
    """A file that is no checkpoint, a damaged one, or one for another model."""


class CalibrationError(OctifyError):
    """Images or activations that a calibration cannot use."""


class CalibrationWarning(UserWarning):
    """A network that is expected to keep too little, said before the long work."""


class BackendError(OctifyError):
    """A runtime that is not installed, or that cannot run the model."""
