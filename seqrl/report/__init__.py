"""The report room: metrics, where they are written, and the HTML report of a run."""
