"""Reports: one self-contained HTML file per run or comparison, and the tables that the terminal shows."""
