"""The service: requests in, scores of one version out. HTTP and gRPC stand on it; it knows neither."""

from __future__ import annotations

from limaml.serving.tensors import InferRequest, InferResponse, ModelMetadata, Refused

__all__ = ["Service"]


class Service:
    """Answers requests for one model of a store."""

    async def start(self) -> None:
        """Load and warm the version that is current; `ready` from then on."""
        raise NotImplementedError

    async def drain(self) -> None:
        """Take nothing new, finish what waits, release the versions."""
        raise NotImplementedError

    @property
    def live(self) -> bool:
        return True

    def ready(self, name: str | None = None, version: str | None = None) -> bool:
        """Whether requests are taken; with a name, whether those for that model (and version) are."""
        return False

    async def model_metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """Inputs and outputs of a version, by default of the current one; `Refused` (404) where there is none."""
        raise Refused(503, f"The model {name!r} is not loaded yet.")

    async def infer(self, request: InferRequest) -> InferResponse:
        """Scores of one version for the rows of a request; `Refused` says why there are none."""
        raise Refused(503, f"The model {request.model!r} is not loaded yet.")
