"""Estimate what a run will take: seconds, memory and dollars."""
