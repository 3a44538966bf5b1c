"""What an endpoint did instead of answering."""


class TryAgain(Exception):
    """This try gave no answer, another may. `wait`: seconds that the server asked for."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class GiveUp(Exception):
    """The endpoint will not serve us, whatever is asked."""
