"""The command line: one module a verb, `main` the frame, `output` the only place that formats."""
