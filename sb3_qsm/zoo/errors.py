"""Errors that are the user's to mend."""

import pickle

# Prints the traceback that an error's one line leaves out
TRACEBACK_VARIABLE = "SB3_QSM_TRACEBACK"
TRACEBACK_HINT = f" ({TRACEBACK_VARIABLE}=1 shows where)"

# What wrong values end in that rl_zoo3 passes on unseen: the mistake is the user's more often than a programmer's, but for
# what comes from the middle of a training
SETUP_MISTAKES = (AttributeError, LookupError, TypeError, RuntimeError, pickle.UnpicklingError)


class UserError(Exception):
    """A mistake in what the user gave: printed as one line, without a traceback."""
