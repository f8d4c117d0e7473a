"""Reports: console, metrics log, summary, tables and figures."""
