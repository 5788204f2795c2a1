"""The report: what runs left on disk, as one HTML file that needs nothing else."""
