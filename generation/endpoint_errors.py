"""The errors of an endpoint: try again, or give up."""


class TryAgain(Exception):
    """This try failed, and another one may succeed. `wait`: seconds that the server asked for."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class GiveUp(Exception):
    """The endpoint will not answer any request."""
