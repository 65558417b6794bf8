"""Evaluate models: methods, ledger, tables, published numbers, and the driver."""
