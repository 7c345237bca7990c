"""What a simulated kernel can do wrong; the package's docstring says when each is raised."""


class Fault(AssertionError):
    """A kernel broke a rule of the hardware."""


class Deadlock(Fault):
    pass


class WrongPhase(Fault):
    pass


class Unlanded(Fault):
    pass


class Unreleased(Fault):
    pass


class Unfenced(Fault):
    pass


class Unwaited(Fault):
    pass


class OutOfBounds(Fault):
    pass


class Misused(Fault):
    pass


class Contended(Fault):
    pass
