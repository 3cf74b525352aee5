"""Memory truth: what a model will need (plan.py), what it takes (ledger.py), and how both are shown (table.py)."""
