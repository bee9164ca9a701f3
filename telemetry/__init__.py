"""Metrics for Prometheus, and the journal's report for people."""
