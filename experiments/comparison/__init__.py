"""Comparisons of methods: records, statistics, tables, figures and the HTML report."""
