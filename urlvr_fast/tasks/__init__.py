"""Prompts: procedural tasks with exact checkers, and readers for JSONL, JSON, Parquet and `datasets`."""
