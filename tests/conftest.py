"""What all tests share: neither an example of hypothesis nor the making of one has a deadline, as no test has a threshold on time."""

from hypothesis import HealthCheck, settings

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
