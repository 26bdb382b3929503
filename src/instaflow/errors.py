"""One error family. Every message is one line that says the value, the rule and the place."""

from __future__ import annotations


class InstaFlowError(Exception):
    """The user's mistake: the command line prints it as one line and exits with 2."""


class RecipeError(InstaFlowError):
    """A recipe field is unknown, missing or outside its allowed values."""


class DataError(InstaFlowError):
    """Pictures, captions or pairs are missing, unreadable or damaged."""


class BundleError(InstaFlowError):
    """A model folder is missing something, damaged, or asked for what its kind cannot do."""


class PromptError(InstaFlowError):
    """A prompt, seed, size or style that the model cannot draw."""
