"""The same application on Ray Serve: replicas behind its proxy, as many as the load asks for.

serve run instaflow.serve.replicas:application model=runs/emoji/one-step/bundle least=2 most=8
"""

from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from instaflow.generate import InstaFlow
from instaflow.serve.app import create_app, find_controls, read_key
from instaflow.serve.orders import Limits

ENOUGH = 8  # requests at hand in a replica from which on another one is started


class Options(BaseModel):
    """What `serve run` takes as name=value."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    """A folder, a hub id or a .safetensors file that every machine can read; None is the default model."""
    least: int = Field(1, ge=1)
    most: int = Field(8, ge=1)
    """Replicas."""
    cpus: float = Field(1, gt=0)
    """Cores that Ray sets aside for each."""
    queue: int = Field(64, ge=1)
    """Pictures that wait in each."""
    api_key_file: Path | None = None
    controls: Path | None = None


def application(options: Options) -> serve.Application:
    """What Ray Serve runs. Each replica batches its own requests, as `instaflow serve` does.

    Raises:
        DataError: a file or folder that options name is not there.
    """
    controls = find_controls(options.model, options.controls)
    key = read_key(options.api_key_file) if options.api_key_file else None

    def build() -> FastAPI:
        flow = InstaFlow.load(options.model)
        return create_app(flow, controls=controls, limits=Limits(queue=options.queue), api_key=key)

    scale = {"min_replicas": options.least, "max_replicas": options.most, "target_ongoing_requests": ENOUGH}
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="InstaFlow",
        autoscaling_config=scale,
        max_ongoing_requests=options.queue,
        ray_actor_options={"num_cpus": options.cpus},
    )
    return deployment.bind()
