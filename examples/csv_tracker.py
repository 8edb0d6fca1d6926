"""A tracker of one's own: accuracy and loss by round, in a table for spreadsheets.

    fedclip run configs/quickstart.yaml "tracking=[examples/csv_tracker.py:CsvTable]"

The table is `figures.csv` in the run folder. A run that was killed goes on with it where it ends.
"""

from collections.abc import Mapping

from fedclip.reports.trackers import Tracker


class CsvTable(Tracker):
    """Adds a line to `figures.csv` after every round."""

    def open(self) -> int:
        """The last round that the table has."""
        self.file = self.run.folder / "figures.csv"
        if not self.file.exists():
            self.file.write_text("round,accuracy,loss\n")
        return len(self.file.read_text().splitlines()) - 2

    def log(self, server_round: int, figures: Mapping[str, float], at: float) -> None:
        """One line; a figure that the round does not have stays empty."""
        accuracy, loss = figures.get("accuracy", ""), figures.get("loss", "")
        with self.file.open("a") as file:
            file.write(f"{server_round},{accuracy},{loss}\n")
