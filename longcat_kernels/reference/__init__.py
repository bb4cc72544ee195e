"""The definition of every op in plain torch: what the implementations are judged by."""
