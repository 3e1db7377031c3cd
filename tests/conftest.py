"""What all tests share: no example of hypothesis has a deadline, as no test has a threshold on time."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
