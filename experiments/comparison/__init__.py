"""Comparisons of methods: records, statistics, tables and figures."""
