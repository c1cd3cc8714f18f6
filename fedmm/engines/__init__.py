"""Where clients run. One table: name -> one line on it.

| Name     | Entry point                                            |
|----------|--------------------------------------------------------|
| `inproc` | `inprocess.InProcessGrid(app, clients)`                |
| `ray`    | `ray_workers.RayPool(app, workers)`, `RayGrid(pool, clients)` |
| `flower` | `flower.run_flower(server_app, client_app, run_config)` |

The first two are Flower grids for our own server loop and give the same bits; import the module that you need,
so that a run in process never pays for Ray.
"""

from __future__ import annotations

ENGINES: dict[str, str] = {
    "inproc": "in this process, one client after another; no start-up, for tests, debugging and small runs",
    "ray": "persistent Ray workers that survive crashes; the same bits as inproc for any number of workers",
    "flower": "Flower's own simulation (`flwr run`) with a private SuperLink; the path to a deployment",
}
