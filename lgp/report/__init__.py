"""The report: table, page, figures."""
