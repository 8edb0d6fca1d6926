"""What Flower starts at the coordinator for each run."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedclip.deploy.coordinator.rounds import carry
from fedclip.device import keep_freed_memory

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Go through the rounds of the run in the folder that the coordinator has named."""
    keep_freed_memory()
    carry(grid, Path(str(context.run_config["folder"])))
