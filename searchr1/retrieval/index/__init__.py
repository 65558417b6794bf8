"""Indexes and the rows behind them: BM25, FAISS, exact search."""
