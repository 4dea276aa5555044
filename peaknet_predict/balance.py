"""The one error that says a run did not account for everything."""


class BalanceError(RuntimeError):
    """A run ended, but not every event that went in is accounted for at its end."""
