"""A ServerApp that sends three rounds to `echo_app` and writes what came back."""

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from support import arrays, messages

from fedmm.engines.grid import stream_replies

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    if context.run_config["fail"]:
        raise ValueError(context.run_config["text"])
    out = []
    for number in range(int(context.run_config["rounds"])):
        print(f"round {number}", flush=True)
        replies = list(stream_replies(grid, messages(grid, record=arrays(number))))
        out.append(
            {
                r.content["metrics"]["partition"]: [r.content["arrays"]["0"].data.hex(), r.content["metrics"]["calls"]]
                for r in replies
            }
        )
    Path(str(context.run_config["out"])).write_text(json.dumps(out))
