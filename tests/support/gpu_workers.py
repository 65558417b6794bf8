"""Launch worker groups on a machine whose GPUs are pretended, and print what their processes were given, as JSON."""

from __future__ import annotations

import json
import os
from typing import Any

from rlinf.scheduler import Worker

from searchr1.config.schema import Config
from searchr1.device import Device

NAMES = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "ACCELERATOR_TYPE")


class Witness(Worker):
    """Answers what its environment is."""

    def __init__(self, channel: Any) -> None:
        super().__init__()
        self._channel = channel

    async def given(self) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in NAMES}

    async def send(self, item: str) -> None:
        await self._channel.put(item, key="items", async_op=True).async_wait()

    async def receive(self) -> str:
        return await self._channel.get(key="items", async_op=True).async_wait()


def main() -> None:
    import ray
    from rlinf.scheduler import Channel, Cluster

    from searchr1.cluster.launch import Launcher
    from searchr1.cluster.ray_start import own_ray
    from searchr1.cluster.rlinf_compat import without_gpus
    from searchr1.cluster.worker_group import WorkerGroup

    config = Config()
    config.cluster.component_placement = {"actor": "0,2", "rollout": "0-1", "reward": "0"}
    config.rollout.tensor_parallel_size = 2
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    device = Device("cuda", slots=len(visible.split(",")) if visible else 8, cores=2)
    with own_ray(1):
        cluster = Cluster(num_nodes=1)
    with without_gpus(cluster):
        channel = Channel.create("items")
    launcher = Launcher(config, device, cluster, channel)
    launched = {name: launcher.launch(WorkerGroup, Witness, name, channel) for name in ("actor", "rollout", "reward")}
    answers: dict[str, Any] = {name: group.call(Witness.given).wait(120) for name, group in launched.items()}
    received = launched["reward"].call(Witness.receive)
    launched["rollout"].call(Witness.send, "from rollout").wait(120)
    answers["received"] = received.wait(120)
    ray.shutdown()
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
